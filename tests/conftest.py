"""A tiny simulated screen that every room's tests share."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pyro_causalcell.data import Screen

CELLS = {"non-targeting": 100, "A": 60, "B": 60, "C": 60, "D": 60, "A+B": 60}
N_GENES = 20


def _simulate() -> ad.AnnData:
    """400 cells x 20 genes of counts; A and C raise genes 0-4, B lowers genes 5-9, D does nothing."""
    rng = np.random.default_rng(0)
    label_n = np.repeat(list(CELLS), list(CELLS.values()))
    shift_tg = {
        "A": np.zeros(N_GENES),
        "B": np.zeros(N_GENES),
        "C": np.zeros(N_GENES),
        "D": np.zeros(N_GENES),
    }
    shift_tg["A"][:5] = shift_tg["C"][:5] = 1.2
    shift_tg["B"][5:10] = -1.2
    log_mean_g = rng.normal(1.5, 0.5, N_GENES)
    guide_number_n = rng.integers(1, 3, len(label_n))
    batch_n = rng.choice(["b1", "b2"], len(label_n))
    rate_ng = np.empty((len(label_n), N_GENES))
    guide_n = []
    for n, label in enumerate(label_n):
        targets = [] if label == "non-targeting" else label.split("+")
        guide_n.append("+".join(f"{t}_g{guide_number_n[n]}" for t in targets) or f"nt_g{guide_number_n[n]}")
        shift_g = sum((shift_tg[t] for t in targets), np.zeros(N_GENES))
        rate_ng[n] = np.exp(log_mean_g + shift_g + 0.2 * (batch_n[n] == "b2") + rng.normal(0, 0.2))
    counts_ng = rng.poisson(rate_ng * rng.gamma(5.0, 0.2, rate_ng.shape))
    order = rng.permutation(len(label_n))
    obs = pd.DataFrame(
        {"target": label_n, "guide": guide_n, "batch": batch_n},
        index=[f"cell{n}" for n in range(len(label_n))],
    )
    adata = ad.AnnData(
        sparse.csr_matrix(counts_ng[order].astype(np.float32)),
        obs=obs.iloc[order],
        var=pd.DataFrame(index=[f"gene{g}" for g in range(N_GENES)]),
    )
    for column in obs:
        adata.obs[column] = adata.obs[column].astype("category")
    return adata


@pytest.fixture(scope="session")
def _tiny() -> ad.AnnData:
    return _simulate()


@pytest.fixture
def tiny_adata(_tiny: ad.AnnData) -> ad.AnnData:
    """400 cells x 20 genes of counts (CSR); obs target, guide, batch. A test may change its copy."""
    return _tiny.copy()


@pytest.fixture
def tiny_screen(tiny_adata: ad.AnnData) -> Screen:
    """The screen of ``tiny_adata``: 6 conditions, 4 targets, 2 batches."""
    return Screen(tiny_adata, batch="batch", guide="guide")
