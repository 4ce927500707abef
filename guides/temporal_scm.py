"""Amortised guide of the latent temporal SCM."""

from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell.batch import Batch, LaggedMechanisms, Rotation
from pyro_causalcell.distributions import Gate, GatedNormal, Likelihood, MeanFieldGate
from pyro_causalcell.embeddings import LEAST_SHARE, DescriptionGuide, Reading, all_changes, seen_targets
from pyro_causalcell.nets import Activation, Encoder, Network, Norm, encoded_together
from pyro_causalcell.penalties import alignment as align_pairs
from pyro_causalcell.penalties import mmd_by_group

__all__ = ["TemporalSCMGuide"]

OPEN_ABOVE = 0.1
"""Edges that start open after the warm start: lagged effects above this."""

WORTH_A_GATE = 0.25
"""Shift that opens the gate of a target without training cells, in standard deviations of a programme."""

CUT_LOGIT = -2.2
"""Logit of the prior probability of a cut, for targets without training cells."""


class TemporalSCMGuide(PyroModule):
    r"""Free posteriors of gates, edges, cuts and changes; an encoder for both blocks; the alignment penalty.

    .. math::
        q(\gamma_{pv}) &= \mathrm{Bernoulli}(\phi_{pv}), \quad q(A_{vj}) = \mathrm{Bernoulli}(\psi_{vj}),
            \quad q(c_{pv}) = \mathrm{Bernoulli}(\chi_{pv}), \quad \text{Normal changes} \\
        q(z_l, z_v \mid x_n) &= \mathrm{Normal}(e(x_n), \mathrm{diag}\, s(x_n)^2)

    A target without training cells has the priors of what it changes; with embeddings, given what the other
    targets say of them.

    Alignment keeps what a perturbation does out of z_l, against control cells of the same time:
    ``"mmd"`` (default) charges α times the maximum mean discrepancy between the cells of a condition at a
    time and control cells of that time; ``"pairs"`` α ‖e_l(x) − e_l(x₀)‖² with one control cell of that time,
    as in the paper; ``"none"`` nothing.

    Where the screen knows tracks, the past of a cell is a draw from q(z | x) of the same cell at the time
    before.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding, times: sizes of the screen.
        n_invariant, n_responsive, likelihood, gates, edges, graph, onset: as in the model.
        alignment: See above.
        alpha: α, nats per cell.
        sees_time: Let the encoder see a cell's time as well, for cells so shallow that x alone leaves open
            what time they are from. Without it their latents lie between those of neighbouring snapshots.
        network, n_hidden, n_layers, norm, dropout, activation: of the encoder.

    Source: CITE-VAE (arXiv 2605.25581), equations 13 and 17.
    """

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        target_cells: tuple[float, ...] = (),
        n_embedding: int = 0,
        times: tuple[float, ...] = (0.0, 1.0),
        *,
        n_invariant: int = 10,
        n_responsive: int = 6,
        likelihood: Likelihood = "nb",
        gates: Literal["posterior", "open"] = "posterior",
        edges: Literal["posterior", "open"] = "posterior",
        graph: Literal["full", "triangular"] = "full",
        onset: float | None = None,
        alignment: Literal["mmd", "pairs", "none"] = "mmd",
        alpha: float = 100.0,
        sees_time: bool = False,
        network: Network = "mlp",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        dropout: float = 0.0,
        activation: Activation = "silu",
    ):
        super().__init__()
        if not n_targets:  # a time course of control cells: nothing to compare or to find
            alignment, gates = "none", "open"
        self.needs = set() if alignment == "none" else {"control"}
        self.n_invariant, self.n_responsive = n_invariant, n_responsive
        self.gates, self.edges, self.alignment, self.alpha = gates, edges, alignment, alpha
        self.sees_time = sees_time
        self.rotated_site = ("z_invariant", "z_responsive")
        self.register_buffer("times_t", torch.tensor(times))
        shape, n_programmes = (n_targets, n_responsive), n_invariant + n_responsive
        if gates == "posterior":
            self.gate_logit = PyroParam(torch.full(shape, 2.0))
            self.cut_logit = PyroParam(torch.full(shape, -2.0))
        if edges == "posterior":
            self.edge_logit = PyroParam(torch.full((n_responsive, n_programmes), 2.0))
        starts = ("start",) if onset is None else ()
        self.changes = ("shift", "log_scale", *starts)
        for name in self.changes:
            self._normal(name, 0.1 * torch.randn(shape) if name == "shift" else torch.zeros(shape))
        own_vv = 0.5 * torch.eye(n_responsive) if graph == "full" else torch.zeros(n_responsive, n_responsive)
        self._normal("weight", torch.cat([torch.zeros(n_responsive, n_invariant), own_vv], 1))
        self.register_buffer("seen_p1", seen_targets(n_targets, target_cells).unsqueeze(-1))
        if n_embedding:
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
            self.description = DescriptionGuide(self.seen_p1.squeeze(-1))
        held = ["gate_rate", "gate", "min_effect", "cut", "min_cut"] if gates == "posterior" else []
        held += ["table_log_noise", "table_map", "table"] if n_embedding else []
        held += ["edge", "min_weight"] if edges == "posterior" else []
        held += [] if alignment == "none" else ["align"]
        self.gate_sites = (*held, *self.changes, "weight") if gates == "posterior" else ()
        self.encoder = Encoder(
            n_genes,
            n_programmes,
            n_batches + sees_time,
            log_input=likelihood != "gaussian",
            network=network,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            dropout=dropout,
            activation=activation,
        )

    def _normal(self, name: str, loc: Tensor) -> None:
        setattr(self, f"{name}_loc", PyroParam(loc))
        scale = PyroParam(torch.full_like(loc, 0.1), constraint=constraints.positive)
        setattr(self, f"{name}_spread", scale)

    def forward(self, batch: Batch) -> None:
        """q of gates, edges and changes; then q(z_l, z_v | x) inside the cells plate."""
        self.mechanism(batch)
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            control = None if self.alignment == "none" else batch.control
            loc_nk, scale_nk, control_nk = encoded_together(self.encoder, batch, control, self.beside)
            if batch.previous is not None:
                past = batch.previous
                past_loc_nk, past_scale_nk = self.encoder(past.x_ng, self.beside(past))
                past_nk = past_loc_nk + past_scale_nk * torch.randn_like(past_loc_nk)
                pyro.sample("z_past", dist.Delta(past_nk, event_dim=1))
            sizes = [self.n_invariant, self.n_responsive]
            (loc_nl, loc_nv), (scale_nl, scale_nv) = loc_nk.split(sizes, -1), scale_nk.split(sizes, -1)
            pyro.sample("z_invariant", dist.Normal(loc_nl, scale_nl).to_event(1))  # q(z_l | x)
            pyro.sample("z_responsive", dist.Normal(loc_nv, scale_nv).to_event(1))  # q(z_v | x)
            if control is not None:
                self.align(loc_nl, control_nk[:, : self.n_invariant], batch)

    def beside(self, batch: Batch) -> Tensor:
        """What the encoder sees beside x: batch columns and, from 0 at the first snapshot to 1, time."""
        if not self.sees_time:
            return batch.batch_nb
        assert batch.time_n is not None
        first, last = self.times_t[0], self.times_t[-1]
        return torch.cat([batch.batch_nb, ((batch.time_n - first) / (last - first)).unsqueeze(-1)], -1)

    def mechanism(self, batch: Batch) -> None:
        """q(π) q(γ) q(c) q(A), and q of the changes where they are open."""
        ones_pv, edge_vk = torch.ones_like(self.shift_loc), torch.ones_like(self.weight_loc)
        gate = MeanFieldGate if self.training else Gate  # probabilities to train on, draws to predict
        gate_pv, logit_pv, cut_logit_pv = ones_pv, None, None
        if self.gates == "posterior":
            logit_pv, cut_logit_pv = self.gate_logit, torch.where(self.seen_p1, self.cut_logit, CUT_LOGIT)
        normals = {
            name: (getattr(self, f"{name}_loc"), getattr(self, f"{name}_spread")) for name in self.changes
        }
        unknown = (torch.zeros_like(ones_pv), 0.5 * ones_pv)
        normals["log_scale"] = self.where_seen(normals["log_scale"], unknown)
        if hasattr(self, "embedding_pe"):
            logit_pv, cut_logit_pv, normals = self.read(logit_pv, cut_logit_pv, normals)
        if logit_pv is not None:
            phi_pv = torch.sigmoid(logit_pv)
            beta = dist.Beta(1 + phi_pv, len(phi_pv) + 1 - phi_pv)
            pyro.sample("gate_rate", beta.to_event(2))  # q(π), the conjugate update
            gate_pv = pyro.sample("gate", gate(logits=logit_pv).to_event(2))  # q(γ)
            pyro.sample("cut", gate(logits=cut_logit_pv).to_event(2))  # q(c)
        if self.edges == "posterior":
            edge_vk = pyro.sample("edge", gate(logits=self.edge_logit).to_event(2))  # q(A)
        pyro.sample("shift", GatedNormal(gate_pv, *normals["shift"]).to_event(2))  # q(μ | γ)
        pyro.sample("log_scale", GatedNormal(gate_pv, *normals["log_scale"]).to_event(2))  # q(log σ | γ)
        if "start" in normals:
            pyro.sample("start", dist.Normal(*normals["start"]).to_event(2))
        pyro.sample(
            "weight", GatedNormal(edge_vk, self.weight_loc, self.weight_spread).to_event(2)
        )  # q(w | A)

    def where_seen(self, seen: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Means and standard deviations of targets with training cells, and of the others."""
        return torch.where(self.seen_p1, seen[0], other[0]), torch.where(self.seen_p1, seen[1], other[1])

    def read(
        self, logit_pv: Tensor | None, cut_logit_pv: Tensor | None, normals: dict[str, tuple[Tensor, Tensor]]
    ) -> tuple[Tensor | None, Tensor | None, dict[str, tuple[Tensor, Tensor]]]:
        """Samples q of how rows of the table follow from changes; changes of unseen targets from their rows.

        A gate of theirs is open where the shift is larger than ``WORTH_A_GATE``, as probably as that is.
        """
        open_pv = torch.ones_like(self.shift_loc) if logit_pv is None else torch.sigmoid(logit_pv)
        cut_pv = torch.zeros_like(open_pv) if cut_logit_pv is None else torch.sigmoid(cut_logit_pv)
        locs = {f"{name}_pv": loc for name, (loc, _) in normals.items()}
        change_pf = all_changes(open_pv, cut_pv=cut_pv, **locs)
        reading = self.description(self.embedding_pe, change_pf)
        if self.training or bool(self.seen_p1.all()):
            return logit_pv, cut_logit_pv, normals
        shift, log_scale, cut, *start = self.told(reading, change_pf.shape[1] // open_pv.shape[1])
        if logit_pv is not None and cut_logit_pv is not None:
            sides = [torch.special.ndtr((sign * shift[0] - WORTH_A_GATE) / shift[1]) for sign in (-1, 1)]
            open_pv = torch.stack(sides).sum(0).clamp(1e-4, 1 - 1e-4)
            logit_pv = torch.where(self.seen_p1, logit_pv, torch.logit(open_pv))
            cut_logit_pv = torch.where(self.seen_p1, cut_logit_pv, torch.logit(cut[0].clamp(0.01, 0.99)))
        share_pv = open_pv.clamp(min=LEAST_SHARE)
        unseen = [(mean_pv / share_pv, sd_pv) for mean_pv, sd_pv in (shift, log_scale)] + start
        found = zip(self.changes, unseen, strict=True)
        return logit_pv, cut_logit_pv, {name: self.where_seen(normals[name], other) for name, other in found}

    def told(self, reading: Reading, n_kinds: int) -> list[tuple[Tensor, Tensor]]:
        """Mean and standard deviation of each kind of change, p, v, of unseen targets by their rows."""
        is_unseen_p = ~self.seen_p1.squeeze(-1)
        found = reading.changes(self.embedding_pe[is_unseen_p], n_kinds)
        means, sds = (
            value_uf.new_ones(len(is_unseen_p), value_uf.shape[1])
            .index_put((is_unseen_p,), value_uf)
            .chunk(n_kinds, -1)
            for value_uf in found
        )
        return list(zip(means, sds, strict=True))

    def align(self, loc_nl: Tensor, control_nl: Tensor, batch: Batch) -> None:
        """Charge differences of z_l between cells and control cells of the same time."""
        assert batch.time_n is not None
        if self.alignment == "pairs":
            align_pairs("align", loc_nl, control_nl, self.alpha)
            return
        time_n = (self.times_t - batch.time_n.unsqueeze(-1)).abs().argmin(-1)
        group_n = batch.condition_n * len(self.times_t) + time_n
        # anchors have the cells' times
        distance = mmd_by_group(loc_nl, group_n, control_nl, time_n, pool_n=time_n)
        pyro.factor("align", self.alpha * distance.expand(len(loc_nl)), has_rsample=True)

    def hold_gates_open(self, held: bool) -> None:
        """Leave the mechanisms alone while axes are sought, or let them be learned."""
        for name, parameter in self.named_parameters():
            if not name.startswith("encoder"):
                parameter.requires_grad_(not held)

    @torch.no_grad()
    def rotate(self, rotation: Rotation) -> None:
        """Take over new axes, with the mechanisms seen there."""
        self.encoder.rotate(rotation.map_kk, rotation.offset_k)
        seen = rotation.mechanisms
        assert isinstance(seen, LaggedMechanisms)
        self.gate_logit.copy_(torch.where(seen.altered_pv, 4.0, -4.0))
        self.cut_logit.copy_(torch.where(seen.cut_pv, 4.0, -4.0))
        if self.edges == "posterior":
            self.edge_logit.copy_(torch.where(seen.weight_vk.abs() > OPEN_ABOVE, 4.0, -2.0))
        for name in self.changes:
            getattr(self, f"{name}_loc").copy_(getattr(seen, f"{name}_pv"))
        self.weight_loc.copy_(seen.weight_vk)
