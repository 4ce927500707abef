import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import stats

from pyro_causalcell.data import Screen
from pyro_causalcell.datasets import semrau2017
from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.studies import semrau


def test_grid_has_every_method_and_reference_of_each_setting() -> None:
    jobs = semrau.table_jobs(seeds=2)
    names = {*semrau.METHODS, *semrau.REFERENCES}
    assert {job.method for job in jobs} == names
    assert len({job.key for job in jobs}) == len(jobs) == len(semrau.SETTINGS) * len(names) * 2
    with pytest.raises(CausalCellError, match=r"unknown \['VAE'\]"):
        semrau.table_jobs(methods=("VAE",))


def test_settings_are_chosen_on_training_snapshots() -> None:
    for setting in semrau.SETTINGS.values():
        assert setting.chosen_on not in setting.held


def test_weights_of_snapshots() -> None:
    known, times = np.array([0.0, 6.0, 24.0]), [3.0, 12.0, 48.0]
    assert semrau.nearest_weights(known, times).argmax(1).tolist() == [0, 1, 2]
    assert semrau.last_weights(known, times).argmax(1).tolist() == [0, 1, 2]
    assert semrau.last_weights(known[1:], times).argmax(1).tolist() == [0, 0, 1]


@pytest.fixture
def screen() -> Screen:
    """Counts of two genes: shares of 1/4 and 3/4 at time 0, the other way at 2; cells at 1 and 3."""
    x_ng = np.array([[1, 3], [2, 6], [3, 1], [9, 3], [4, 4], [8, 0]], dtype=np.float32)
    obs = pd.DataFrame({"target": "control", "time": [0.0, 0.0, 2.0, 2.0, 1.0, 3.0]}, index=list("abcdef"))
    return Screen(ad.AnnData(x_ng, obs, pd.DataFrame(index=["g", "h"])), control="control", time="time")


def test_shares_follow_straight_lines_and_stay_positive(screen) -> None:
    trained, held = np.flatnonzero(screen.time_n % 2 == 0), np.flatnonzero(screen.time_n % 2 == 1)
    line = semrau.CountsInTime(screen, trained, semrau.line_weights)
    np.testing.assert_allclose(line.means(held)[0], [4, 4])
    np.testing.assert_allclose(line.means(held)[1], [8, 0], atol=0.2)  # 5/4 and -1/4, cut at half a count
    assert np.isfinite(line.nll(held)).all()
    last = semrau.CountsInTime(screen, trained, semrau.last_weights)
    np.testing.assert_allclose(last.means(held), [[2, 6], [6, 2]])


def test_likelihood_is_that_of_negative_binomial_counts(screen) -> None:
    trained = np.flatnonzero(screen.time_n % 2 == 0)
    model = semrau.CountsInTime(screen, trained, semrau.nearest_weights)
    model.dispersion_g = np.array([2.0, 0.5])
    mean_g, x_g = np.array([1.0, 3.0]), np.array([1, 3])  # the first cell
    expected = stats.nbinom(model.dispersion_g, model.dispersion_g / (model.dispersion_g + mean_g)).logpmf(
        x_g
    )
    assert model.nll(trained[:1])[0] == pytest.approx(-expected.sum())
    drawn = model.draws(trained[:1], 20_000, seed=0)
    np.testing.assert_allclose(drawn.mean(0)[0], mean_g, rtol=0.05)
    np.testing.assert_allclose(drawn.var(0)[0], mean_g + mean_g**2 / model.dispersion_g, rtol=0.1)


def test_dispersion_is_found() -> None:
    rng = np.random.default_rng(0)
    mean_n = rng.uniform(1, 20, 4000)
    x_n = rng.poisson(mean_n * rng.gamma(1.5, 1 / 1.5, 4000)).astype(float)
    assert semrau._dispersion(x_n, mean_n) == pytest.approx(1.5, rel=0.1)


def test_the_right_model_covers_what_it_says(screen) -> None:
    """Simulated counts of the real shape, drawn from the model that predicts them."""
    cells = semrau2017()
    real = Screen(cells, control="control", time="time_h", allow_empty=True)
    rows = np.flatnonzero(real.library_n > 5)
    model = semrau.CountsInTime(real, rows, semrau.line_weights)
    drawn = cells[rows].copy()
    drawn.X = model.draws(rows, 1, seed=3)[0].astype(np.float32)
    drawn.obs["total"] = real.library_n[rows]
    again = Screen(drawn, control="control", time="time_h", library="total", allow_empty=True)
    every = np.arange(again.n_cells)
    right = semrau.CountsInTime(again, every, semrau.line_weights)
    late = every[again.time_n == 72]
    scores = semrau._counts_scored(again, every, late, right, seed=0, quick=False)
    assert 0.87 < scores["coverage_90"] < 0.93
    late_from_early = semrau.CountsInTime(again, every[again.time_n < 10], semrau.last_weights)
    wrong = semrau._counts_scored(again, every, late, late_from_early, seed=0, quick=False)
    for name in ("rmse_depth", "e_distance_depth", "nll"):
        assert wrong[name] > scores[name]


def test_differences_are_paired_by_cell() -> None:
    rows = pd.DataFrame(
        {
            "setting": "36 h",
            "method": ["ours", "no change", "scNODE"],
            "seed": 0,
            "nll_of_cells": [[1.0, 5.0, 9.0], [2.0, 6.5, 10.5], None],
        }
    )
    (row,) = semrau._differences(rows).to_dict("records")
    assert row["method"] == "no change"
    assert row["difference"] == pytest.approx(-4 / 3)
    assert row["se"] == pytest.approx(np.std([1, 1.5, 1.5], ddof=1) / np.sqrt(3))
    assert "**-1.333 ± 0.167**" in semrau._differences_page(semrau._differences(rows))
    assert semrau._differences_page(semrau._differences(rows[1:])) == ""


def test_the_quick_study_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(semrau, "SETTINGS", {"36 h": semrau.SETTINGS["36 h"]})
    chosen = {"methods": ("ours", "scNODE"), "seeds": 1, "quick": True, "progress": False}
    table = semrau.run(tmp_path, **chosen)
    by = table.set_index(["method", "metric"])["mean"]
    assert set(by["ours"].index) == set(by["linear in time"].index) == set(semrau.METRICS)
    assert set(by["scNODE"].index) == {"rmse", "e_distance"}
    assert by["technical duplicate", "rmse_depth"] < by["ours", "rmse_depth"]
    assert "transition" in (tmp_path / "chosen.csv").read_text()
    assert set(pd.read_csv(tmp_path / "differences.csv")["method"]) == set(semrau.REFERENCES)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    semrau.run(tmp_path, **chosen)
    assert {path: path.stat().st_mtime_ns for path in done} == done
