import importlib.util

import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import Predictor, condition_means
from pyro_causalcell.baselines.gears import GEARS
from pyro_causalcell.data import held_out_perturbations
from pyro_causalcell.errors import DataError

# A and C do the same; so says the graph, in which everybody is its own neighbour too.
EDGES = [("A", "C"), ("C", "A"), *[(t, t) for t in "ABCD"]]
GRAPH = pd.DataFrame([(s, t, 1.0) for s, t in EDGES], columns=["source", "target", "importance"])


@pytest.mark.slow  # cell-gears compiles as it is imported, and trains cell by cell
@pytest.mark.filterwarnings("ignore")  # cell-gears warns of what newer libraries changed
def test_an_unseen_target_is_predicted_from_its_neighbour(tiny_screen):
    pytest.importorskip("gears")
    split = held_out_perturbations(tiny_screen, ["C"], validation=0.0)
    gears = GEARS(tiny_screen, split.train, GRAPH, epochs=4, hidden_size=16, batch_size=16)
    assert isinstance(gears, Predictor)
    found = gears.predict(["C", "B+A", "A+B", "control"])
    assert found.shape == (4, 20) and np.isfinite(found).all()
    np.testing.assert_array_equal(found[1], found[2])
    truth, a, d, control = condition_means(
        tiny_screen, np.arange(tiny_screen.n_cells), ["C", "A", "D", "control"]
    )
    np.testing.assert_allclose(found[3], control, rtol=1e-4)
    predicted = gears.predict(["A", "D"])
    up_g = a - control > 0.5
    assert (predicted[0] - predicted[1])[up_g].mean() > 0  # it has learned that A raises these genes
    assert (found[0] - predicted[1])[up_g].mean() > 0  # and that C is like A


@pytest.mark.skipif(importlib.util.find_spec("gears") is not None, reason="cell-gears is installed")
def test_without_the_package_it_says_what_to_install(tiny_screen):
    with pytest.raises(DataError, match=r"pyro-causalcell\[peers\]"):
        GEARS(tiny_screen, np.arange(tiny_screen.n_cells), GRAPH)


def test_graphs_are_checked(tiny_screen):
    pytest.importorskip("gears")
    rows = np.arange(tiny_screen.n_cells)
    with pytest.raises(DataError, match="lacks the columns"):
        GEARS(tiny_screen, rows, GRAPH[["source", "target"]])
    with pytest.raises(DataError, match="names Z, which are no targets"):
        GEARS(tiny_screen, rows, GRAPH.replace({"source": {"B": "Z"}}))
    with pytest.raises(DataError, match="without control cells"):
        GEARS(tiny_screen, rows[tiny_screen.condition_n > 0], GRAPH)
