import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import LinearInTime, NoChange, ScNODE, TimeMatchedControl, snapshots
from pyro_causalcell.data import held_out_perturbations, held_out_times
from pyro_causalcell.errors import DataError, PredictionError

pytest.importorskip("torchdiffeq")
pytest.importorskip("ot")


@pytest.fixture
def rotating(course):
    """Simulated cells: a Gaussian that goes half way round a circle in a plane of 10 genes."""
    rng = np.random.default_rng(0)
    loading_2g = rng.normal(size=(2, 10))
    cells = {}
    for t in range(6):
        centre = 3 * np.array([np.cos(t * np.pi / 5), np.sin(t * np.pi / 5)])
        x_ng = (centre + 0.4 * rng.normal(size=(100, 2))) @ loading_2g + 0.1 * rng.normal(size=(100, 10))
        cells["control", float(t)] = x_ng
    return course(cells)


def test_a_missing_snapshot_of_a_rotation_lies_on_the_circle(rotating):
    split = held_out_times(rotating, 3.0, validation=0.0)
    fitted = ScNODE(rotating, split.train, n_pretraining=200, n_steps=250)
    truth_g = snapshots(rotating, split.test).mean_ctg[0, 0]

    def error(method):
        return np.sqrt(np.mean((method.predict(["control"], [3.0])[0, 0] - truth_g) ** 2))

    assert error(fitted) < 0.7 * error(LinearInTime.fit(rotating, split.train))  # a chord
    assert error(fitted) < 0.3 * error(NoChange.fit(rotating, split.train))
    ((now, early, late),) = fitted.cells(["control"], [0.0, 1.0, 5.0], 30)
    assert now.shape == early.shape == late.shape == (30, 10)
    ((reversed_late, reversed_early),) = fitted.cells(["control"], [5.0, 1.0], 30)
    np.testing.assert_allclose(reversed_late, late, atol=1e-4)
    np.testing.assert_allclose(reversed_early, early, atol=0.02)  # the solver's grid has other points


@pytest.fixture
def drifting(course):
    """Simulated cells: a perturbation of size e moves gene 0 by e t; six of them, times 1 to 3."""
    rng = np.random.default_rng(1)
    size = {"control": 0.0, "A": -2.0, "B": -1.0, "C": 0.5, "D": 1.0, "E": 2.0}
    return course(
        {
            (name, float(t)): 4 + np.array([e * t / 2, 0, 0]) + 0.3 * rng.normal(size=(40, 3))
            for name, e in size.items()
            for t in (1, 2, 3)
        }
    )


def test_an_unseen_perturbation_by_its_embedding(drifting):
    table = pd.DataFrame({"size": [-2.0, -1.0, 0.5, 1.0, 2.0]}, index=list("ABCDE"))
    split = held_out_perturbations(drifting, ["D"], validation=0.0)
    fitted = ScNODE(drifting, split.train, embedding=table, n_pretraining=100, n_steps=150, n_hidden=32)
    truth_tg = snapshots(drifting, split.test).mean_ctg[drifting.conditions.index("D")]
    found_tg = fitted.predict(["D"], [1.0, 2.0, 3.0])[0]
    control_tg = TimeMatchedControl.fit(drifting, split.train).predict(["D"], [1.0, 2.0, 3.0])[0]
    assert np.abs(found_tg - truth_tg).mean() < 0.5 * np.abs(control_tg - truth_tg).mean()


def test_mistakes(rotating, drifting):
    split = held_out_perturbations(drifting, ["D"], validation=0.0)
    fitted = ScNODE(drifting, split.train, n_pretraining=1, n_steps=1)
    with pytest.raises(PredictionError, match="without cells of D"):
        fitted.predict(["D"], [2.0])
    with pytest.raises(DataError, match="onset=0.0, found the time -1.0"):
        fitted.predict(["A"], [-1.0])
    with pytest.raises(DataError, match="two training times"):
        ScNODE(rotating, np.flatnonzero(rotating.time_n == 1))
