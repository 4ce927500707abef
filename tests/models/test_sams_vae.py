"""SAMS-VAE: its formulas term by term, an exactly solvable limit, and planted shifts."""

import anndata as ad
import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Screen, held_out_combinations
from pyro_causalcell.guides.sams_vae import SAMSVAEGuide
from pyro_causalcell.inference import elbo_terms, fit
from pyro_causalcell.models.sams_vae import PRESETS, SAMSVAE
from pyro_causalcell.predict import effects, graph, predict


@pytest.fixture
def batch() -> Batch:
    """10 of 40 cells, 2 genes, 2 targets; the last two cells carry both."""
    torch.manual_seed(0)
    u_np = torch.zeros(10, 2)
    u_np[3:6, 0] = u_np[6:8, 1] = u_np[8:] = 1.0
    return Batch(
        x_ng=torch.randn(10, 2) + 2 * u_np,
        u_np=u_np,
        library_n1=torch.ones(10, 1),
        batch_nb=torch.zeros(10, 0),
        condition_n=torch.zeros(10, dtype=torch.long),
        index_n=torch.arange(10),
        n_total=40,
    )


GATE = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
SHIFT = torch.tensor([[2.0, -3.0], [0.5, 1.0]])
SETTINGS = {"n_latents": 2, "likelihood": "gaussian", "n_hidden": 4, "norm": "none"}


def _sites(model, batch, **data):
    trace = poutine.trace(poutine.condition(model, data=data)).get_trace(batch)
    trace.compute_log_prob()
    return trace.nodes


def test_priors(batch):
    rate_p = torch.tensor([0.2, 0.6])
    nodes = _sites(SAMSVAE(2, 2, alpha=3.0, **SETTINGS), batch, edge_rate=rate_p, gate=GATE, shift=SHIFT)
    expected = {
        "edge_rate": dist.Beta(1.0, 3.0).log_prob(rate_p).sum(),
        "gate": dist.Bernoulli(rate_p.unsqueeze(-1).expand(2, 2)).log_prob(GATE).sum(),
        "shift": (GATE * dist.Normal(0.0, 1.0).log_prob(SHIFT)).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(nodes[name]["log_prob_sum"], value)
    mean_field = SAMSVAE(2, 2, correlated=False, **SETTINGS)
    nodes = _sites(mean_field, batch, edge_rate=rate_p, gate=GATE, shift=SHIFT)
    torch.testing.assert_close(nodes["shift"]["log_prob_sum"], dist.Normal(0.0, 1.0).log_prob(SHIFT).sum())


def test_cells_sit_at_the_sum_of_their_masked_shifts(batch):
    z = _sites(SAMSVAE(2, 2, **SETTINGS), batch, gate=GATE, shift=SHIFT)["z"]["fn"].base_dist
    torch.testing.assert_close(z.loc[3], torch.tensor([2.0, 0.0]))
    torch.testing.assert_close(z.loc[9], torch.tensor([2.5, 1.0]))
    assert bool((z.loc[:3] == 0).all() and (z.scale == 1).all())


def test_without_a_mask_it_is_the_additive_model(batch):
    settings = SETTINGS | PRESETS["cpa-vae"]
    nodes = _sites(SAMSVAE(2, 2, **settings), batch, shift=SHIFT)
    assert "gate" not in nodes and "edge_rate" not in nodes
    torch.testing.assert_close(nodes["z"]["fn"].base_dist.loc, batch.u_np @ SHIFT)


def test_rate_posterior_is_the_conjugate_update(batch):
    guide = SAMSVAEGuide(2, 2, alpha=3.0, **SETTINGS)
    guide.gate_logit = torch.logit(torch.tensor([[0.9, 0.2], [0.5, 0.5]]))
    beta = poutine.trace(guide).get_trace(batch).nodes["edge_rate"]["fn"].base_dist
    torch.testing.assert_close(beta.concentration1, torch.tensor([2.1, 2.0]))
    torch.testing.assert_close(beta.concentration0, torch.tensor([3.9, 4.0]))


@pytest.mark.parametrize("correlated", [True, False])
def test_encoder_sees_the_shift_only_if_correlated(batch, correlated):
    guide = SAMSVAEGuide(2, 2, correlated=correlated, **SETTINGS)
    moved = batch._replace(u_np=1 - batch.u_np)
    data = {"gate": GATE, "shift": SHIFT}
    basal = []
    for b in (batch, moved):
        z = poutine.trace(poutine.condition(guide, data=data)).get_trace(b).nodes["z"]["fn"].base_dist
        basal.append(z.loc - b.u_np @ (GATE * SHIFT))
    assert torch.allclose(*basal, atol=1e-5) != correlated


class _Same(nn.Module):
    def forward(self, z_nk, batch_nb):
        return z_nk


class _ExactBasal(nn.Module):
    """Posterior of the basal state where x ~ Normal(basal + moved, s): conjugate."""

    def __init__(self, s: float):
        super().__init__()
        self.weight = 1 / (1 + s**2)

    def forward(self, x_nk, batch_nb, moved_nk):
        scale_nk = torch.full_like(x_nk, (1 - self.weight) ** 0.5)
        return self.weight * (x_nk - moved_nk), scale_nk


def test_exact_posterior_gives_the_exact_evidence(batch):
    """One target, x = z + noise: each programme's mask has two states, the rest is Gaussian."""
    s, rate, tau = 0.5, 0.3, 2.0
    one = batch._replace(u_np=batch.u_np[:, :1], n_total=10)
    model = SAMSVAE(2, 1, mask="bernoulli", rate=rate, shift_scale=tau, **SETTINGS)
    guide = SAMSVAEGuide(2, 1, mask="bernoulli", **SETTINGS)
    model.decoder, model.scale_g = _Same(), torch.full((2,), s)
    variance = 1 + s**2
    perturbed_mk = one.x_ng[one.u_np[:, 0] == 1]
    m = len(perturbed_mk)
    open_cov = variance * torch.eye(m) + tau**2
    closed_k = dist.Normal(0.0, variance**0.5).log_prob(perturbed_mk).sum(0) + np.log(1 - rate)
    open_k = dist.MultivariateNormal(torch.zeros(m), open_cov).log_prob(perturbed_mk.T) + np.log(rate)
    precision = 1 / tau**2 + m / variance
    guide.encoder = _ExactBasal(s)
    guide.gate_logit = (open_k - closed_k).unsqueeze(0)
    guide.shift_loc = (perturbed_mk.sum(0) / variance / precision).unsqueeze(0)
    guide.shift_scale = torch.full((1, 2), precision**-0.5)
    control_k = dist.Normal(0.0, variance**0.5).log_prob(one.x_ng[one.u_np[:, 0] == 0]).sum(0)
    evidence = (control_k + torch.logaddexp(closed_k, open_k)).sum()
    for seed in range(5):  # for each draw, whatever its masks
        torch.manual_seed(seed)
        q = poutine.trace(guide).get_trace(one)
        p = poutine.trace(poutine.replay(model, trace=q)).get_trace(one)
        torch.testing.assert_close(p.log_prob_sum() - q.log_prob_sum(), evidence, rtol=1e-4, atol=1e-3)
    with torch.no_grad():
        draws = torch.stack([sum(elbo_terms(model, guide, one).values()) for _ in range(400)])
    assert abs(float(draws.mean() - evidence)) < 4 * float(draws.std()) / 20


@pytest.fixture(scope="module")
def planted() -> Screen:
    """Simulated: A lifts genes 0-3 by 3, B lowers genes 4-7 by 3, C does nothing; 150 cells each, and A+B."""
    rng = np.random.default_rng(0)
    label_n = np.repeat(["non-targeting", "A", "B", "C", "A+B"], [300, 150, 150, 150, 150])
    z_nk = rng.normal(size=(len(label_n), 2))
    z_nk[:, 0] += 3 * np.array(["A" in label.split("+") for label in label_n])
    z_nk[:, 1] -= 3 * np.array(["B" in label.split("+") for label in label_n])
    x_ng = np.repeat(z_nk, 4, axis=1) + 0.5 * rng.normal(size=(len(label_n), 8))
    obs = pd.DataFrame({"target": label_n}, index=[f"cell{i}" for i in range(len(label_n))])
    return Screen(ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(8)])))


def test_planted_shifts_are_found_and_add_up(planted):
    split = held_out_combinations(planted, ["A+B"])
    settings = {"n_latents": 3, "n_hidden": 16, "likelihood": "gaussian", "norm": "none", "shift_scale": 3.0}
    settings |= {"mask": "bernoulli", "rate": 0.1}
    training = {"epochs": 120, "batch_size": 64, "lr": 2e-2, "warmup": {"z": 30}, "progress": False}
    trained = fit("sams-vae", None, planted, split=split, device="cpu", **settings, **training)
    edges = graph(trained).pivot(index="perturbation", columns="programme", values="probability")
    assert (edges.loc[["A", "B"]].max(axis=1) > 0.9).all() and (edges.loc["C"] < 0.3).all()
    found = effects(trained, ["A", "B", "C", "A+B"], n_samples=20)["gene_effect"].to_numpy()
    truth = np.repeat([[3, 0], [0, -3], [0, 0], [3, -3]], 4, axis=1)
    assert np.abs(found - truth).max() < 0.7
    cells = predict(trained, ["control", "A+B"], 200)  # the double was never seen
    mean = {c: cells.X[cells.obs["condition"] == c].mean(0) for c in ("control", "A+B")}
    assert np.corrcoef(mean["A+B"] - mean["control"], truth[3])[0, 1] > 0.97
