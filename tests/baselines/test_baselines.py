import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from pyro_causalcell.baselines import (
    Additive,
    ControlMean,
    MatchingMean,
    PerturbedMean,
    TimeMatchedMean,
    condition_means,
    fit_baselines,
    halves,
)
from pyro_causalcell.baselines.means import condition_moments, expression, moments
from pyro_causalcell.data import Screen, held_out_combinations
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import e_distance


@pytest.fixture
def rows(tiny_screen):
    return np.arange(tiny_screen.n_cells)


def _scanpy_mean(adata, mask):
    normalised = adata.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    return np.asarray(normalised.X[mask].mean(0)).ravel()


def test_means_are_those_of_scanpy(tiny_adata, tiny_screen, rows):
    label = tiny_adata.obs["target"].to_numpy()
    control, perturbed = (
        _scanpy_mean(tiny_adata, m) for m in (label == "non-targeting", label != "non-targeting")
    )
    np.testing.assert_allclose(ControlMean.fit(tiny_screen, rows).predict(["A"])[0], control, rtol=1e-5)
    np.testing.assert_allclose(PerturbedMean.fit(tiny_screen, rows).predict(["D"])[0], perturbed, rtol=1e-5)
    np.testing.assert_allclose(
        condition_means(tiny_screen, rows, ["A+B"])[0], _scanpy_mean(tiny_adata, label == "A+B"), rtol=1e-5
    )


def test_baselines_use_the_rows_they_are_given(tiny_screen, rows):
    half = rows[: len(rows) // 2]
    assert not np.allclose(
        ControlMean.fit(tiny_screen, half).predict(["A"]), ControlMean.fit(tiny_screen, rows).predict(["A"])
    )


def test_combination_of_seen_singles(tiny_screen):
    split = held_out_combinations(tiny_screen, ["A+B"], seed=0)
    a, b, o = condition_means(tiny_screen, split.train, ["A", "B", "control"])
    for name in ("A+B", "B+A"):
        np.testing.assert_allclose(MatchingMean.fit(tiny_screen, split.train).predict([name])[0], (a + b) / 2)
        np.testing.assert_allclose(Additive.fit(tiny_screen, split.train).predict([name])[0], a + b - o)


def test_additive_is_the_best_baseline_where_effects_add(tiny_screen):
    split = held_out_combinations(tiny_screen, ["A+B"], seed=0)
    truth = condition_means(tiny_screen, split.test, ["A+B"])
    error = {
        name: np.abs(baseline.predict(["A+B"]) - truth).mean()
        for name, baseline in fit_baselines(tiny_screen, split.train).items()
    }
    assert min(error, key=error.get) == "additive"


def test_cells_of_a_baseline_have_the_spread_of_control_cells(tiny_screen, rows):
    fitted = fit_baselines(tiny_screen, rows)
    control, added = (fitted[name].cells(["A+B"], 5000)[0] for name in ("control mean", "additive"))
    measured = expression(tiny_screen, rows[tiny_screen.condition_n[rows] == 0])
    assert set(map(tuple, control.round(6))) == set(map(tuple, measured.round(6)))  # drawn with replacement
    assert len(control) == len(added) == 5000
    np.testing.assert_allclose(added.mean(0), fitted["additive"].predict(["A+B"])[0], atol=0.1)
    np.testing.assert_allclose(added.std(0), measured.std(0), rtol=0.1)
    perturbed = rows[tiny_screen.condition_n[rows] > 0]
    without = fit_baselines(tiny_screen, perturbed)["matching mean"]
    (cells,) = without.cells(["A+B"], 5000)
    np.testing.assert_allclose(cells.mean(0), without.predict(["A+B"])[0], atol=0.1)


def test_a_few_control_cells_do_not_make_a_baseline_better_than_the_truth():
    """Their residuals, each once around the true mean, would be nearer to the truth than its own cells."""
    rng = np.random.default_rng(0)
    found = []
    for seed in range(40):
        obs = pd.DataFrame({"target": ["control"] * 30 + ["A"] * 300}, index=[f"c{n}" for n in range(330)])
        x_ng = rng.normal(3.0, 1.0, (330, 30)).astype(np.float32)
        screen = Screen(ad.AnnData(x_ng, obs))
        train, measured_ng = np.arange(230), x_ng[230:]
        lent = MatchingMean.fit(screen, train).cells(["A"], 100, seed)[0]
        found.append(e_distance(measured_ng, lent))
    assert np.mean(found) > -2 * np.std(found) / np.sqrt(len(found))


def test_unseen_component_stands_for_the_perturbed_mean(tiny_screen, rows):
    without_d = rows[tiny_screen.condition_n[rows] != tiny_screen.conditions.index("D")]
    fitted = fit_baselines(tiny_screen, without_d)
    mean, a, o = (
        fitted["perturbed mean"].means.perturbed_g,
        *condition_means(tiny_screen, rows, ["A", "control"]),
    )
    np.testing.assert_allclose(fitted["matching mean"].predict(["A+D", "D"]), [(a + mean) / 2, mean])
    np.testing.assert_allclose(fitted["additive"].predict(["A+D", "D"]), [a + mean - o, mean])


def test_control_is_predicted_by_control(tiny_screen, rows):
    fitted = fit_baselines(tiny_screen, rows)
    expected = condition_means(tiny_screen, rows, ["control"])
    for baseline in fitted.values():
        np.testing.assert_allclose(baseline.predict(["non-targeting"]), expected)


def test_normalised_data_are_used_as_they_are(tiny_adata):
    tiny_adata.X = tiny_adata.X * 0.37
    screen = Screen(tiny_adata)
    control = tiny_adata.obs["target"].to_numpy() == "non-targeting"
    expected = np.asarray(tiny_adata.X[control].mean(0)).ravel()
    fitted = ControlMean.fit(screen, np.arange(screen.n_cells))
    np.testing.assert_allclose(fitted.predict(["A"])[0], expected, rtol=1e-5)


def test_halves_are_disjoint_and_reproducible(tiny_screen, rows):
    conditions = ["A", "B"]
    first, second = halves(tiny_screen, rows, conditions, seed=3)
    np.testing.assert_array_equal(first, halves(tiny_screen, rows, conditions, seed=3)[0])
    asked = np.flatnonzero(np.isin(tiny_screen.condition_n, [tiny_screen.conditions.index(c) for c in "AB"]))
    np.testing.assert_array_equal(np.sort(np.concatenate([first, second])), asked)  # every cell once
    assert len(first) == len(second) == 60
    assert not np.array_equal(first, halves(tiny_screen, rows, conditions, seed=4)[0])


def test_moments_are_those_of_numpy(tiny_adata, tiny_screen, rows):
    normalised = tiny_adata.copy()
    sc.pp.normalize_total(normalised, target_sum=1e4)
    sc.pp.log1p(normalised)
    of_b = normalised.X[tiny_adata.obs["target"].to_numpy() == "B"].toarray()
    found = condition_moments(tiny_screen, rows, ["A+B", "B"])
    np.testing.assert_allclose(found.mean_cg[1], of_b.mean(0), rtol=1e-5)
    np.testing.assert_allclose(found.variance_cg[1], of_b.var(0, ddof=1), rtol=1e-4)
    assert found.cells_c.tolist() == [60, 60]
    one = moments(tiny_screen, rows[:1])
    assert np.isnan(one.variance_cg).all() and np.isfinite(one.mean_cg).all(1).sum() == 1


def test_cells_of_control_and_perturbed_mean_are_training_cells(tiny_screen, rows):
    fitted = fit_baselines(tiny_screen, rows)
    for name, n_cells in {"control mean": 10_000, "perturbed mean": 300}.items():
        first, second = fitted[name].cells(["A", "D"], n_cells=10_000)
        assert first.shape == (n_cells, 20)
        np.testing.assert_array_equal(first, second)
        np.testing.assert_allclose(first.mean(0), fitted[name].predict(["A"])[0], atol=0.1)
        assert len(fitted[name].cells(["A"], n_cells=7)[0]) == 7


def _timed(adata):
    adata.obs["day"] = np.where(np.arange(adata.n_obs) % 2, 3.0, 1.0)
    return Screen(adata, time="day")


def test_time_matched_mean_follows_the_times_of_the_asked_cells(tiny_adata):
    screen = _timed(tiny_adata)
    rows = np.arange(screen.n_cells)
    day_n, perturbed_n = screen.time_n, screen.condition_n > 0
    early, late = (_scanpy_mean(tiny_adata, perturbed_n & (day_n == day)) for day in (1.0, 3.0))
    of_a = rows[screen.condition_n == screen.conditions.index("A")]
    only_late = of_a[day_n[of_a] == 3.0]
    np.testing.assert_allclose(TimeMatchedMean(screen, rows, only_late).predict(["A"])[0], late, rtol=1e-5)
    share = (day_n[of_a] == 3.0).mean()
    mixed = TimeMatchedMean(screen, rows, of_a).predict(["A"])[0]
    np.testing.assert_allclose(mixed, share * late + (1 - share) * early, rtol=1e-5)
    trained_early = rows[day_n == 1.0]  # the asked time was never trained on: the nearest one stands in
    found = TimeMatchedMean(screen, trained_early, only_late).predict(["A"])[0]
    np.testing.assert_allclose(found, early, rtol=1e-5)


def test_time_matched_mean_says_what_it_needs(tiny_adata, tiny_screen, rows):
    with pytest.raises(DataError, match="pass time="):
        TimeMatchedMean(tiny_screen, rows, rows)
    screen = _timed(tiny_adata)
    with pytest.raises(DataError, match="no asked cells of 'A'"):
        TimeMatchedMean(screen, rows, rows[screen.condition_n == 0]).predict(["A"])
    with pytest.raises(DataError, match="needs perturbed cells"):
        TimeMatchedMean(screen, rows[screen.condition_n == 0], rows)


def test_errors_say_what_is_missing(tiny_screen, rows):
    no_control = rows[tiny_screen.condition_n[rows] != 0]
    with pytest.raises(DataError, match="control mean needs control cells"):
        ControlMean.fit(tiny_screen, no_control)
    with pytest.raises(DataError, match="need perturbed cells"):
        fit_baselines(tiny_screen, rows[tiny_screen.condition_n[rows] == 0])
    with pytest.raises(DataError, match="no cells of .*'D'"):
        condition_means(tiny_screen, rows[tiny_screen.condition_n[rows] == 0], ["D"])
    with pytest.raises(DataError, match="has no cells of"):
        condition_means(tiny_screen, rows, ["A+C"])
    with pytest.raises(DataError, match="halves need 2"):
        halves(tiny_screen, rows[tiny_screen.condition_n[rows] == 1][:1], [tiny_screen.conditions[1]])
    with pytest.raises(DataError, match="unknown perturbation"):
        ControlMean.fit(tiny_screen, rows).predict(["ZZZ"])


def test_without_control_cells_the_other_baselines_stay(tiny_screen, rows):
    no_control = rows[tiny_screen.condition_n[rows] != 0]
    fitted = fit_baselines(tiny_screen, no_control)
    assert list(fitted) == ["perturbed mean", "matching mean"]
    for name, baseline in fitted.items():
        expected = fit_baselines(tiny_screen, rows)[name].predict(["A", "A+B"])
        np.testing.assert_array_equal(baseline.predict(["A", "A+B"]), expected)
        with pytest.raises(DataError, match="needs control cells"):
            baseline.predict(["control"])
