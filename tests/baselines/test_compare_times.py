import functools

import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import (
    CellOT,
    MeanAtTime,
    ScNODE,
    TimeMatchedControl,
    compare_times,
    make_folds,
    snapshots,
)
from pyro_causalcell.baselines.compare import MEASURES
from pyro_causalcell.data import held_out_perturbations, held_out_times
from pyro_causalcell.errors import DataError, PredictionError

TIMES = (1.0, 2.0, 3.0)


class Fixed:
    """Predicts the same array for every condition and time."""

    def __init__(self, name, mean_g, seen_rows=None):
        self.name, self.mean_g = name, np.asarray(mean_g, dtype=float)
        if seen_rows is not None:
            self.seen_rows = seen_rows

    def predict(self, conditions, times):
        return np.broadcast_to(self.mean_g, (len(conditions), len(times), len(self.mean_g)))


@pytest.fixture
def screen(course):
    """Simulated: A, B and C raise gene 0 by t, and a gene of their own; 24 cells per snapshot."""
    rng = np.random.default_rng(1)
    own = {"control": [0] * 6, "A": [1, 1, 0, 0, 0, 0], "B": [1, 0, 1, 0, 0, 0], "C": [1, 0, 0, 1, 0, 0]}
    return course(
        {
            (c, t): 3 + 0.1 * t + t * np.array(e) + 0.1 * rng.normal(size=(24, 6))
            for c, e in own.items()
            for t in TIMES
        }
    )


def _scores(compared, metric):
    table = compared.table[compared.table["metric"] == metric]
    return table.set_index(["method", "condition", "time"])["value"]


def test_leave_one_out_scores_every_condition_at_every_time(screen):
    folds = make_folds(screen, n_folds=3)
    compared = compare_times(screen, [Fixed("zero", np.zeros(6))], folds, min_cells=10, n_top=2)
    assert list(compared.table) == ["method", "fold", "seed", "condition", "time", "metric", "value"]
    rmse = _scores(compared, "rmse")
    assert len(rmse["zero"]) == 9 and len(compared.left_out) == 0
    assert set(compared.table["metric"]) <= set(MEASURES)
    assert compared.own == ["zero"]
    # Half the effect of A is what B and C do too: gene 0; genes 2 and 3 get half of theirs, gene 1 nothing.
    expected = np.sqrt((2**2 + 1**2 + 1**2) / 6)
    assert rmse["time-matched mean", "A", 2.0] == pytest.approx(expected, abs=0.05)
    assert rmse["time-matched control", "A", 2.0] == pytest.approx(np.sqrt((2**2 + 2**2) / 6), abs=0.05)
    assert rmse["technical duplicate", "A", 2.0] < 0.1
    pearson = _scores(compared, "pearson_control")
    effect_g, found_g = [1, 1, 0, 0, 0, 0], [1, 0, 0.5, 0.5, 0, 0]
    assert pearson["time-matched mean", "A", 3.0] == pytest.approx(
        np.corrcoef(effect_g, found_g)[0, 1], abs=0.05
    )
    assert np.isnan(pearson["time-matched control", "A", 3.0])  # no effect to correlate
    # Two of six genes change most in A; the time-matched mean finds gene 0 first and gene 1 last.
    assert _scores(compared, "auroc_test_top")["technical duplicate", "A", 3.0] == 1
    assert _scores(compared, "auprc_lift_test_top")["technical duplicate", "A", 3.0] == pytest.approx(3)
    assert _scores(compared, "auroc_test_top")["time-matched mean", "A", 3.0] < 0.9
    # Genes 0, 2 and 3 change in B or C, so these are the training DE genes of A's fold.
    assert _scores(compared, "auroc_train_de")["time-matched mean", "A", 3.0] == 1
    differences = compared.differences("time-matched mean").set_index(["method", "metric"])
    assert differences.loc[("technical duplicate", "rmse"), "better"]
    assert differences.loc[("technical duplicate", "rmse"), "n_conditions"] == 3


def test_effects_at_a_held_out_time_use_its_own_control(screen):
    compared = compare_times(
        screen, [], [held_out_times(screen, 3.0, validation=0.0)], min_cells=10, n_cells=12, n_top=2
    )
    pearson, distance = _scores(compared, "pearson_control"), _scores(compared, "e_distance")
    assert pearson["linear in time", "B", 3.0] > 0.95
    assert distance["technical duplicate", "B", 3.0] < 0.2 < distance["no change", "B", 3.0]
    assert set(compared.table["time"]) == {3.0} and set(compared.table["condition"]) == {"A", "B", "C"}


def test_recipes_are_trained_on_the_training_cells_of_each_fold(screen):
    trained = []

    def recipe(screen, rows, seed):
        trained.append((len(rows), seed))
        method = TimeMatchedControl.fit(screen, rows)
        method.name = "mine"
        return method

    compare_times(screen, [recipe], make_folds(screen, n_folds=3)[:2], seeds=(4, 5), min_cells=10)
    assert trained == [(216, 4), (216, 5)] * 2


def test_classes_and_partials_are_recipes(screen):
    split = held_out_times(screen, 3.0, validation=0.0)
    methods = [CellOT, functools.partial(ScNODE, n_pretraining=1, n_steps=1)]
    with pytest.raises(PredictionError, match="CellOT .* no map for A at 3"):
        compare_times(screen, methods[:1], [split], min_cells=10)
    pytest.importorskip("torchdiffeq")
    pytest.importorskip("ot")
    compared = compare_times(screen, methods[1:], [split], min_cells=10, n_cells=10)
    assert np.isfinite(_scores(compared, "e_distance")["scNODE"]).all()


def test_a_time_course_without_perturbations(course):
    rng = np.random.default_rng(0)
    screen = course({("control", t): t + 2 + 0.1 * rng.normal(size=(20, 4)) for t in TIMES})
    compared = compare_times(
        screen, [], [held_out_times(screen, 2.0, validation=0.0)], min_cells=10, n_cells=10
    )
    assert set(compared.table["metric"]) == {"rmse", "mae", "r2_means", "e_distance"}
    rmse = _scores(compared, "rmse")
    assert rmse["linear in time", "control", 2.0] < 0.1 < 0.9 < rmse["no change", "control", 2.0]


def test_few_cells_are_listed_and_mistakes_are_told(screen, rising):
    split = held_out_perturbations(screen, ["A"], validation=0.0)
    rows = np.setdiff1d(np.arange(screen.n_cells), snapshots(screen, split.test).cells(1, 0)[4:])
    few = type(split)("mine", split.train, split.validation, np.intersect1d(split.test, rows), 0, {})
    left_out = compare_times(screen, [], [few], min_cells=10).left_out
    assert left_out.to_numpy().tolist() == [[0, "A", 1.0, 4]]
    with pytest.raises(DataError, match="no condition has 99 held-out cells"):
        compare_times(screen, [], [split], min_cells=99)
    with pytest.raises(DataError, match="trained on 72 of the 72 held-out cells"):
        compare_times(screen, [Fixed("seen", np.ones(6), np.arange(screen.n_cells))], [split])
    with pytest.raises(DataError, match="several named time-matched mean"):
        compare_times(screen, [MeanAtTime.fit(screen, split.train)], [split])
    with pytest.raises(DataError, match=r"shape \(1, 3, 5\); expected .* \(1, 3, 6\)"):
        compare_times(screen, [Fixed("short", np.ones(5))], [split])
    with pytest.raises(DataError, match="NaN or infinity in those of hollow"):
        compare_times(screen, [Fixed("hollow", np.full(6, np.nan))], [split])
    with pytest.raises(DataError, match="at least one split"):
        compare_times(screen, [], [])


def test_regressions_join_where_the_screen_has_embeddings(screen):
    with_table = type(screen)(
        screen.adata,
        control="control",
        time="time",
        embeddings=pd.DataFrame({"x": [0.0, 1.0, 2.0]}, index=list("ABC")),
    )
    split = held_out_times(with_table, 2.0, validation=0.0)
    methods = set(compare_times(with_table, [], [split], min_cells=10).table["method"])
    assert {"ridge in time, given embedding", "elastic net in time, PCA embedding"} <= methods
