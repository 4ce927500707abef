"""Template of a model. Copy it, change ``forward``, and fit it: ``fit("my_model.py:TemplateModel", ...)``."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from pyro_causalcell.batch import Batch

__all__ = ["TemplateModel"]


class TemplateModel(PyroModule):
    r"""A Poisson factor model: each perturbation shifts the latent programmes.

    .. math::
        z_n &\sim \mathrm{Normal}(\textstyle\sum_p u_{np}\, \mu_p,\; 1) && \text{programme activity} \\
        x_{ng} &\sim \mathrm{Poisson}(\ell_n\, \mathrm{softmax}_g(W z_n + c)) && \text{counts}

    Args:
        n_genes, n_targets: Sizes of the screen. ``fit`` fills in whichever of ``n_cells``, ``n_genes``,
            ``n_targets``, ``n_batches``, ``target_cells`` are arguments here.
        n_latents: Programmes k. Your own settings look like this one: ``fit(..., n_latents=5)``.
    """

    def __init__(self, n_genes: int, n_targets: int, *, n_latents: int = 10):
        super().__init__()
        self.needs = {"counts"}  # or {"normalised"}: fit checks the screen for it
        self.n_latents = n_latents
        self.shift_pk = PyroParam(0.1 * torch.randn(n_targets, n_latents))  # a parameter: no prior
        self.decoder = nn.Linear(n_latents, n_genes)  # any torch module

    def forward(self, batch: Batch) -> Tensor:
        """The generative story of one minibatch; its tensors are listed in ``batch.py``."""
        # Latents of the whole screen go here, outside the plate. The guide needs the same names.

        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):  # latents of each cell
            loc_nk = batch.u_np @ self.shift_pk  # control cells have u = 0
            z_nk = pyro.sample("z", dist.Normal(loc_nk, 1.0).to_event(1))  # p(z | u)

            # batch.x_ng is None when cells are to be predicted: then x is drawn.
            mean_ng = batch.library_n1 * self.decoder(z_nk).softmax(-1)
            x: Tensor = pyro.sample("x", dist.Poisson(mean_ng).to_event(1), obs=batch.x_ng)  # p(x | z)
            return x
