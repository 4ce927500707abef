import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import (
    Comparison,
    TechnicalDuplicate,
    average_conditions,
    compare,
    condition_means,
    halves,
    make_folds,
    score_predictors,
    training_means,
)
from pyro_causalcell.baselines.compare import CEILING, MEASURES
from pyro_causalcell.data import Screen, held_out_combinations, held_out_perturbations, random_cells
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import other_genes, rmse

BASELINES = ["control mean", "perturbed mean", "matching mean", "additive"]


class Fixed:
    """Predicts the same array whatever is asked."""

    def __init__(self, name, mean_cg, seen_rows=None):
        self.name, self.mean_cg = name, mean_cg
        if seen_rows is not None:
            self.seen_rows = seen_rows

    def predict(self, conditions):
        return self.mean_cg


class TestMean:
    """A leak: the mean of the held-out cells themselves."""

    __test__ = False
    name = "leak"

    def __init__(self, screen, rows):
        self.screen, self.rows = screen, rows

    def predict(self, conditions):
        return condition_means(self.screen, self.rows, conditions)


# ---------------------------------------------------------------- folds


def test_folds_hold_out_every_target_once(tiny_screen):
    folds = make_folds(tiny_screen, n_folds=2, seed=3)
    held = [set(fold.settings["held_out"]) for fold in folds]
    assert held[0] | held[1] == set("ABCD") and not held[0] & held[1]
    assert all(len(fold.validation) == 0 for fold in folds)
    again = make_folds(tiny_screen, n_folds=2, seed=3)
    assert [fold.settings for fold in folds] == [fold.settings for fold in again]


def test_folds_of_cells_and_combinations(tiny_screen):
    first, second = make_folds(tiny_screen, "random", n_folds=2)
    assert len(first.test) == pytest.approx(80, abs=3) and not np.array_equal(first.test, second.test)
    (only,) = make_folds(tiny_screen, "held-out-combinations", n_folds=1)
    assert only.settings["held_out"] == ["A+B"]
    with pytest.raises(DataError, match="found 1 for 2 folds"):
        make_folds(tiny_screen, "held-out-combinations", n_folds=2)


# ---------------------------------------------------------------- scores


def test_every_method_is_scored_on_the_same_half(tiny_screen):
    split = random_cells(tiny_screen, validation=0.0, test=0.4)
    exact = Fixed("zero", np.zeros((2, 20)))
    table = score_predictors(tiny_screen, split.train, split.test, ["A", "B"], [exact], seed=1)
    methods = list(dict.fromkeys(table["method"]))
    assert methods[:5] == ["zero", *BASELINES]
    assert methods[-2:] == ["interpolated duplicate", CEILING]
    assert {"ridge on PCA embedding", "ridge on random embedding", "elastic net"} <= set(methods)
    value = table.set_index(["method", "condition", "metric"])["value"]
    # The truth can be had back from the zero prediction; the other half must differ from it.
    truth_mae = value["zero", "A", "mae"]
    duplicate = value[CEILING, "A", "mae"]
    assert 0 < duplicate < 0.1 * truth_mae


def test_scores_against_a_half_known_by_hand(tiny_screen):
    split = held_out_combinations(tiny_screen, ["A+B"], validation=0.0)
    table = score_predictors(tiny_screen, split.train, split.test, ["A+B"], [], seed=5)
    first, second = halves(tiny_screen, split.test, ["A+B"], seed=5)
    truth, duplicate = (condition_means(tiny_screen, half, ["A+B"]) for half in (first, second))
    scored = other_genes(tiny_screen, ["A+B"])
    value = table.set_index(["method", "metric"])["value"]
    assert value[CEILING, "rmse"] == pytest.approx(rmse(truth, duplicate, scored)[0])
    mean = training_means(tiny_screen, split.train).perturbed_g
    assert value["perturbed mean", "rmse"] == pytest.approx(rmse(truth, mean[None], scored)[0])
    assert value["additive", "rmse"] < value["perturbed mean", "rmse"]


def test_metrics_of_cells_are_scored_where_cells_are_predicted(tiny_screen):
    split = random_cells(tiny_screen, validation=0.0, test=0.4)
    table = score_predictors(tiny_screen, split.train, split.test, ["A", "D"], [], n_cells=30)
    distance = table[table["metric"] == "e_distance"].set_index(["method", "condition"])["value"]
    without = {"interpolated duplicate"}  # a mixture of means, which has no cells
    assert set(distance.index.get_level_values(0)) == set(table["method"]) - without
    assert distance["additive", "A"] < distance["control mean", "A"]  # A was trained on
    assert abs(distance[CEILING, "A"]) < 0.5 * distance["control mean", "A"]
    assert "auroc_train_de" in set(table["metric"])  # A was trained on
    unseen = held_out_perturbations(tiny_screen, ["D"], validation=0.0)
    table = score_predictors(tiny_screen, unseen.train, unseen.test, ["D"], [], n_cells=30)
    assert not any(metric.endswith("_train_de") for metric in table["metric"])  # defined nowhere


def test_a_screen_with_times_and_embeddings_has_their_baselines(tiny_adata):
    tiny_adata.obs["day"] = np.arange(tiny_adata.n_obs) % 3
    table = pd.DataFrame({"e": [1.0, 0, 1, 0]}, index=list("ABCD"))
    screen = Screen(tiny_adata, time="day", embeddings=table)
    methods = compare(screen, splits=make_folds(screen, n_folds=4)).methods
    assert {"time-matched mean", "ridge on given embedding"} <= set(methods)


# ---------------------------------------------------------------- compare


@pytest.fixture
def compared(tiny_screen):
    def own(screen, rows, seed):
        return Fixed("own", np.tile(training_means(screen, rows).perturbed_g + 0.1 * seed, (1, 1)))

    folds = [held_out_perturbations(tiny_screen, [name], validation=0.0) for name in ("C", "D")]
    return compare(tiny_screen, [own], folds, seeds=(0, 1))


def test_methods_by_folds_by_seeds(compared):
    table = compared.table
    assert list(table) == ["method", "fold", "seed", "condition", "metric", "value"]
    assert set(zip(table["fold"], table["seed"], table["condition"], strict=True)) == {
        (0, 0, "C"), (0, 1, "C"), (1, 0, "D"), (1, 1, "D"),
    }  # fmt: skip
    assert compared.methods[0] == "own" and list(compared.own) == ["own"]
    assert set(compared.metrics) <= set(MEASURES)
    assert not table.duplicated(["method", "fold", "seed", "condition", "metric"]).any()


def test_a_recipe_is_trained_on_training_cells_alone(tiny_screen):
    asked = []

    def recipe(screen, rows, seed):
        asked.append((rows, seed))
        return Fixed("own", np.tile(training_means(screen, rows).perturbed_g, (1, 1)))

    split = held_out_combinations(tiny_screen, ["A+B"], validation=0.0)
    compare(tiny_screen, [recipe], [split], seeds=(7,))
    np.testing.assert_array_equal(asked[0][0], split.train)
    assert asked[0][1] == 7


def test_a_leak_shows_as_more_than_the_duplicate_can_have(tiny_screen):
    split = random_cells(tiny_screen, validation=0.0, test=0.5)
    leak = TestMean(tiny_screen, split.test)
    score = compare(tiny_screen, [leak], [split]).calibrated().set_index(["method", "metric"])["score"]
    assert score["leak", "rmse"] > 1


def test_conditions_with_few_cells_are_named(tiny_screen):
    split = random_cells(tiny_screen, validation=0.0, test=0.3)
    compared = compare(tiny_screen, [], [split], min_cells=18)
    cells_c = np.bincount(tiny_screen.condition_n[split.test], minlength=6)[1:]
    expected = [name for name, n in zip(tiny_screen.conditions[1:], cells_c, strict=True) if n < 18]
    assert compared.left_out["condition"].tolist() == expected
    assert not set(expected) & set(compared.table["condition"])
    with pytest.raises(DataError, match="no perturbed condition has 100 held-out cells; the largest has"):
        compare(tiny_screen, [], [split], min_cells=100)


def test_what_cannot_be_compared(tiny_screen):
    split = held_out_combinations(tiny_screen, ["A+B"], validation=0.1)
    good = np.ones((1, 20))
    with pytest.raises(DataError, match="several named additive"):
        compare(tiny_screen, [Fixed("additive", good)], [split])
    with pytest.raises(DataError, match=r"own has shape \(1, 3\)"):
        compare(tiny_screen, [Fixed("own", good[:, :3])], [split])
    with pytest.raises(DataError, match=r"NaN or infinity in own for \['A\+B'\]"):
        compare(tiny_screen, [Fixed("own", np.nan * good)], [split])
    with pytest.raises(DataError, match="own was trained on 3 of the 60 held-out cells"):
        compare(tiny_screen, [Fixed("own", good, seen_rows=split.test[:3])], [split])
    compare(tiny_screen, [Fixed("own", good, seen_rows=split.train)], [split])
    with pytest.raises(DataError, match="expected held-out test cells, found none"):
        compare(tiny_screen, [], [random_cells(tiny_screen)])


def test_a_screen_without_controls_is_compared(tiny_adata):
    perturbed = tiny_adata[tiny_adata.obs["target"] != "non-targeting"].copy()
    screen = Screen(perturbed, control=None)
    compared = compare(screen, splits=make_folds(screen, n_folds=2))
    assert "control mean" not in compared.methods and "pearson_control" not in compared.metrics


# ---------------------------------------------------------------- statements


def _comparison(values, metric="rmse"):
    """Methods by conditions, one fold and seed."""
    rows = [
        (method, 0, 0, f"c{c}", metric, value)
        for method, value_c in values.items()
        for c, value in enumerate(value_c)
    ]
    table = pd.DataFrame(rows, columns=["method", "fold", "seed", "condition", "metric", "value"])
    return Comparison(table, pd.DataFrame(columns=["fold", "condition", "cells"]))


def test_differences_are_paired():
    noise_c = np.random.default_rng(0).normal(10, 3, 20)
    compared = _comparison({"perturbed mean": noise_c, "m": noise_c - 0.5, CEILING: 0 * noise_c})
    row = compared.differences().set_index("method").loc["m"]
    assert row[["difference", "low", "high"]].tolist() == pytest.approx([-0.5, -0.5, -0.5])
    assert row["better"] and row["n_conditions"] == 20
    alone = compared.summary().set_index("method").loc["m"]
    assert alone["high"] - alone["low"] > 1.5  # unpaired, the noise of conditions would hide it


def test_bootstrap_interval_is_that_of_the_mean():
    value_c = np.random.default_rng(1).normal(0, 1, 400)
    row = _comparison({"perturbed mean": value_c, CEILING: value_c}).summary().iloc[0]
    se = value_c.std(ddof=1) / 20
    assert [row["low"], row["high"]] == pytest.approx(
        [value_c.mean() - 1.96 * se, value_c.mean() + 1.96 * se], abs=0.3 * se
    )


@pytest.mark.parametrize(("metric", "better"), [("rmse", False), ("pearson_control", True)])
def test_better_follows_the_direction_of_the_metric(metric, better):
    compared = _comparison({"perturbed mean": [0.1, 0.2], "m": [0.3, 0.4], CEILING: [0.5, 0.6]}, metric)
    assert compared.differences().set_index("method").loc["m", "better"] == better


def test_calibrated_scores_are_never_clipped():
    values = {
        "perturbed mean": [4.0, 2],
        "worse": [6, 4],
        "half": [3, 1.5],
        "beyond": [0.5, 0],
        CEILING: [2, 1],
    }
    table = _comparison(values).calibrated().set_index("method")
    assert table["score"].to_dict() == pytest.approx({"worse": -4 / 3, "half": 0.5, "beyond": 5.5 / 3})
    assert table["resolved"].all()
    assert table.loc["half", ["low", "high"]].tolist() == pytest.approx([0.5, 0.5])


def test_a_metric_that_cannot_tell_is_marked():
    values = {"perturbed mean": [1.0, 2, 3, 4], "m": [1, 1, 1, 1], CEILING: [4.0, 3, 2, 1]}
    assert not _comparison(values).calibrated()["resolved"].any()


def test_undefined_scores_are_left_out_pairwise():
    nan = np.nan
    values = {"perturbed mean": [1.0, 2, nan], "m": [nan, 4, 5], CEILING: [0.0, 0, 0]}
    compared = _comparison(values)
    row = compared.differences().set_index("method").loc["m"]
    assert (row["difference"], row["n_conditions"]) == (2, 1) and np.isnan(row["low"])
    assert compared.summary().set_index("method").loc["m", "mean"] == 4.5
    gone = _comparison({"perturbed mean": [nan, nan], "m": [1.0, 2], CEILING: [0.0, 0]})
    assert np.isnan(gone.calibrated().set_index("method").loc["m", "score"])


def test_folds_and_seeds_of_a_condition_count_once():
    rows = [("m", f, s, "c0", "rmse", v) for f, s, v in [(0, 0, 1.0), (0, 1, 3.0)]]
    rows += [("m", 1, 0, "c1", "rmse", 8.0)]
    table = pd.DataFrame(rows, columns=["method", "fold", "seed", "condition", "metric", "value"])
    row = Comparison(table, pd.DataFrame()).summary().iloc[0]
    assert (row["mean"], row["n_conditions"]) == (5.0, 2)


def test_unknown_references_are_told(compared):
    with pytest.raises(DataError, match="no method named 'mean' was scored; methods are own"):
        compared.differences("mean")
    with pytest.raises(DataError, match="no method named 'mean'"):
        compared.calibrated("mean")


def test_average_over_conditions_keeps_the_order():
    table = pd.DataFrame(
        {"method": ["b", "b", "a"], "metric": "rmse", "value": [1.0, 3.0, np.nan]},
    )
    average = average_conditions(table)
    assert average["method"].tolist() == ["b", "a"] and average["n_conditions"].tolist() == [2, 0]
    assert average["mean"][0] == 2


def test_duplicate_is_a_predictor_like_the_others(tiny_screen):
    split = random_cells(tiny_screen, validation=0.0, test=0.4)
    again = TechnicalDuplicate(tiny_screen, split.train)
    again.name = "training duplicate"
    assert "training duplicate" in compare(tiny_screen, [again], [split]).methods
