"""One small fit that every test of this folder reads, with edges set by hand."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_causalcell.data import Screen
from pyro_causalcell.inference import Fit, fit

SETTINGS = {"n_latents": 3, "n_hidden": 16, "epochs": 12, "warm_start": 0, "progress": False, "device": "cpu"}
SETTINGS |= {"lr": 1e-2, "batch_size": 32}


def _adata(seed: int = 0) -> ad.AnnData:
    """300 cells x 15 genes of counts: control, A, B, C, A+B, in two batches."""
    rng = np.random.default_rng(seed)
    labels = np.tile(["non-targeting", "non-targeting", "A", "B", "C", "A+B"], 50)
    z_nk = rng.normal(size=(300, 3))
    for column, target in enumerate(("A", "B")):
        z_nk[:, column] += 2.5 * np.array([target in str(label).split("+") for label in labels])
    x_ng = rng.poisson(np.exp(0.4 * z_nk @ rng.normal(size=(3, 15)) + 1.5)).astype(np.float32)
    obs = pd.DataFrame({"target": labels, "batch": np.tile(["b1", "b2", "b2"], 100)})
    obs.index = [f"cell{i}" for i in range(300)]
    return ad.AnnData(x_ng, obs, pd.DataFrame(index=[f"gene{i}" for i in range(15)]))


@pytest.fixture(scope="session")
def predict_adata() -> ad.AnnData:
    return _adata()


@pytest.fixture(scope="session")
def screen(predict_adata) -> Screen:
    return Screen(predict_adata, batch="batch")


@pytest.fixture(scope="session")
def _trained(screen) -> Fit:
    return fit("sparse-shift", None, screen, gates="posterior", interactions=((0, 1),), **SETTINGS)


@pytest.fixture
def trained(_trained) -> Fit:
    """A: programme 1 by +2, B: programme 2 by -3, A with B: 1.5 more on programme 3; C: surely nothing."""
    guide = _trained.guide
    logit_pk, shift_pk = torch.full((4, 3), -30.0), torch.zeros(4, 3)
    logit_pk[0, 0] = logit_pk[1, 1] = logit_pk[3, 2] = 30.0
    shift_pk[0, 0], shift_pk[1, 1], shift_pk[3, 2] = 2.0, -3.0, 1.5
    guide.gate_logit, guide.shift_loc = logit_pk, shift_pk
    guide.shift_scale = torch.full((4, 3), 0.05)
    return _trained


@pytest.fixture(scope="session")
def gaussian_fit(predict_adata) -> tuple[Fit, Screen]:
    adata = predict_adata.copy()
    adata.layers["log"] = np.log1p(adata.X)
    screen = Screen(adata, layer="log")
    return fit("sparse-shift", None, screen, likelihood="gaussian", gates="posterior", **SETTINGS), screen
