"""Conditional VAE: what the nets see, an exactly solvable limit, and means that it must learn."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_causalcell.batch import Batch
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.guides.conditional_vae import ConditionalVAEGuide
from pyro_causalcell.inference import fit
from pyro_causalcell.models.conditional_vae import ConditionalVAE
from pyro_causalcell.predict import effects, graph


@pytest.fixture
def batch() -> Batch:
    """6 cells, 4 genes, 2 targets, 2 batch columns; the last cell carries both targets."""
    torch.manual_seed(0)
    u_np = torch.tensor([[0.0, 0], [0, 0], [1, 0], [1, 0], [0, 1], [1, 1]])
    return Batch(
        x_ng=torch.poisson(torch.full((6, 4), 5.0)),
        u_np=u_np,
        library_n1=torch.full((6, 1), 20.0),
        batch_nb=torch.eye(2)[torch.arange(6) % 2],
        condition_n=torch.zeros(6, dtype=torch.long),
        index_n=torch.arange(6),
        n_total=6,
    )


SETTINGS = {"n_latents": 2, "n_hidden": 4, "norm": "none"}


def test_programmes_know_nothing_of_the_perturbation_and_the_decoder_all(batch):
    model, z_nk = ConditionalVAE(4, 2, 2, **SETTINGS), torch.randn(6, 2)
    nodes = poutine.trace(poutine.condition(model, data={"z": z_nk})).get_trace(batch).nodes
    z, x = (nodes[site]["fn"].base_dist for site in ("z", "x"))
    assert bool((z.loc == 0).all() and (z.scale == 1).all())
    output_ng = model.decoder(z_nk, torch.cat([batch.u_np, batch.batch_nb], -1))  # a double: both columns
    torch.testing.assert_close(x.mean, 20 * output_ng.softmax(-1))
    assert torch.unique(x.mean[[0, 2, 4]], dim=0).shape[0] == 3


def test_encoder_sees_the_perturbation(batch):
    guide = ConditionalVAEGuide(4, 2, 2, **SETTINGS)
    other = batch._replace(u_np=1 - batch.u_np)
    locs = [poutine.trace(guide).get_trace(b).nodes["z"]["fn"].base_dist.loc for b in (batch, other)]
    assert not torch.allclose(*locs)


class _Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.z, self.u = nn.Linear(1, 4, bias=False), nn.Linear(2, 4)

    def forward(self, z_nk, extra):
        return self.z(z_nk) + self.u(extra)


def test_exact_posterior_gives_the_exact_likelihood(batch):
    """A linear decoder and one programme: x | u is Gaussian with a known covariance."""
    batch = batch._replace(batch_nb=torch.zeros(6, 0))
    model = ConditionalVAE(4, 2, n_latents=1, likelihood="gaussian")
    guide = ConditionalVAEGuide(4, 2, n_latents=1, likelihood="gaussian")
    model.decoder, model.scale_g = _Linear(), torch.full((4,), 0.7)
    w_g, mean_ng = model.decoder.z.weight[:, 0], model.decoder.u(batch.u_np)
    precision = 1 + w_g @ w_g / 0.49
    loc_n1 = ((batch.x_ng - mean_ng) @ w_g / 0.49 / precision).unsqueeze(-1)
    guide.encoder.forward = lambda *_: (loc_n1, precision.rsqrt().expand_as(loc_n1))
    covariance = torch.outer(w_g, w_g) + 0.49 * torch.eye(4)
    expected = dist.MultivariateNormal(mean_ng, covariance).log_prob(batch.x_ng).sum()
    q = poutine.trace(guide).get_trace(batch)
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(batch)
    torch.testing.assert_close(p.log_prob_sum() - q.log_prob_sum(), expected, rtol=1e-4, atol=1e-3)


def test_planted_effects_are_found_and_there_is_no_graph(tiny_screen):
    """Simulated: A raises genes 0-4 and B lowers genes 5-9, by 1.2 nats before normalisation."""
    settings = {"n_latents": 2, "n_hidden": 16, "epochs": 60, "batch_size": 64, "lr": 1e-2}
    trained = fit("conditional-vae", None, tiny_screen, progress=False, device="cpu", **settings)
    found = effects(trained, ["A", "B", "D"], n_samples=1, n_cells=200)["gene_effect"].to_numpy()
    rest = slice(10, None)
    up, down = found[0, :5] - found[0, rest].mean(), found[1, 5:10] - found[1, rest].mean()
    np.testing.assert_allclose(up, 1.2 / np.log(2), atol=0.6)
    np.testing.assert_allclose(down, -1.2 / np.log(2), atol=0.6)
    assert np.abs(found[2]).mean() < 0.2
    with pytest.raises(PredictionError, match="no graph"):
        graph(trained)
