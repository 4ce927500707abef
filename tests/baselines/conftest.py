"""Simulated time courses that the tests of predictors over time share."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.data import Screen


def _screen(cells, genes=None, **settings):
    """A screen of given cells: (condition, time) to an array [n, g]."""
    x_ng = np.concatenate(list(cells.values()))
    labels = [pair for pair, x in cells.items() for _ in x]
    obs = pd.DataFrame(labels, columns=["target", "time"], index=[f"cell{n}" for n in range(len(x_ng))])
    genes = [f"g{g}" for g in range(x_ng.shape[1])] if genes is None else genes
    adata = ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=genes))
    return Screen(adata, control="control", time="time", **settings)


@pytest.fixture
def course():
    """Builds a screen from cells: (condition, time) to an array [n, g]."""
    return _screen


@pytest.fixture
def course_of_means():
    """Builds a screen of four cells per condition and time with exactly these means, [g] each."""
    offset_n1 = np.array([-0.25, -0.125, 0.125, 0.25])[:, None]

    def build(means, **settings):
        return _screen({pair: offset_n1 + np.asarray(mean) for pair, mean in means.items()}, **settings)

    return build


@pytest.fixture
def rising():
    """Simulated counts, 60 cells per condition and time, 20 genes, times 1 to 4.

    Log rates approach their target as 1 - exp(-t / 2); A and B have effects of their own, C is A + B.
    """
    rng = np.random.default_rng(0)
    base_g, a_g, b_g = rng.normal(2, 0.5, 20), rng.normal(0, 1, 20), rng.normal(0, 1, 20)
    ends = {"control": np.zeros(20), "A": a_g, "B": b_g, "A+B": a_g + b_g}
    return _screen(
        {
            (name, float(t)): rng.poisson(
                np.exp(base_g + end_g * (1 - np.exp(-t / 2)) + 0.2 * rng.normal(size=(60, 20)))
            )
            for name, end_g in ends.items()
            for t in (1, 2, 3, 4)
        }
    )
