"""Amortised guide of the conditional VAE."""

import pyro
import pyro.distributions as dist
from pyro.nn import PyroModule

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import Likelihood
from pyro_causalcell.nets import Activation, Encoder, Norm

__all__ = ["ConditionalVAEGuide"]


class ConditionalVAEGuide(PyroModule):
    """q(z | x, u): an encoder that sees the cell, its perturbation and its batch.

    Args:
        n_genes, n_targets, n_batches: Sizes of the screen.
        n_latents, likelihood: As in the model.
        n_hidden, n_layers, norm, dropout, activation: of the encoder.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        *,
        n_latents: int = 10,
        likelihood: Likelihood = "nb",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.encoder = Encoder(
            n_genes,
            n_latents,
            n_targets + n_batches,
            log_input=likelihood != "gaussian",
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            dropout=dropout,
            activation=activation,
        )

    def forward(self, batch: Batch) -> None:
        """q(z | x, u) inside the cells plate."""
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk, scale_nk = self.encoder(batch.x_ng, batch.u_np, batch.batch_nb)
            pyro.sample("z", dist.Normal(loc_nk, scale_nk).to_event(1))  # q(z | x, u)
