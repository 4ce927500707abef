"""Sparse mechanism shift: each perturbation moves a few latent programmes (sVAE+ and its relatives)."""

from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.direct import DirectEffects
from pyro_causalcell.distributions import (
    Gate,
    GatedNormal,
    Likelihood,
    UncertainMeanNormal,
    measurement,
    spread,
)
from pyro_causalcell.embeddings import expected_effects, expected_gates, where_open
from pyro_causalcell.epistasis import combined, sample_epistasis
from pyro_causalcell.nets import Activation, Decoder, Network, Norm, straight_through, with_interactions
from pyro_causalcell.penalties import beta_sparsity, edge_cost

__all__ = ["PRESETS", "SparseShift"]

Gates = Literal["posterior", "open", "closed", "sampled"]

_AS_RELEASED: dict[str, Any] = {
    "gates": "sampled",
    "intervention": "ignored",
    "dropout": 0.1,
    "batch_size": 128,
    "lr": 1e-3,
    "clip": None,
    "warmup": {"z": 50, "sparsity": 50},
}
PRESETS: dict[str, dict[str, Any]] = {
    "vae": {"gates": "closed", "intervention": "ignored"},
    "beta-vae": {"gates": "closed", "intervention": "ignored", "weights": {"z": 8.0}},
    "ivae": {"gates": "open", "intervention": "ignored"},
    "svae": {**_AS_RELEASED, "sparsity": "l1", "alpha": 100.0, "adam_eps": 1e-2, "weight_decay": 1e-6},
    "released": {**_AS_RELEASED, "sparsity": "beta", "adam_eps": 3e-7},
}
"""Arguments of ``fit`` that make other members of the family: ``fit("sparse-shift", None, screen,
**PRESETS["ivae"])``. ``"svae"`` and ``"released"`` (sVAE+) follow the authors' code: straight-through gates
per cell, the prior's rate tied to the gate, Adam with eps 0.01, which gate sparsity depends on. The code's
loss of sVAE is a mean over cells, as here; that of sVAE+ is a sum, so its eps is divided by 36,000 cells here
(and its weight decay of 1e-6 vanishes)."""


class SparseShift(PyroModule):
    r"""Sparse mechanism shift: each perturbation moves a few latent programmes.

    .. math::
        \pi_{pk} &\sim \mathrm{Beta}(1, \alpha) && \text{how likely is an edge?} \\
        \gamma_{pk} &\sim \mathrm{Bernoulli}(\pi_{pk}) && \text{does } p \text{ hit programme } k? \\
        \mu_{pk} &\sim \mathrm{Normal}(0, \tau) && \text{by how much, where it does} \\
        z_n &\sim \mathrm{Normal}(\textstyle\sum_p u_{np}\,\gamma_p \odot \mu_p,\; 1) && \text{programmes} \\
        x_{ng} &\sim \mathrm{NB}(\ell_n\, \mathrm{softmax}_g f(z_n, b_n),\; \theta_g) && \text{counts}

    ======  =============  ======  ====================================================================
    symbol  name           shape   meaning
    ======  =============  ======  ====================================================================
    π       ``edge_rate``  p, k    prior probability of an edge
    γ       ``gate``       p, k    1 where the perturbation hits the programme
    μ       ``shift``      p, k    size of the shift, in standard deviations of a control programme
    z       ``z``          n, k    programme activity of each cell
    x       ``x``          n, g    counts (or log-normalised values)
    θ       ``theta_g``    g       inverse dispersion
    ======  =============  ======  ====================================================================

    Shifts of several targets in one cell add. With ``epistasis`` one target may mask another: p takes a share
    κ_pk (``epistasis``, p, k) of what the other targets of its cell do to programme k. And shifts of one
    direction may saturate, by one number for all (``saturation``): see ``pyro_causalcell.epistasis``. Only
    cells with several targets tell of both: what masks or saturates in some combinations is expected to do
    so in others. With ``direct`` targets also act on single genes, beside all programmes (``direct``, p, g):
    see ``pyro_causalcell.direct``.

    ``gates`` chooses the member of the family:

    * ``"posterior"`` (default): global gates, integrated out exactly in training: the guide hands over
      its gate probabilities, and the variance that they give to the mean of z is scored in its prior.
    * ``"open"``: γ = 1, the iVAE. ``"closed"``: γ = 0, the VAE (with a KL weight above 1 the β-VAE).
    * ``"sampled"``: as the sVAE authors' code does: one straight-through draw per cell, μ and the gate
      probabilities are parameters, and a penalty asks for sparsity: ``"beta"`` (sVAE+, the prior's rate
      tied to the gate) or ``"l1"`` (sVAE).

    An edge of size d in a target with m cells is worth about m·d²/2 nats, while the Beta prior asks only
    log(1 + α). Small shifts that a still imperfect representation leaves behind would therefore open
    edges everywhere. ``min_effect`` states the smallest shift worth an edge: each open edge costs
    m·min_effect²/2 nats (at least log(1 + α) stays from the prior). Zero turns this off.

    Where the screen has ``embeddings``, they say what to expect of a target (``gates="posterior"`` and
    ``"open"``): μ is centred on a linear function of them, and the rate of edges on its size, in place of π
    and τ (see ``pyro_causalcell.embeddings``). A target without training cells then has a prediction.

    To test another assumption, copy ``models/template.py`` or edit ``forward``.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding: sizes of the screen (see ``Dims``).
        n_latents: Programmes k.
        likelihood: ``"nb"``, ``"zinb"``, ``"poisson"`` (counts) or ``"gaussian"`` (log-normalised values).
        gates: Member of the family, see above.
        min_effect: Smallest shift worth an edge, in standard deviations of z (``gates="posterior"``).
        shift_scale: τ, prior standard deviation of shifts.
        alpha: Beta shape, or weight of the L1 penalty; the number of targets when left out.
        sparsity: Penalty of ``gates="sampled"``.
        interactions: Pairs of targets that get a gated shift of their own in cells that carry both.
        epistasis: Whether a target may mask what others do, and shifts saturate, see above.
        direct: Whether targets act on single genes, too, see above.
        network: ``"mlp"``, or ``"image"`` where x are the pixels (y, x, rgb) of an image, from -1 to 1.
        n_hidden, n_layers, norm, activation: of the decoder.

    Raises:
        ValueError: Interactions together with embeddings, which describe single targets; epistasis together
            with interactions, or without global gates.

    Source: Lopez et al., CLeaR 2023, section 3.2 and Appendices A, B; the exact expectation over gates
    and the cost of an edge are this project's.
    """

    site_dims = {"shift_map": ("programme", "feature"), **DirectEffects.dims}
    """Names of the axes of global latents that are not over perturbation and programme, for ArviZ."""

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        target_cells: tuple[float, ...] = (),
        n_embedding: int = 0,
        *,
        n_latents: int = 10,
        likelihood: Likelihood = "nb",
        gates: Gates = "posterior",
        min_effect: float = 0.5,
        shift_scale: float = 3.0,
        alpha: float | None = None,
        sparsity: Literal["beta", "l1"] = "beta",
        interactions: tuple[tuple[int, int], ...] = (),
        epistasis: bool = False,
        direct: bool = False,
        network: Network = "mlp",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        activation: Activation = "relu",
    ):
        super().__init__()
        if n_embedding and interactions:
            raise ValueError("embeddings describe targets, not interactions=; use one of the two")
        if epistasis and (interactions or gates not in ("posterior", "open")):
            raise ValueError('epistasis= goes with gates="posterior" or "open" and without interactions=')
        self.needs = {"normalised"} if likelihood == "gaussian" else {"counts"}
        self.n_latents, self.likelihood, self.gates, self.sparsity = n_latents, likelihood, gates, sparsity
        self.shift_scale = shift_scale
        self.interactions, self.epistasis = tuple(interactions), epistasis
        n_edges = n_targets + len(self.interactions)
        self.alpha = float(n_targets if alpha is None else alpha)
        cells_p = torch.tensor(target_cells or [0.0] * n_targets)
        pair_cells = [float(torch.minimum(cells_p[i], cells_p[j])) for i, j in self.interactions]
        self.register_buffer("cost_p", torch.cat([cells_p, torch.tensor(pair_cells)]) * min_effect**2 / 2)
        if n_embedding and gates in ("posterior", "open"):
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
        if gates == "sampled":
            self.shift = PyroParam(torch.randn(n_edges, n_latents))
            self.gate_logit = PyroParam(torch.full((n_edges, n_latents), 5.0))
        self.decoder = Decoder(
            n_latents,
            n_genes,
            n_batches,
            network=network,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            activation=activation,
        )
        self.direct = DirectEffects(n_targets, n_genes) if direct else None
        self.theta_g, self.scale_g, self.zero_logit_g = spread(likelihood, n_genes, network)

    def forward(self, batch: Batch) -> Tensor:
        """The generative story of one minibatch; returns the observed or drawn x, shape n, g."""
        u_np = with_interactions(batch.u_np, self.interactions)
        gate_pk, shift_pk = self.edges(u_np, batch.n_total)
        epistasis = sample_epistasis(gate_pk) if self.epistasis else None  # p(κ) p(s)
        direct_ng = None if self.direct is None else self.direct(batch.u_np)  # p(δ)

        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            if self.gates == "sampled":
                loc_nk = straight_through(u_np, gate_pk, shift_pk)
                var_nk = torch.zeros_like(loc_nk)
            else:
                loc_nk, var_nk = combined(u_np, gate_pk, shift_pk, epistasis)
            z_nk = pyro.sample("z", UncertainMeanNormal(loc_nk, var_nk).to_event(1))  # p(z | γ, μ, u)
            p_x = self.measurement(z_nk, batch, direct_ng)
            x: Tensor = pyro.sample("x", p_x.to_event(1), obs=batch.x_ng)  # p(x | z)
            return x

    def edges(self, u_np: Tensor, n_total: int) -> tuple[Tensor, Tensor]:
        """Gates γ and shifts μ, each p, k."""
        shape = (u_np.shape[-1], self.n_latents)
        if self.gates == "closed":
            return u_np.new_zeros(shape), u_np.new_zeros(shape)
        if self.gates == "sampled":
            gate_pk = torch.sigmoid(self.gate_logit)
            if self.sparsity == "beta":
                beta_sparsity("sparsity", gate_pk, self.alpha)
            else:
                edge_cost("sparsity", gate_pk, gate_pk.new_tensor([self.alpha * n_total / gate_pk.numel()]))
            return gate_pk, self.shift
        gate_pk, loc_pk, scale = (
            u_np.new_ones(shape),
            u_np.new_zeros(shape),
            u_np.new_tensor(self.shift_scale),
        )
        described = hasattr(self, "embedding_pe")
        if described:
            loc_pk, scale = expected_effects("shift", self.embedding_pe, shape[1:], self.shift_scale)
        if self.gates == "posterior":
            if described:
                logit_pk = expected_gates("gate", loc_pk**2)
                gate, loc_pk = Gate(logits=logit_pk), where_open(loc_pk, logit_pk)
            else:
                beta = dist.Beta(u_np.new_ones(()), self.alpha).expand(shape)
                gate = Gate(pyro.sample("edge_rate", beta.to_event(2)))  # p(π)
            gate_pk = pyro.sample("gate", gate.to_event(2))  # p(γ | π)
            edge_cost("min_effect", gate_pk, self.cost_p)
        slab = GatedNormal(gate_pk, loc_pk, scale)
        return gate_pk, pyro.sample("shift", slab.to_event(2))  # p(μ | γ)

    def measurement(
        self, z_nk: Tensor, batch: Batch, direct_ng: Tensor | None = None
    ) -> dist.TorchDistribution:
        """p(x | z): counts around library × softmax, or a Gaussian around the decoder's output."""
        output_ng = self.decoder(z_nk, batch.batch_nb)
        if direct_ng is not None:
            output_ng = output_ng + direct_ng
        return measurement(output_ng, batch.library_n1, self.theta_g, self.scale_g, self.zero_logit_g)

    def rotate(self, map_kk: Tensor, offset_k: Tensor) -> None:
        """Take over new axes: z becomes ``z @ map_kk.T + offset_k``, with the same p(x | z)."""
        self.decoder.rotate(map_kk, offset_k)
