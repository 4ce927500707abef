"""Amortised guide of the weight-variant latent SCM."""

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_causalcell.batch import Batch, Mechanisms, Rotation
from pyro_causalcell.direct import DirectGuide
from pyro_causalcell.distributions import Gate, GatedNormal, Likelihood, MeanFieldGate
from pyro_causalcell.embeddings import EffectMapGuide, GateCurveGuide, seen_targets, squared_size
from pyro_causalcell.epistasis import EpistasisGuide, combined
from pyro_causalcell.nets import Activation, Encoder, Norm, encoded_together
from pyro_causalcell.penalties import alignment as align_pairs
from pyro_causalcell.penalties import mmd_by_group, sliced_wasserstein

__all__ = ["WeightVariantSCMGuide"]


class WeightVariantSCMGuide(PyroModule):
    r"""Free posteriors of gates, edges and changes; an encoder for both blocks; the alignment penalty.

    .. math::
        q(\gamma_{pv}) &= \mathrm{Bernoulli}(\phi_{pv}), \quad q(g_{vj}) = \mathrm{Bernoulli}(\psi_{vj}),
            \quad \text{Normal changes where they are open} \\
        q(z_l \mid x_n) &= \mathrm{Normal}(e_l(x_n), s_l(x_n)) \\
        q(z_v \mid x_n, u_n) &= \mathrm{Normal}(e_v(x_n) + K h(u_n), s_v(x_n))

    With embeddings, gates and changes of a target without training cells have their priors, given what the
    other targets say of the embeddings.

    Nothing tells q(z_l) of the perturbation. Alignment charges what it finds out nevertheless:

    * ``"pairs"``: α ‖e_l(x) − e_l(x₀)‖² with the control cell x₀ of each cell, as in the paper. With cells
      that share their background this is right; with random ones it is smallest for an encoder that
      ignores x, and costs information.
    * ``"mmd"`` (default) and ``"sliced"``: the same for whole conditions: α times the maximum mean
      discrepancy (unbiased, also with few cells of a condition in a minibatch), or the sliced Wasserstein
      distance (for 20 cells or more), between a condition's cells and control cells.
    * ``"none"``.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding: sizes of the screen.
        n_invariant, n_responsive, likelihood, gates, edges, alters, centred, rank, epistasis, direct: as
            in the model.
        alignment: See above.
        alpha: α, nats per cell.
        intervention: How the perturbation enters q(z_v): ``"ignored"``, ``"input"`` (h = u), or ``"prior"``
            (h: the mean that gates and shifts give, so that it also works for unseen combinations).
        n_hidden, n_layers, norm, dropout, activation: of the encoder.

    Source: cDAG-VAE (submitted to ICLR 2026), equations 6 to 9.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        target_cells: tuple[float, ...] = (),
        n_embedding: int = 0,
        *,
        n_invariant: int = 28,
        n_responsive: int = 7,
        likelihood: Likelihood = "nb",
        gates: Literal["posterior", "open"] = "posterior",
        edges: Literal["posterior", "open"] = "posterior",
        alters: Sequence[str] = ("shift", "scale", "weight"),
        centred: bool = True,
        rank: int | None = None,
        epistasis: bool = False,
        direct: bool = False,
        alignment: Literal["mmd", "sliced", "pairs", "none"] = "mmd",
        alpha: float = 100.0,
        intervention: Literal["ignored", "input", "prior"] = "prior",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: Activation = "silu",
    ):
        super().__init__()
        self.needs = set() if alignment == "none" else {"control"}
        self.n_targets, self.n_invariant, self.n_responsive = n_targets, n_invariant, n_responsive
        self.gates, self.edges, self.alters, self.centred = gates, edges, tuple(alters), centred
        self.rank, self.alignment, self.alpha = rank, alignment, alpha
        self.intervention = intervention if "shift" in alters or intervention != "prior" else "ignored"
        self.gates_held = False
        self.rotated_site = ("z_invariant", "z_responsive")
        rate_site = "gate_curve" if n_embedding else "gate_rate"
        held = {rate_site, "gate", "min_effect"} if gates == "posterior" else set()
        held |= {"edge", "min_weight"} if edges == "posterior" else set()
        can_turn = centred and gates == "posterior" and set(alters) == {"shift", "scale", "weight"}
        self.gate_sites = tuple(sorted(held | ({"align"} & self.aligned_sites()))) if can_turn else ()
        n_programmes = n_invariant + n_responsive
        self.epistasis = EpistasisGuide(n_targets, n_responsive) if epistasis else None
        self.direct = DirectGuide(n_targets, n_genes) if direct else None
        if gates == "posterior":
            self.gate_logit = PyroParam(torch.full((n_targets, n_responsive), 2.0))
        if edges == "posterior":
            self.edge_logit = PyroParam(torch.full((n_responsive, n_programmes), 2.0))
        shapes = {"shift": (n_responsive,), "scale": (n_responsive,), "weight": (n_responsive, n_programmes)}
        if rank is not None:
            shapes["weight"] = (rank,)
        for part in self.alters:
            start = torch.zeros(n_targets, *shapes[part])
            start = 0.1 * torch.randn_like(start) if part == "shift" or rank is not None else start
            scale = PyroParam(torch.full_like(start, 0.1), constraint=constraints.positive)
            setattr(self, f"{part}_loc", PyroParam(start))
            setattr(self, f"{part}_spread", scale)
        if n_embedding:
            seen_p = seen_targets(n_targets, target_cells)
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
            self.maps = nn.ModuleDict({part: EffectMapGuide(self.site(part), seen_p) for part in self.alters})
            self.gate_curve = GateCurveGuide("gate", n_responsive, seen_p)
        self.encoder = Encoder(
            n_genes,
            n_programmes,
            n_batches,
            log_input=likelihood != "gaussian",
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            dropout=dropout,
            activation=activation,
        )
        if self.intervention != "ignored":
            n_seen = n_targets if self.intervention == "input" else n_responsive
            self.adjust = nn.Linear(n_seen, n_responsive, bias=False)
            nn.init.zeros_(self.adjust.weight)

    def aligned_sites(self) -> set[str]:
        """The factor of the alignment, where there is one."""
        return set() if self.alignment == "none" else {"align"}

    def forward(self, batch: Batch) -> None:
        """q of gates, edges and changes, q(δ); then q(z_l | x) q(z_v | x, u) inside the cells plate."""
        prior_loc_nv = self.changes(batch)
        if self.direct is not None:
            self.direct()  # q(δ)
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            control = None if self.alignment == "none" else batch.control
            loc_nk, scale_nk, control_nk = encoded_together(self.encoder, batch, control)
            loc_nl, loc_nv = loc_nk.split([self.n_invariant, self.n_responsive], -1)
            scale_nl, scale_nv = scale_nk.split([self.n_invariant, self.n_responsive], -1)
            if self.intervention != "ignored":
                loc_nv = loc_nv + self.adjust(batch.u_np if self.intervention == "input" else prior_loc_nv)
            pyro.sample("z_invariant", dist.Normal(loc_nl, scale_nl).to_event(1))  # q(z_l | x)
            latent = "z_responsive" if self.centred else "innovation"
            pyro.sample(latent, dist.Normal(loc_nv, scale_nv).to_event(1))  # q(z_v | x, u)
            if control is not None:
                self.align(loc_nl, control_nk[:, : self.n_invariant], batch)

    def changes(self, batch: Batch) -> Tensor:
        """q(π) q(γ) q(g) and q of the changes; returns the mean of p(n_v | u) that they give, n, v."""
        gate_pv = batch.u_np.new_ones(self.n_targets, self.n_responsive)
        edge_vk = batch.u_np.new_ones(self.n_responsive, self.n_invariant + self.n_responsive)
        gate = MeanFieldGate if self.training else Gate  # probabilities to train on, draws to predict
        parts, squared_pv = self.parts()
        if self.gates == "posterior":
            logit_pv, phi_pv = self.gate_logit, torch.sigmoid(self.gate_logit)
            if hasattr(self, "embedding_pe"):
                logit_pv = self.gate_curve(squared_pv, logit_pv)
                for part in self.gated_parts():
                    parts[part] = (self.gate_curve.where_open(parts[part][0], logit_pv), parts[part][1])
            else:
                beta = dist.Beta(1 + phi_pv, self.n_targets + 1 - phi_pv)
                pyro.sample("gate_rate", beta.to_event(2))  # q(π), the conjugate update
            gate_pv = pyro.sample("gate", gate(logits=logit_pv).to_event(2))  # q(γ)
        if self.edges == "posterior":
            edge_vk = pyro.sample("edge", gate(logits=self.edge_logit).to_event(2))  # q(g)
        shift_pv = torch.zeros_like(gate_pv)
        if "shift" in self.alters:
            slab = GatedNormal(gate_pv, *parts["shift"])
            shift_pv = pyro.sample("shift", slab.to_event(2))  # q(μ | γ)
        if "scale" in self.alters:
            slab = GatedNormal(gate_pv, *parts["scale"])
            pyro.sample("log_scale", slab.to_event(2))  # q(log σ | γ)
        if "weight" in self.alters and self.rank is None:
            open_pvk = gate_pv.unsqueeze(-1) * edge_vk
            pyro.sample("weight", GatedNormal(open_pvk, *parts["weight"]).to_event(3))
        elif "weight" in self.alters:
            slab = GatedNormal(torch.ones_like(self.weight_loc), *parts["weight"])
            pyro.sample("loading", slab.to_event(2))
        if self.epistasis is None:
            moved_nv = batch.u_np @ (gate_pv * shift_pv)
        else:
            moved_nv, _ = combined(batch.u_np, gate_pv, shift_pv, self.epistasis())  # q(κ) q(s)
        return torch.zeros_like(moved_nv) if self.gates_held else moved_nv

    def parts(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
        """Means and standard deviations of the parts of changes; squared size of what is expected, p, v."""
        own = {part: (getattr(self, f"{part}_loc"), getattr(self, f"{part}_spread")) for part in self.alters}
        ones_pv = self.encoder.loc.weight.new_ones(self.n_targets, self.n_responsive)
        if not hasattr(self, "embedding_pe"):
            return own, ones_pv
        open_pv = torch.sigmoid(self.gate_logit) if self.gates == "posterior" else ones_pv
        opened = {"shift": open_pv, "scale": open_pv, "weight": open_pv.unsqueeze(-1)}
        if self.edges == "posterior":
            opened["weight"] = opened["weight"] * torch.sigmoid(self.edge_logit)
        if self.rank is not None:
            opened["weight"] = torch.ones_like(own["weight"][0])
        found, locs = {}, []
        for part, (loc, scale) in own.items():
            *found[part], expected = self.maps[part](self.embedding_pe, opened[part], loc, scale)
            if part in self.gated_parts():
                locs.append(expected)
        return {part: (loc, scale) for part, (loc, scale) in found.items()}, squared_size(locs, ones_pv)

    def gated_parts(self) -> list[str]:
        """Parts of a change that are there only where its gate is open."""
        return [part for part in self.alters if self.site(part) != "loading"]

    def site(self, part: str) -> str:
        """Site of a part of a change."""
        return {"shift": "shift", "scale": "log_scale", "weight": "loading" if self.rank else "weight"}[part]

    def align(self, loc_nl: Tensor, control_nl: Tensor, batch: Batch) -> None:
        """Charge differences of z_l between cells and control cells."""
        if self.alignment == "pairs":
            align_pairs("align", loc_nl, control_nl, self.alpha)
            return
        if self.alignment == "sliced":
            distance = sliced_wasserstein(loc_nl, control_nl, batch.condition_n)
        else:
            distance = mmd_by_group(loc_nl, batch.condition_n, control_nl)
        pyro.factor("align", self.alpha * distance.expand(len(loc_nl)), has_rsample=True)

    def hold_gates_open(self, held: bool) -> None:
        """Fix all gates and edges open (the warm start), or let them be learned."""
        self.gates_held = held
        if self.epistasis is not None:
            self.epistasis.requires_grad_(not held)
        for name in ("gate_logit", "edge_logit"):
            if hasattr(self, name):
                logit = getattr(self, name)
                logit.requires_grad_(not held)
                logit.data.fill_(10.0 if held else 2.0)

    @torch.no_grad()
    def rotate(self, rotation: Rotation) -> None:
        """Take over new axes, with the mechanisms seen there."""
        self.encoder.rotate(rotation.map_kk, rotation.offset_k)
        seen = rotation.mechanisms
        assert isinstance(seen, Mechanisms)
        self.gate_logit.copy_(torch.where(seen.altered_pv, 4.0, -4.0))
        if self.edges == "posterior":
            self.edge_logit.copy_(torch.where(seen.edge_vk, 4.0, -4.0))
        self.shift_loc.copy_(seen.shift_pv)
        self.scale_loc.copy_(seen.log_scale_pv)
        if self.rank is None:
            self.weight_loc.copy_(seen.weight_pvk)
