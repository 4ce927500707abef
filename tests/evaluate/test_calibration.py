"""Scores by hand, coverage that is exact for counts, and fits whose intervals are wrong on purpose."""

import copy
import dataclasses

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import kstest, nbinom, poisson

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import draws as room
from pyro_causalcell.evaluate.calibration import (
    CLASSES,
    aurc,
    calibration,
    crps,
    energy_score,
    gene_classes,
    interval_coverage,
    interval_score,
    randomised_pit,
    risk_coverage,
)
from pyro_causalcell.inference import Fit


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_crps_by_hand() -> None:
    # mean |X - 1| = (1 + 0 + 2) / 3; pairs |0-1|, |0-3|, |1-3| have mean 2
    assert crps(np.array(1.0), np.array([0.0, 1.0, 3.0])) == pytest.approx(1 - 2 / 2)
    observed = np.array([[1.0, 5.0]])
    drawn = np.array([[[3.0, 5.0]], [[0.0, 5.0]], [[1.0, 7.0]]])
    np.testing.assert_allclose(crps(observed, drawn), [[1 - 1, 2 / 3 - (4 / 3) / 2]], atol=1e-12)


def test_crps_is_unbiased_in_the_number_of_draws(rng: np.random.Generator) -> None:
    many = crps(np.zeros(1), rng.normal(size=(100_000, 1)))[0]
    assert many == pytest.approx((np.sqrt(2) - 1) / np.sqrt(np.pi), abs=0.01)  # of a standard normal at 0
    assert crps(np.zeros(40_000), rng.normal(size=(3, 40_000))).mean() == pytest.approx(many, abs=0.02)


def test_energy_score_is_the_crps_of_one_gene(rng: np.random.Generator) -> None:
    observed, drawn = rng.normal(size=(7, 1)), rng.normal(size=(5, 7, 1))
    np.testing.assert_allclose(energy_score(observed, drawn), crps(observed, drawn)[:, 0])


def test_energy_score_by_hand() -> None:
    observed = np.array([[0.0, 0.0]])
    drawn = np.array([[[3.0, 4.0]], [[0.0, 0.0]]])  # distances 5 and 0, and 5 between them
    assert energy_score(observed, drawn)[0] == pytest.approx(2.5 - 2.5)


def test_interval_score_by_hand() -> None:
    drawn = np.arange(11.0)[:, None] * np.ones(3)  # the 80 % interval is 1 to 9
    np.testing.assert_allclose(interval_score(np.array([5.0, 0.0, 10.5]), drawn, 0.8), [8, 8 + 10, 8 + 15])
    with pytest.raises(DataError, match="between 0 and 1"):
        interval_score(np.zeros(3), drawn, 1.0)


@pytest.mark.parametrize("mean", [0.05, 1.0, 30.0])
def test_pit_of_counts_is_uniform_and_covers_exactly(rng: np.random.Generator, mean: float) -> None:
    observed = poisson(mean).rvs(20_000, random_state=1)
    drawn = poisson(mean).rvs((19, 20_000), random_state=2)
    pit = randomised_pit(observed, drawn, rng)
    assert kstest(pit, "uniform").pvalue > 0.01
    np.testing.assert_allclose(interval_coverage(pit), [0.5, 0.8, 0.9, 0.95], atol=0.012)


def test_pit_by_hand() -> None:
    class Half:
        def random(self, shape: tuple[int, ...]) -> np.ndarray:
            return np.full(shape, 0.5)

    drawn = np.array([[0, 1, 1, 4]]).T
    assert randomised_pit(np.array([1]), drawn, Half())[0] == (1 + 0.5 * 3) / 5  # type: ignore[arg-type]


def test_coverage_shows_predictions_that_are_too_narrow_or_too_wide(rng: np.random.Generator) -> None:
    observed = nbinom(2, 0.1).rvs(20_000, random_state=1)
    narrow = randomised_pit(observed, poisson(18).rvs((99, 20_000), random_state=2), rng)
    wide = randomised_pit(observed, nbinom(0.5, 0.5 / 18.5).rvs((99, 20_000), random_state=2), rng)
    assert interval_coverage(narrow, [0.9])[0] < 0.6
    assert interval_coverage(wide, [0.9])[0] > 0.94
    assert np.isnan(interval_coverage(np.zeros(0), [0.9])).all()


def test_risk_coverage_by_hand() -> None:
    curve = risk_coverage(np.array([1.0, 4.0, 1.0]), np.array([0.1, 0.9, 0.5]))
    np.testing.assert_allclose(curve["coverage"], [1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(curve["risk"], [1, 1, 2])
    np.testing.assert_allclose(curve["best"], curve["risk"])
    assert (curve["random"] == 2).all() and aurc(curve) == pytest.approx(4 / 3)
    misled = risk_coverage(np.array([1.0, 4.0, 1.0]), np.array([0.9, 0.1, 0.5]))
    assert aurc(misled) == pytest.approx((4 + 2.5 + 2) / 3)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: risk_coverage(np.zeros(2), np.zeros(3)), r"\(2,\) and \(3,\)"),
        (lambda: risk_coverage(np.array([np.nan]), np.zeros(1)), "finite"),
        (lambda: crps(np.zeros(3), np.zeros((1, 3))), "at least 2 draws"),
        (lambda: energy_score(np.zeros((2, 3)), np.zeros((4, 3, 2))), r"\(2, 3\)"),
        (lambda: randomised_pit(np.zeros(3), np.zeros((5, 4)), np.random.default_rng(0)), r"\(5, 4\)"),
    ],
)
def test_arrays_that_do_not_fit(act, words: str) -> None:
    with pytest.raises(DataError, match=words):
        act()


def test_gene_classes() -> None:
    mean_g = np.array([9.0, 0.01, 3.0, 1.0, 2.0, 5.0, 8.0])
    zero_g = np.array([0.0, 0.99, 0.1, 0.5, 0.2, 0.1, 0.0])
    names = ["high", "mostly zero", "middle", "low", "low", "middle", "high"]
    assert gene_classes(mean_g, zero_g).tolist() == names
    assert "mostly zero" not in gene_classes(mean_g, zero_g, counts=False)


@pytest.fixture(scope="module")
def measured(small_fit: Fit, small_screen: Screen):
    return calibration(small_fit, small_screen, np.arange(small_screen.n_cells), n_samples=40)


def test_a_fit_of_the_right_family_is_calibrated(measured) -> None:
    assert measured.verdict == "calibrated" and measured.misses == {}
    classes = measured.classes.set_index("gene_class")
    assert classes.index.tolist() == [*CLASSES[1:], "all"] and classes.loc["all", "n_genes"] == 20
    assert classes["coverage_90"].between(0.87, 0.93).all() and (classes["se_90"] < 0.02).all()
    assert (classes[["crps", "interval_score"]] > 0).all(axis=None)
    density = measured.pit.groupby("gene_class")["density"]
    np.testing.assert_allclose(density.mean(), 1.0)  # a histogram of mass 1
    assert density.max().max() < 1.4


def test_conditions_and_genes(measured, small_screen: Screen) -> None:
    assert measured.conditions["condition"].tolist() == small_screen.conditions
    assert measured.conditions["n_cells"].sum() == small_screen.n_cells == measured.n_cells
    assert measured.genes["gene"].tolist() == small_screen.genes
    x_ng = small_screen.x(np.arange(400))
    assert np.corrcoef(measured.genes["mean"], x_ng.mean(0))[0, 1] > 0.99
    assert measured.risk["risk"].iloc[-1] == pytest.approx(measured.conditions["error"].mean())
    assert measured.aurc == pytest.approx(measured.risk["risk"].mean())
    # replicates of a mean of 60 cells scatter by about 1 / sqrt(60) of a cell's standard deviation
    assert measured.conditions["uncertainty"].between(0.07, 0.4).all()


@pytest.mark.parametrize(("factor", "direction"), [(30.0, "too narrow"), (1 / 30, "too wide")])
def test_a_wrong_dispersion_is_found(
    small_fit: Fit, small_screen: Screen, factor: float, direction: str
) -> None:
    wrong = dataclasses.replace(small_fit, pair=copy.deepcopy(small_fit.pair))
    with torch.no_grad():
        wrong.model.theta_g_unconstrained += np.log(factor)
    result = calibration(wrong, small_screen, np.arange(400), n_samples=30)
    assert result.verdict.startswith("miscalibrated") and direction in result.verdict
    assert "high" in result.misses and direction in result.misses["high"]


def test_few_cells_at_a_time_cover_all_cells(
    small_fit: Fit, small_screen: Screen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "CHUNK_BYTES", 4 * 30 * 20 * 7)  # seven cells
    some = calibration(small_fit, small_screen, n_samples=30, seed=1)
    assert some.n_cells == len(small_fit.split.validation) == some.conditions["n_cells"].sum()
    assert 0.8 < some.classes.set_index("gene_class").loc["all", "coverage_90"] < 0.97


def test_seed(small_fit: Fit, small_screen: Screen) -> None:
    first, again, other = (calibration(small_fit, small_screen, n_samples=5, seed=s) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first.classes, again.classes)
    assert not first.classes.equals(other.classes)


def test_cells_and_draws_that_are_missing(small_fit: Fit, small_screen: Screen) -> None:
    with pytest.raises(DataError, match="two draws"):
        calibration(small_fit, small_screen, n_samples=1)
    split = dataclasses.replace(small_fit.split, validation=np.zeros(0, int), test=np.zeros(0, int))
    with pytest.raises(DataError, match="pass rows="):
        calibration(dataclasses.replace(small_fit, split=split), small_screen)
