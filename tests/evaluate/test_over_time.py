"""Courses of measured cells, largest movements, and effects over time, worked out by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pyro_causalcell import evaluate
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import over_time

GENES = ["A", "g1", "g2"]


def screen_of(conditions, times, x):
    obs = pd.DataFrame({"target": conditions, "time": times}, index=[f"c{i}" for i in range(len(x))])
    adata = ad.AnnData(np.asarray(x, dtype=np.float32), obs, pd.DataFrame(index=GENES))
    return Screen(adata, "target", "control", time="time", allow_empty=True)


@pytest.fixture
def screen():
    """Control at times 1 and 2; A at both, B at time 1 alone; normalised values."""
    rows = [
        ("control", 1, [0.5, 1.0, 0.0]),
        ("control", 1, [0.5, 3.0, 0.0]),
        ("control", 2, [0.5, 1.5, 1.0]),
        ("control", 2, [0.5, 1.5, 1.0]),
        ("A", 1, [0.0, 4.5, 0.0]),
        ("A", 1, [0.0, 5.5, 0.0]),
        ("A", 2, [0.0, 1.5, 2.5]),
        ("A", 2, [0.0, 1.5, 3.5]),
        ("B", 1, [0.5, 2.0, 1.0]),
        ("B", 1, [0.5, 2.0, 1.0]),
    ]
    return screen_of(*map(list, zip(*rows, strict=True)))


class Constant:
    """Predicts the number of the condition times the time, whatever the gene."""

    name = "constant"

    def predict(self, conditions, times):
        size = np.array([{"control": 1.0, "A": 2.0, "B": 4.0}[c] for c in conditions])
        return np.broadcast_to((size[:, None] * times)[..., None], (len(conditions), len(times), 3))


def test_effects_are_differences_from_control_of_the_time(screen):
    table = evaluate.effects_over_time(Constant(), screen, np.arange(10), min_cells=2)
    assert list(table) == ["condition", "time", "gene", "observed", "predicted"]
    found = table.set_index(["condition", "time", "gene"])
    assert found.loc[("A", 1.0, "g1")].tolist() == [3.0, 1.0]  # 5 - 2, and 2 - 1
    assert found.loc[("A", 2.0, "g2")].tolist() == [2.0, 2.0]  # 3 - 1, and 4 - 2
    assert found.loc[("B", 1.0, "A")].tolist() == [0.0, 3.0]
    assert ("A", 1.0, "A") not in found.index  # the perturbed gene itself
    assert ("B", 2.0, "g1") not in found.index  # not measured
    assert len(found) == 2 + 2 + 3


def test_pairs_with_few_cells_and_times_without_control_have_no_effects(screen):
    assert evaluate.effects_over_time(Constant(), screen, np.arange(10), min_cells=3).empty
    held = evaluate.effects_over_time(Constant(), screen, np.array([6, 7]), min_cells=2)
    assert set(zip(held["condition"], held["time"], strict=True)) == {("A", 2.0)}
    no_control = screen_of(["control"] * 2 + ["A"] * 2, [1, 1, 2, 2], np.ones((4, 3)))
    assert evaluate.effects_over_time(Constant(), no_control, np.arange(4), min_cells=2).empty
    assert evaluate.effects_over_time(Constant(), screen, np.array([], dtype=int)).empty


def test_measured_courses_are_means_of_cells(screen, monkeypatch):
    z_nk = np.column_stack([np.arange(10.0), -np.arange(10.0)])
    found = ad.AnnData(obs=screen.adata.obs.copy(), obsm={"X_causalcell": z_nk})
    found.uns["causalcell"] = {"programmes": ["k1", "k2"]}
    monkeypatch.setattr(over_time, "latents", lambda fit, screen: found)
    paths = evaluate.measured_trajectories(None, screen, np.array([0, 1, 4, 8, 9]))
    assert paths["condition"].values.tolist() == ["control", "A", "B"]
    assert paths["time"].values.tolist() == [1.0]
    assert paths["mean"].sel(programme="k1").values[:, 0].tolist() == [0.5, 4.0, 8.5]
    assert paths["se"].sel(condition="B").values[0].tolist() == [0.5, 0.5]  # sd √½ of two cells
    assert np.isnan(paths["se"].sel(condition="A")).all()
    assert paths["cells"].values[:, 0].tolist() == [2, 1, 2]
    every = evaluate.measured_trajectories(None, screen)
    assert np.isnan(every["mean"].sel(condition="B", time=2.0)).all()
    assert int(every["cells"].sel(condition="B", time=2.0)) == 0


def test_measured_courses_need_times():
    obs = pd.DataFrame({"target": ["A", "control"]}, index=["c0", "c1"])
    bare = ad.AnnData(np.ones((2, 3), dtype=np.float32), obs)
    with pytest.raises(DataError, match="with times"):
        evaluate.measured_trajectories(None, Screen(bare, "target", "control"))


def test_largest_movements_are_from_control_or_else_from_the_start():
    over = ("condition", "time", "programme")
    mean = np.array([[[0.0, 1.0], [1.0, 1.0]], [[0.5, 1.0], [0.0, 4.0]]])
    coords = {"condition": ["control", "A"], "time": [1.0, 2.0], "programme": ["k1", "k2"]}
    variables = {"mean": (over, mean), "low": (over, mean - 1), "high": (over, mean + 1)}
    paths = xr.Dataset(variables, coords)
    table = evaluate.largest_movements(paths)
    assert table.to_numpy().tolist() == [
        ["A", "k2", 2.0, 3.0, 4.0, 3.0, 5.0],
        ["A", "k1", 2.0, -1.0, 0.0, -1.0, 1.0],
    ]
    alone = evaluate.largest_movements(paths.sel(condition=["A"]))
    assert alone["change"].tolist() == [3.0, -0.5]
    assert evaluate.largest_movements(paths.sel(condition=["control"])).empty
