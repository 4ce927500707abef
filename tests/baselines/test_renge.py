import numpy as np
import pytest

from pyro_causalcell.baselines import RENGE, MeanAtTime, TimeMatchedControl, snapshots
from pyro_causalcell.data import held_out_perturbations, held_out_times
from pyro_causalcell.errors import DataError

GENES = [f"g{g}" for g in range(12)]
EDGES = {(1, 0): 0.8, (2, 1): 0.8, (3, 2): 0.8, (4, 3): 0.8, (8, 2): -0.9, (9, 3): 0.7, (10, 1): 0.6}
TIMES = [1.0, 2.0, 3.0, 4.0]


@pytest.fixture
def chain(course):
    """Simulated knock-outs in a chain g0 -> g1 -> ..., whose effects arrive one edge after another."""
    rng = np.random.default_rng(0)
    a_gg = np.zeros((12, 12))
    for edge, weight in EDGES.items():
        a_gg[edge] = weight
    cells = {}
    for name in ["control", *GENES[:7]]:
        x_g, free_g = np.zeros(12), np.ones(12)
        if name != "control":
            x_g[GENES.index(name)], free_g[GENES.index(name)] = -2.0, 0.0
        for t in TIMES:
            reached_g, change_g = x_g, x_g.copy()
            for k in (1, 2, 3):
                reached_g = free_g * (a_gg @ reached_g)
                change_g = change_g + reached_g / (1 + np.exp(-(1.2 * t - 1.2 * k)))
            cells[name, t] = 3 + 0.1 * t + change_g + 0.3 * rng.normal(size=(40, 12))
    return course(cells, GENES)


def test_an_unseen_knock_out_acts_through_the_network(chain):
    split = held_out_perturbations(chain, ["g1"], validation=0.0)
    fitted = RENGE(chain, split.train, n_steps=600)
    truth_tg = snapshots(chain, split.test).mean_ctg[chain.conditions.index("g1")]
    others = [g for g in range(12) if g != 1]

    def error(method):
        return np.sqrt(np.mean((method.predict(["g1"], TIMES)[0] - truth_tg)[:, others] ** 2))

    assert error(fitted) < 0.5 * error(MeanAtTime.fit(chain, split.train))
    assert error(fitted) < 0.5 * error(TimeMatchedControl.fit(chain, split.train))
    np.testing.assert_allclose(fitted.predict(["g1"], TIMES)[0, :, 1], truth_tg[:, 1], atol=0.3)
    assert not np.diag(fitted.network_gg).any()
    assert fitted.network_gg[2, 1] > 0.5 and abs(fitted.network_gg[1, 2]) < 0.2


def test_later_times_and_control(chain):
    split = held_out_times(chain, 4.0, validation=0.0)
    fitted = RENGE(chain, split.train, n_steps=300)
    found = fitted.predict(["control", "g0"], [4.0])[:, 0]
    truth = snapshots(chain, split.test).mean_ctg[[0, chain.conditions.index("g0")], 0]
    assert np.abs(found[0] - truth[0]).max() < 0.3
    assert np.abs(found[1] - truth[1]).max() < 0.7  # effects up to 2
    np.testing.assert_allclose(RENGE(chain, split.train, n_steps=300).predict(["g0"], [4.0])[0, 0], found[1])


def test_mistakes(chain, rising):
    rows = np.arange(chain.n_cells)
    with pytest.raises(DataError, match="among the genes of the screen, found none for A"):
        RENGE(rising, np.arange(rising.n_cells))
    with pytest.raises(DataError, match="control cells and perturbed cells"):
        RENGE(chain, rows[chain.condition_n > 0])
    with pytest.raises(DataError, match="onset=2.0, found the time 1.0"):
        RENGE(chain, rows, onset=2.0)
