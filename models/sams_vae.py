"""SAMS-VAE: each perturbation adds a sparse shift to the basal state of a cell; CPA-VAE: a dense one."""

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import Gate, GatedNormal, Likelihood, measurement, spread
from pyro_causalcell.embeddings import expected_effects, expected_gates, where_open
from pyro_causalcell.nets import Activation, Decoder, Norm

__all__ = ["PRESETS", "SAMSVAE"]

Mask = Literal["beta", "bernoulli", "none"]

PRESETS: dict[str, dict[str, Any]] = {
    "cpa-vae": {"mask": "none"},
    "norman": {
        "mask": "bernoulli",
        "rate": 0.01,
        "n_latents": 200,
        "n_hidden": 400,
        "activation": "leaky_relu",
        "batch_size": 512,
        "lr": 3e-4,
    },
}
"""Arguments of ``fit``: ``fit("sams-vae", None, screen, **PRESETS["cpa-vae"])``. ``"cpa-vae"``: every
perturbation moves every programme, as the compositional perturbation autoencoder has it. ``"norman"``: the
sizes and rates of the paper on Norman 2019."""


class SAMSVAE(PyroModule):
    r"""Sparse additive mechanism shift: a cell is its basal state and the sum of its perturbations' shifts.

    .. math::
        \pi_p &\sim \mathrm{Beta}(1, \alpha) && \text{share of programmes that } p \text{ moves} \\
        m_{pk} &\sim \mathrm{Bernoulli}(\pi_p) && \text{the mask: does } p \text{ move programme } k? \\
        e_{pk} &\sim \mathrm{Normal}(0, \tau) && \text{by how much} \\
        z^{\mathrm{basal}}_n &\sim \mathrm{Normal}(0, I) && \text{the cell without perturbation} \\
        z_n &= z^{\mathrm{basal}}_n + \textstyle\sum_p u_{np}\, m_p \odot e_p && \text{programmes} \\
        x_{ng} &\sim \mathrm{NB}(\ell_n\, \mathrm{softmax}_g f(z_n, b_n),\; \theta_g) && \text{counts}

    ======  =============  ======  ====================================================================
    symbol  name           shape   meaning
    ======  =============  ======  ====================================================================
    π       ``edge_rate``  p       share of open edges (``mask="beta"``)
    m       ``gate``       p, k    1 where the perturbation moves the programme
    e       ``shift``      p, k    size of the shift, in standard deviations of a control programme
    z       ``z``          n, k    programme activity; z − Σ u m e is the basal state
    ======  =============  ======  ====================================================================

    The site is z, whose prior is then Normal(Σ u m e, I), so that predictions carry the moved programmes.
    The basal state is its noise, which a counterfactual keeps.

    Where the screen has ``embeddings``, e is centred on a linear function of them and the rate of edges
    follows its size, in place of π and τ (see ``pyro_causalcell.embeddings``), so that a target without
    training cells has a prediction.

    Args:
        n_genes, n_targets, n_batches, n_embedding: Sizes of the screen.
        n_latents: Programmes k.
        likelihood: ``"nb"``, ``"zinb"``, ``"poisson"`` (counts) or ``"gaussian"`` (log-normalised values).
        mask: Prior of the mask: ``"beta"`` learns the share of each perturbation, ``"bernoulli"`` has one
            fixed ``rate``, ``"none"`` opens every edge (CPA-VAE).
        rate: π of ``"bernoulli"``.
        alpha: Beta shape of ``"beta"``; the number of programmes when left out: one is moved on average.
        shift_scale: τ, prior standard deviation of shifts.
        correlated: Whether e exists only where its mask is open, which makes q(e | m) exact where it is
            closed; otherwise the guide is mean-field.
        n_hidden, n_layers, norm, activation: of the decoder.

    Source: Bereket and Karaletsos, NeurIPS 2023, section 3; CPA: Lotfollahi et al., Molecular Systems
    Biology 2023.
    """

    site_dims = {"shift_map": ("programme", "feature")}
    """Names of the axes of global latents that are not over perturbation and programme, for ArviZ."""

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        n_embedding: int = 0,
        *,
        n_latents: int = 10,
        likelihood: Likelihood = "nb",
        mask: Mask = "beta",
        rate: float = 0.1,
        alpha: float | None = None,
        shift_scale: float = 1.0,
        correlated: bool = True,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        activation: Activation = "relu",
    ):
        super().__init__()
        self.needs = {"normalised"} if likelihood == "gaussian" else {"counts"}
        self.n_targets, self.n_latents, self.mask, self.rate = n_targets, n_latents, mask, rate
        self.alpha = float(n_latents if alpha is None else alpha)
        self.shift_scale, self.correlated = shift_scale, correlated
        if n_embedding:
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
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
        effect_pk = self.effects(batch.u_np)

        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nk = pyro.sample("z", dist.Normal(batch.u_np @ effect_pk, 1.0).to_event(1))  # p(z | m, e, u)
            output_ng = self.decoder(z_nk, batch.batch_nb)
            p_x = measurement(output_ng, batch.library_n1, self.theta_g, self.scale_g, self.zero_logit_g)
            x: Tensor = pyro.sample("x", p_x.to_event(1), obs=batch.x_ng)  # p(x | z)
            return x

    def effects(self, u_np: Tensor) -> Tensor:
        """Mask times shift, p, k."""
        gate_pk = u_np.new_ones(self.n_targets, self.n_latents)
        loc_pk, scale = torch.zeros_like(gate_pk), gate_pk.new_tensor(self.shift_scale)
        described = hasattr(self, "embedding_pe")
        if described:
            loc_pk, scale = expected_effects("shift", self.embedding_pe, (self.n_latents,), self.shift_scale)
        if self.mask != "none" and described:
            logit_pk = expected_gates("gate", loc_pk**2)
            loc_pk = where_open(loc_pk, logit_pk)
            gate_pk = pyro.sample("gate", Gate(logits=logit_pk).to_event(2))  # p(m)
        elif self.mask != "none":
            rate_p = u_np.new_full((self.n_targets,), self.rate)
            if self.mask == "beta":
                beta = dist.Beta(u_np.new_ones(()), self.alpha).expand((self.n_targets,))
                rate_p = pyro.sample("edge_rate", beta.to_event(1))  # p(π)
            rate_pk = rate_p.unsqueeze(-1).expand_as(gate_pk)
            gate_pk = pyro.sample("gate", Gate(rate_pk).to_event(2))  # p(m | π)
        scored_pk = gate_pk if self.correlated else gate_pk.new_ones(gate_pk.shape)
        slab = GatedNormal(scored_pk, loc_pk, scale)
        shift_pk: Tensor = pyro.sample("shift", slab.to_event(2))  # p(e)
        return gate_pk * shift_pk
