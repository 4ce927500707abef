"""Scenes as triangles: they lie on the ray marcher's surfaces; VTK, where it is, draws the same images."""

import sys

import numpy as np
import pytest
import torch

from pyro_causalcell import simulate
from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate.rasteriser import _corners, _grid
from pyro_causalcell.simulate.renderer import SHAPES, Scene, render


def draws(n: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    place_n3, turn_n6 = rng.uniform(-2, 2, (n, 3)), rng.uniform(0, 2 * np.pi, (n, 6))
    return np.column_stack([place_n3, turn_n6, np.arange(n) % len(SHAPES)])


@pytest.mark.parametrize("shape", SHAPES)
def test_corners_lie_on_the_parts(shape):
    scene = Scene(torch.tensor(draws(1), dtype=torch.float32), shape)
    point_q3, part_q, triangle_m3 = _corners(scene)
    start_q3, along_q3 = scene.from_m3[part_q], scene.along_m3[part_q]
    share_q = (((point_q3 - start_q3) * along_q3).sum(1) / along_q3.square().sum(1)).clamp(0, 1)
    distance_q = (point_q3 - start_q3 - share_q.unsqueeze(1) * along_q3).norm(dim=1)
    radius_q = scene.radius_m[part_q] + share_q * scene.widening_m[part_q]
    torch.testing.assert_close(distance_q, radius_q, atol=1e-5, rtol=1e-4)
    assert (part_q.numpy()[triangle_m3] == part_q.numpy()[triangle_m3[:, :1]]).all()
    assert set(triangle_m3.ravel()) == set(range(len(point_q3)))
    # closed from tip to tip: the triangles of a part have the surface of a capsule, to the corners they cut
    a, b, c = (point_q3[triangle_m3[:, i]] for i in range(3))
    area_m = torch.linalg.cross(b - a, c - a).norm(dim=1) / 2
    found_p = torch.zeros(len(scene.radius_m)).index_add(0, part_q[triangle_m3[:, 0]], area_m)
    first_p, last_p = scene.radius_m, scene.radius_m + scene.widening_m
    slant_p = (scene.along_m3.square().sum(1) + scene.widening_m**2).sqrt()
    true_p = torch.pi * (2 * first_p**2 + 2 * last_p**2 + (first_p + last_p) * slant_p)
    torch.testing.assert_close(found_p, true_p, rtol=0.02, atol=0)


def test_a_grid_is_covered_once():
    triangle_m3 = _grid(3, 4)
    assert len(triangle_m3) == 2 * 2 * 3
    at_m32 = np.stack(np.divmod(triangle_m3, 4), -1)
    (first, second) = at_m32[:, 1] - at_m32[:, 0], at_m32[:, 2] - at_m32[:, 0]
    area_m = np.abs(first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]) / 2
    assert (area_m == 0.5).all()


def test_vtk_draws_the_same_scenes():
    pytest.importorskip("vtkmodules")
    factors_nf = draws(14)
    traced, drawn = render(factors_nf, 64), render(factors_nf, 64, engine="vtk")
    assert drawn.dtype == np.uint8 and drawn.shape == traced.shape
    np.testing.assert_array_equal(drawn, render(factors_nf, 64, engine="vtk"))
    difference = np.abs(drawn.astype(int) - traced)
    assert difference.mean() < 1 and np.quantile(difference, 0.95) < 5
    films = simulate.scenes(2, length=2, size=32, engine="vtk")
    same = simulate.scenes(2, length=2, size=32)
    assert np.abs(films["image"].astype(int) - same["image"]).mean() < 1.5


def test_what_cannot_draw_says_so(monkeypatch):
    with pytest.raises(DataError, match=r"engine of \['torch', 'vtk'\].*found 'blender'"):
        render(draws(1), engine="blender")
    with pytest.raises(DataError, match="device cpu"):
        render(draws(1), engine="vtk", device="cuda")
    monkeypatch.setitem(sys.modules, "vtkmodules", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro_causalcell\[vtk\]'"):
        render(draws(1), engine="vtk")
