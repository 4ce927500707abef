"""Importance-weighted likelihood against a model whose marginal likelihood is known."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from torch.distributions import constraints

from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.evaluate import iw_nll, likelihood
from pyro_causalcell.evaluate.likelihood import Proposal
from pyro_causalcell.inference import Fit, fit
from pyro_causalcell.predict import global_means


class Linear(PyroModule):
    """z ~ N(u @ shift, 1), x ~ N(z @ loading, scale)."""

    def __init__(self, n_genes, n_targets):
        super().__init__()
        self.needs, self.n_latents = {"normalised"}, 2
        self.loading_kg = PyroParam(torch.randn(2, n_genes))
        self.shift_pk = PyroParam(torch.randn(n_targets, 2))
        self.scale = PyroParam(torch.tensor(0.7), constraint=constraints.positive)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nk = pyro.sample("z", dist.Normal(batch.u_np @ self.shift_pk, 1.0).to_event(1))
            return pyro.sample(
                "x", dist.Normal(z_nk @ self.loading_kg, self.scale).to_event(1), obs=batch.x_ng
            )


class LinearGuide(PyroModule):
    """q(z | x, u): linear, with free scales; width spoils it."""

    width = 1.0

    def __init__(self, n_genes, n_targets):
        super().__init__()
        self.loc = torch.nn.Linear(n_genes + n_targets, 2)
        self.scale_k = PyroParam(torch.full((2,), 0.5), constraint=constraints.positive)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk = self.loc(torch.cat([batch.x_ng, batch.u_np], -1))
            pyro.sample("z", dist.Normal(loc_nk, self.scale_k * self.width).to_event(1))


@pytest.fixture(scope="module")
def screen() -> Screen:
    rng = np.random.default_rng(0)
    label_n = np.repeat(["non-targeting", "A", "B"], 40)
    z_nk = rng.normal(size=(120, 2)) + np.repeat([[0, 0], [2, 0], [0, -2]], 40, 0)
    x_ng = z_nk @ rng.normal(size=(2, 5)) + 0.5 * rng.normal(size=(120, 5))
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(120)])
    return Screen(ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(5)])))


@pytest.fixture(scope="module")
def linear(screen) -> Fit:
    return fit(Linear, LinearGuide, screen, epochs=100, lr=2e-2, batch_size=60, progress=False, device="cpu")


def _exact(linear: Fit, screen: Screen) -> np.ndarray:
    model = linear.model
    batch = next(iter(Minibatches(screen, np.arange(screen.n_cells), 1000, shuffle=False)))
    w_kg = model.loading_kg
    covariance = w_kg.T @ w_kg + model.scale**2 * torch.eye(5)
    marginal = dist.MultivariateNormal(batch.u_np @ model.shift_pk @ w_kg, covariance)
    return -marginal.log_prob(batch.x_ng).detach().numpy()


def test_equals_the_exact_likelihood_within_its_stated_error(linear, screen):
    result = iw_nll(linear, screen, n_particles=2000, seed=1)
    exact_n = _exact(linear, screen)
    z_n = (result["nll"].values - exact_n) / result["mc_se"].values
    trusted = result["pareto_k"].values < 0.7
    assert trusted.mean() > 0.8
    assert np.abs(z_n[trusted]).max() < 4.5 and 0.6 < z_n[trusted].std() < 1.5
    assert abs(result["nll"].mean() - exact_n.mean()) < 0.02


def test_the_bound_rises_with_particles(linear, screen):
    exact = _exact(linear, screen).mean()
    nll = [
        np.mean([float(iw_nll(linear, screen, n_particles=t, seed=s)["nll"].mean()) for s in range(3)])
        for t in (1, 10, 1000)
    ]
    assert nll[0] > nll[1] > nll[2] - 1e-3 and abs(nll[2] - exact) < 0.05


def test_a_bad_proposal_says_so(linear, screen, monkeypatch):
    good = iw_nll(linear, screen, n_particles=300)
    monkeypatch.setattr(LinearGuide, "width", 0.2)  # too narrow: heavy-tailed weights
    bad = iw_nll(linear, screen, n_particles=300)
    assert float(bad["pareto_k"].mean()) > float(good["pareto_k"].mean()) + 0.3
    assert float(bad["mc_se"].mean()) > 2 * float(good["mc_se"].mean())
    assert float(bad["ess"].mean()) < float(good["ess"].mean()) and bool((good["ess"] <= 300.5).all())


def test_what_comes_back(linear, screen):
    rows = np.array([100, 3, 50])
    result = iw_nll(linear, screen, rows, n_particles=20)
    assert result["cell"].values.tolist() == ["cell100", "cell3", "cell50"]
    assert result["condition"].values.tolist() == ["B", "control", "A"]
    assert set(result) == {"nll", "pareto_k", "ess", "mc_se"} and result.attrs["n_particles"] == 20


def test_memory_budget_changes_draws_and_nothing_else(linear, screen):
    wide = iw_nll(linear, screen, n_particles=1500, memory_budget_gb=0.5)
    tight = iw_nll(linear, screen, n_particles=1500, memory_budget_gb=1e-4)
    gap_n = (wide["nll"] - tight["nll"]).values / np.hypot(wide["mc_se"], tight["mc_se"]).values
    assert abs(gap_n.mean()) < 0.5 and gap_n.std() < 2


@pytest.mark.parametrize("n_rounds", [0, 2])
def test_particles_scored_together_do_not_matter(tiny_screen, monkeypatch, n_rounds):
    """The same draws have the same weights, one by one, some at a time, and all at once."""
    f = fit("sparse-shift", None, tiny_screen, gates="posterior", **SMALL)
    fixed = global_means(f)
    model, guide = (poutine.condition(m, data=fixed) for m in (f.model, f.guide))
    batch = next(iter(Minibatches(tiny_screen, np.arange(6), 6, shuffle=False)))
    found = []
    for particles in (5, 40, 400):
        monkeypatch.setattr(likelihood, "VALUES_AT_ONCE", particles * 6 * tiny_screen.n_genes)
        torch.manual_seed(0)
        proposal = Proposal(model, guide, batch, batch)
        proposal.fit(n_rounds)
        assert proposal.piece == particles * torch.get_num_threads()
        found.append(torch.cat([weight_sn for weight_sn, _ in proposal.particles(300)]))
    assert found[0].shape == (300, 6)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=2e-3)


def test_particles_that_are_drawn_together_fit_the_budget(tiny_screen):
    """By hand: 600 values hold 25 draws of 6 cells with 2 × 2 covariances."""
    f = fit("sparse-shift", None, tiny_screen, gates="closed", **SMALL)
    batch = next(iter(Minibatches(tiny_screen, np.arange(6), 6, shuffle=False)))
    assert Proposal(f.model, f.guide, batch, batch, memory_budget_gb=24 * 600 / 2**30).step == 25
    assert Proposal(f.model, f.guide, batch, batch).step == 1000


def test_cells_that_are_scored_together(monkeypatch):
    """By hand: a cache of 4000 values on one thread holds 250 particles of 10 genes of one cell."""
    monkeypatch.setattr(likelihood, "VALUES_AT_ONCE", 4000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert likelihood._cells_per_chunk(10, 5000, cpu, 0.5) == 1
    assert likelihood._cells_per_chunk(10, 20, cpu, 0.5) == 20
    assert likelihood._cells_per_chunk(10, 20, cpu, 24 * 600 / 2**30) == 3  # the budget holds 600 values
    assert likelihood._cells_per_chunk(10, 20, gpu, 24 * 40_000 / 2**30) == 200  # no cache to respect


def test_seed_and_outer_stream(linear, screen):
    state = torch.get_rng_state()
    first, again, other = (iw_nll(linear, screen, n_particles=5, seed=s) for s in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)
    assert torch.equal(torch.get_rng_state(), state)


SMALL = {
    "n_latents": 2,
    "n_hidden": 8,
    "epochs": 4,
    "warm_start": 0,
    "batch_size": 64,
    "progress": False,
    "device": "cpu",
}


@pytest.mark.parametrize("gates", ["posterior", "open", "closed", "sampled"])
def test_members_of_the_family_are_scored(tiny_screen, gates):
    f = fit("sparse-shift", None, tiny_screen, gates=gates, **SMALL)
    rows = np.arange(30)
    one, many = (iw_nll(f, tiny_screen, rows, n_particles=t)["nll"] for t in (1, 300))
    assert np.isfinite(one).all() and np.isfinite(many).all() and float(many.mean()) < float(one.mean())


def test_minibatches_do_not_matter(tiny_screen):
    """A cell's likelihood has no plate scale in it, whichever cells are scored beside it."""
    f = fit("sparse-shift", None, tiny_screen, gates="posterior", **SMALL)
    together = iw_nll(f, tiny_screen, np.arange(40), n_particles=800)
    alone = iw_nll(f, tiny_screen, np.arange(5), n_particles=800, seed=5)
    gap_n = (together["nll"][:5].values - alone["nll"].values) / np.hypot(
        together["mc_se"][:5], alone["mc_se"]
    ).values
    assert np.abs(gap_n).max() < 6


@pytest.mark.gpu
def test_on_a_gpu(tiny_screen):
    f = fit("sparse-shift", None, tiny_screen, **SMALL | {"device": "cuda"})
    assert np.isfinite(iw_nll(f, tiny_screen, np.arange(20), n_particles=50)["nll"]).all()
