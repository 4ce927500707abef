"""Negative binomial counts around rates of the training cells."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy.stats import nbinom

from pyro_causalcell.baselines import RATES, CountBaseline
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError


@pytest.fixture(scope="module")
def screen():
    """Simulated counts: A doubles gene 0, B doubles gene 1, A+B both; C is not measured alone."""
    rng = np.random.default_rng(0)
    share = {"control": np.array([1.0, 1, 2, 6]), "A": np.array([2.0, 1, 2, 5])}
    share |= {"B": np.array([1.0, 2, 2, 5]), "A+B": np.array([2.0, 2, 2, 4]), "A+C": share["A"]}
    x_ng = [rng.negative_binomial(4, 4 / (4 + 20 * share_g), (300, 4)) for share_g in share.values()]
    obs = pd.DataFrame({"target": np.repeat(list(share), 300)}, index=[f"c{n}" for n in range(1500)])
    obs["total"] = 200.0
    var = pd.DataFrame(index=["w", "x", "y", "z"])
    return Screen(
        ad.AnnData(np.concatenate(x_ng).astype(np.float32), obs, var), control="control", library="total"
    )


@pytest.fixture(scope="module")
def seen(screen):
    return np.flatnonzero(np.isin(np.array(screen.conditions)[screen.condition_n], ["control", "A", "B"]))


def test_rates_of_a_double(screen, seen):
    baseline = CountBaseline(screen, seen)
    share = {name: baseline.rate(name, "additive") * 10 for name in ("control", "A", "B")}
    np.testing.assert_allclose(share["A"], [2, 1, 2, 5], rtol=0.06)
    np.testing.assert_array_equal(baseline.rate("A+B", "control") * 10, share["control"])
    np.testing.assert_allclose(baseline.rate("A+B", "perturbed") * 10, [1.5, 1.5, 2, 5], rtol=0.06)
    np.testing.assert_allclose(baseline.rate("B+A", "matching") * 10, (share["A"] + share["B"]) / 2)
    added = share["A"] * share["B"] / share["control"]
    np.testing.assert_allclose(
        baseline.rate("A+B", "additive"), added / added.sum() * share["control"].sum() / 10
    )
    unknown = baseline.perturbed_g * baseline.rate(
        "A", "additive"
    )  # what perturbed cells say stands in for C
    found = baseline.rate("A+C", "additive")
    np.testing.assert_allclose(found / found.sum(), (s := unknown / share["control"]) / s.sum())


def test_likelihood_is_that_of_the_law(screen, seen):
    baseline = CountBaseline(screen, seen)
    assert ((baseline.theta_g > 2.5) & (baseline.theta_g < 6.5)).all()
    rows = np.flatnonzero(screen.condition_n == screen.conditions.index("A+B"))[:7]
    theta_g, mean_g = baseline.theta_g, 200 * baseline.rate("A+B", "additive")
    x_ng = np.asarray(screen.adata.X)[rows]
    expected_n = nbinom.logpmf(x_ng, theta_g, theta_g / (theta_g + mean_g)).sum(1)
    np.testing.assert_allclose(-baseline.nll(rows, "additive"), expected_n)


def test_the_right_rates_are_most_likely(screen, seen):
    rows = np.flatnonzero(screen.condition_n == screen.conditions.index("A+B"))
    baseline = CountBaseline(screen, seen)
    score = {rates: baseline.nll(rows, rates).mean() for rates in RATES}
    assert min(score, key=score.get) == "additive" and max(score, key=score.get) == "control"


def test_what_count_baselines_need(screen, seen):
    values = screen.adata.copy()
    values.X = np.log1p(values.X)
    with pytest.raises(DataError, match="needs counts"):
        CountBaseline(Screen(values, control="control"), seen)
    with pytest.raises(DataError, match="control and perturbed cells"):
        CountBaseline(screen, seen[screen.condition_n[seen] == 0])
