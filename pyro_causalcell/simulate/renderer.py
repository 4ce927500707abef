"""A ray marcher for small scenes: one object of seven shapes above a ground plane, lit by a spotlight."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_causalcell.errors import DataError

__all__ = ["FACTORS", "SHAPES", "Engine", "render"]

Engine = Literal["torch", "vtk"]

FACTORS = (
    *("pos_x", "pos_y", "pos_z", "rot_alpha", "rot_beta"),
    *("rot_spot", "hue_object", "hue_spot", "hue_back", "shape"),
)
"""Columns of a table of scenes. Positions lie in [-2, 2], angles and hues in [0, 2 pi)."""

# Parts of each shape: a capsule from a to b, with a radius at either end.
_PARTS: dict[str, tuple[tuple[float, ...], ...]] = {
    "teapot": (
        (0.0, 0.0, -0.1, 0.0, 0.0, 0.1, 0.75, 0.7),
        (0.0, 0.0, 0.85, 0.0, 0.0, 1.1, 0.2, 0.25),
        (0.6, 0.0, -0.2, 1.4, 0.0, 0.6, 0.25, 0.15),
        (-0.6, 0.0, 0.45, -1.3, 0.0, 0.4, 0.15, 0.15),
        (-1.3, 0.0, 0.4, -1.1, 0.0, -0.4, 0.15, 0.15),
        (-1.1, 0.0, -0.4, -0.5, 0.0, -0.5, 0.15, 0.15),
        (0.0, 0.7, -0.1, 0.0, 0.75, -0.1, 0.25, 0.2),
    ),
    "armadillo": (
        (0.0, 0.0, -0.3, 0.0, 0.0, 0.4, 0.55, 0.5),
        (0.0, 0.2, 0.95, 0.0, 0.4, 1.0, 0.36, 0.34),
        (0.0, 0.6, 0.95, 0.0, 1.0, 0.85, 0.18, 0.12),
        (0.4, 0.0, 0.4, 1.2, 0.4, 0.2, 0.2, 0.18),
        (-0.4, 0.0, 0.4, -1.2, 0.4, 0.6, 0.2, 0.18),
        (0.3, 0.0, -0.6, 0.5, 0.1, -1.3, 0.25, 0.2),
        (-0.3, 0.0, -0.6, -0.5, 0.1, -1.3, 0.25, 0.2),
        (0.0, -0.4, -0.5, 0.0, -1.3, -0.8, 0.25, 0.1),
    ),
    "hare": (
        (0.0, -0.5, -0.4, 0.0, 0.2, -0.1, 0.65, 0.55),
        (0.0, 0.6, 0.45, 0.0, 0.75, 0.4, 0.4, 0.35),
        (0.2, 0.5, 0.75, 0.45, 0.2, 1.45, 0.16, 0.14),
        (-0.2, 0.5, 0.75, -0.35, 0.0, 1.4, 0.16, 0.14),
        (0.0, -1.15, -0.4, 0.0, -1.25, -0.4, 0.25, 0.22),
        (0.35, 0.4, -0.5, 0.4, 0.9, -0.9, 0.2, 0.15),
        (-0.35, 0.4, -0.5, -0.4, 0.9, -0.9, 0.2, 0.15),
    ),
    "cow": (
        (-0.75, 0.0, 0.1, 0.6, 0.0, 0.1, 0.55, 0.5),
        (1.05, 0.0, 0.45, 1.3, 0.0, 0.35, 0.36, 0.26),
        (1.0, 0.25, 0.75, 0.95, 0.6, 1.15, 0.13, 0.08),
        (1.0, -0.25, 0.75, 0.95, -0.6, 1.15, 0.13, 0.08),
        (0.5, 0.35, -0.3, 0.55, 0.4, -1.2, 0.18, 0.16),
        (0.5, -0.35, -0.3, 0.55, -0.4, -1.2, 0.18, 0.16),
        (-0.7, 0.35, -0.3, -0.75, 0.4, -1.2, 0.18, 0.16),
        (-0.7, -0.35, -0.3, -0.75, -0.4, -1.2, 0.18, 0.16),
    ),
    "dragon": (
        (-0.5, 0.0, -0.3, 0.4, 0.0, 0.0, 0.42, 0.42),
        (-0.5, 0.0, -0.3, -1.4, 0.3, -0.6, 0.3, 0.08),
        (0.4, 0.0, 0.1, 0.8, 0.0, 0.85, 0.28, 0.2),
        (0.8, 0.0, 0.85, 1.3, 0.0, 0.8, 0.27, 0.16),
        (0.0, 0.2, 0.2, -0.3, 1.4, 0.7, 0.14, 0.1),
        (-0.3, 1.4, 0.7, -0.9, 0.9, 0.4, 0.1, 0.06),
        (0.0, -0.2, 0.2, -0.3, -1.4, 0.7, 0.14, 0.1),
        (0.2, 0.0, -0.3, 0.4, 0.0, -1.2, 0.22, 0.16),
    ),
    "head": (
        (-0.1, 0.0, 0.3, 0.05, 0.0, 0.3, 0.85, 0.8),
        (0.25, 0.0, -0.4, 0.35, 0.0, -0.45, 0.55, 0.5),
        (0.8, 0.0, 0.25, 1.3, 0.0, 0.0, 0.16, 0.22),
        (0.0, 0.85, 0.2, -0.1, 1.2, 0.45, 0.25, 0.2),
        (0.0, -0.85, 0.2, -0.1, -1.1, 0.3, 0.22, 0.16),
        (-0.2, 0.0, -0.7, -0.3, 0.0, -1.3, 0.4, 0.42),
        (-0.85, 0.0, 0.8, -1.0, 0.0, 0.95, 0.32, 0.3),
    ),
    "horse": (
        (-0.6, 0.0, 0.0, 0.45, 0.0, 0.05, 0.42, 0.4),
        (0.5, 0.0, 0.2, 0.95, 0.0, 1.0, 0.3, 0.22),
        (0.95, 0.0, 1.05, 1.4, 0.0, 0.75, 0.24, 0.16),
        (0.4, 0.25, -0.2, 0.75, 0.3, -1.2, 0.16, 0.13),
        (0.4, -0.25, -0.2, 0.3, -0.3, -1.3, 0.16, 0.13),
        (-0.6, 0.25, -0.2, -0.5, 0.3, -1.3, 0.16, 0.13),
        (-0.6, -0.25, -0.2, -0.95, -0.3, -1.1, 0.16, 0.13),
        (-0.95, 0.0, 0.2, -1.4, 0.0, -0.5, 0.2, 0.12),
    ),
}
SHAPES = tuple(_PARTS)
"""Names of the values of the factor "shape". They are stand-ins, made of capsules."""

_SCALE = 1.6  # of the parts
_BOUND = 2.82  # radius of a ball around the object that holds all parts of every shape
CAMERA = (0.0, -10.0, 9.0)
LOOK_AT = (0.0, 0.0, -0.6)
HALF_VIEW = 0.37  # tangent of half the angle of view
GROUND = -4.2
_LIGHT_RADIUS, _LIGHT_HEIGHT = 4.0, 7.5
_CONE = math.radians(17.5), math.radians(15.5)  # where the spotlight has ended, and where it starts to fade
_AMBIENT, _SPOT = 0.55, 0.75
_PAINT_WIDTH = 1.1
_DARK, _PALE = 0.85, 1.0  # how much darker the object gets along its own x axis, and paler along its y axis
_STEPS = 20
_CLOSE = 0.02  # of a surface that is hit
_RAYS_PER_PIXEL = 4
_BATCH = 16  # images at a time: their rays stay in the cache


@torch.no_grad()
def render(
    factors_nf: NDArray[np.floating], size: int = 32, *, device: str = "cpu", engine: Engine = "torch"
) -> NDArray[np.uint8]:
    """Draws scenes: sphere tracing, Lambert shading, a hard shadow on the ground, four rays per pixel.

    The object turns by alpha around x, then by beta around y, and stands at (x, y, z). The spotlight is on a
    circle above the scene at the angle "rot_spot", and points at the object. Object, spotlight and ground
    have the hues of their factors. The object gets darker along its own x axis and paler along its y axis, so
    that its rotation can be read at 32 pixels. White light from all around lets every hue be seen under a
    spotlight of any other.

    The same call gives the same bytes.

    Args:
        factors_nf: One scene per row, columns as in ``FACTORS``; shape is a number from 0 to 6.
        size: Pixels along each side.
        device: "cpu" or "cuda".
        engine: "torch" follows rays; "vtk" draws triangles, the same scene but for its edges
            (``pip install 'pyro_causalcell[vtk]'``, and EGL or Mesa on the machine).

    Returns:
        Images, shape (n, size, size, 3): rows from the top, red, green, blue.

    Raises:
        DataError: The table has another form, a shape or engine does not exist, or VTK is asked for a GPU.
        ImportError: VTK is not installed.

    Source: sphere tracing: Hart 1996, The Visual Computer 12. The scene is that of Zimmermann et al. 2021
    and of CITRIS (Lippe et al. 2022) with other shapes, materials and camera.
    """
    factors_nf = np.asarray(factors_nf)
    if factors_nf.ndim != 2 or factors_nf.shape[1] != len(FACTORS):
        raise DataError(f"expected scenes x {len(FACTORS)} factors {FACTORS}, found {factors_nf.shape}.")
    if not np.isin(factors_nf[:, -1], range(len(SHAPES))).all():
        raise DataError(f"expected shapes from 0 to {len(SHAPES) - 1}, found others in the last column.")
    if engine not in get_args(Engine) or (engine == "vtk" and device != "cpu"):
        raise DataError(
            f"expected an engine of {list(get_args(Engine))}, the latter with device cpu, found {engine!r} "
            f"with {device!r}. VTK finds a graphics card by itself."
        )
    image_nyxc = np.empty((len(factors_nf), size, size, 3), dtype=np.uint8)
    with _one_thread():
        draw = _drawing(View(size, device), engine)
        for rows, shape in _batches(factors_nf[:, -1].astype(np.int64)):
            scene = Scene(torch.tensor(factors_nf[rows], dtype=torch.float32, device=device), shape)
            image_nyxc[rows] = draw(scene).cpu().numpy()
    return image_nyxc


def _drawing(view: "View", engine: Engine) -> "Callable[[Scene], Tensor]":
    if engine == "torch":
        return view.draw
    from pyro_causalcell.simulate.rasteriser import Rasteriser  # it draws these very scenes

    return Rasteriser(view).draw


@contextmanager
def _one_thread() -> Iterator[None]:
    """The tensors are small: on a busy machine several threads spend their time waiting for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _batches(shape_n: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], str]]:
    """Rows of scenes that are drawn together: all have one shape."""
    for number, shape in enumerate(SHAPES):
        rows = np.flatnonzero(shape_n == number)
        for first in range(0, len(rows), _BATCH):
            yield rows[first : first + _BATCH], shape


class Scene:
    """Scenes with one shape: places, turns and colours, a row for each."""

    def __init__(self, factors_nf: Tensor, shape: str) -> None:
        x, y, z, alpha, beta, spot, hue_object, hue_spot, hue_back, _ = factors_nf.unbind(1)
        self.place_n3 = torch.stack([x, y, z], 1)
        one, none = torch.ones_like(x), torch.zeros_like(x)
        cos, sin = alpha.cos(), alpha.sin()
        first = torch.stack([one, none, none, none, cos, -sin, none, sin, cos], 1).unflatten(1, (3, 3))
        cos, sin = beta.cos(), beta.sin()
        second = torch.stack([cos, none, sin, none, one, none, -sin, none, cos], 1).unflatten(1, (3, 3))
        self.turn_n33 = second @ first
        height = torch.full_like(x, _LIGHT_HEIGHT)
        self.light_n3 = torch.stack([_LIGHT_RADIUS * spot.sin(), _LIGHT_RADIUS * spot.cos(), height], 1)
        self.hue_n = hue_object
        self.spot_n3 = _SPOT * _colour(hue_spot, one * 0.8)
        self.back_n3 = _colour(hue_back, one * 0.6)
        part_mf = torch.tensor(_PARTS[shape], dtype=torch.float32, device=factors_nf.device)
        self.from_m3, self.along_m3 = _SCALE * part_mf[:, :3], _SCALE * (part_mf[:, 3:6] - part_mf[:, :3])
        self.radius_m, self.widening_m = _SCALE * part_mf[:, 6], _SCALE * (part_mf[:, 7] - part_mf[:, 6])

    def trace(
        self, origin_n3: Tensor, direction_r3: Tensor, image_r: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Follows rays from one point per scene to the object.

        Args:
            origin_n3: where the rays of each scene start.
            direction_r3: unit vectors.
            image_r: scene of each ray.

        Returns:
            Which rays meet the object, and for these the distance and the part they meet.
        """
        to_n3 = origin_n3 - self.place_n3
        nearest_r = -(direction_r3 * to_n3[image_r]).sum(1)
        half_r = nearest_r.square() - to_n3.square().sum(1)[image_r] + _BOUND**2
        ray_s = (half_r > 0).nonzero().squeeze(1)
        image_s = image_r[ray_s]
        start_n3 = (to_n3.unsqueeze(1) @ self.turn_n33).squeeze(1)  # seen from the object
        step_s3 = (direction_r3[ray_s].unsqueeze(1) @ self.turn_n33[image_s]).squeeze(1)
        # A ray is straight, so that all products with its points are linear in the distance t.
        length_m = self.along_m3.square().sum(1)
        away_nm3 = start_n3.unsqueeze(1) - self.from_m3
        share_sm = ((away_nm3 * self.along_m3).sum(2) / length_m)[image_s]
        share_step_sm = step_s3 @ self.along_m3.T / length_m
        square_sm = away_nm3.square().sum(2)[image_s]
        dot_sm = (start_n3[image_s] * step_s3).sum(1, keepdim=True) - step_s3 @ self.from_m3.T
        t_s1 = (nearest_r[ray_s] - half_r[ray_s].sqrt()).unsqueeze(1)
        for _ in range(_STEPS):
            place_sm = share_sm + t_s1 * share_step_sm
            capped_sm = place_sm.clamp(0, 1)
            away_sm = square_sm + t_s1 * (2 * dot_sm + t_s1)
            away_sm = away_sm + length_m * capped_sm * (capped_sm - 2 * place_sm)
            gap_sm = away_sm.clamp(min=0).sqrt() - (self.radius_m + self.widening_m * capped_sm)
            gap_s1, part_s1 = gap_sm.min(1, keepdim=True)
            t_s1 = t_s1 + gap_s1
        hit_s = gap_s1.squeeze(1) < _CLOSE
        return ray_s[hit_s], t_s1.squeeze(1)[hit_s], part_s1.squeeze(1)[hit_s]

    def surface(self, point_h3: Tensor, image_h: Tensor, part_h: Tensor) -> tuple[Tensor, Tensor]:
        """Paint and direction of the surface at points of the object."""
        turn_h33 = self.turn_n33[image_h]
        own_h3 = ((point_h3 - self.place_n3[image_h]).unsqueeze(1) @ turn_h33).squeeze(1)
        shade_h3 = (0.5 + own_h3 / (2 * _PAINT_WIDTH)).clamp(0, 1)
        paint_h3 = _colour(self.hue_n[image_h], 1 - _PALE * shade_h3[:, 1])
        paint_h3 = paint_h3 * (1 - _DARK * shade_h3[:, :1])
        away_h3, along_h3 = own_h3 - self.from_m3[part_h], self.along_m3[part_h]
        share_h1 = ((away_h3 * along_h3).sum(1) / along_h3.square().sum(1)).clamp(0, 1).unsqueeze(1)
        normal_h3 = torch.nn.functional.normalize(away_h3 - share_h1 * along_h3, dim=1)
        return paint_h3, (turn_h33 @ normal_h3.unsqueeze(2)).squeeze(2)

    def object_colour(self, point_h3: Tensor, image_h: Tensor, part_h: Tensor) -> Tensor:
        """Colours of points of the object: its paint under the light from all around and that of the spot."""
        paint_h3, normal_h3 = self.surface(point_h3, image_h, part_h)
        spot_h3 = self.spotlight(point_h3, normal_h3, image_h).unsqueeze(1) * self.spot_n3[image_h]
        return paint_h3 * (_AMBIENT * (0.75 + 0.25 * normal_h3[:, 2:]) + spot_h3)

    def ground_colour(self, lit_r: Tensor, image_r: Tensor) -> Tensor:
        """Colours of points of the ground that get so much of the spotlight."""
        return self.back_n3[image_r] * (_AMBIENT + lit_r.unsqueeze(1) * self.spot_n3[image_r])

    def spotlight(self, point_r3: Tensor, normal_r3: Tensor, image_r: Tensor) -> Tensor:
        """Light of the spot at points of a surface, 0 to 1, shadows aside."""
        ray_r3 = torch.nn.functional.normalize(self.light_n3[image_r] - point_r3, dim=1)
        axis_n3 = torch.nn.functional.normalize(self.light_n3 - self.place_n3, dim=1)
        outer, inner = math.cos(_CONE[0]), math.cos(_CONE[1])
        inside_r = ((ray_r3 * axis_n3[image_r]).sum(1) - outer) / (inner - outer)
        return (ray_r3 * normal_r3).sum(1).clamp(min=0) * inside_r.clamp(0, 1)


class View:
    """The rays of a camera, and where they meet the ground."""

    def __init__(self, size: int, device: str) -> None:
        self.size, self.device = size, device
        self.per_side = math.isqrt(_RAYS_PER_PIXEL)
        self.camera_3 = torch.tensor(CAMERA, device=device)
        self.up_13 = torch.tensor([[0.0, 0.0, 1.0]], device=device)
        direction_yx3 = self._directions()
        # The rays of a pixel stand side by side, so that its colour is a mean over the last axis.
        pixels = direction_yx3.unflatten(0, (size, self.per_side)).unflatten(2, (size, self.per_side))
        self.direction_r3 = pixels.transpose(1, 2).reshape(-1, 3)
        self.ground_r3 = self._meet_ground(self.direction_r3)

    def draw(self, scene: Scene) -> Tensor:
        """Images of scenes, (n, y, x, rgb)."""
        n, rays = len(scene.place_n3), len(self.direction_r3)
        image_r = torch.arange(n, device=self.device).repeat_interleave(rays)
        colour_r3 = self._ground(scene, image_r)
        direction_r3 = self.direction_r3.repeat(n, 1)
        ray_h, t_h, part_h = scene.trace(self.camera_3.expand(n, 3), direction_r3, image_r)
        point_h3 = self.camera_3 + t_h.unsqueeze(1) * direction_r3[ray_h]
        colour_r3[ray_h] = scene.object_colour(point_h3, image_r[ray_h], part_h)
        pixel = colour_r3.unflatten(0, (n, self.size, self.size, _RAYS_PER_PIXEL)).mean(3)
        return (pixel.clamp(0, 1) * 255).round().to(torch.uint8)

    def ground_corners(self) -> Tensor:
        """Where rays meet the ground, and one more row of them on every side, row by row, (q, 3)."""
        return self._meet_ground(self._directions(beyond=1)).flatten(0, 1)

    def _directions(self, beyond: int = 0) -> Tensor:
        """Unit vectors along all rays, and along some beyond the image, (y, x, 3)."""
        ahead_3 = torch.tensor(LOOK_AT, device=self.device) - self.camera_3
        ahead_3 = torch.nn.functional.normalize(ahead_3, dim=0)
        right_3 = torch.nn.functional.normalize(torch.linalg.cross(ahead_3, self.up_13[0]), dim=0)
        down_3 = torch.linalg.cross(ahead_3, right_3)
        side = self.size * self.per_side
        at = torch.arange(-beyond, side + beyond, device=self.device) + 0.5
        at_y, at_x = torch.meshgrid(2 * [(at / side * 2 - 1) * HALF_VIEW], indexing="ij")
        to_yx3 = ahead_3 + at_x.unsqueeze(2) * right_3 + at_y.unsqueeze(2) * down_3
        return torch.nn.functional.normalize(to_yx3, dim=2)

    def _meet_ground(self, direction_3: Tensor) -> Tensor:
        return self.camera_3 + (GROUND - self.camera_3[2]) / direction_3[..., 2:] * direction_3

    def _ground(self, scene: Scene, image_r: Tensor) -> Tensor:
        """Colours of the ground behind every ray."""
        point_r3 = self.ground_r3.repeat(len(scene.place_n3), 1)
        lit_r = scene.spotlight(point_r3, self.up_13, image_r)
        bright_b = (lit_r > 0).nonzero().squeeze(1)
        image_b = image_r[bright_b]
        ray_b3 = torch.nn.functional.normalize(point_r3[bright_b] - scene.light_n3[image_b], dim=1)
        shadow_h, _, _ = scene.trace(scene.light_n3, ray_b3, image_b)
        lit_r[bright_b[shadow_h]] = 0
        return scene.ground_colour(lit_r, image_r)


def _colour(hue_n: Tensor, saturation_n: Tensor) -> Tensor:
    """Red, green and blue of hues in radians, at full brightness."""
    turn_n3 = hue_n.unsqueeze(1) / (2 * math.pi) + torch.tensor([0.0, 2 / 3, 1 / 3], device=hue_n.device)
    ramp_n3 = ((turn_n3 % 1) * 6 - 3).abs() - 1
    return 1 - saturation_n.unsqueeze(1) * (1 - ramp_n3.clamp(0, 1))
