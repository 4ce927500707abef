"""Weight-variant latent SCM: perturbations change the mechanisms of programmes; a background is invariant."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_causalcell.batch import Batch, carried
from pyro_causalcell.direct import DirectEffects
from pyro_causalcell.distributions import Gate, GatedNormal, Likelihood, LinearSCM, measurement, spread
from pyro_causalcell.embeddings import expected_effects, expected_gates, squared_size, where_open
from pyro_causalcell.epistasis import Epistasis, masked_doses, pooled, sample_epistasis
from pyro_causalcell.nets import Activation, Decoder, Norm
from pyro_causalcell.penalties import edge_cost

__all__ = ["PRESETS", "WeightVariantSCM"]

Part = Literal["shift", "scale", "weight"]
Expected = dict[str, tuple[Tensor, Tensor]]

PRESETS: dict[str, dict[str, Any]] = {
    "dag-vae": {"alignment": "none"},
    "dense": {"gates": "open", "edges": "open"},
    "algorithm-1": {
        "gates": "open",
        "edges": "open",
        "anchored": False,
        "centred": False,
        "alters": ["weight"],
        "intervention": "ignored",
        "alignment": "pairs",
        "alpha": 0.1,
        "anchors": "random",
    },
}
"""Arguments of ``fit``: ``fit("weight-variant-scm", None, screen, **PRESETS["dag-vae"])``. ``"dag-vae"`` has
no alignment. ``"dense"`` lets every perturbation change every mechanism, which is not identified.
``"algorithm-1"`` follows the algorithm of the paper: the encoder gives the noise, from x alone; perturbations
change weights alone; every cell is aligned with a random control cell. The paper multiplies the KL terms:
``weights={"innovation": 1e-2, "z_invariant": 1e-2}`` on a loss that is a mean over genes."""


class WeightVariantSCM(PyroModule):
    r"""Weight-variant latent SCM: perturbations change the mechanisms of a few programmes.

    .. math::
        \pi_{pv} &\sim \mathrm{Beta}(1, \alpha), \quad \gamma_{pv} \sim \mathrm{Bernoulli}(\pi_{pv})
            && \text{does } p \text{ change the mechanism of programme } v? \\
        g_{vj} &\sim \mathrm{Bernoulli}(1/2) && \text{may programme } j \text{ act on } v? \\
        \mu_{pv} &\sim \mathrm{Normal}(0, \tau), \quad \log\sigma_{pv} \sim \mathrm{Normal}(0, 1/2), \quad
            w_{pvj} \sim \mathrm{Normal}(0, 1) && \text{the changes} \\
        z_l &= \Lambda_{ll} z_l + n_l, \quad n_l \sim \mathrm{Normal}(0, I) && \text{invariant programmes} \\
        z_v &= \Lambda_{vl}(u) z_l + \Lambda_{vv}(u) z_v + n_v, \quad n_v \sim
            \mathrm{Normal}(\mu(u), \sigma(u)) && \text{responsive programmes} \\
        x_{ng} &\sim \mathrm{NB}(\ell_n\, \mathrm{softmax}_g f(z_l, z_v, b_n),\; \theta_g) && \text{counts}

    with Λ(u)_vj = Σ_p u_p γ_pv g_vj w_pvj, μ(u) = Σ_p u_p γ_p μ_p and log σ(u) = Σ_p u_p γ_p log σ_p.
    Λ_ll and Λ_vv are strictly upper triangular. Control is the anchor: there Λ_vl = Λ_vv = 0 and n_v is
    standard normal.

    ======  =================  ========  ===============================================================
    symbol  name               shape     meaning
    ======  =================  ========  ===============================================================
    π       ``gate_rate``      p, v      prior probability that a mechanism is changed
    γ       ``gate``           p, v      1 where the perturbation changes the programme's mechanism
    g       ``edge``           v, l+v    1 where a programme may act on a responsive one
    μ       ``shift``          p, v      change of the mean of the noise
    log σ   ``log_scale``      p, v      change of the log standard deviation of the noise
    w       ``weight``         p, v, l+v weights of incoming edges
    z_l     ``z_invariant``    n, l      background programmes
    z_v     ``z_responsive``   n, v      programmes that perturbations act on
    x       ``x``              n, g      counts (or log-normalised values)
    ======  =================  ========  ===============================================================

    Which mechanisms a perturbation changes has to be sparse: where every perturbation may change all, any
    rotation of the responsive programmes gives the same likelihood. In training the guide hands over
    probabilities of gates and edges, and p(z_v | z_l) is the exact expectation over them; in evaluation they
    are drawn.

    Where the screen has ``embeddings``, changes are centred on linear functions of them and the rate of gates
    follows the size of the expected change of a mechanism, in place of π and τ (see
    ``pyro_causalcell.embeddings``), so that a target without training cells has a prediction.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding: sizes of the screen (see ``Dims``).
        n_invariant, n_responsive: Programmes l and v.
        likelihood: ``"nb"``, ``"zinb"``, ``"poisson"`` (counts) or ``"gaussian"`` (log-normalised values).
        gates: ``"posterior"``, or ``"open"``: every perturbation may change every mechanism (dense).
        edges: ``"posterior"``, or ``"open"``: every programme may act on the responsive ones before it.
        alters: What of a mechanism a perturbation changes.
        anchored: Whether control has no edges into responsive programmes; otherwise it has weights Λ⁰ of
            its own, to which changes add.
        centred: Whether z_v is the latent; otherwise its noise n_v is (site ``innovation``), which needs
            open gates and edges.
        rank: Rank of the weights over perturbations, for many targets; None leaves them free.
        epistasis: Whether a target may mask what other targets of the cell change about a programme, and
            shifts of one direction saturate (see ``pyro_causalcell.epistasis``).
        direct: Whether targets act on single genes, too (see ``pyro_causalcell.direct``).
        min_effect: Smallest change worth a gate, in standard deviations of a programme.
        min_weight: Smallest weight worth an edge, over the cells whose mechanism is changed.
        shift_scale: τ.
        n_hidden, n_layers, norm, activation: of the decoder.

    Raises:
        ValueError: Non-centred sites with gates or edges to learn, or ``alters`` something unknown.

    Source: Identifying unperturbed cellular programs enables accurate single-cell perturbation prediction
    (cDAG-VAE, submitted to ICLR 2026), equations 1 to 3. Gates, edges and the exact expectation over them are
    this project's.
    """

    site_dims = dict.fromkeys(
        ("gate_rate", "gate", "shift", "log_scale", "epistasis"), ("perturbation", "responsive")
    ) | {
        "edge": ("responsive", "programme"),
        "weight": ("perturbation", "responsive", "programme"),
        "loading": ("perturbation", "component"),
        "shift_map": ("responsive", "feature"),
        "log_scale_map": ("responsive", "feature"),
        "weight_map": ("responsive_programme", "feature"),
        "loading_map": ("component", "feature"),
        **DirectEffects.dims,
    }
    """Names of the axes of the global latents, for ArviZ."""

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
        alters: Sequence[Part] = ("shift", "scale", "weight"),
        anchored: bool = True,
        centred: bool = True,
        rank: int | None = None,
        epistasis: bool = False,
        direct: bool = False,
        min_effect: float = 0.5,
        min_weight: float = 0.3,
        shift_scale: float = 2.0,
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        activation: Activation = "silu",
    ):
        super().__init__()
        if not centred and "posterior" in (gates, edges):
            raise ValueError("centred=False needs gates='open' and edges='open'")
        if not set(alters) <= set(get_args(Part)):
            raise ValueError(f"alters holds some of {list(get_args(Part))}, found {list(alters)}")
        self.needs = {"normalised"} if likelihood == "gaussian" else {"counts"}
        self.n_targets, self.n_invariant, self.n_responsive = n_targets, n_invariant, n_responsive
        self.gates, self.edges, self.alters, self.centred = gates, edges, tuple(alters), centred
        self.shift_scale, self.rank, self.background_held = shift_scale, rank, True
        self.epistasis = epistasis
        n_programmes = n_invariant + n_responsive
        cells_p = torch.tensor(target_cells or [0.0] * n_targets)
        self.register_buffer("cells_p", cells_p)
        self.min_effect, self.min_weight = min_effect, min_weight
        below_vv = torch.ones(n_responsive, n_responsive).triu(1)
        self.register_buffer("allowed_vk", torch.cat([torch.ones(n_responsive, n_invariant), below_vv], 1))
        self.weight_ll = PyroParam(torch.zeros(n_invariant, n_invariant))
        if not anchored:
            self.weight_vk = PyroParam(torch.zeros(n_responsive, n_programmes))
        self.anchored = anchored
        if rank is not None:
            self.basis_rvk = PyroParam(0.1 * torch.randn(rank, n_responsive, n_programmes))
        self.free_shift_pl = PyroParam(torch.zeros(n_targets, n_invariant))
        self.free_log_scale_pl = PyroParam(torch.zeros(n_targets, n_invariant))
        if n_embedding:
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
        self.decoder = Decoder(
            n_programmes,
            n_genes,
            n_batches,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            activation=activation,
        )
        self.direct = DirectEffects(n_targets, n_genes) if direct else None
        self.theta_g, self.scale_g, self.zero_logit_g = spread(likelihood, n_genes)

    def forward(self, batch: Batch) -> Tensor:
        """The generative story of one minibatch; returns the observed or drawn x, shape n, g."""
        expected = self.expected()
        gate_pv, edge_vk, expected = self.structure(expected)
        changes = self.changes(gate_pv, edge_vk, expected)
        epistasis = sample_epistasis(gate_pv) if self.epistasis else None  # p(κ) p(s)
        direct_ng = None if self.direct is None else self.direct(batch.u_np)  # p(δ)

        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nl = pyro.sample("z_invariant", self.background(batch.u_np))  # p(z_l)
            held = carried(batch.u_np, batch.most if self.training else None)
            p_z_nv = self.mechanisms(held, z_nl, gate_pv, edge_vk, *changes, epistasis)
            z_nv = self.responsive(p_z_nv)  # p(z_v | z_l, u)
            z_nk = torch.cat([z_nl.expand(*z_nv.shape[:-1], -1), z_nv], -1)
            output_ng = self.decoder(z_nk, batch.batch_nb)
            if direct_ng is not None:
                output_ng = output_ng + direct_ng
            p_x = measurement(output_ng, batch.library_n1, self.theta_g, self.scale_g, self.zero_logit_g)
            x: Tensor = pyro.sample("x", p_x.to_event(1), obs=batch.x_ng)  # p(x | z)
            return x

    def expected(self) -> Expected:
        """Mean and standard deviation of the parts of a change, where it is there."""
        parts = {
            "shift": ("shift", (self.n_responsive,), self.shift_scale),
            "scale": ("log_scale", (self.n_responsive,), 0.5),
            "weight": ("weight", tuple(self.allowed_vk.shape), 1.0),
        }
        if self.rank is not None:
            parts["weight"] = ("loading", (self.rank,), 1.0)
        sites = [parts[part] for part in parts if part in self.alters]
        if not hasattr(self, "embedding_pe"):
            zero = self.allowed_vk.new_zeros(())
            return {name: (zero, zero + sd) for name, _, sd in sites}
        return {name: expected_effects(name, self.embedding_pe, shape, sd) for name, shape, sd in sites}

    def structure(self, expected: Expected) -> tuple[Tensor, Tensor, Expected]:
        """Gates γ, shape p, v, edges g, shape v, l+v, and what is expected where gates are open."""
        edge_vk: Tensor = self.allowed_vk
        gate_pv = edge_vk.new_ones(self.n_targets, self.n_responsive)
        if self.gates == "posterior":
            if hasattr(self, "embedding_pe"):
                gated = {name: part for name, part in expected.items() if name != "loading"}
                logit_pv = expected_gates("gate", squared_size([loc for loc, _ in gated.values()], gate_pv))
                gate = Gate(logits=logit_pv)
                expected = expected | {
                    name: (where_open(loc, logit_pv), sd) for name, (loc, sd) in gated.items()
                }
            else:
                beta = dist.Beta(gate_pv.new_ones(()), float(self.n_targets)).expand(gate_pv.shape)
                gate = Gate(pyro.sample("gate_rate", beta.to_event(2)))  # p(π)
            gate_pv = pyro.sample("gate", gate.to_event(2))  # p(γ | π)
            edge_cost("min_effect", gate_pv, self.cells_p * self.min_effect**2 / 2)
        if self.edges == "posterior":
            edge_vk = edge_vk * pyro.sample("edge", Gate(0.5 * torch.ones_like(edge_vk)).to_event(2))  # p(g)
            changed_v = self.cells_p @ gate_pv.detach()  # cells in which the edge can act
            edge_cost("min_weight", edge_vk, changed_v * self.min_weight**2 / 2)
        return gate_pv, edge_vk, expected

    def changes(self, gate_pv: Tensor, edge_vk: Tensor, expected: Expected) -> tuple[Tensor, Tensor, Tensor]:
        """Changes of means and log scales, each p, v, and of weights, p, v, l+v."""
        shift_pv = log_scale_pv = torch.zeros_like(gate_pv)
        weight_pvk = torch.zeros_like(gate_pv).unsqueeze(-1) * edge_vk
        if "shift" in self.alters:
            slab = GatedNormal(gate_pv, *expected["shift"])
            shift_pv = pyro.sample("shift", slab.to_event(2))  # p(μ | γ)
        if "scale" in self.alters:
            slab = GatedNormal(gate_pv, *expected["log_scale"])
            log_scale_pv = pyro.sample("log_scale", slab.to_event(2))  # p(log σ | γ)
        if "weight" in self.alters and self.rank is None:
            slab = GatedNormal(gate_pv.unsqueeze(-1) * edge_vk, *expected["weight"])
            weight_pvk = pyro.sample("weight", slab.to_event(3))  # p(w | γ, g)
        elif "weight" in self.alters:
            slab = GatedNormal(gate_pv.new_ones(self.n_targets, len(self.basis_rvk)), *expected["loading"])
            loading_pr = pyro.sample("loading", slab.to_event(2))
            weight_pvk = torch.einsum("pr,rvk->pvk", loading_pr, self.basis_rvk)
        return shift_pv, log_scale_pv, weight_pvk

    def background(self, u_np: Tensor) -> LinearSCM:
        """p(z_l): the same under every perturbation. While axes are sought it may shift and spread."""
        zeros_nl = u_np.new_zeros(len(u_np), self.n_invariant)
        if self.background_held:
            return LinearSCM(zeros_nl, self.weight_ll.triu(1), zeros_nl)
        return LinearSCM(u_np @ self.free_shift_pl, self.weight_ll.triu(1), u_np @ self.free_log_scale_pl)

    def mechanisms(
        self,
        held: tuple[Tensor, Tensor],
        z_nl: Tensor,
        gate_pv: Tensor,
        edge_vk: Tensor,
        shift_pv: Tensor,
        log_scale_pv: Tensor,
        weight_pvk: Tensor,
        epistasis: Epistasis | None = None,
    ) -> LinearSCM:
        """p(z_v | z_l, u), exact for binary gates; for probabilities its expectation over them.

        A gate enters a squared residual together with the precision it sets. Weighting by that precision
        tilts its probability: ρ = γ σ⁻² / (1 − γ + γ σ⁻²) takes the place of γ in the residual. A cell looks
        at the targets m that it holds (``carried``) alone: all of them would take n, p, v, k.
        """
        n_l, (target_nm, dose_nmv) = self.n_invariant, held
        parts = [gate_pv, shift_pv, log_scale_pv, *([] if epistasis is None else [epistasis.masked_pk])]
        # one table: its rows are picked at once
        table_pvj = torch.cat([*(part.unsqueeze(-1) for part in parts), weight_pvk], -1)
        rows_nmvj = table_pvj.index_select(0, target_nm.flatten()).unflatten(0, target_nm.shape)
        gate_nmv, shift_nmv, log_scale_nmv, *masked_nmv = rows_nmvj[..., : len(parts)].unbind(-1)
        weight_nmvk = rows_nmvj[..., len(parts) :]
        if masked_nmv:
            dose_nmv = masked_doses(dose_nmv, *masked_nmv)
        ratio_nmv = torch.exp(-2 * dose_nmv * log_scale_nmv)
        share_nmv = 1 - gate_nmv + gate_nmv * ratio_nmv
        tilted_nmv = gate_nmv * ratio_nmv / share_nmv
        precision_nv = torch.exp(share_nmv.log().sum(1))
        given_nmv = dose_nmv * tilted_nmv
        mean_nvk = (given_nmv.unsqueeze(-1) * weight_nmvk).sum(1)
        if not self.anchored:
            mean_nvk = mean_nvk + self.weight_vk
        weight_nvk = mean_nvk * edge_vk
        moved_nmv = given_nmv * shift_nmv
        loc_nv = moved_nmv.sum(1) if epistasis is None else pooled(moved_nmv, epistasis.power)
        loc_nv = loc_nv + torch.einsum("nij,...nj->...ni", weight_nvk[..., :n_l], z_nl)
        slack = None
        if self.training and "posterior" in (self.gates, self.edges):
            unsure_nmv = dose_nmv**2 * tilted_nmv * (1 - tilted_nmv)
            slack = self.slack(z_nl, unsure_nmv, mean_nvk, edge_vk, shift_nmv, weight_nmvk)
        log_scale_nv = (dose_nmv * gate_nmv * log_scale_nmv).sum(1)
        return LinearSCM(loc_nv, weight_nvk[..., n_l:], log_scale_nv, precision_nv, slack)

    def slack(
        self,
        z_nl: Tensor,
        unsure_nmv: Tensor,
        mean_nvk: Tensor,
        edge_vk: Tensor,
        shift_nmv: Tensor,
        weight_nmvk: Tensor,
    ) -> Callable[[Tensor], Tensor]:
        """Variance of the residual of z_v that undecided gates and edges leave, as a function of z_v."""
        square_nvk = mean_nvk**2 + (unsure_nmv.unsqueeze(-1) * weight_nmvk**2).sum(1)
        by_edge_nvk = edge_vk * (1 - edge_vk) * square_nvk

        def variance(z_nv: Tensor) -> Tensor:
            z_nk = torch.cat([z_nl.expand(*z_nv.shape[:-1], -1), z_nv], -1)
            moved_nmv = torch.einsum("...nk,nmvk->...nmv", z_nk, weight_nmvk * edge_vk) + shift_nmv
            by_gate_nv = (unsure_nmv * moved_nmv**2).sum(-2)
            return by_gate_nv + torch.einsum("nvk,...nk->...nv", by_edge_nvk, z_nk**2)

        return variance

    def responsive(self, p_z_nv: LinearSCM) -> Tensor:
        """z_v, drawn as such or from its noise."""
        if self.centred:
            z_nv: Tensor = pyro.sample("z_responsive", p_z_nv)
            return z_nv
        noise = dist.Normal(torch.zeros_like(p_z_nv.loc), 1.0)
        return p_z_nv.from_noise(pyro.sample("innovation", noise.to_event(1)))

    def programme_names(self) -> list[str]:
        """Names in the order of the latents: invariant ones first."""
        blocks = (("invariant", self.n_invariant), ("responsive", self.n_responsive))
        return [f"{block}_{i + 1}" for block, n in blocks for i in range(n)]

    def hold_gates_open(self, held: bool) -> None:
        """While the axes are sought the background may change as well."""
        self.background_held = not held

    @torch.no_grad()
    def rotate(self, map_kk: Tensor, offset_k: Tensor) -> None:
        """Take over new axes: (z_l, z_v) becomes ``z @ map_kk.T + offset_k``, with the same p(x | z)."""
        self.decoder.rotate(map_kk, offset_k)
        self.weight_ll.zero_()
