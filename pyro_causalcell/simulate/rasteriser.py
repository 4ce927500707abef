"""The scenes of the ray marcher as triangles, drawn by VTK (``pip install 'pyro_causalcell[vtk]'``).

Colours and light are worked out at the corners of the triangles by the same formulas, and the shadow is the
object itself, laid flat on the ground from the light. So the images differ from the ray marcher's at edges
alone.
"""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_causalcell.simulate.renderer import CAMERA, GROUND, HALF_VIEW, LOOK_AT, Scene, View

__all__ = ["Rasteriser"]

_AROUND, _DOWN = 32, 8  # corners around a part, and from its side to its tip
_LIFT = 0.02  # of the shadow above the ground
Floats = NDArray[np.float64]


class Rasteriser:
    """Draws scenes of one shape at a time; an off-screen window of VTK.

    Args:
        view: Camera, ground and light of the ray marcher.

    Raises:
        ImportError: VTK is not installed.
    """

    def __init__(self, view: View) -> None:
        try:
            from vtkmodules import vtkRenderingOpenGL2
            from vtkmodules.vtkRenderingCore import vtkRenderer, vtkRenderWindow
        except ImportError as error:
            raise ImportError("VTK is not installed: pip install 'pyro_causalcell[vtk]'") from error
        self.view = view
        self.side = view.size * view.per_side
        self.renderer = vtkRenderer()
        # Linux needs no display for this one
        self.window = getattr(vtkRenderingOpenGL2, "vtkEGLRenderWindow", vtkRenderWindow)()
        self.window.SetOffScreenRendering(1)
        self.window.SetMultiSamples(0)  # a pixel is a mean over rays, as the ray marcher's
        self.window.SetSize(self.side, self.side)
        self.window.AddRenderer(self.renderer)
        camera = self.renderer.GetActiveCamera()
        camera.SetPosition(*CAMERA)
        camera.SetFocalPoint(*LOOK_AT)
        camera.SetViewUp(0, 0, 1)
        camera.SetViewAngle(2 * math.degrees(math.atan(HALF_VIEW)))
        camera.SetClippingRange(1.0, 100.0)
        self.ground_q3 = view.ground_corners()
        self.ground = self._surface(_grid(self.side + 2, self.side + 2), len(self.ground_q3))

    def draw(self, scene: Scene) -> Tensor:
        """Images of scenes, (n, y, x, rgb)."""
        point_q3, part_q, triangle_m3 = _corners(scene)
        n, q, g = len(scene.place_n3), len(point_q3), len(self.ground_q3)
        point_nq3 = point_q3 @ scene.turn_n33.transpose(1, 2) + scene.place_n3.unsqueeze(1)
        image_q = torch.arange(n).repeat_interleave(q)
        colour_nq3 = scene.object_colour(point_nq3.flatten(0, 1), image_q, part_q.repeat(n)).unflatten(
            0, (n, q)
        )
        light_n13 = scene.light_n3.unsqueeze(1)
        ray_nq3 = point_nq3 - light_n13
        shadow_nq3 = light_n13 + (GROUND + _LIFT - light_n13[..., 2:]) / ray_nq3[..., 2:] * ray_nq3
        unlit_n13 = scene.ground_colour(torch.zeros(n), torch.arange(n)).unsqueeze(1)
        image_g = torch.arange(n).repeat_interleave(g)
        lit_g = scene.spotlight(self.ground_q3.repeat(n, 1), self.view.up_13, image_g)
        ground_ng3 = scene.ground_colour(lit_g, image_g).unflatten(0, (n, g))
        solid, shadow = (self._surface(triangle_m3, q) for _ in range(2))
        images = []
        for i in range(n):
            self.ground.show(self.ground_q3, ground_ng3[i])
            solid.show(point_nq3[i], colour_nq3[i])
            shadow.show(shadow_nq3[i], unlit_n13[i])
            images.append(self._image())
        for surface in (solid, shadow):
            self.renderer.RemoveActor(surface.actor)
        return torch.from_numpy(np.stack(images))

    def _surface(self, triangle_m3: NDArray[np.int64], n_corners: int) -> "_Surface":
        surface = _Surface(triangle_m3, n_corners)
        self.renderer.AddActor(surface.actor)
        return surface

    def _image(self) -> NDArray[np.uint8]:
        """What the window shows, its rays averaged, (y, x, rgb)."""
        from vtkmodules.util.numpy_support import vtk_to_numpy
        from vtkmodules.vtkCommonCore import vtkUnsignedCharArray

        self.window.Render()
        pixels = vtkUnsignedCharArray()
        self.window.GetPixelData(0, 0, self.side - 1, self.side - 1, 0, pixels, 0)
        rays = vtk_to_numpy(pixels).reshape(self.side, self.side, 3)[::-1]
        per_side, size = self.view.per_side, self.view.size
        mean = rays.reshape(size, per_side, size, per_side, 3).mean((1, 3))
        image: NDArray[np.uint8] = mean.round().astype(np.uint8)
        return image


class _Surface:
    """Triangles whose corners have a place and a colour each."""

    def __init__(self, triangle_m3: NDArray[np.int64], n_corners: int) -> None:
        from vtkmodules.util.numpy_support import numpy_to_vtk, numpy_to_vtkIdTypeArray
        from vtkmodules.vtkCommonCore import vtkPoints
        from vtkmodules.vtkCommonDataModel import vtkCellArray, vtkPolyData
        from vtkmodules.vtkRenderingCore import vtkActor, vtkPolyDataMapper

        self.place_q3 = np.zeros((n_corners, 3), dtype=np.float32)
        self.colour_q3 = np.zeros((n_corners, 3), dtype=np.uint8)
        points, triangles = vtkPoints(), vtkCellArray()
        points.SetData(numpy_to_vtk(self.place_q3))
        triangles.SetData(3, numpy_to_vtkIdTypeArray(triangle_m3.ravel(), deep=True))
        self.data: Any = vtkPolyData()
        self.data.SetPoints(points)
        self.data.SetPolys(triangles)
        self.data.GetPointData().SetScalars(numpy_to_vtk(self.colour_q3))
        mapper = vtkPolyDataMapper()
        mapper.SetInputData(self.data)
        self.actor = vtkActor()
        self.actor.SetMapper(mapper)
        self.actor.GetProperty().LightingOff()

    def show(self, place_q3: Tensor, colour_q3: Tensor) -> None:
        """Take new places and colours."""
        self.place_q3[:] = place_q3.numpy()
        self.colour_q3[:] = (colour_q3.clamp(0, 1) * 255).round().numpy()
        self.data.GetPoints().Modified()
        self.data.GetPointData().GetScalars().Modified()
        self.data.Modified()


def _corners(scene: Scene) -> tuple[Tensor, Tensor, NDArray[np.int64]]:
    """Corners of all parts of an object, as it sees itself, the part of each, and triangles between them."""
    from_m3, along_m3 = scene.from_m3.double().numpy(), scene.along_m3.double().numpy()
    first_m, last_m = scene.radius_m.double().numpy(), (scene.radius_m + scene.widening_m).double().numpy()
    down_d = np.linspace(0, math.pi / 2, _DOWN + 1)
    turn_a = np.linspace(0, 2 * math.pi, _AROUND + 1)
    triangle_t3 = _grid(2 * _DOWN + 2, _AROUND + 1)
    points: list[Floats] = []
    triangles = []
    for start_3, way_3, first, last in zip(from_m3, along_m3, first_m, last_m, strict=True):
        length = np.linalg.norm(way_3)
        axis_3 = way_3 / length
        side_3 = np.cross(axis_3, np.eye(3)[np.abs(axis_3).argmin()])
        side_3 /= np.linalg.norm(side_3)
        around_a3 = np.cos(turn_a)[:, None] * side_3 + np.sin(turn_a)[:, None] * np.cross(axis_3, side_3)
        at_r = np.r_[-first * np.sin(down_d[::-1]), length + last * np.sin(down_d)]
        wide_r = np.r_[first * np.cos(down_d[::-1]), last * np.cos(down_d)]
        ring_ra3 = start_3 + at_r[:, None, None] * axis_3 + wide_r[:, None, None] * around_a3
        triangles.append(triangle_t3 + len(points) * (triangle_t3.max() + 1))
        points.append(ring_ra3.reshape(-1, 3))
    part_q = np.repeat(np.arange(len(points)), [len(point_q3) for point_q3 in points])
    point_q3 = torch.from_numpy(np.concatenate(points)).float()
    return point_q3, torch.from_numpy(part_q), np.concatenate(triangles)


def _grid(n_rows: int, n_columns: int) -> NDArray[np.int64]:
    """Triangles between the corners of a grid, [m, 3]."""
    corner_rc = np.arange(n_rows * n_columns).reshape(n_rows, n_columns)
    a, b, c, d = corner_rc[:-1, :-1], corner_rc[:-1, 1:], corner_rc[1:, :-1], corner_rc[1:, 1:]
    halves = [np.stack(half, -1).reshape(-1, 3) for half in ((a, b, c), (b, d, c))]
    return np.concatenate(halves)
