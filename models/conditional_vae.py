"""Conditional VAE: the decoder is told the perturbation."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import Likelihood, measurement, spread
from pyro_causalcell.nets import Activation, Decoder, Norm

__all__ = ["ConditionalVAE"]


class ConditionalVAE(PyroModule):
    r"""Conditional VAE: programmes know nothing of the perturbation, the decoder knows all of it.

    .. math::
        z_n &\sim \mathrm{Normal}(0, I) && \text{programmes} \\
        x_{ng} &\sim \mathrm{NB}(\ell_n\, \mathrm{softmax}_g f(z_n, u_n, b_n),\; \theta_g) && \text{counts}

    Nothing ties f at an unseen combination to f at its parts but the smoothness of the net: a baseline
    for models that say how perturbations combine. It has no graph.

    Args:
        n_genes, n_targets, n_batches: Sizes of the screen.
        n_latents: Programmes k.
        likelihood: ``"nb"``, ``"zinb"``, ``"poisson"`` (counts) or ``"gaussian"`` (log-normalised values).
        n_hidden, n_layers, norm, activation: of the decoder.

    Source: Sohn et al., NeurIPS 2015; as a baseline for perturbations: Bereket and Karaletsos, NeurIPS 2023.
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
        activation: Activation = "relu",
    ):
        super().__init__()
        self.needs = {"normalised"} if likelihood == "gaussian" else {"counts"}
        self.n_latents = n_latents
        self.decoder = Decoder(
            n_latents,
            n_genes,
            n_targets + n_batches,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            activation=activation,
        )
        self.theta_g, self.scale_g, self.zero_logit_g = spread(likelihood, n_genes)

    def forward(self, batch: Batch) -> Tensor:
        """The generative story of one minibatch; returns the observed or drawn x, shape n, g."""
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            standard = dist.Normal(batch.u_np.new_zeros(batch.n_cells, self.n_latents), 1.0)
            z_nk = pyro.sample("z", standard.to_event(1))  # p(z)
            output_ng = self.decoder(z_nk, torch.cat([batch.u_np, batch.batch_nb], -1))
            p_x = measurement(output_ng, batch.library_n1, self.theta_g, self.scale_g, self.zero_logit_g)
            x: Tensor = pyro.sample("x", p_x.to_event(1), obs=batch.x_ng)  # p(x | z, u)
            return x
