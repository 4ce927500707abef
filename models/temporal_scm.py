"""Latent temporal SCM: responses unfold between snapshots through a sparse lagged graph."""

import math
from typing import Any, Literal, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.distributions import (
    Gate,
    GatedNormal,
    Likelihood,
    PopulationNormal,
    TransitionMixture,
    TransportMixture,
    measurement,
    spread,
)
from pyro_causalcell.embeddings import all_changes, described, seen_targets
from pyro_causalcell.nets import Activation, AdditiveMaps, Decoder, Network, Norm, times
from pyro_causalcell.penalties import contrast, edge_cost, potentials, sinkhorn_divergence, transport_cost

__all__ = ["PRESETS", "TemporalSCM"]

PRESETS: dict[str, dict[str, Any]] = {
    "no-alignment": {"alignment": "none"},
    "no-sparsity": {"gates": "open", "edges": "open"},
    "independent-pairs": {"join": "mixture", "n_sources": 1},
    "transport": {"join": "transport", "n_sources": 32},
    "sinkhorn": {"join": "sinkhorn", "n_sources": 32},
    "paper": {
        "gates": "open",
        "edges": "open",
        "graph": "triangular",
        "l1": 1e-3,
        "join": "mixture",
        "n_sources": 1,
        "alignment": "pairs",
        "alpha": 0.1,
    },
}
"""Arguments of ``fit``: ``fit("temporal-scm", None, screen, **PRESETS["independent-pairs"])``. ``"paper"`` is
what is known of the paper's settings: a strictly lower triangular lagged graph under an L1 penalty, one
random cell of the snapshot before as the past of a cell, and alignment with a random control cell."""

ODE_STEP = 0.5
"""Length of the steps of the fourth-order Runge-Kutta method, as a share of a step of the model."""
LEAST_SCALE = 0.05
"""Smallest standard deviation of an innovation: a mixture over sampled pasts cannot resolve less."""


EACH_PAST = ("mixture", "transport")
"""Ways of joining snapshots that look at every past, where others need moments over pasts."""


class Mechanism(NamedTuple):
    """One draw of the global latents."""

    gate_pv: Tensor
    edge_vk: Tensor
    shift_pv: Tensor
    log_scale_pv: Tensor
    cut_pv: Tensor
    start_pv: Tensor
    weight_vk: Tensor


class Law(NamedTuple):
    """Normal laws of programmes in each situation r, one for each past m; see ``TransitionMixture``."""

    loc_rmk: Tensor
    log_scale_rk: Tensor
    precision_rk: Tensor
    slack_rmk: Tensor

    def where(self, other_r: Tensor, loc_rk: Tensor) -> "Law":
        """Unit normals at loc in some situations."""
        other_r1 = other_r.unsqueeze(-1)
        return Law(
            torch.where(other_r1.unsqueeze(-1), loc_rk.unsqueeze(-2), self.loc_rmk),
            torch.where(other_r1, 0.0, self.log_scale_rk),
            torch.where(other_r1, 1.0, self.precision_rk),
            torch.where(other_r1.unsqueeze(-1), 0.0, self.slack_rmk),
        )

    def mixture(self, situation_n: Tensor | slice, logits_nm: Tensor | None = None) -> TransitionMixture:
        """The mixture over pasts, for cells in these situations."""
        loc_nmk, log_scale_nk, precision_nk, slack_nmk = (part[situation_n] for part in self)
        return TransitionMixture(loc_nmk, log_scale_nk, precision_nk, slack_nmk, logits_nm)

    def likely(self, z_nk: Tensor) -> Tensor:
        """Log density of each cell n under the law of each situation r, for the only past of that, n, r."""
        # no product of matrices, which may be of low precision: these are differences of large numbers
        away_nrk = (z_nk.unsqueeze(-2) - self.loc_rmk.movedim(-2, -3)) * torch.exp(-self.log_scale_rk)
        return -(away_nrk**2).sum(-1) / 2 - self.log_scale_rk.sum(-1)

    def spread(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the programmes over the possible pasts, each r, k."""
        between_rk = self.loc_rmk.var(-2, unbiased=False)
        return self.loc_rmk.mean(-2), (between_rk + torch.exp(2 * self.log_scale_rk)).sqrt()

    def stretched(self, shift_rk: Tensor, ratio_rk: Tensor) -> "Law":
        """Moved, and stretched about the mean over pasts."""
        mean_r1k, ratio_r1k = self.loc_rmk.mean(-2, keepdim=True), ratio_rk.unsqueeze(-2)
        return Law(
            mean_r1k + shift_rk.unsqueeze(-2) + ratio_r1k * (self.loc_rmk - mean_r1k),
            self.log_scale_rk + ratio_rk.log(),
            self.precision_rk / ratio_rk**2,
            self.slack_rmk * ratio_r1k**2,
        )

    def draw(self) -> Tensor:
        """A draw for every past."""
        scale_rmk = self.log_scale_rk.exp().unsqueeze(-2)
        # in the order of its axes: a compiled step may lay loc out differently
        noise_rmk = torch.randn_like(self.loc_rmk, memory_format=torch.contiguous_format)
        return self.loc_rmk + scale_rmk * noise_rmk


def moments(*laws: Law) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, Cholesky factor of the covariance, and slack of the programmes, over the possible pasts.

    A covariance that cannot be factored, as of numbers out of range, gives no number.
    """
    loc_rmk = torch.cat([law.loc_rmk for law in laws], -1)
    noise_rk = torch.cat([torch.exp(2 * law.log_scale_rk) for law in laws], -1)
    loc_rk = loc_rmk.mean(-2)
    left_rmk = loc_rmk - loc_rk.unsqueeze(-2)
    between_rkk = left_rmk.mT @ left_rmk / max(loc_rmk.shape[-2] - 1, 1)
    root_rkk, fault_r = torch.linalg.cholesky_ex(between_rkk + torch.diag_embed(noise_rk))
    root_rkk = torch.where(fault_r[:, None, None] > 0, torch.nan, root_rkk)
    return loc_rk, root_rkk, torch.cat([law.slack_rmk.mean(-2) for law in laws], -1)


class TemporalSCM(PyroModule):
    r"""Latent temporal SCM: invariant and responsive programmes that evolve through a lagged graph.

    .. math::
        \pi_{pv} &\sim \mathrm{Beta}(1, \alpha), \quad \gamma_{pv} \sim \mathrm{Bernoulli}(\pi_{pv})
            && \text{does } p \text{ change the mechanism of programme } v? \\
        A_{vj} &\sim \mathrm{Bernoulli}(1/2) && \text{does } j \text{ act on } v \text{ one step later?} \\
        \mu_{pv} &\sim \mathrm{Normal}(0, \tau), \quad \log\sigma_{pv} \sim \mathrm{Normal}(0, 1/2), \quad
            c_{pv} \sim \mathrm{Bernoulli}(0.1) && \text{the changes: shift, noise, parents cut} \\
        z_l^{t+1} &= f_l(z_l^t) + n_l && \text{invariant programmes} \\
        z_v^{t+1} &= (1 - c_v(u)) \big(b_v + \textstyle\sum_j A_{vj}\, f_{vj}(z_j^t)\big) + \mu_v(u)
            + \sigma_v(u)\, n_v && \text{responsive programmes} \\
        x_{ng} &\sim \mathrm{NB}(\ell_n\, \mathrm{softmax}_g f(z_l, z_v, b_n),\; \theta_g) && \text{counts}

    with μ(u) = Σ_p u_p γ_p μ_p, log σ(u) = Σ_p u_p γ_p log σ_p, and 1 − c(u) = Π_p (1 − u_p c_p). At
    the first snapshot z_l is standard normal, and so is z_v of control cells; there a perturbation has moved
    z_v by start_pv already.

    Snapshots are not paired: nobody knows the past of a cell. Its past is one of the cells of the snapshot
    before, of its condition, each as likely: p(z^{t+1}) is the mixture of the transitions of ``n_sources`` of
    them. They come from a memory of posterior draws that every training step renews. Where a condition has
    no earlier snapshot, as one that was never measured, pasts are drawn from the law of the first snapshot,
    or of the onset.
    A mixture over a sample needs many components where programmes have a long memory, and is too low with
    few; so by default the normal with the moments of those transitions stands in for it (``join="moments"``),
    which is the same thing where transitions are linear. Pairing each cell with one random cell of the
    snapshot before (``join="mixture", n_sources=1``, as in the paper) teaches transitions to forget, for
    given the condition the two are independent.

    In evaluation, cells at a time between two snapshots of their condition are led to the later one: what
    transitions from the earlier one miss of the mean and spread of each programme in the later one is made up
    for, in the share of the gap that has passed.

    Two more ways are there for comparison; both train the transitions, and leave likelihood and predictions
    to the moments. ``join="transport"`` lets a cell come from the pasts that entropic optimal transport
    couples it with, from where they have moved to the cells of its snapshot. ``join="sinkhorn"`` gives each
    snapshot a normal law of its own, and charges the Sinkhorn divergence between its cells and where the
    pasts have moved.
    Both take time in proportion to ``n_sources`` squared; 32 are enough.

    Where the screen knows tracks (``track=``), a cell's past is no secret: it is drawn from q(z | x) of the
    same cell at the time before (site ``z_past``), and p(z^{t+1}) is its transition alone. Then ``contrast``
    helps to find the background: z_l is to tell a cell's past from the pasts of other cells of its condition,
    by its own transition. What an intervention sets anew tells nothing of its past, and has no room there.

    Where it is known when perturbations began to act (``onset``), nothing has moved before: at the onset the
    programmes of every condition are standard normal each, and the first snapshots follow from there by
    transitions, as later ones do; there are no starts. In snapshots close to the end of a response a
    lasting shift is otherwise hard to tell from a slow programme.

    A gap between snapshots is divided into equal steps no longer than the shortest gap; a step of a part h of
    it goes z + h (f(z) - z), with noise of variance h σ². With ``transition="ode"`` it goes to where the
    differential equation dz/dt = f(z) - z leads in that time, so that programmes act on each other within a
    step as well; the variance that uncertain gates give to where it leads is then that of a straight step.

    Where the screen has ``embeddings``, a target's row is read off all that it changes (site ``table``, see
    ``pyro_causalcell.embeddings``), so that one without training cells has a prediction: what explains its
    row with changes of few programmes.

    ======  =================  =========  ===============================================================
    symbol  name               shape      meaning
    ======  =================  =========  ===============================================================
    π       ``gate_rate``      p, v       prior probability that a mechanism is changed
    γ       ``gate``           p, v       1 where the perturbation changes the programme's mechanism
    A       ``edge``           v, l+v     1 where a programme acts on a responsive one a step later
    μ       ``shift``          p, v       shift of the innovation
    log σ   ``log_scale``      p, v       change of the log standard deviation of the innovation
    c       ``cut``            p, v       1 where the perturbation cuts the programme off its parents
    start   ``start``          p, v       shift at the first snapshot
    f_vj    ``weight``         v, l+v     slope of the effect of an edge (its bend is a parameter)
    M       ``table_map``      f+1, e     how rows of embeddings follow from all f changes
    z_l     ``z_invariant``    n, l       background programmes
    z_v     ``z_responsive``   n, v       programmes that perturbations act on
    x       ``x``              n, g       counts (or log-normalised values)
    ======  =================  =========  ===============================================================

    In training the guide hands over probabilities of gates, edges and cuts. The logarithm of each component
    of the mixture is then replaced by its expectation, which bounds the expected log of the mixture from
    below.

    Args:
        n_genes, n_targets, n_batches, target_cells, n_embedding, n_cells, n_conditions, times, longest_gap,
            latest_start, doses_vary: sizes of the screen (see ``Dims``).
        n_invariant, n_responsive: Programmes l and v.
        likelihood: ``"nb"``, ``"zinb"``, ``"poisson"`` (counts) or ``"gaussian"`` (log-normalised values).
        gates: ``"posterior"``, or ``"open"``: every perturbation may change every mechanism.
        edges: ``"posterior"``, or ``"open"``: every programme of the graph acts.
        graph: ``"full"``, or ``"triangular"``: responsive programmes act on later ones alone, and not on
            themselves.
        l1: Nats for a unit of absolute slope of an edge.
        transition: ``"additive"``: the effect of an edge may bend; ``"linear"``; ``"ode"``: effects that may
            bend act all along a step, see above.
        onset: When perturbations began to act, on the scale of times and not after the first snapshot; None
            if that is not known.
        join: ``"moments"`` or ``"mixture"``: how the transitions of possible pasts make up p(z);
            ``"transport"`` or ``"sinkhorn"``: what joins them in training, see above.
        n_sources: Possible pasts that are looked at in a step.
        memory: Cells that are remembered of each condition and snapshot.
        blur: Weight of the entropy in ``"transport"`` and ``"sinkhorn"``, a squared distance of programmes.
        unbalanced: Price of using pasts unlike one another in ``"transport"``, over ``blur``: with a low one
            pasts may have grown or died. None demands that each is used alike.
        min_effect: Smallest change worth a gate, in standard deviations of a programme.
        min_weight: Smallest slope worth an edge.
        shift_scale: τ.
        contrast: Where tracks are known, weight of telling a cell's past by z_l, see above.
        network: ``"mlp"``, or ``"image"`` where x are the pixels (y, x, rgb) of an image, from -1 to 1.
        n_hidden, n_layers, norm, activation: of the decoder.

    Source: CITE-VAE (arXiv 2605.25581), equations 2 to 4. Gates, the population transition and its bound are
    this project's.
    """

    site_dims = dict.fromkeys(
        ("gate_rate", "gate", "shift", "log_scale", "cut", "start"), ("perturbation", "responsive")
    ) | dict.fromkeys(("edge", "weight"), ("responsive", "programme"))
    site_dims |= {"table_map": ("change", "feature")}
    """Names of the axes of the global latents, for ArviZ."""

    def __init__(
        self,
        n_genes: int,
        n_targets: int,
        n_batches: int = 0,
        target_cells: tuple[float, ...] = (),
        n_embedding: int = 0,
        n_cells: int = 1,
        n_conditions: int = 1,
        times: tuple[float, ...] = (0.0, 1.0),
        longest_gap: float | None = None,
        latest_start: float | None = None,
        doses_vary: bool = True,
        *,
        n_invariant: int = 10,
        n_responsive: int = 6,
        likelihood: Likelihood = "nb",
        gates: Literal["posterior", "open"] = "posterior",
        edges: Literal["posterior", "open"] = "posterior",
        graph: Literal["full", "triangular"] = "full",
        l1: float = 0.0,
        transition: Literal["additive", "linear", "ode"] = "additive",
        onset: float | None = None,
        join: Literal["moments", "mixture", "transport", "sinkhorn"] = "moments",
        n_sources: int = 128,
        memory: int = 128,
        blur: float = 0.3,
        unbalanced: float | None = None,
        min_effect: float = 0.5,
        min_weight: float = 0.15,
        shift_scale: float = 2.0,
        contrast: float = 0.0,
        network: Network = "mlp",
        n_hidden: int = 128,
        n_layers: int = 2,
        norm: Norm = "batch",
        activation: Activation = "silu",
    ):
        super().__init__()
        if len(times) < 2:
            raise ValueError(
                f"a temporal model needs two snapshots at least, found times {list(times)}; pass the column "
                "of times as time=, or fit weight-variant-scm to a single snapshot"
            )
        if not (isinstance(contrast, int | float) and contrast >= 0):
            raise ValueError(f"expected contrast as a number from 0 on, found {contrast!r}")
        if n_invariant < 1 or n_responsive < 1:
            raise ValueError("expected n_invariant and n_responsive of at least 1")
        is_price = isinstance(unbalanced, int | float) and unbalanced > 0
        if unbalanced is not None and not (join == "transport" and is_price):
            raise ValueError(
                f'expected unbalanced above 0, and join="transport", found {unbalanced!r} with {join!r}; '
                "pass unbalanced=None to use every past alike"
            )
        if onset is not None and not (isinstance(onset, int | float) and onset <= times[0]):
            raise ValueError(
                f"expected onset as a number not after the first snapshot, at {times[0]}, found {onset!r}; "
                "leave out earlier cells, or pass onset=None"
            )
        self.needs = {"time", "normalised" if likelihood == "gaussian" else "counts"}
        self.n_targets, self.n_invariant, self.n_responsive = n_targets, n_invariant, n_responsive
        self.gates, self.edges, self.graph, self.l1 = gates if n_targets else "open", edges, graph, l1
        self.join, self.n_sources, self.blur, self.unbalanced = join, n_sources, blur, unbalanced
        self.shift_scale, self.contrast, self.axes_sought = shift_scale, contrast, False
        self.min_effect, self.min_weight, self.n_cells = min_effect, min_weight, n_cells
        n_programmes = n_invariant + n_responsive
        self.register_buffer("cells_p", torch.tensor(target_cells or [0.0] * n_targets))
        if n_embedding:
            self.register_buffer("embedding_pe", torch.zeros(n_targets, n_embedding))
            self.register_buffer("seen_p", seen_targets(n_targets, target_cells))
        own_vk = torch.cat([torch.zeros(n_responsive, n_invariant), torch.eye(n_responsive)], 1)
        below_vv = torch.ones(n_responsive, n_responsive).tril(-1)
        self.register_buffer("own_vk", own_vk if graph == "full" else torch.zeros_like(own_vk))
        allowed_vk = torch.cat([torch.ones(n_responsive, n_invariant), below_vv], 1)
        self.register_buffer("allowed_vk", torch.ones_like(own_vk) if graph == "full" else allowed_vk)
        # the past: what each snapshot of each condition looked like lately
        self.register_buffer("times_t", torch.tensor(times))
        self.register_buffer("memory_ctmk", torch.zeros(n_conditions, len(times), memory, n_programmes))
        self.register_buffer("filled_ct", torch.zeros(n_conditions, len(times), dtype=torch.bool))
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        self.unit, self.doses_vary = min(gaps), doses_vary
        self.onset, self.first = onset, times[0] if onset is None else onset
        latest_start = times[-1] if latest_start is None else latest_start
        self.longest_gap = max(longest_gap or 0.0, latest_start - self.first)
        # f_l and f_v
        bends = 0 if transition == "linear" else 4
        self.follows_ode = transition == "ode"
        self.invariant_map = AdditiveMaps(n_invariant, n_invariant, bends)
        self.invariant_weight_ll = PyroParam(0.5 * torch.eye(n_invariant))
        self.invariant_offset_l = PyroParam(torch.zeros(n_invariant))
        self.invariant_log_scale_l = PyroParam(torch.full((n_invariant,), -0.2))
        self.responsive_map = AdditiveMaps(n_programmes, n_responsive, bends)
        self.responsive_offset_v = PyroParam(torch.zeros(n_responsive))
        self.responsive_log_scale_v = PyroParam(torch.full((n_responsive,), -0.2))
        if self.first < times[0]:
            self.onset_root_kk = PyroParam(torch.eye(n_programmes))
        # while axes are sought every snapshot of every condition has a normal law of its own
        self.free_loc_ctk = PyroParam(torch.zeros(n_conditions, len(times), n_programmes))
        self.free_log_scale_ctk = PyroParam(torch.zeros(n_conditions, len(times), n_programmes))
        self.decoder = Decoder(
            n_programmes,
            n_genes,
            n_batches,
            network=network,
            n_hidden=n_hidden,
            n_layers=n_layers,
            norm=norm,
            activation=activation,
        )
        self.theta_g, self.scale_g, self.zero_logit_g = spread(likelihood, n_genes, network)

    def forward(self, batch: Batch) -> Tensor:
        """The generative story of one minibatch; returns the observed or drawn x, shape n, g."""
        mechanism = self.mechanism()

        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            situations, situation_n = self.situations(batch)
            laws = self.laws(situations, mechanism, self.own_past(batch))
            if self.training and self.join == "sinkhorn" and not self.axes_sought and batch.previous is None:
                laws = self.apart(situations, situation_n, *laws)
            if self.training and self.join == "transport" and laws[0].loc_rmk.shape[-2] > 1:
                z_nk = self.transported(*laws, situations, situation_n)
            else:
                z_nk = self.programmes(*laws, situation_n)
            if self.training and self.contrast:
                self.recognised(z_nk[:, : self.n_invariant], laws[0], batch)
            self.remember(batch, z_nk)
            output_ng = self.decoder(z_nk, batch.batch_nb)
            p_x = measurement(output_ng, batch.library_n1, self.theta_g, self.scale_g, self.zero_logit_g)
            x: Tensor = pyro.sample("x", p_x.to_event(1), obs=batch.x_ng)  # p(x | z)
            return x

    def mechanism(self) -> Mechanism:
        """Gates, edges, and what they let through."""
        edge_vk: Tensor = self.allowed_vk
        gate_pv = edge_vk.new_ones(self.n_targets, self.n_responsive)
        cut_pv = torch.zeros_like(gate_pv)
        if self.gates == "posterior":
            cost_p = self.cells_p * self.min_effect**2 / 2
            beta = dist.Beta(gate_pv.new_ones(()), float(self.n_targets)).expand(gate_pv.shape)
            gate = Gate(pyro.sample("gate_rate", beta.to_event(2)))  # p(π)
            gate_pv = pyro.sample("gate", gate.to_event(2))  # p(γ | π)
            edge_cost("min_effect", gate_pv, cost_p)
            cut_pv = pyro.sample("cut", Gate(torch.full_like(gate_pv, 0.1)).to_event(2))  # p(c)
            edge_cost("min_cut", cut_pv, self.cells_p * self.min_weight**2 / 2)
        if self.edges == "posterior":
            edge_vk = pyro.sample("edge", Gate(0.5 * torch.ones_like(edge_vk)).to_event(2))  # p(A)
            edge_vk = edge_vk * self.allowed_vk * (1 - self.own_vk) + self.own_vk  # a past of its own is free
            edge_cost("min_weight", edge_vk, edge_vk.new_tensor([self.n_cells * self.min_weight**2 / 2]))
        shift_pv = pyro.sample("shift", GatedNormal(gate_pv, 0.0, self.shift_scale).to_event(2))  # p(μ | γ)
        log_scale = GatedNormal(gate_pv, 0.0, 0.5)
        log_scale_pv = pyro.sample("log_scale", log_scale.to_event(2))  # p(log σ | γ)
        start_pv = torch.zeros_like(shift_pv)
        if self.onset is None:
            start = dist.Normal(torch.zeros_like(cut_pv), self.shift_scale)
            start_pv = pyro.sample("start", start.to_event(2))
        weight_vk = pyro.sample("weight", GatedNormal(edge_vk, 0.0, 1.0).to_event(2))  # p(w | A)
        if self.l1:
            pyro.factor("sparsity", -self.l1 * self.n_cells * (edge_vk * weight_vk).abs().sum((-2, -1)))
        if hasattr(self, "embedding_pe"):
            starts = start_pv if self.onset is None else None
            change_pf = all_changes(gate_pv, shift_pv, log_scale_pv, cut_pv, starts)
            # in training nobody reads the rows of targets without cells
            described(self.embedding_pe, change_pf, self.seen_p | (not self.training))
        return Mechanism(gate_pv, edge_vk, shift_pv, log_scale_pv, cut_pv, start_pv, weight_vk)

    def situations(self, batch: Batch) -> tuple[Batch, Tensor | slice]:
        """The distinct conditions, times and designs of the cells, r, and which of them each cell is in.

        A step of training is recorded, so no size may depend on values: r are then all cells, or all
        conditions at all times where those are fewer.
        """
        assert batch.time_n is not None
        few_places = batch.n_cells > self.filled_ct.numel() and not self.doses_vary
        if batch.previous is not None or (self.training and not few_places):  # a tracked past is its own
            return batch, slice(None)
        if self.training:
            place_n = batch.condition_n * len(self.times_t) + self.snapshot(batch.time_n)
            cell_n = torch.arange(batch.n_cells, device=place_n.device)
            # places without cells repeat the first cell
            cell_r = place_n.new_zeros(self.filled_ct.numel()).scatter(0, place_n, cell_n)
            u_rp, condition_r, time_r = (
                part[cell_r] for part in (batch.u_np, batch.condition_n, batch.time_n)
            )
            return batch._replace(u_np=u_rp, condition_n=condition_r, time_n=time_r), place_n
        key_nq = torch.cat([batch.condition_n.unsqueeze(-1), batch.time_n.unsqueeze(-1), batch.u_np], -1)
        key_rq, situation_n = torch.unique(key_nq, dim=0, return_inverse=True)
        distinct = batch._replace(u_np=key_rq[:, 2:], condition_n=key_rq[:, 0].long(), time_n=key_rq[:, 1])
        return distinct, situation_n

    def own_past(self, batch: Batch) -> Tensor | None:
        """Programmes of the same cells at the time before, n, k, as the guide drew them."""
        if batch.previous is None:
            return None
        if self.onset is not None:
            raise ValueError("tracked cells start from their own first snapshot; leave out onset= or track=")
        zero_nk = batch.u_np.new_zeros(batch.n_cells, self.n_invariant + self.n_responsive)
        law = dist.Normal(zero_nk, 1.0).to_event(1)
        past_nk: Tensor = pyro.sample("z_past", law.mask(False))  # its own law is a term of the cell before
        return past_nk if past_nk.dim() == 2 else past_nk[0]

    def programmes(self, invariant: Law, responsive: Law, situation_n: Tensor | slice) -> Tensor:
        """z_l and z_v, n, k, where each possible past is as likely."""
        if self.join == "mixture" or invariant.loc_rmk.shape[-2] == 1:  # the same where a past is known
            p_z_nl = invariant.mixture(situation_n)
            z_nl = pyro.sample("z_invariant", p_z_nl)  # p(z_l)
            # z_l tells which past it may have been
            p_z_nv = responsive.mixture(situation_n, p_z_nl.components(z_nl))
        else:
            loc_nk, root_nkk, slack_nk = (part[situation_n] for part in moments(invariant, responsive))
            n_l = self.n_invariant
            p_z_nl = PopulationNormal(loc_nk[:, :n_l], root_nkk[:, :n_l, :n_l])
            z_nl = pyro.sample("z_invariant", p_z_nl)  # p(z_l)
            known_nv = (root_nkk[:, n_l:, :n_l] @ p_z_nl.noise_of(z_nl).unsqueeze(-1)).squeeze(-1)
            own_nvv = root_nkk[:, n_l:, n_l:]
            p_z_nv = PopulationNormal(loc_nk[:, n_l:] + known_nv, own_nvv, slack_nk[:, n_l:])
        z_nv = pyro.sample("z_responsive", p_z_nv)  # p(z_v | z_l, u)
        return torch.cat([z_nl, z_nv], -1)

    def recognised(self, z_nl: Tensor, invariant: Law, batch: Batch) -> None:
        """Charge z_l for what does not tell a cell's own past from those of others of its condition."""
        if batch.previous is None:
            raise ValueError(
                "contrast= needs cells whose past is known; name the column that tells which cells are the "
                "same (track=), or pass contrast=0"
            )
        if self.axes_sought:  # laws are of snapshots then, not of pasts
            return
        assert batch.previous.time_n is not None and batch.time_n is not None
        is_later_n = batch.previous.time_n < batch.time_n
        alone_n = -1 - torch.arange(batch.n_cells, device=is_later_n.device)  # a group of its own
        group_n = torch.where(is_later_n, batch.condition_n, alone_n)
        contrast("contrast", invariant.likely(z_nl), group_n, self.contrast)

    def transported(
        self, invariant: Law, responsive: Law, batch: Batch, situation_n: Tensor | slice
    ) -> Tensor:
        """z_l and z_v, n, k, from the pasts that transport couples each cell with, from where they moved."""
        cells_rsk, known_r11 = self.remembered(batch)
        moved_rmk = torch.cat([invariant.loc_rmk, responsive.loc_rmk], -1).detach()

        def priced(n_k: int) -> Tensor:
            cost_rms = transport_cost(moved_rmk[..., :n_k], cells_rsk[..., :n_k], self.blur)
            price_rm, _ = potentials(cost_rms, unbalanced=self.unbalanced)
            return torch.where(known_r11.squeeze(-1), price_rm, 0.0)[situation_n]

        p_z_nl = TransportMixture(invariant.mixture(situation_n), priced(self.n_invariant), self.blur)
        z_nl = pyro.sample("z_invariant", p_z_nl)
        spent_nm = p_z_nl.priced(z_nl) - p_z_nl.price_nm
        price_nm = priced(self.n_invariant + self.n_responsive) + spent_nm
        p_z_nv = TransportMixture(responsive.mixture(situation_n), price_nm, self.blur)
        return torch.cat([z_nl, pyro.sample("z_responsive", p_z_nv)], -1)

    def apart(
        self, batch: Batch, situation_n: Tensor | slice, invariant: Law, responsive: Law
    ) -> tuple[Law, Law]:
        """Laws of their own for later snapshots, charged with what the transitions miss of their cells."""
        cells_rsk, known_r11 = self.remembered(batch)
        moved_rmk = torch.cat([invariant.draw(), responsive.draw()], -1)
        assert batch.time_n is not None
        is_later_r = batch.time_n > self.first
        missed_r = sinkhorn_divergence(moved_rmk, cells_rsk, self.blur)
        missed_r = torch.where(is_later_r & known_r11.flatten(), missed_r, 0.0)
        missed_n = missed_r.expand(len(is_later_r))[situation_n]
        pyro.factor("missed", -missed_n)
        own_laws = self.free_laws(batch)
        starts = (invariant.loc_rmk.mean(-2), responsive.loc_rmk.mean(-2))
        invariant, responsive = (
            law.where(~is_later_r, start) for law, start in zip(own_laws, starts, strict=True)
        )
        return invariant, responsive

    def remembered(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Cells of each situation as they were drawn lately, r, s, k, and whether there are any, r, 1, 1."""
        place = (batch.condition_n, self.snapshot(batch.time_n))
        cells_rsk = self.memory_ctmk[place]
        chosen_s = torch.randperm(cells_rsk.shape[1], device=cells_rsk.device)[: self.n_sources]
        return cells_rsk[:, chosen_s], self.filled_ct[place][:, None, None]

    def laws(self, batch: Batch, mechanism: Mechanism, own_past_nk: Tensor | None = None) -> tuple[Law, Law]:
        """Laws of z_l and z_v of each cell, given each of its possible pasts, or its own."""
        if self.axes_sought:
            return self.free_laws(batch)
        assert batch.time_n is not None
        if own_past_nk is None:
            past_rmk, is_past_r, from_r = self.past(batch, mechanism)
        else:
            assert batch.previous is not None and batch.previous.time_n is not None
            past_rmk, from_r = own_past_nk.unsqueeze(-2), batch.previous.time_n
            is_past_r = from_r < batch.time_n
        invariant, responsive = self.moved(past_rmk, batch.u_np, from_r, batch.time_n, mechanism)
        if own_past_nk is None and not self.training:
            since_r = torch.where(is_past_r, from_r, batch.time_n)
            invariant, responsive = self.bridged((invariant, responsive), past_rmk, since_r, batch, mechanism)
        is_start_r = ~is_past_r & (batch.time_n <= self.first)
        start_rv = batch.u_np @ mechanism.start_pv
        zeros_rl = start_rv.new_zeros(len(start_rv), self.n_invariant)
        return invariant.where(is_start_r, zeros_rl), responsive.where(is_start_r, start_rv)

    def free_laws(self, batch: Batch) -> tuple[Law, Law]:
        """While axes are sought: a normal law for each snapshot of each condition."""
        place = (batch.condition_n, self.snapshot(batch.time_n))
        known_r1 = ((place[0] > 0) | (place[1] > 0)).unsqueeze(-1)  # control's first snapshot is the anchor
        loc_rmk = torch.where(known_r1, self.free_loc_ctk[place], 0.0).unsqueeze(-2)
        log_scale_rk = torch.where(known_r1, self.free_log_scale_ctk[place], 0.0)
        whole = Law(loc_rmk, log_scale_rk, torch.exp(-2 * log_scale_rk), torch.zeros_like(loc_rmk))
        blocks = zip(*(part.split([self.n_invariant, self.n_responsive], -1) for part in whole), strict=True)
        invariant, responsive = (Law(*block) for block in blocks)
        return invariant, responsive

    def moved(
        self, past_rmk: Tensor, u_np: Tensor, from_r: Tensor, to_r: Tensor, mechanism: Mechanism
    ) -> tuple[Law, Law]:
        """Laws of z_l and z_v at a time, from each past at an earlier one."""
        past_rmk, step_r = self.roll(past_rmk, u_np, from_r, to_r, mechanism)
        return self.step(past_rmk, u_np, step_r, mechanism)

    def bridged(
        self,
        laws: tuple[Law, Law],
        past_rmk: Tensor,
        from_r: Tensor,
        batch: Batch,
        mechanism: Mechanism,
    ) -> tuple[Law, Law]:
        """Laws between two snapshots of a condition, from pasts in the earlier one, led to the later one.

        Transitions miss the mean and the spread of each programme in the later snapshot. As much of that is
        made up for as of the gap has passed.
        """
        time_r = batch.time_n
        assert time_r is not None
        condition_r, measured_rt = self.measured(batch)
        later_rt = measured_rt & (self.times_t > time_r.unsqueeze(-1) + 1e-6)
        next_r = later_rt.long().argmax(-1)
        is_measured_r = (measured_rt & ((self.times_t - time_r.unsqueeze(-1)).abs() <= 1e-6)).any(-1)
        is_between_r = later_rt.any(-1) & ~is_measured_r & (from_r < time_r)
        if not is_between_r.any():
            return laws
        to_r = torch.where(is_between_r, self.times_t[next_r], time_r)
        share_r1 = torch.where(is_between_r, (time_r - from_r) / (to_r - from_r), 0.0).unsqueeze(-1)
        seen_rmk = self.memory_ctmk[condition_r, next_r]
        seen = (seen_rmk.mean(-2), seen_rmk.std(-2, unbiased=False))
        seen_blocks = zip(
            *(part.split([self.n_invariant, self.n_responsive], -1) for part in seen), strict=True
        )
        ahead = self.moved(past_rmk, batch.u_np, from_r, to_r, mechanism)
        found = []
        for law, law_ahead, (loc_rk, scale_rk) in zip(laws, ahead, seen_blocks, strict=True):
            ahead_loc_rk, ahead_scale_rk = law_ahead.spread()
            ratio_rk = 1 + share_r1 * (scale_rk / ahead_scale_rk - 1)
            found.append(law.stretched(share_r1 * (loc_rk - ahead_loc_rk), ratio_rk))
        return found[0], found[1]

    def past(self, batch: Batch, mechanism: Mechanism) -> tuple[Tensor, Tensor, Tensor]:
        """Possible pasts of each cell, n, m, k; whether they were measured; and their time, n.

        They are cells of the last snapshot of its condition before it. Where there is none, they are drawn
        from the law of the first snapshot, or of the onset.
        """
        before_rt = self.times_t < batch.time_n.unsqueeze(-1) - 1e-6  # type: ignore[union-attr]
        condition_r, measured_rt = self.measured(batch)
        known_rt = measured_rt & before_rt
        last_r = (known_rt * torch.arange(1, len(self.times_t) + 1, device=known_rt.device)).argmax(-1)
        is_past_r = known_rt.any(-1)
        chosen_m = torch.arange(self.memory_ctmk.shape[2], device=last_r.device)
        if self.training and self.n_sources < len(chosen_m):
            chosen_m = torch.randperm(len(chosen_m), device=last_r.device)[: self.n_sources]
        seen_rmk = self.memory_ctmk[condition_r[:, None], last_r[:, None], chosen_m]
        start_rv = torch.cat([self._zeros(batch), batch.u_np @ mechanism.start_pv.detach()], -1)
        drawn_rmk = start_rv.unsqueeze(-2) + self.at_onset(torch.randn_like(seen_rmk[:1]))
        past_rmk = torch.where(is_past_r[:, None, None], seen_rmk, drawn_rmk)
        from_r = torch.where(is_past_r, self.times_t[last_r], self.first)
        if self.training:  # in the first steps, what lies further back stands in for snapshots not yet seen
            assert batch.time_n is not None
            from_r = torch.maximum(from_r, batch.time_n - self.longest_gap)
        return past_rmk, is_past_r, from_r

    def at_onset(self, noise_rmk: Tensor) -> Tensor:
        """Standard normal programmes; before the first snapshot they may be correlated."""
        if not hasattr(self, "onset_root_kk"):
            return noise_rmk
        root_kk = self.onset_root_kk.tril()
        return noise_rmk @ (root_kk / root_kk.norm(dim=-1, keepdim=True)).mT

    def measured(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Each cell's condition, n (0 for unknown ones), and at which times that was measured, n, t."""
        is_known_r = (batch.condition_n >= 0) & (batch.condition_n < len(self.filled_ct))
        condition_r = torch.where(is_known_r, batch.condition_n, 0)
        return condition_r, self.filled_ct[condition_r] & is_known_r.unsqueeze(-1)

    def roll(
        self, z_rmk: Tensor, u_np: Tensor, from_r: Tensor, to_r: Tensor, mechanism: Mechanism
    ) -> tuple[Tensor, Tensor]:
        """Draws at the last step before a time, and the length of that step in units, n."""
        gap_r = (to_r - from_r).clamp(min=0.0) / self.unit
        steps_r = (gap_r - 1e-3).ceil().clamp(min=1.0)
        step_r = gap_r / steps_r
        # in training a number that the screen fixes
        most = math.ceil(self.longest_gap / self.unit - 1e-3) if self.training else int(steps_r.max())
        for done in range(1, most):
            moved_rmk = torch.cat([law.draw() for law in self.step(z_rmk, u_np, step_r, mechanism)], -1)
            z_rmk = torch.where((steps_r > done)[:, None, None], moved_rmk, z_rmk)
        return z_rmk, step_r

    def step(self, z_rmk: Tensor, u_np: Tensor, step_r: Tensor, mechanism: Mechanism) -> tuple[Law, Law]:
        """Laws of z_l and z_v after one step from each past."""
        laws = self.straight(z_rmk, u_np, step_r, mechanism)
        if not self.follows_ode:
            return laws

        def field(at_rmk: Tensor) -> Tensor:
            laws = self.straight(at_rmk, u_np, step_r, mechanism)
            return torch.cat([law.loc_rmk for law in laws], -1) - at_rmk

        moved_rmk = z_rmk
        for _ in range(round(1 / ODE_STEP)):  # of fixed number, so that a step of training can be recorded
            first = field(moved_rmk)
            second = field(moved_rmk + ODE_STEP / 2 * first)
            third = field(moved_rmk + ODE_STEP / 2 * second)
            last = field(moved_rmk + ODE_STEP * third)
            moved_rmk = moved_rmk + ODE_STEP / 6 * (first + 2 * second + 2 * third + last)
        blocks = moved_rmk.split([self.n_invariant, self.n_responsive], -1)
        invariant, responsive = (law._replace(loc_rmk=loc) for law, loc in zip(laws, blocks, strict=True))
        return invariant, responsive

    def straight(self, z_rmk: Tensor, u_np: Tensor, step_r: Tensor, mechanism: Mechanism) -> tuple[Law, Law]:
        """Laws of z_l and z_v after one step in the direction of its start."""
        z_rml, z_rmv = z_rmk.split([self.n_invariant, self.n_responsive], -1)
        step_r1 = step_r.unsqueeze(-1)
        z_rkm = z_rmk.mT.contiguous()  # pasts last: what is fast on processors
        z_rlm = z_rkm[:, : self.n_invariant]
        pushed_rml = (times(self.invariant_weight_ll, z_rlm) + self.invariant_map.sum(z_rlm)).mT
        target_rml = self.invariant_offset_l + pushed_rml
        log_scale_rl = self.bounded(self.invariant_log_scale_l) + 0.5 * step_r1.clamp(min=1e-6).log()
        loc_rml = z_rml + step_r1.unsqueeze(-1) * (target_rml - z_rml)
        invariant = Law(loc_rml, log_scale_rl, torch.exp(-2 * log_scale_rl), torch.zeros_like(loc_rml))
        return invariant, self.respond(z_rkm, z_rmv, u_np, step_r1, mechanism)

    def respond(
        self, z_rkm: Tensor, z_rmv: Tensor, u_np: Tensor, step_r1: Tensor, mechanism: Mechanism
    ) -> Law:
        """Laws of z_v after one step, exact for binary gates, expectations for probabilities.

        A gate enters a squared residual together with the precision it sets; weighting by that precision
        tilts its probability.
        """
        gate_pv, edge_vk, shift_pv, log_scale_pv, cut_pv, _, weight_vk = mechanism
        pushed_rmv, unsure_rmv = self.pushed(z_rkm, edge_vk, weight_vk)
        dose_rp1 = u_np.unsqueeze(-1)
        keep_r1v = (1 - dose_rp1 * cut_pv).prod(1).unsqueeze(1)
        square_r1v = (1 - cut_pv * (1 - (1 - dose_rp1) ** 2)).prod(1).unsqueeze(1)  # E (1 - c(u))²
        ratio_rpv = torch.exp(-2 * dose_rp1 * log_scale_pv)
        share_rpv = 1 - gate_pv + gate_pv * ratio_rpv
        tilted_rpv = gate_pv * ratio_rpv / share_rpv
        shift_rv = (dose_rp1 * tilted_rpv * shift_pv).sum(1)
        shift_var_rv = (dose_rp1**2 * tilted_rpv * (1 - tilted_rpv) * shift_pv**2).sum(1)
        target_rmv = keep_r1v * pushed_rmv + shift_rv.unsqueeze(1)
        square_rmv = self.over_pasts(pushed_rmv**2)
        variance_rmv = square_r1v * (square_rmv + unsure_rmv) - keep_r1v**2 * square_rmv
        step_r11 = step_r1.unsqueeze(-1)
        log_step_r1 = step_r1.clamp(min=1e-6).log()
        own_log_scale_v = self.bounded(self.responsive_log_scale_v)
        return Law(
            z_rmv + step_r11 * (target_rmv - z_rmv),
            own_log_scale_v + u_np @ (gate_pv * log_scale_pv) + 0.5 * log_step_r1,
            torch.exp(share_rpv.log().sum(1) - 2 * own_log_scale_v - log_step_r1),
            step_r11**2 * (variance_rmv + shift_var_rv.unsqueeze(1)),
        )

    def pushed(self, z_rkm: Tensor, edge_vk: Tensor, weight_vk: Tensor) -> tuple[Tensor, Tensor]:
        """What its parents make of each responsive programme, and the variance of that as edges may be shut.

        Mixtures need the variance of every past. Moments need its mean over pasts, which is a quadratic
        form in the slopes f of an effect.
        """
        part_rkfm = torch.cat([self.responsive_map.bends(z_rkm), z_rkm.unsqueeze(-2)], -2)
        slope_vkf = torch.cat([self.responsive_map.size_oib, weight_vk.unsqueeze(-1)], -1)
        pushed_rvm = times((edge_vk.unsqueeze(-1) * slope_vkf).flatten(-2), part_rkfm.flatten(-3, -2))
        unsure_vk = edge_vk * (1 - edge_vk)
        if self.join in EACH_PAST:
            effect_rmvk = torch.einsum("rkfm,vkf->rmvk", part_rkfm, slope_vkf)
            unsure_rmv = (unsure_vk * effect_rmvk**2).sum(-1)
        else:
            # twice the gradient of one side: slopes are symmetric, and the other side's would lie across
            half_rkff = part_rkfm @ part_rkfm.detach().mT / part_rkfm.shape[-1]
            product_rkff = 2 * half_rkff - half_rkff.detach()
            slopes_vkff = unsure_vk[..., None, None] * slope_vkf.unsqueeze(-1) * slope_vkf.unsqueeze(-2)
            unsure_rmv = (product_rkff.flatten(1) @ slopes_vkff.flatten(1).T).unsqueeze(1)
        return self.responsive_offset_v + pushed_rvm.mT, unsure_rmv

    def over_pasts(self, value_rmv: Tensor) -> Tensor:
        """The mean over pasts, where moments are all that is needed."""
        return value_rmv if self.join in EACH_PAST else value_rmv.mean(1, keepdim=True)

    def bounded(self, log_scale_k: Tensor) -> Tensor:
        """A log standard deviation that cannot fall below the smallest one."""
        return torch.logaddexp(log_scale_k, torch.full_like(log_scale_k, LEAST_SCALE).log())

    @torch.no_grad()
    def remember(self, batch: Batch, z_nk: Tensor) -> None:
        """Keep the draws of the cells as possible pasts of others."""
        if not self.training:
            return
        z_nk = z_nk if z_nk.dim() == 2 else z_nk[0]
        place = (batch.condition_n, self.snapshot(batch.time_n))
        # the first cell of a snapshot fills all of it
        kept_nmk, seen_n11 = self.memory_ctmk[place], self.filled_ct[place][:, None, None]
        self.memory_ctmk[place] = torch.where(seen_n11, kept_nmk, z_nk.unsqueeze(1))
        self.filled_ct[place] = True
        slot_n = torch.randint(kept_nmk.shape[1], place[0].shape, device=z_nk.device)
        self.memory_ctmk[(*place, slot_n)] = z_nk

    def snapshot(self, time_n: Tensor | None) -> Tensor:
        """Index of the snapshot nearest to each time."""
        assert time_n is not None
        return (self.times_t - time_n.unsqueeze(-1)).abs().argmin(-1)

    @torch.no_grad()
    def roll_out(self, z_nk: Tensor, batch: Batch, from_n: Tensor) -> Tensor:
        """Draws of the programmes at the batch's times and perturbations, from programmes at earlier times.

        Args:
            z_nk: Programmes to start from.
            batch: Design and times to go to.
            from_n: Times to start from.
        """
        assert batch.time_n is not None
        mechanism = self.mechanism()
        laws = self.moved(z_nk.unsqueeze(1), batch.u_np, from_n, batch.time_n, mechanism)
        moved_nk = torch.cat([law.draw() for law in laws], -1).squeeze(1)
        return torch.where((batch.time_n > from_n + 1e-6).unsqueeze(-1), moved_nk, z_nk)

    def _zeros(self, batch: Batch) -> Tensor:
        return batch.u_np.new_zeros(batch.n_cells, self.n_invariant)

    def programme_names(self) -> list[str]:
        """Names in the order of the latents: invariant ones first."""
        blocks = (("invariant", self.n_invariant), ("responsive", self.n_responsive))
        return [f"{block}_{i + 1}" for block, n in blocks for i in range(n)]

    def hold_gates_open(self, held: bool) -> None:
        """While the axes are sought every snapshot of every condition has a law of its own."""
        self.axes_sought = held

    @torch.no_grad()
    def rotate(self, map_kk: Tensor, offset_k: Tensor) -> None:
        """Take over new axes: (z_l, z_v) becomes ``z @ map_kk.T + offset_k``, with the same p(x | z)."""
        self.decoder.rotate(map_kk, offset_k)
        self.memory_ctmk.copy_(self.memory_ctmk @ map_kk.T + offset_k)
