"""Amortised guide of the sparse mechanism shift family."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell.batch import Batch, Rotation
from pyro_causalcell.direct import DirectGuide
from pyro_causalcell.distributions import Gate, GatedNormal, MeanFieldGate
from pyro_causalcell.embeddings import EffectMapGuide, GateCurveGuide, seen_targets
from pyro_causalcell.epistasis import EpistasisGuide, combined
from pyro_causalcell.nets import Activation, Encoder, Network, Norm, with_interactions

__all__ = ["SparseShiftGuide"]

OPEN_ABOVE = 0.35
"""Edges that start open after the warm start: shifts above this share of the target's largest one (or of
1, where that is smaller). What a rotation leaves behind is proportional to the shift that it left."""


class SparseShiftGuide(PyroModule):
    r"""q(π) q(γ) q(μ | γ) q(z | x): free posteriors of the edges, an encoder for the programmes.

    .. math::
        q(\gamma_{pk}) &= \mathrm{Bernoulli}(\phi_{pk}), \qquad
        q(\pi_{pk}) = \mathrm{Beta}(1 + \phi_{pk},\; \alpha + 1 - \phi_{pk}) \\
        q(\mu_{pk} \mid \gamma_{pk} = 1) &= \mathrm{Normal}(m_{pk}, s_{pk}) \\
        q(z_n \mid x_n) &= \mathrm{Normal}(e(x_n), \mathrm{diag}\, s(x_n)^2)

    q(π) is the conjugate update, the best one given φ. In training the gates' draw is their probability,
    which the model integrates exactly; in evaluation mode gates are drawn.

    With embeddings, q(μ) and q(γ) of a target without training cells are their priors, given what the other
    targets say of the embeddings (``EffectMapGuide``, ``GateCurveGuide``).

    With ``epistasis``, q(κ) and q(s) are points, the most likely values: where no combination tells, the
    modes of the prior, 0 and 1.

    The cell's intervention may enter q(z): ``intervention="ignored"`` (as the authors' code),
    ``"input"`` (the design is appended to the encoder's input, as the paper's formula), or ``"prior"``
    (default: the prior mean Σ u γ μ is appended, so that the encoder also knows what to make of a shift
    learned later). During the warm start the encoder sees zeros there: axes are found from the counts.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding: sizes of the screen.
        n_latents, likelihood, gates, alpha, interactions, epistasis, direct: as in the model.
        intervention: How the intervention enters q(z).
        network, n_hidden, n_layers, norm, dropout, activation: of the encoder.

    Source: Lopez et al., CLeaR 2023, equation 3.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        target_cells: tuple[float, ...] = (),
        n_embedding: int = 0,
        *,
        n_latents: int = 10,
        likelihood: Literal["nb", "zinb", "poisson", "gaussian"] = "nb",
        gates: Literal["posterior", "open", "closed", "sampled"] = "posterior",
        alpha: float | None = None,
        interactions: tuple[tuple[int, int], ...] = (),
        epistasis: bool = False,
        direct: bool = False,
        intervention: Literal["ignored", "input", "prior"] = "prior",
        network: Network = "mlp",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.gates, self.intervention, self.interactions = gates, intervention, tuple(interactions)
        self.n_latents, self.gates_held = n_latents, False
        self.alpha = float(n_targets if alpha is None else alpha)
        self.rotated_site = "z"
        described = bool(n_embedding) and gates in ("posterior", "open")
        rate_site = "gate_curve" if described else "edge_rate"
        self.gate_sites = (rate_site, "gate", "min_effect") if gates == "posterior" else ()
        shape = (n_targets + len(self.interactions), n_latents)
        self.epistasis = EpistasisGuide(*shape) if epistasis else None
        self.direct = DirectGuide(n_targets, n_genes) if direct else None
        if gates == "posterior":
            self.gate_logit = PyroParam(torch.full(shape, 2.0))
        if gates in ("posterior", "open"):
            self.shift_loc = PyroParam(0.1 * torch.randn(shape))
            self.shift_scale = PyroParam(torch.full(shape, 0.1), constraint=constraints.positive)
        if described:
            seen_p = seen_targets(n_targets, target_cells)
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
            self.shift_map, self.gate_curve = (
                EffectMapGuide("shift", seen_p),
                GateCurveGuide("gate", n_latents, seen_p),
            )
        self.encoder = Encoder(
            n_genes,
            n_latents,
            n_batches + {"ignored": 0, "input": n_targets, "prior": n_latents}[intervention],
            log_input=likelihood != "gaussian",
            network=network,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            dropout=dropout,
            activation=activation,
        )
        if intervention == "prior":  # the encoder learns about interventions from a neutral start
            self.encoder.overlook_last(n_latents)

    def forward(self, batch: Batch) -> None:
        """q(π) q(γ) q(μ | γ) q(δ), then q(z | x) inside the cells plate."""
        prior_loc_nk = self.prior_loc(batch)
        if self.direct is not None:
            self.direct()  # q(δ)
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk, scale_nk = self.encoder(batch.x_ng, batch.batch_nb, *self.seen(batch, prior_loc_nk))
            pyro.sample("z", dist.Normal(loc_nk, scale_nk).to_event(1))  # q(z | x, u)

    def seen(self, batch: Batch, prior_loc_nk: Tensor) -> tuple[Tensor, ...]:
        """What the encoder sees of the interventions."""
        if self.intervention == "ignored":
            return ()
        if self.intervention == "input":
            return (batch.u_np,)
        return (torch.zeros_like(prior_loc_nk) if self.gates_held else prior_loc_nk,)

    def prior_loc(self, batch: Batch) -> Tensor:
        """q(π) q(γ) q(μ | γ), and the mean of p(z | u) that they give, shape n, k."""
        if self.gates in ("closed", "sampled"):
            return batch.u_np.new_zeros(len(batch.u_np), self.n_latents)
        loc_pk, scale_pk, described = self.shift_loc, self.shift_scale, hasattr(self, "embedding_pe")
        logit_pk = self.gate_logit if self.gates == "posterior" else None
        gate_pk = phi_pk = torch.ones_like(loc_pk) if logit_pk is None else torch.sigmoid(logit_pk)
        if described:
            loc_pk, scale_pk, expected_pk = self.shift_map(self.embedding_pe, phi_pk, loc_pk, scale_pk)
        if logit_pk is not None:
            if described:
                logit_pk = self.gate_curve(expected_pk**2, logit_pk)
                loc_pk = self.gate_curve.where_open(loc_pk, logit_pk)
            else:
                beta = dist.Beta(1 + phi_pk, self.alpha + 1 - phi_pk)
                pyro.sample("edge_rate", beta.to_event(2))  # q(π)
            gate = MeanFieldGate if self.training else Gate  # probabilities to train on, draws to predict
            gate_pk = pyro.sample("gate", gate(logits=logit_pk).to_event(2))  # q(γ)
        slab = GatedNormal(gate_pk, loc_pk, scale_pk)
        shift_pk = pyro.sample("shift", slab.to_event(2))  # q(μ | γ)
        u_np = with_interactions(batch.u_np, self.interactions)
        if self.epistasis is None:
            return u_np @ (gate_pk * shift_pk)
        return combined(u_np, gate_pk, shift_pk, self.epistasis())[0]  # q(κ) q(s)

    def hold_gates_open(self, held: bool) -> None:
        """Fix all gates open (the warm start), or let them be learned."""
        self.gates_held = held
        self.gate_logit.requires_grad_(not held)
        if self.epistasis is not None:
            self.epistasis.requires_grad_(not held)
        if held:
            self.gate_logit.data.fill_(10.0)

    @torch.no_grad()
    def rotate(self, rotation: Rotation) -> None:
        """Take over new axes: z becomes ``z @ map_kk.T + offset_k``, with the shifts seen there."""
        self.encoder.rotate(rotation.map_kk, rotation.offset_k)
        shift_pk, n_targets = rotation.shift_pk, len(rotation.shift_pk)
        size_pk = shift_pk.abs()
        open_pk = size_pk > OPEN_ABOVE * size_pk.amax(-1, keepdim=True).clamp(min=1.0)
        self.shift_loc[:n_targets] = shift_pk
        self.shift_loc[n_targets:] = 0.0
        self.gate_logit[:n_targets] = torch.where(open_pk, 4.0, -4.0)
        self.gate_logit[n_targets:] = -2.0
