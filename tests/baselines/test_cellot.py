import numpy as np
import pytest

from pyro_causalcell.baselines import CellOT, DuplicateInTime, MeanAtTime, snapshots
from pyro_causalcell.data import held_out_perturbations, random_cells
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.evaluate import e_distance


def test_a_gaussian_is_shifted_and_scaled(course):
    rng = np.random.default_rng(0)
    laws = {"control": ([0, 0, 0], [1, 1, 1]), "A": ([2, -1, 0], [0.5, 1, 2]), "B": ([0, 0, 3], [1, 1, 0.3])}
    screen = course(
        {
            (name, t): 4 + t * np.array(mean) / 2 + np.array(sd) * rng.normal(size=(300, 3))
            for name, (mean, sd) in laws.items()
            for t in (1.0, 2.0)
        }
    )
    train = random_cells(screen, validation=0.0, test=0.3).train
    fitted = CellOT(screen, train, n_steps=60)
    cells = fitted.cells(["A", "B"], [1.0, 2.0], 200)
    for name, of_condition in zip("AB", cells, strict=True):
        mean, sd = laws[name]
        for t, x_ng in zip((1.0, 2.0), of_condition, strict=True):
            np.testing.assert_allclose(x_ng.mean(0), 4 + t * np.array(mean) / 2, atol=0.3)
            np.testing.assert_allclose(x_ng.std(0), sd, atol=0.3)
    ((control_ng,),) = fitted.cells(["control"], [2.0], 10**4)
    measured = snapshots(screen, train)
    np.testing.assert_allclose(control_ng.mean(0), measured.at([0], [2.0])[0])


def test_only_the_cells_that_respond_are_moved(course):
    rng = np.random.default_rng(0)

    def cells(shift):
        kind_n1 = rng.integers(2, size=(400, 1))
        return 4 + 0.5 * rng.normal(size=(400, 4)) + kind_n1 * np.array([4, 0, 0, 0]) + kind_n1 * shift

    screen = course({("control", 1.0): cells(np.zeros(4)), ("A", 1.0): cells(np.array([0, 3, 0, 0]))})
    split = random_cells(screen, validation=0.0, test=0.3)
    measured_ng = screen.x(split.test[screen.condition_n[split.test] == 1])

    def distance(method):
        return e_distance(measured_ng, method.cells(["A"], [1.0], 200)[0][0])

    moved = distance(CellOT(screen, split.train, n_steps=100))
    shifted = distance(MeanAtTime.fit(screen, split.train))  # all cells alike, by the mean effect
    assert moved < 0.2 * shifted
    assert moved < distance(DuplicateInTime(snapshots(screen, split.train))) + 0.1


def test_what_has_no_map_is_told(course_of_means):
    screen = course_of_means(
        {(c, t): (e + t, 2, 3) for c, e in {"control": 0, "A": 1, "B": 2}.items() for t in (1.0, 2.0)}
    )
    fitted = CellOT(screen, held_out_perturbations(screen, ["B"], validation=0.0).train, n_steps=1)
    with pytest.raises(PredictionError, match="no map for B at 2"):
        fitted.predict(["A", "B"], [2.0])
    with pytest.raises(PredictionError, match="A at 3"):
        fitted.predict(["A"], [3.0])
    alone = np.flatnonzero((screen.condition_n > 0) | (screen.time_n == 1))
    with pytest.raises(DataError, match=r"no control at \[2.0\]"):
        CellOT(screen, alone)
