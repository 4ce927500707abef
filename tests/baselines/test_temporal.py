import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import (
    AdditiveInTime,
    DuplicateInTime,
    LinearInTime,
    MeanAtTime,
    NoChange,
    RegressionInTime,
    TargetFeatures,
    TimeCellPredictor,
    TimeMatchedControl,
    snapshots,
    time_references,
)
from pyro_causalcell.baselines.temporal import line_weights, require_course
from pyro_causalcell.data import held_out_perturbations, held_out_times
from pyro_causalcell.errors import DataError, PredictionError

TIMES = (1.0, 2.0, 4.0)  # uneven


@pytest.fixture
def screen(course_of_means):
    """Gene 0 rises by 1 in a unit of time; A adds 1 to it, B adds 3 and takes 2 from gene 1."""
    effect = {"control": (0, 0), "A": (1, 0), "B": (3, -2)}
    return course_of_means({(c, t): (2 + t + e[0], 5 + e[1]) for c, e in effect.items() for t in TIMES})


@pytest.fixture
def rows(screen):
    return np.arange(screen.n_cells)


def test_lines_go_through_the_points_and_on_beyond_them():
    weight_ts = line_weights(np.array([0.0, 2.0, 3.0]), [0.0, 1.0, 2.5, 3.0, 5.0, -1.0])
    np.testing.assert_allclose(weight_ts @ [0.0, 4.0, 5.0], [0, 2, 4.5, 5, 7, -2])
    np.testing.assert_allclose(line_weights(np.array([2.0]), [0.0, 9.0]) @ [7.0], [7, 7])


def test_snapshots_are_means_of_their_own_cells(screen, rows):
    means = snapshots(screen, rows[::-1])
    np.testing.assert_array_equal(means.times, TIMES)
    np.testing.assert_allclose(means.mean_ctg[:, :, 0], [[3, 4, 6], [4, 5, 7], [6, 7, 9]])
    assert (means.cells_ct == 4).all()
    assert screen.adata.obs.iloc[means.cells(2, 1)].drop_duplicates().values.tolist() == [["B", 2.0]]
    known, mean_tg = means.course([1, 2])
    np.testing.assert_allclose(mean_tg[:, 0], [5, 6, 8])


def test_a_missing_snapshot_is_filled_by_the_line(course_of_means):
    means = {("control", t): (t, 1) for t in TIMES} | {("A", 1.0): (3, 1), ("A", 4.0): (9, 1)}
    screen = course_of_means(means)
    fitted = LinearInTime.fit(screen, np.arange(screen.n_cells))
    np.testing.assert_allclose(fitted.predict(["A"], [1, 2, 4, 5])[0, :, 0], [3, 5, 9, 11])


def test_simple_baselines_at_held_out_times(screen):
    train = held_out_times(screen, 4.0, validation=0.0).train
    times = [2.0, 4.0]
    np.testing.assert_allclose(NoChange.fit(screen, train).predict(["B"], times)[0, :, 0], [7, 7])
    np.testing.assert_allclose(LinearInTime.fit(screen, train).predict(["B"], times)[0, :, 0], [7, 9])
    np.testing.assert_allclose(TimeMatchedControl.fit(screen, train).predict(["B"], times)[0, :, 0], [4, 6])
    np.testing.assert_allclose(MeanAtTime.fit(screen, train).predict(["B"], times)[0, :, 0], [6, 8])
    np.testing.assert_allclose(AdditiveInTime.fit(screen, train).predict(["B"], times)[0], [[7, 3], [9, 3]])


def test_simple_baselines_of_an_unseen_perturbation(screen):
    train = held_out_perturbations(screen, ["B"], validation=0.0).train
    found = {m.name: m.predict(["B"], [3.0])[0, 0] for m in time_references(snapshots(screen, train))}
    np.testing.assert_allclose(found["no change"], [4, 5])  # control, its last snapshot
    np.testing.assert_allclose(found["time-matched control"], [5, 5])
    for name in ("time-matched mean", "linear in time", "additive in time"):
        np.testing.assert_allclose(found[name], [6, 5], err_msg=name)  # as A, the one that was seen


def test_additive_in_time_fills_a_hole_in_the_table(course_of_means):
    effect, course = {"control": 0.0, "A": 1.0, "B": 3.0}, {1.0: 2.0, 2.0: 2.5, 4.0: 1.0}
    holes = {("A", 2.0), ("B", 4.0)}
    means = {(c, t): (e + m, 1.0) for c, e in effect.items() for t, m in course.items()}
    screen = course_of_means({pair: mean for pair, mean in means.items() if pair not in holes})
    fitted = AdditiveInTime.fit(screen, np.arange(screen.n_cells))
    np.testing.assert_allclose(fitted.predict(["A", "B"], [2.0, 4.0])[..., 0], [[3.5, 2], [5.5, 4]])
    logs = {
        pair: (np.log1p(np.expm1(effect[pair[0]]) + np.expm1(course[pair[1]])), 1.0)
        for pair in means
        if pair not in holes
    }
    on_counts = AdditiveInTime(
        snapshots(screen := course_of_means(logs), np.arange(screen.n_cells)), counts=True
    )
    expected = np.log1p(np.expm1(1.0) + np.expm1(2.5))
    np.testing.assert_allclose(on_counts.predict(["A"], [2.0])[0, 0, 0], expected, rtol=1e-5)


def test_cells_of_a_baseline_have_the_spread_of_control_at_the_nearest_time(course):
    rng = np.random.default_rng(0)
    spread = {1.0: 0.1, 3.0: 1.0}
    screen = course(
        {(c, t): 5 + sd * rng.normal(size=(200, 2)) for c in ("control", "A") for t, sd in spread.items()}
    )
    fitted = LinearInTime.fit(screen, np.arange(screen.n_cells))
    assert isinstance(fitted, TimeCellPredictor)
    ((early, late),) = fitted.cells(["A"], [1.5, 2.5], 100)
    assert early.shape == late.shape == (100, 2)
    assert early.std() < 0.2 and late.std() > 0.8
    ((many,),) = fitted.cells(["A"], [1.0], 5000)
    np.testing.assert_allclose(many.mean(0), fitted.predict(["A"], [1.0])[0, 0], atol=0.01)


def test_regression_finds_effects_that_are_linear_in_the_embedding(course_of_means):
    size = dict(zip("ABCDEF", [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], strict=True))
    means = {(name, t): (3 + t + e * t / 4, 4 - e / 4) for name, e in size.items() for t in TIMES}
    screen = course_of_means(means | {("control", t): (3 + t, 4) for t in TIMES})
    table = pd.DataFrame({"size": list(size.values()), "noise": [3.0, -1, 0, 2, -2, 1]}, index=list(size))
    train = held_out_perturbations(screen, ["C"], validation=0.0).train
    for kind, off in (("ridge", 0.02), ("elastic net", 0.25)):
        fitted = RegressionInTime(snapshots(screen, train), kind, table)
        found = fitted.predict(["control", "C"], [2.0, 4.0])
        np.testing.assert_allclose(found[0, :, 0], [5, 7])
        np.testing.assert_allclose(found[1], [[6.5, 3.25], [10, 3.25]], atol=off, err_msg=kind)
        shared = MeanAtTime.fit(screen, train).predict(["C"], [4.0])[0, 0]
        assert np.abs(found[1, 1] - [10, 3.25]).max() < np.abs(shared - [10, 3.25]).max()


def test_features_add_up_and_know_what_was_never_seen(rising):
    table = pd.DataFrame({"x": [1.0, 3.0]}, index=["A", "B"])
    everything = np.arange(rising.n_cells)
    features = TargetFeatures(rising, everything, table)
    np.testing.assert_allclose(features(["control", "A", "A+B"]), [[0, 0], [1, -1], [2, 0]])
    train = held_out_perturbations(rising, ["B"], validation=0.0).train
    TargetFeatures(rising, train, table).require_known(["B"], "it")
    unknowing = TargetFeatures(rising, train)
    unknowing.require_known(["A", "control"], "it")
    with pytest.raises(PredictionError, match="without cells of B.*embedding="):
        unknowing.require_known(["A+B"], "it")
    with pytest.raises(DataError, match="found none for 1: B"):
        TargetFeatures(rising, train, table.drop("B"))


def test_a_time_course_without_perturbations_has_baselines(course_of_means):
    screen = course_of_means({("control", t): (t, 2) for t in TIMES})
    train = held_out_times(screen, 2.0, validation=0.0).train
    found = {
        m.name: m.predict(["control"], [2.0])[0, 0, 0] for m in time_references(snapshots(screen, train))
    }
    assert found == pytest.approx({"no change": 1.0, "linear in time": 2.0})


def test_duplicate_gives_what_was_measured(screen, rows):
    train = held_out_times(screen, 4.0, validation=0.0).train
    measured = DuplicateInTime(snapshots(screen, train))
    found = measured.predict(["B", "A"], [4.0, 2.0])
    assert np.isnan(found[:, 0]).all()
    np.testing.assert_allclose(found[:, 1, 0], [7, 5])
    (nothing, some), _ = measured.cells(["B", "A"], [4.0, 2.0], 3)
    assert nothing.shape == (0, 2) and some.shape == (3, 2)


def test_errors_say_what_is_missing(screen, rows, tiny_screen):
    with pytest.raises(DataError, match="pass time="):
        snapshots(tiny_screen, np.arange(5))
    with pytest.raises(DataError, match="found 0 rows"):
        snapshots(screen, rows[:0])
    with pytest.raises(DataError, match="unknown perturbation target 'X'"):
        TimeMatchedControl.fit(screen, rows).predict(["X"], [1.0])
    perturbed = rows[screen.condition_n[rows] > 0]
    with pytest.raises(DataError, match="needs control cells"):
        TimeMatchedControl.fit(screen, perturbed)
    with pytest.raises(DataError, match="expected training cells of .'control'."):
        LinearInTime.fit(screen, perturbed).predict(["control"], [1.0])
    control = rows[screen.condition_n[rows] == 0]
    with pytest.raises(DataError, match="perturbed conditions"):
        MeanAtTime.fit(screen, control).predict(["A"], [1.0])
    with pytest.raises(DataError, match="two perturbed training conditions, found 1"):
        train = held_out_perturbations(screen, ["B"], validation=0.0).train
        RegressionInTime(snapshots(screen, train), embedding=pd.DataFrame({"x": [0.0, 1]}, index=["A", "B"]))
    with pytest.raises(DataError, match="onset=1.5, found the time 1.0"):
        require_course(snapshots(screen, rows), 1.5, "it")
