import numpy as np
import pytest

from pyro_causalcell.baselines import LFADS, MeanAtTime, NoChange, TimeCellPredictor, snapshots
from pyro_causalcell.data import held_out_combinations, held_out_times
from pyro_causalcell.errors import DataError, PredictionError

TIMES = [1.0, 2.0, 3.0, 4.0]


def _error(method, truth_tg, condition, times):
    return np.sqrt(np.mean((method.predict([condition], times)[0] - truth_tg) ** 2))


def test_an_unseen_combination_follows_both_inputs(rising):
    split = held_out_combinations(rising, ["A+B"], validation=0.0)
    fitted = LFADS(rising, split.train, n_steps=300)
    assert isinstance(fitted, TimeCellPredictor)
    truth_tg = snapshots(rising, split.test).mean_ctg[rising.conditions.index("A+B")]
    found = _error(fitted, truth_tg, "A+B", TIMES)
    assert found < 0.5 * _error(MeanAtTime.fit(rising, split.train), truth_tg, "A+B", TIMES)


def test_a_missing_snapshot_and_its_cells(rising):
    split = held_out_times(rising, 2.0, validation=0.0)
    fitted = LFADS(rising, split.train, n_steps=300)
    truth_g = snapshots(rising, split.test).mean_ctg[rising.conditions.index("A"), 0]
    assert _error(fitted, truth_g, "A", [2.0]) < 0.7 * _error(
        NoChange.fit(rising, split.train), truth_g, "A", [2.0]
    )
    ((x_ng, later_ng),) = fitted.cells(["A"], [2.0, 6.0], 50)
    assert x_ng.shape == later_ng.shape == (50, 20)
    assert np.isfinite(later_ng).all() and x_ng.min() >= 0
    ((again_ng, _),) = fitted.cells(["A"], [2.0, 6.0], 50)
    np.testing.assert_array_equal(again_ng, x_ng)


def test_sequences_join_cells_of_one_condition(rising):
    from pyro_causalcell.baselines.lfads import _Joined

    rows = np.flatnonzero(~((rising.condition_n == 1) & (rising.time_n == 3)))
    fitted = LFADS(rising, rows, n_steps=1)
    labels_n1 = (10 * rising.condition_n[rows] + rising.time_n[rows])[:, None].astype(np.float32)
    joined = _Joined(fitted, labels_n1, rising.library_n[rows], np.random.default_rng(0))
    drawn = joined.draw(200)
    c_n = np.round(drawn.x_ntg[:, 0, 0].numpy() // 10)
    expected_nt = 10 * c_n[:, None] + np.array(TIMES)
    measured_nt = drawn.measured_nt.numpy()
    np.testing.assert_array_equal(drawn.x_ntg[..., 0].numpy()[measured_nt], expected_nt[measured_nt])
    np.testing.assert_array_equal(measured_nt, ~((c_n == 1)[:, None] & (np.array(TIMES) == 3)))


def test_mistakes(rising, course_of_means):
    normalised = course_of_means({(c, t): (t, 2) for c in ("control", "A") for t in (1.0, 2.0)})
    with pytest.raises(DataError, match="non-negative integers"):
        LFADS(normalised, np.arange(normalised.n_cells))
    without = np.flatnonzero(~np.isin(rising.condition_n, [rising.conditions.index(c) for c in ("B", "A+B")]))
    fitted = LFADS(rising, without, n_steps=1)
    with pytest.raises(PredictionError, match="without cells of B"):
        fitted.predict(["A+B"], [1.0])
