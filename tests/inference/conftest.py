"""Small minibatches, pairs whose exact answer is known, and a fast fit."""

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Screen
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.models.sparse_shift import SparseShift


@pytest.fixture
def batch() -> Batch:
    """12 of 60 cells, 6 genes, 3 targets (multi-hot), 2 batch columns."""
    generator = torch.Generator().manual_seed(0)
    u_np = torch.zeros(12, 3)
    u_np[2:5, 0] = u_np[5:8, 1] = u_np[7:10, 2] = 1.0
    x_ng = torch.poisson(torch.rand(12, 6, generator=generator) * 8, generator=generator)
    return Batch(
        x_ng=x_ng,
        u_np=u_np,
        library_n1=x_ng.sum(1, keepdim=True).clamp(min=1),
        batch_nb=torch.eye(2)[torch.arange(12) % 2],
        condition_n=torch.zeros(12, dtype=torch.long),
        index_n=torch.arange(12) * 5,
        n_total=60,
    )


@pytest.fixture
def build(batch: Batch) -> Callable[..., tuple[SparseShift, SparseShiftGuide]]:
    """A small sparse shift pair with the sizes of ``batch``; settings as in the classes."""

    def _build(guide: dict | None = None, **settings) -> tuple[SparseShift, SparseShiftGuide]:
        torch.manual_seed(1)
        sizes = {"n_genes": 6, "n_targets": 3, "n_batches": 2, "n_latents": 4, "n_hidden": 8, "norm": "layer"}
        model_only = {k: settings.pop(k) for k in ("min_effect", "shift_scale", "sparsity") if k in settings}
        both = sizes | settings
        model = SparseShift(target_cells=(15.0, 15.0, 15.0), **both, **model_only)
        return model, SparseShiftGuide(**both, **(guide or {}))

    return _build


class LinearGaussian(PyroModule):
    """z ~ N(u @ shift, 1), x ~ N(z @ loading, scale): every marginal is a Normal with a known density."""

    def __init__(self, n_genes: int, n_targets: int, n_latents: int = 2):
        super().__init__()
        self.needs = {"normalised"}
        self.n_latents = n_latents
        self.loading_kg = PyroParam(torch.randn(n_latents, n_genes))
        self.shift_pk = PyroParam(torch.randn(n_targets, n_latents))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def forward(self, batch: Batch) -> Tensor:
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nk = pyro.sample("z", dist.Normal(batch.u_np @ self.shift_pk, 1.0).to_event(1))
            x = dist.Normal(z_nk @ self.loading_kg, self.scale)
            return pyro.sample("x", x.to_event(1), obs=batch.x_ng)

    def exact_nll(self, batch: Batch) -> Tensor:
        """−log p(x | u) of each cell."""
        w_kg = self.loading_kg
        covariance = w_kg.T @ w_kg + self.scale**2 * torch.eye(w_kg.shape[1])
        marginal = dist.MultivariateNormal(batch.u_np @ self.shift_pk @ w_kg, covariance)
        return -marginal.log_prob(batch.x_ng).detach()


class LinearGuide(PyroModule):
    """q(z | x, u): a linear map of x and u and free scales; it can represent the exact posterior's mean."""

    def __init__(self, n_genes: int, n_targets: int, n_latents: int = 2):
        super().__init__()
        self.loc = torch.nn.Linear(n_genes + n_targets, n_latents)
        self.scale_k = PyroParam(torch.full((n_latents,), 0.5), constraint=constraints.positive)

    def forward(self, batch: Batch) -> None:
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk = self.loc(torch.cat([batch.x_ng, batch.u_np], -1))
            pyro.sample("z", dist.Normal(loc_nk, self.scale_k).to_event(1))


@pytest.fixture
def linear_gaussian() -> tuple[type[LinearGaussian], type[LinearGuide]]:
    return LinearGaussian, LinearGuide


@pytest.fixture
def gaussian_screen() -> Screen:
    """120 cells x 5 genes of normalised values: control, A, B."""
    rng = np.random.default_rng(0)
    label_n = np.repeat(["non-targeting", "A", "B"], 40)
    z_nk = rng.normal(size=(120, 2)) + np.repeat([[0, 0], [2, 0], [0, -2]], 40, 0)
    x_ng = z_nk @ rng.normal(size=(2, 5)) + 0.5 * rng.normal(size=(120, 5))
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(120)])
    var = pd.DataFrame(index=[f"gene{i}" for i in range(5)])
    return Screen(ad.AnnData(x_ng.astype(np.float32), obs, var))


@pytest.fixture
def quick() -> dict:
    """Settings of a fit that takes a second and whose numbers do not depend on defaults."""
    return {
        "n_latents": 3,
        "n_hidden": 8,
        "epochs": 3,
        "warm_start": 0,
        "batch_size": 64,
        "lr": 5e-3,
        "lr_drops": 0,
        "progress": False,
        "device": "cpu",
    }
