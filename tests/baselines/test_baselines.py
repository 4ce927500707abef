import numpy as np
import pandas as pd
import pytest
import scanpy as sc

from pyro_causalcell.baselines import (
    Additive,
    ControlMean,
    MatchingMean,
    PerturbedMean,
    average_conditions,
    compare_means,
    condition_means,
    fit_baselines,
    other_genes,
    technical_duplicate,
)
from pyro_causalcell.data import Screen, held_out_combinations
from pyro_causalcell.errors import DataError


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


def test_technical_duplicate_halves_are_disjoint_and_reproducible(tiny_screen, rows):
    conditions = ["A", "B"]
    first, second = technical_duplicate(tiny_screen, rows, conditions, seed=3)
    again = technical_duplicate(tiny_screen, rows, conditions, seed=3)
    np.testing.assert_array_equal(first, again[0])
    whole = condition_means(tiny_screen, rows, conditions)
    np.testing.assert_allclose((first + second) / 2, whole)  # 60 cells each: equal halves, no cell twice
    assert 0 < np.abs(first - second).max() < 1.5


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
        technical_duplicate(
            tiny_screen, rows[tiny_screen.condition_n[rows] == 1][:1], [tiny_screen.conditions[1]]
        )
    with pytest.raises(DataError, match="unknown perturbation"):
        ControlMean.fit(tiny_screen, rows).predict(["ZZZ"])


def test_without_control_cells_the_other_baselines_and_metrics_stay(tiny_screen, rows):
    no_control = rows[tiny_screen.condition_n[rows] != 0]
    fitted = fit_baselines(tiny_screen, no_control)
    assert list(fitted) == ["perturbed mean", "matching mean"]
    for name, baseline in fitted.items():
        expected = fit_baselines(tiny_screen, rows)[name].predict(["A", "A+B"])
        np.testing.assert_array_equal(baseline.predict(["A", "A+B"]), expected)
        with pytest.raises(DataError, match="needs control cells"):
            baseline.predict(["control"])
    table = compare_means(np.ones((1, 4)), {"m": np.ones((1, 4))}, None, np.ones(4), ["a"])
    assert table["metric"].tolist() == ["rmse", "pearson_perturbed"]


def test_scores_in_closed_form():
    control_g, perturbed_g = np.zeros(4), np.array([5.0, 0, 0, 0])
    true_cg = np.array([[1.0, 2, 3, 4], [1, 0, 0, 1]])
    predicted = {
        "exact": true_cg,
        "half": true_cg / 2,
        "nothing": np.zeros((2, 4)),
        "shared": np.tile(perturbed_g, (2, 1)),
    }
    table = compare_means(true_cg, predicted, control_g, perturbed_g, ["a", "b"])
    value = table.set_index(["method", "condition", "metric"])["value"]
    assert value["exact", "a", "rmse"] == 0
    assert value["half", "a", "rmse"] == pytest.approx(np.sqrt(30 / 16))
    assert value["half", "a", "pearson_control"] == pytest.approx(1)  # blind to scale
    assert value["half", "a", "pearson_perturbed"] < 0.999  # sees scale
    assert np.isnan(value["nothing", "a", "pearson_control"])
    assert np.isnan(value["shared", "b", "pearson_perturbed"])
    average = average_conditions(table).set_index(["method", "metric"])
    assert average.loc[("half", "rmse"), "mean"] == pytest.approx((np.sqrt(30 / 16) + np.sqrt(2 / 16)) / 2)
    assert average.loc[("nothing", "pearson_control"), "n_conditions"] == 0
    assert list(dict.fromkeys(average.index.get_level_values(0))) == list(predicted)


def test_perturbed_genes_are_not_scored(tiny_adata):
    tiny_adata.var_names = ["A", *tiny_adata.var_names[1:]]
    screen = Screen(tiny_adata)
    scored_cg = other_genes(screen, ["A", "B", "A+B"])
    assert scored_cg.sum(1).tolist() == [19, 20, 19]
    true_cg = np.ones((3, 20))
    wrong_cg = true_cg.copy()
    wrong_cg[:, 0] = 99
    zero_g = np.zeros(20)
    table = compare_means(true_cg, {"m": wrong_cg}, zero_g, zero_g, ["A", "B", "A+B"], scored_cg)
    rmse = table[table["metric"] == "rmse"].set_index("condition")["value"]
    assert rmse["A"] == rmse["A+B"] == 0 < rmse["B"]


def test_shapes_are_checked():
    with pytest.raises(
        DataError, match=r"model has shape \(1, 3\); expected \(conditions, genes\) = \(1, 4\)"
    ):
        compare_means(np.ones((1, 4)), {"model": np.ones((1, 3))}, np.ones(4), np.ones(4), ["a"])
    assert isinstance(
        compare_means(np.ones((1, 4)), {"m": np.ones((1, 4))}, np.ones(4), np.ones(4), ["a"]), pd.DataFrame
    )
