"""Cells that are seen at several times: what was before them, and splits that keep them whole."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.data import Minibatches, Screen, random_cells
from pyro_causalcell.errors import DataError


def _cells(n_tracks: int = 6, times: tuple[float, ...] = (0.0, 1.0, 3.0), seed: int = 0) -> ad.AnnData:
    """Tracks in random order of cells; every other one is of A."""
    tracks, hours = (part.ravel() for part in np.meshgrid(np.arange(n_tracks), times, indexing="ij"))
    order = np.random.default_rng(seed).permutation(len(tracks))
    obs = pd.DataFrame({"target": np.where(tracks % 2, "A", "control"), "hour": hours, "cell": tracks}).iloc[
        order
    ]
    obs.index = [f"c{n}" for n in range(len(obs))]
    x_ng = np.stack([obs["cell"], obs["hour"]], 1).astype(np.float32) + 0.5
    return ad.AnnData(x_ng, obs=obs)


def _screen(adata: ad.AnnData, **settings) -> Screen:
    return Screen(adata, control="control", **{"time": "hour", "track": "cell"} | settings)


def test_what_was_before_a_cell_is_the_same_cell_earlier():
    screen = _screen(_cells())
    obs = screen.adata.obs
    before = {0.0: None, 1.0: 0.0, 3.0: 1.0}
    for row, previous in enumerate(screen.previous_n):
        hour = before[obs["hour"].iloc[row]]
        if hour is None:
            assert previous == -1
        else:
            assert obs["hour"].iloc[previous] == hour
            assert obs["cell"].iloc[previous] == obs["cell"].iloc[row]
    other = Screen(screen.adata, control="control", time="hour")
    assert other.previous_n is None and other.track_n is None


@pytest.mark.parametrize("budget", [4.0, 1e-9])
def test_batches_bring_the_cells_before(budget):
    screen = _screen(_cells(8))
    rows = np.flatnonzero(screen.adata.obs["cell"] >= 2)[::-1]
    before = {0: 0, 1: 0, 3: 1}
    minibatches = Minibatches(screen, rows, 5, memory_budget_gb=budget, anchors="batch")
    assert minibatches.is_resident == (budget > 1)
    for batch in minibatches:
        cell_n, hour_n = (batch.x_ng - 0.5).T
        past_n, then_n = (batch.previous.x_ng - 0.5).T
        assert (cell_n == past_n).all()
        assert then_n.tolist() == [before[hour] for hour in hour_n.tolist()]
        assert (batch.previous.time_n == then_n).all()
        assert (batch.control.condition_n == 0).all()
        assert batch.to("cpu").previous.n_cells == batch.n_cells
    assert next(iter(Minibatches(_screen(_cells(), track=None), np.arange(9), 4))).previous is None


def test_random_cells_are_whole_tracks():
    screen = _screen(_cells(40))
    split = random_cells(screen, 0.2, 0.1, seed=3)
    parts = [split.train, split.validation, split.test]
    assert [len(part) for part in parts] == [84, 24, 12]
    assert sorted(np.concatenate(parts)) == list(range(120))
    tracks = [set(screen.track_n[part]) for part in parts]
    assert not (tracks[0] & tracks[1] or tracks[0] & tracks[2] or tracks[1] & tracks[2])
    conditions = screen.condition_n[split.validation]
    assert (conditions == 0).sum() == (conditions == 1).sum() == 12


def test_a_part_of_a_track_is_refused():
    screen = _screen(_cells())
    late = np.flatnonzero(screen.adata.obs["hour"] > 0)
    with pytest.raises(DataError, match="6 of 12 without the same cell at the time before"):
        Minibatches(screen, late, 4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda cells: cells.obs.assign(cell=0), "one cell at a time"),
        (lambda cells: cells.obs.assign(target=["A"] + ["control"] * 17), "one condition"),
        (lambda cells: cells.obs.assign(hour=cells.obs["hour"] + cells.obs["cell"]), "a cell at the first"),
    ],
)
def test_tracks_that_are_none_are_named(change, words):
    adata = _cells()
    adata.obs = change(adata)
    with pytest.raises(DataError, match=words):
        _screen(adata)


def test_tracks_need_times():
    with pytest.raises(DataError, match="time="):
        _screen(_cells(), time=None)
