import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import false_discovery_control, ttest_ind

from pyro_causalcell.baselines import InterpolatedDuplicate, TechnicalDuplicate, condition_means, halves
from pyro_causalcell.baselines.means import expression
from pyro_causalcell.data import Screen, held_out_perturbations
from pyro_causalcell.errors import DataError


def test_technical_duplicate_is_the_mean_of_its_cells(tiny_screen):
    rows = np.arange(tiny_screen.n_cells)
    first, second = halves(tiny_screen, rows, ["A", "B"])
    duplicate = TechnicalDuplicate(tiny_screen, second)
    np.testing.assert_array_equal(
        duplicate.predict(["B", "A"]), condition_means(tiny_screen, second, ["B", "A"])
    )
    of_b, of_a = duplicate.cells(["B", "A"], n_cells=1000)
    np.testing.assert_allclose([of_b.mean(0), of_a.mean(0)], duplicate.predict(["B", "A"]))
    with pytest.raises(DataError, match="no cells of"):
        duplicate.predict(["C"])


def test_interpolation_is_by_adjusted_p_values(tiny_screen):
    split = held_out_perturbations(tiny_screen, ["C"], validation=0.0)
    found = InterpolatedDuplicate(tiny_screen, split.train, split.test).predict(["C"])[0]
    perturbed = split.train[tiny_screen.condition_n[split.train] > 0]
    own_ng, rest_ng = expression(tiny_screen, split.test), expression(tiny_screen, perturbed)
    alpha_g = 1 - false_discovery_control(ttest_ind(own_ng, rest_ng, equal_var=False).pvalue)
    np.testing.assert_allclose(found, alpha_g * own_ng.mean(0) + (1 - alpha_g) * rest_ng.mean(0))
    assert alpha_g[:5].min() > 0.99  # genes that C raises: the duplicate
    assert alpha_g[10:].min() < 0.9


def test_a_gene_without_variance_takes_the_mean():
    x_ng = np.array([[5.0, 1], [5, 3], [5, 2], [5, 4], [5, 9], [5, 8]])
    obs = pd.DataFrame({"target": ["ctrl", "ctrl", "A", "A", "B", "B"]}, index=list("abcdef"))
    screen = Screen(ad.AnnData(x_ng / 2, obs, pd.DataFrame(index=["g0", "g1"])), control="ctrl")
    found = InterpolatedDuplicate(screen, np.array([0, 1, 2, 3]), np.array([4, 5])).predict(["B"])
    assert found[0, 0] == 2.5 and np.isfinite(found).all()


def test_a_duplicate_needs_two_cells(tiny_screen):
    rows = np.arange(tiny_screen.n_cells)
    one = np.flatnonzero(tiny_screen.condition_n == tiny_screen.conditions.index("A"))[:1]
    with pytest.raises(DataError, match=r"two cells of each condition; leave out \['A'\]"):
        InterpolatedDuplicate(tiny_screen, rows, one).predict(["A"])
    with pytest.raises(DataError, match="needs perturbed training cells"):
        InterpolatedDuplicate(tiny_screen, rows[tiny_screen.condition_n == 0], rows)
