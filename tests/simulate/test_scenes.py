import math

import numpy as np
import pytest
import xarray as xr

from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate import scenes, write_scenes
from pyro_causalcell.simulate.renderer import FACTORS, SHAPES

TURN = 2 * math.pi
SD = np.array([0.1] * 3 + [0.15] * 6)


def steps(data):
    """Scenes before and after each step, [n, f], and what was set on the way."""
    before, after = (data.factors.values[:, rows].reshape(-1, 10) for rows in (slice(-1), slice(1, None)))
    return before, after, data.target.values[:, 1:].reshape(-1, 10)


def goals(before_nf, *, spot_follows_object=False, single_shape=False):
    """The goals of the nine continuous factors, written again."""
    x, y, _, alpha, beta, spot, hue_o, hue_s, hue_b, shape = before_nf.T
    if spot_follows_object:
        spot = np.arctan2(x, y)
    to_hue = hue_o
    if not single_shape:
        mean = np.angle(np.exp(1j * hue_s) + np.exp(1j * hue_b))
        names = np.array(SHAPES)[shape.astype(int)]
        fixed = {"teapot": 0, "armadillo": 0.4, "cow": 0.8, "head": 1.2, "horse": 1.6}  # in units of pi
        fixed = np.array([fixed.get(name, 0) * np.pi for name in names])
        to_hue = np.select([names == "hare", names == "dragon"], [mean, mean + np.pi], fixed)
    return np.column_stack(
        [1.5 * np.sin(beta), 1.5 * np.sin(alpha), 1.5 * np.cos(alpha), hue_b, hue_o, spot]
        + [to_hue, TURN - hue_b, hue_b]
    )


def residuals(before_nf, after_nf, goal_nf):
    """What a step adds to half of the (shorter) way to the goal."""
    way_nf = goal_nf - before_nf[:, :9]
    way_nf[:, 3:] = np.angle(np.exp(1j * way_nf[:, 3:]))
    rest_nf = after_nf[:, :9] - before_nf[:, :9] - way_nf / 2
    rest_nf[:, 3:] = np.angle(np.exp(1j * rest_nf[:, 3:]))
    return rest_nf


@pytest.mark.parametrize("settings", [{}, {"spot_follows_object": True}, {"single_shape": True}])
def test_steps_go_half_way_to_the_goals(settings):
    shapes = ["cow"] if settings.get("single_shape") else SHAPES
    data = scenes(
        500,
        size=None,
        shapes=shapes,
        spot_follows_object=settings.get("spot_follows_object", False),
        probability=0.0,
    )
    before_nf, after_nf, set_nf = steps(data)
    assert not set_nf.any() and (data.condition == "control").all()
    goal_nf = goals(before_nf, **settings)
    rest_nf = residuals(before_nf, after_nf, goal_nf)
    np.testing.assert_allclose(rest_nf.mean(0), 0, atol=0.02)
    np.testing.assert_allclose(rest_nf.std(0), SD, rtol=0.05)
    assert np.abs(data.factors[..., :3]).max() <= 2
    angles = data.factors[..., 3:9]
    assert angles.min() >= 0 and angles.max() < TURN


def test_fixed_interventions_are_perfect_and_last():
    data = scenes(400, size=None)
    target_stf = data.target.values
    assert not target_stf[:, 0].any() and not target_stf[..., 5:].any()
    assert (target_stf[:, 1:] == target_stf[:, 1:2]).all()
    assert set(data.condition.values) == {"control", "pos", "rot", "pos+rot"}
    before_nf, after_nf, set_nf = steps(data)
    hit_n = set_nf[:, 0]
    assert (set_nf[:, 1] == hit_n).all() and (set_nf[:, 2] == hit_n).all()
    drawn_n3 = after_nf[hit_n, :3]
    np.testing.assert_allclose(drawn_n3.std(0), 4 / math.sqrt(12), rtol=0.05)
    # What is set does not depend on its parents.
    assert abs(np.corrcoef(drawn_n3[:, 2], np.cos(before_nf[hit_n, 3]))[0, 1]) < 0.1
    np.testing.assert_allclose(
        (set_nf[::7, 0].mean(), set_nf[::7, 3].mean()), 0.5, atol=0.08
    )  # 1 / number of targets


def test_interventions_at_each_step():
    every = ("pos", "rot", "rot_spot", "hue_object", "hue_spot", "hue_back", "shape")
    data = scenes(300, size=None, interventions="step", targets=every, shape_changes=True)
    _, _, set_nf = steps(data)
    np.testing.assert_allclose(set_nf.mean(0), 1 / 7, atol=0.025)
    assert "condition" not in data
    target_stf = data.target.values[:, 1:]
    assert (target_stf != target_stf[:, :1]).any()
    before_nf, after_nf, set_nf = steps(data)
    changed = (before_nf[:, 9] != after_nf[:, 9])[~set_nf[:, 9]]
    assert changed.mean() == pytest.approx(0.05 * 6 / 7, abs=0.015)


def test_shape_is_constant_unless_asked():
    data = scenes(50, size=None)
    shape = data.factors.sel(factor="shape")
    assert (shape == shape[:, :1]).all() and len(np.unique(shape)) == 7


def test_graph_and_responsive_factors():
    data = scenes(2, size=None)
    edges = {
        (factor, parent)
        for factor in FACTORS
        for parent in FACTORS
        if data.adjacency.sel(factor=factor, parent=parent)
    }
    assert ("pos_x", "rot_beta") in edges and ("hue_object", "shape") in edges and len(edges) == 9
    moving = data.factor[data.responsive].values.tolist()
    assert moving == ["pos_x", "pos_y", "pos_z", "rot_alpha", "rot_beta"]
    assert not any(parent in moving for factor, parent in edges if factor not in moving)
    follows = scenes(2, size=None, spot_follows_object=True)
    assert follows.adjacency.sel(factor="rot_spot").sum() == 2
    assert bool(follows.responsive.sel(factor="rot_spot"))


def test_more_sequences_leave_the_first_alone_and_files_come_back(tmp_path):
    few, more = scenes(3, size=8), scenes(5, size=8)
    xr.testing.assert_equal(few.factors, more.factors[:3])
    write_scenes(few, tmp_path / "s.nc")
    assert [path.name for path in tmp_path.iterdir()] == ["s.nc"]
    back = xr.load_dataset(tmp_path / "s.nc", engine="h5netcdf")
    xr.testing.assert_equal(back, few)
    assert back.image.dtype == np.uint8 and back.attrs["simulated"] == 1


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("targets", ("pos", "mass"), "each once"),
        ("targets", (), "each once"),
        ("shapes", ("cow", "cow"), "each once"),
        ("probability", 1.5, "between 0 and 1"),
        ("interventions", "always", "fixed"),
        ("length", 0, "at least 1"),
        ("n_sequences", 0, "at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(setting, value, words):
    with pytest.raises(DataError, match=words):
        scenes(**{"n_sequences": 2, "size": None, setting: value})
