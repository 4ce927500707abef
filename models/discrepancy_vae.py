"""Discrepancy-VAE: soft interventions in a linear graph of programmes, matched to cells in distribution."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import Likelihood, ZeroInflatedNegativeBinomial, measurement, spread
from pyro_causalcell.nets import Activation, Decoder, Norm
from pyro_causalcell.penalties import mmd_by_group

__all__ = ["PRESETS", "DiscrepancyVAE"]

PRESETS: dict[str, dict[str, Any]] = {
    "norman": {
        "n_latents": 105,
        "likelihood": "gaussian",
        "epochs": 100,
        "lr": 1e-3,
        "batch_size": 1024,
        "temperature": 5.0,
        "warmup": {"mmd": 50, "z": 50},
    },
    "sena": {"mmd_weight": 1.0, "temperature": 100.0},
}
"""Arguments of ``fit``. ``"norman"``: the sizes and schedule of the paper on Norman 2019. ``"sena"``: what
SENA changes in the model; the other half is the guide's ``gene_sets``."""

BANDWIDTHS = (0.025, 0.1, 0.4, 1.6)
"""Squared widths of the kernels, per gene: a ladder around the variance of a log-normalised gene."""


class DiscrepancyVAE(PyroModule):
    r"""Discrepancy-VAE: a perturbation shifts one programme, and the graph carries the shift on.

    .. math::
        z_n &\sim \mathrm{Normal}(\textstyle\sum_p u_{np}\, s_p\, b_p,\; I)
            && \text{what enters each programme from outside} \\
        b_p &= \mathrm{softmax}(t\, c_p) && \text{the programme that } p \text{ shifts} \\
        v_n &= z_n (I - A)^{-1} && \text{programmes: } v_j = \textstyle\sum_{i<j} v_i A_{ij} + z_j \\
        x_{ng} &\sim \mathrm{NB}(\ell_n\, \mathrm{softmax}_g f(v_n, b_n),\; \theta_g) && \text{counts}

    ======  ===================  ======  ==============================================================
    symbol  name                 shape   meaning
    ======  ===================  ======  ==============================================================
    z       ``z``                n, k    exogenous part of the programmes; its noise is the cell's own
    v       ``programmes(z)``    n, k    programmes, after the graph
    A       ``graph_kk``         k, k    weights of the graph, strictly upper triangular
    c       ``target_logit``     p, k    which programme a perturbation shifts
    s       ``strength_p``       p       by how much
    ======  ===================  ======  ==============================================================

    **Training.** The likelihood is that of control cells alone: every cell comes with a control cell
    (``Batch.control``), which is encoded and decoded. A perturbed cell has no likelihood term. The control
    cell's z is moved as the perturbation says and decoded, and the cells so predicted are compared with the
    measured ones of the same condition by their maximum mean discrepancy:

    .. math::
        \log p(x^{\mathrm{control}}_n) - w \cdot \mathrm{MMD}^2_c\,(\hat x, x) - \lambda\, \|A\|_1
        \quad \text{per cell}

    **Prediction.** A cell without an anchor is explained by the formulas above: its likelihood is p(x | u)
    with z at the shifts of its own perturbation, though training never maximised it. Shifts of several
    targets add in z. The graph is a matter of the order of programmes; ``predict.graph`` gives the targets.

    Cells are compared as log(1 + counts per 10,000) (Gaussian values as they are). Predicted cells are
    draws of p(x | z): they carry the noise of the measurement, as measured cells do.

    Minibatches mix conditions: a condition with fewer than two cells in a minibatch is not compared there,
    so take ``batch_size`` several times the number of conditions.

    Args:
        n_genes, n_targets, n_batches: Sizes of the screen.
        n_latents: Programmes k; the paper takes as many as there are perturbations.
        likelihood: ``"nb"``, ``"zinb"``, ``"poisson"`` (counts) or ``"gaussian"`` (log-normalised values).
        mmd_weight: w, in nats per gene of each cell: the likelihood, too, is a sum over genes.
        sparsity: λ, likewise.
        temperature: t: the larger, the sooner a perturbation has one programme only.
        bandwidths: Squared widths of the kernels, per gene.
        n_hidden, n_layers, norm, activation: of the decoder.

    Source: Zhang et al., NeurIPS 2023, sections 3 and 5.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        *,
        n_latents: int = 10,
        likelihood: Likelihood = "nb",
        mmd_weight: float = 10.0,
        sparsity: float = 1e-3,
        temperature: float = 1.0,
        bandwidths: tuple[float, ...] = BANDWIDTHS,
        n_hidden: int = 128,
        n_layers: int = 1,
        norm: Norm = "none",
        activation: Activation = "leaky_relu",
    ):
        super().__init__()
        self.needs = {"control", "normalised" if likelihood == "gaussian" else "counts"}
        self.n_latents, self.n_genes, self.temperature = n_latents, n_genes, temperature
        self.mmd_weight, self.sparsity, self.bandwidths = mmd_weight, sparsity, tuple(bandwidths)
        self.graph_kk = nn.Parameter(0.1 * torch.randn(n_latents, n_latents))
        self.target_logit = nn.Parameter(0.1 * torch.randn(n_targets, n_latents))
        self.strength_p = nn.Parameter(torch.ones(n_targets))
        self.decoder = Decoder(
            n_latents,
            n_genes,
            n_batches,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            activation=activation,
        )
        self.theta_g, self.scale_g, self.zero_logit_g = spread(likelihood, n_genes)

    def forward(self, batch: Batch) -> Tensor:
        """The generative story of one minibatch; returns the observed or drawn x, shape n, g."""
        explained = batch.control or batch  # control cells in training, the cells themselves elsewhere
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nk = pyro.sample("z", dist.Normal(self.shifts(explained.u_np), 1.0).to_event(1))  # p(z | u)
            p_x = self.measurement(z_nk, explained)
            x: Tensor = pyro.sample("x", p_x.to_event(1), obs=explained.x_ng)  # p(x | z)
        if batch.control is not None:
            self.discrepancy(z_nk, batch)
            l1 = self.graph_kk.triu(1).abs().sum()
            pyro.factor("sparsity", -self.sparsity * self.n_genes * batch.n_total * l1)
        return x

    def discrepancy(self, z_nk: Tensor, batch: Batch) -> None:
        """Charge what distinguishes the control cells, moved, from the cells measured under the move."""
        assert batch.x_ng is not None
        z_nk = z_nk.reshape(-1, *z_nk.shape[-2:])[0]  # of several particles one will do
        predicted_ng = self.drawn(z_nk + self.shifts(batch.u_np), batch)
        measured_ng = self.compared(batch.x_ng, batch.library_n1)
        group_n = batch.condition_n
        mmd = mmd_by_group(predicted_ng, group_n, measured_ng, group_n, self.bandwidths)
        pyro.factor("mmd", -self.mmd_weight * self.n_genes * batch.n_total * mmd)

    def drawn(self, z_nk: Tensor, batch: Batch) -> Tensor:
        """Draws of p(x | z) in the values that are compared, with a gradient.

        That of a Poisson draw is what one more count would change: ∂E f(x)/∂λ = E[f(x + 1) − f(x)], and that
        of a count that is kept with probability s what its loss would: ∂E f(x)/∂s = E[f(x)] − f(0), f(0) = 0.
        """
        p_x = self.measurement(z_nk, batch)
        if self.scale_g is not None:
            return p_x.rsample()
        counts, kept_ng = p_x, torch.ones(())
        if isinstance(p_x, ZeroInflatedNegativeBinomial):
            counts, kept_g = p_x.counts, torch.sigmoid(-p_x.zero_logit)
            kept_ng = torch.bernoulli(kept_g.expand(p_x.batch_shape)) + kept_g - kept_g.detach()
        rate_ng = counts.mean
        if self.theta_g is not None:
            theta_ng = self.theta_g.expand_as(rate_ng)
            rate_ng = rate_ng * dist.Gamma(theta_ng, theta_ng).rsample()
        x_ng = torch.poisson(rate_ng.detach())
        here_ng, above_ng = (self.compared(x, batch.library_n1) for x in (x_ng, x_ng + 1))
        return kept_ng * (here_ng + (above_ng - here_ng) * (rate_ng - rate_ng.detach()))

    def compared(self, x_ng: Tensor, library_n1: Tensor) -> Tensor:
        """Values in which cells are compared."""
        return x_ng if self.scale_g is not None else torch.log1p(x_ng / library_n1 * 1e4)

    def shifts(self, u_np: Tensor) -> Tensor:
        """What the perturbations of each cell add to z, shape n, k."""
        return u_np @ (self.strength_p.unsqueeze(-1) * self.targets)

    @property
    def targets(self) -> Tensor:
        """b: share of each programme in what a perturbation shifts, p, k; rows sum to 1."""
        return (self.temperature * self.target_logit).softmax(-1)

    @property
    def total_effects(self) -> Tensor:
        """What a unit that enters programme i does to programme j, all paths together: (I − A)⁻¹."""
        identity_kk = torch.eye(self.n_latents, device=self.graph_kk.device)
        return torch.linalg.solve_triangular(
            identity_kk - self.graph_kk.triu(1), identity_kk, upper=True, unitriangular=True
        )

    def programmes(self, z_nk: Tensor) -> Tensor:
        """v: programmes after the graph, n, k."""
        return z_nk @ self.total_effects

    def measurement(self, z_nk: Tensor, batch: Batch) -> dist.TorchDistribution:
        """p(x | z): counts or Gaussian values around what the decoder makes of the programmes."""
        output_ng = self.decoder(self.programmes(z_nk), batch.batch_nb)
        return measurement(output_ng, batch.library_n1, self.theta_g, self.scale_g, self.zero_logit_g)

    # ``predict.graph`` asks a model without a latent "shift" for these two

    @property
    def gate_logit(self) -> Tensor:
        """log-odds of the targets, p, k."""
        return torch.logit(self.targets, eps=1e-6)

    @property
    def shift(self) -> Tensor:
        """Strength of each perturbation, p, k."""
        return self.strength_p.unsqueeze(-1).expand_as(self.target_logit)
