"""Guides of SAMS-VAE: mean-field, or correlated through the mask and the shift of the cell."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import GatedNormal, Likelihood, StraightThroughGate
from pyro_causalcell.embeddings import EffectMapGuide, GateCurveGuide, seen_targets
from pyro_causalcell.nets import Activation, Encoder, Norm

__all__ = ["SAMSVAEGuide"]


class SAMSVAEGuide(PyroModule):
    r"""q(π) q(m) q(e | m) q(z_basal | x, m, e): free posteriors of the edges, an encoder for the basal state.

    .. math::
        q(m_{pk}) &= \mathrm{Bernoulli}(\phi_{pk}), \qquad
        q(\pi_p) = \mathrm{Beta}(1 + \textstyle\sum_k \phi_{pk},\; \alpha + \sum_k (1 - \phi_{pk})) \\
        q(e_{pk} \mid m_{pk} = 1) &= \mathrm{Normal}(\hat e_{pk}, s_{pk}) \\
        q(z_n) &= \textstyle\sum_p u_{np}\, m_p \odot e_p + \mathrm{Normal}(h(x_n), \mathrm{diag}\, v(x_n)^2)

    Masks are drawn open or closed, one draw for all cells of a minibatch, with the gradient of a relaxed
    draw. q(π) is the conjugate update. Correlated, the encoder of the basal state also sees Σ u m e, and e
    is left at its prior where the mask is closed, as its exact posterior is. Mean-field, neither.

    With embeddings, q(m) and q(e) of a target without training cells are their priors, given what the other
    targets say of the embeddings.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding: Sizes of the screen.
        n_latents, likelihood, mask, alpha, correlated: As in the model.
        n_hidden, n_layers, norm, dropout, activation: of the encoder.

    Source: Bereket and Karaletsos, NeurIPS 2023, section 3.
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
        likelihood: Likelihood = "nb",
        mask: Literal["beta", "bernoulli", "none"] = "beta",
        alpha: float | None = None,
        correlated: bool = True,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: Activation = "relu",
    ):
        super().__init__()
        self.mask, self.correlated = mask, correlated
        self.alpha = float(n_latents if alpha is None else alpha)
        shape = (n_targets, n_latents)
        if mask != "none":
            self.gate_logit = PyroParam(torch.full(shape, 2.0))  # a closed start hides what there is
        self.shift_loc = PyroParam(0.1 * torch.randn(shape))
        self.shift_scale = PyroParam(torch.full(shape, 0.1), constraint=constraints.positive)
        if n_embedding:
            seen_p = seen_targets(n_targets, target_cells)
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
            self.shift_map, self.gate_curve = (
                EffectMapGuide("shift", seen_p),
                GateCurveGuide("gate", n_latents, seen_p),
            )
        self.encoder = Encoder(
            n_genes,
            n_latents,
            n_batches + (n_latents if correlated else 0),
            log_input=likelihood != "gaussian",
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            dropout=dropout,
            activation=activation,
        )

    def forward(self, batch: Batch) -> None:
        """q(π) q(m) q(e | m), then q(z | x, m, e) inside the cells plate."""
        moved_nk = batch.u_np @ self.effects()
        seen = (moved_nk,) if self.correlated else ()
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            basal_nk, scale_nk = self.encoder(batch.x_ng, batch.batch_nb, *seen)
            pyro.sample("z", dist.Normal(basal_nk + moved_nk, scale_nk).to_event(1))  # q(z_basal | x), moved

    def effects(self) -> Tensor:
        """Mask times shift, p, k."""
        loc_pk, scale_pk, gate_pk = self.shift_loc, self.shift_scale, torch.ones_like(self.shift_loc)
        phi_pk = torch.sigmoid(self.gate_logit) if self.mask != "none" else gate_pk
        described = hasattr(self, "embedding_pe")
        if described:
            loc_pk, scale_pk, expected_pk = self.shift_map(self.embedding_pe, phi_pk, loc_pk, scale_pk)
        if self.mask != "none":
            logit_pk = self.gate_logit
            if described:
                logit_pk = self.gate_curve(expected_pk**2, logit_pk)
                loc_pk = self.gate_curve.where_open(loc_pk, logit_pk)
            elif self.mask == "beta":
                beta = dist.Beta(1 + phi_pk.sum(-1), self.alpha + (1 - phi_pk).sum(-1))
                pyro.sample("edge_rate", beta.to_event(1))  # q(π)
            gate_pk = pyro.sample("gate", StraightThroughGate(logits=logit_pk).to_event(2))  # q(m)
        scored_pk = gate_pk if self.correlated else torch.ones_like(gate_pk)
        slab = GatedNormal(scored_pk, loc_pk, scale_pk)
        shift_pk: Tensor = pyro.sample("shift", slab.to_event(2))  # q(e | m)
        return gate_pk * shift_pk
