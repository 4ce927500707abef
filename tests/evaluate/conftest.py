"""One small fit that several files of this folder read."""

import anndata as ad
import pytest

from pyro_causalcell.data import Screen
from pyro_causalcell.inference import Fit, fit

SMALL = {"n_latents": 3, "n_hidden": 16, "epochs": 20, "warm_start": 0, "lr": 1e-2, "batch_size": 64}
SMALL |= {"progress": False, "device": "cpu"}


@pytest.fixture(scope="session")
def small_screen(_tiny: ad.AnnData) -> Screen:
    return Screen(_tiny, batch="batch")


@pytest.fixture(scope="session")
def small_fit(small_screen: Screen) -> Fit:
    """Gates with a posterior, and a shift of its own for A with B."""
    return fit("sparse-shift", None, small_screen, interactions=((0, 1),), **SMALL)
