"""The temporal latent SCM: programmes that evolve through a lagged graph, seen in unpaired snapshots."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import anndata
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate.decoder import (
    CONTROL,
    Decoder,
    Noise,
    as_tensor,
    check_at_least,
    check_pairs,
    condition_names,
    designs,
    noise_settings,
    numbered,
    observe,
    random_weights,
    scaled_decoder,
    signed,
    simulation_record,
    sparse_targets,
    stream,
)

__all__ = ["Dynamics", "Graph", "Shape", "linear_snapshots", "temporal_cells", "temporal_scm"]

Graph = Literal["full", "triangular"]
Shape = Literal["linear", "nonlinear"]
Floats = NDArray[np.float64]

_SELF_EFFECTS = (0.4, 0.7)
_EDGE_SHARE = 0.3
_EDGE_SIZES = (0.6, 1.0)  # relative to the other edges into a programme
_LAGGED_VARIANCE = 0.35  # of a programme, from its lagged parents if those were independent
_LARGEST_DRIFT = 0.8  # share of a programme's variance that its parents may explain
_LOG_SDS = (math.log(0.5), math.log(2.0))
_STEEPNESS = 1.5  # of the saturation tanh(steepness x z)
_BURN_IN = 50  # steps of control before time 0
_CALIBRATION_CELLS = 10_000
_LINEAR_WEIGHTS = np.array([[0.6, 0, 0, 0], [0.5, 0.6, 0, 0], [0, -0.5, 0.6, 0], [0.4, 0, 0, 0.6]])


@dataclass(frozen=True)
class Dynamics:
    r"""One unit of time: how programmes follow from those before, and what perturbations change.

    .. math::
        z_i' = (1 - c_i(u)) \Big(w_{ii} z_i + \sum_{j \ne i} w_{ij} h(z_j)\Big)
            + \mu_i(u) + s_i(u) \sigma_i n_i, \qquad n_i \sim \mathrm{N}(0, 1)

    Invariant programmes come first and have no parents among the responsive ones; they do not feel u.
    Targets in one cell add their μ and log s; one that cuts is enough.

    Attributes:
        weight_kk: effect of programme j on programme i one step later, [i, j]; self-effects on the diagonal.
        sd_k: standard deviations σ of the innovations in control.
        nonlinear: whether h(z) = tanh(1.5 z); the identity otherwise. Self-effects are always linear.
        shift_pv: mean μ of the innovations of each responsive programme under each perturbation.
        scale_pv: factor s on their standard deviations.
        cut_pv: programmes whose parents, themselves included, have no effect.
    """

    weight_kk: Floats
    sd_k: Floats
    nonlinear: bool
    shift_pv: Floats
    scale_pv: Floats
    cut_pv: NDArray[np.bool_]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Dynamics":
        """Those that uns["simulation"] holds."""
        arrays = {name: np.asarray(record[name]) for name in ("weight_kk", "sd_k", "shift_pv", "scale_pv")}
        nonlinear = record["dynamics"] == "nonlinear"
        return cls(**arrays, nonlinear=nonlinear, cut_pv=np.asarray(record["cut_pv"], dtype=bool))

    def truth(self) -> dict[str, Any]:
        """What :meth:`from_record` reads, and the lagged graph without self-effects."""
        n_l = len(self.sd_k) - self.shift_pv.shape[1]
        graph_kk = (self.weight_kk != 0) & ~np.eye(len(self.sd_k), dtype=bool)
        return {
            "dynamics": "nonlinear" if self.nonlinear else "linear",
            "weight_kk": self.weight_kk,
            "sd_k": self.sd_k,
            "adjacency_vk": graph_kk[n_l:],
            "graph_ll": graph_kk[:n_l, :n_l],
            "shift_pv": self.shift_pv,
            "scale_pv": self.scale_pv,
            "cut_pv": self.cut_pv,
            "altered_pv": (self.shift_pv != 0) | (self.scale_pv != 1) | self.cut_pv,
        }

    def drift(self, z_nk: Floats) -> Floats:
        """What the parents of each programme add up to, before anything is cut, [n, k]."""
        self_k = self.weight_kk.diagonal()
        lagged_nk = np.tanh(_STEEPNESS * z_nk) if self.nonlinear else z_nk
        drift_nk: Floats = self_k * z_nk + lagged_nk @ (self.weight_kk - np.diag(self_k)).T
        return drift_nk

    def step(self, z_nk: Floats, u_p: NDArray[np.bool_], rng: np.random.Generator) -> Floats:
        """Programmes one unit of time later, in cells that carry the perturbations u_p, [n, k]."""
        invariant = (len(self.sd_k) - self.shift_pv.shape[1], 0)  # programmes that do not feel u
        kept_k = np.pad(1.0 - self.cut_pv[u_p].any(0), invariant, constant_values=1.0)
        scale_k = np.pad(self.scale_pv[u_p].prod(0), invariant, constant_values=1.0)
        shift_k = np.pad(self.shift_pv[u_p].sum(0), invariant)
        noise_nk = scale_k * self.sd_k * rng.standard_normal(z_nk.shape)
        later_nk: Floats = kept_k * self.drift(z_nk) + shift_k + noise_nk
        return later_nk

    def trajectories(
        self, u_p: NDArray[np.bool_], times: Sequence[int], n_cells: int, rng: np.random.Generator
    ) -> Floats:
        """Programmes of the same cells at several times, [times, n, k].

        At time 0 the cells have the stationary law of control; the perturbations act from then on.
        """
        z_nk = rng.standard_normal((n_cells, len(self.sd_k)))
        for _ in range(_BURN_IN):
            z_nk = self.step(z_nk, np.zeros_like(u_p), rng)
        seen = [z_nk]
        for _ in range(max(times)):
            seen.append(self.step(seen[-1], u_p, rng))
        return np.stack([seen[time] for time in times])


def temporal_scm(
    *,
    n_genes: int = 500,
    n_responsive: int = 4,
    n_invariant: int = 7,
    n_perturbations: int = 12,
    n_combinations: int = 6,
    times: Sequence[int] = (1, 2, 3, 4),
    cells_per_snapshot: int = 150,
    missing: float | Sequence[tuple[str, int]] = 0.0,
    graph: Graph = "full",
    dynamics: Shape = "linear",
    effect: float = 2.0,
    cut_share: float = 0.33,
    likelihood: Noise = "none",
    noise_sd: float | None = None,
    library_size: float | None = None,
    library_log_sd: float | None = None,
    inverse_dispersion: float | None = None,
    decoder_layers: int = 3,
    truth_draws: int = 1000,
    seed: int = 0,
    decoder_seed: int | None = None,
) -> anndata.AnnData:
    r"""Simulates snapshots of cells whose responsive programmes unfold over time after a perturbation.

    In a unit of time the programmes go from z to z' (:class:`Dynamics`):

    .. math::
        z_l' &= f_l(z_l) + n_l \\
        z_{v,i}' &= (1 - c_i(u)) f_i(z_l, z_v) + \mu_i(u) + s_i(u) n_{v,i} \\
        x &= g(z_l, z_v)

    Every cell is seen once: it has a trajectory of its own, and no cell of one snapshot is in another.
    Control is stationary, and each programme has a standard deviation of about 1 there: the noise fills up
    what the parents leave. At time 0 every cell is as in control; its perturbation acts from then on. g is a
    random injective network, its logits divided by one standard deviation over the training cells.

    **Graph.** Every programme depends on itself one step before. Of the other lagged effects on a responsive
    programme (of invariant and of responsive ones) about 30 % are there, at least one. In a triangular graph
    a responsive programme has only earlier responsive ones as parents.

    **Perturbations.** Each alters one or two responsive programmes, the first ones one each: it shifts the
    mean of the innovations and multiplies their standard deviation by 0.5 to 2. The last share
    ``cut_share`` of them also cuts the parents of what they alter, self-effects included. In a combination
    shifts and log factors add up, and cuts unite.

    Args:
        n_genes: Observed variables, at least 40.
        n_responsive: Programmes that perturbations act on.
        n_invariant: Background programmes; at most 40 programmes in all.
        n_perturbations: Perturbations besides control.
        n_combinations: Pairs of perturbations, drawn without repeats; their cells are all held out.
        times: When snapshots are taken, in increasing whole units of time; gaps may differ, and a gap of
            several units is as many steps. 0 is before any perturbation acts.
        cells_per_snapshot: Cells of each condition at each time.
        missing: Snapshots that are left out: pairs of a condition and a time, or a share of those of
            perturbations and combinations, drawn so that each keeps one.
        graph: "full" or "triangular".
        dynamics: "linear", or "nonlinear": lagged effects saturate as tanh(1.5 z).
        effect: Largest shift of the mean of innovations, in standard deviations of a programme in control;
            the smallest is half of it, the sign is random.
        cut_share: Share of the perturbations that cut parents.
        likelihood: "none" (x = g(z)), "gaussian" (noise around g(z)), or counts: "nb", "poisson", around
            library x softmax of g(z).
        noise_sd: Standard deviation of Gaussian noise, 0.2; a gene without it has one near 1.
        library_size: Median library of count data, 2,000.
        library_log_sd: Standard deviation of the log library of count data, 0.4.
        inverse_dispersion: Of negative binomial counts, 5: variance m + m**2 / inverse_dispersion.
        decoder_layers: Layers of g, the last one included. With more of them it is further from linear.
        truth_draws: Cells behind each true mean.
        seed: Seed of everything but the decoder. Cells of one snapshot do not depend on which others are
            taken.
        decoder_seed: Seed of the decoder's weights; ``seed`` if None.

    Returns:
        AnnData with obs["target"] ("control", "P01", "P02+P03"), obs["time"] (a number), obs["split"]
        ("train", or "heldout" for combinations), obsm["z_invariant"], obsm["z_responsive"], and for counts
        obs["library_true"]. uns["simulation"] says that the data are simulated and holds the settings and
        the truth: conditions [c] (control first), design_cp, times [t], measured_ct (which snapshots were
        taken), the :class:`Dynamics` (weight_kk, sd_k, shift_pv, scale_pv, cut_pv), adjacency_vk (lagged
        edges into responsive programmes from all, self-effects left out), graph_ll, altered_pv, programme_ctk
        (true mean programmes), the true mean of genes (share_ctg, the expected share of a gene in a cell's
        total, for counts; mean_ctg otherwise), for missing snapshots as well, and the decoder.

    Raises:
        DataError: if a setting is out of its range or does not belong to the likelihood.

    Source: the process of CITE-VAE, equations 2 to 4. The paper does not print its coefficients; these, the
    full graph and the cut of self-effects are choices made here.
    """
    check_at_least("n_responsive", n_responsive, 1)
    check_at_least("n_invariant", n_invariant, 0)
    check_at_least("n_perturbations", n_perturbations, 1)
    check_at_least("cells_per_snapshot", cells_per_snapshot, 1)
    check_at_least("effect", effect, 0)
    check_at_least("truth_draws", truth_draws, 1)
    check_pairs(n_combinations, n_perturbations)
    _check_one_of("graph", graph, get_args(Graph))
    _check_one_of("dynamics", dynamics, get_args(Shape))
    if not 0 <= cut_share <= 1:
        raise DataError(f"expected cut_share between 0 and 1, found {cut_share}. Pass a share.")
    times = _checked_times(times)
    given = {
        "noise_sd": noise_sd,
        "library_size": library_size,
        "library_log_sd": library_log_sd,
        "inverse_dispersion": inverse_dispersion,
    }
    noise = noise_settings(likelihood, given)

    altered_pv = sparse_targets(stream(seed, "graph", 1), n_perturbations, n_responsive)
    graph_kk = _draw_graph(stream(seed, "graph"), n_responsive, n_invariant, graph)
    weight_kk, sd_k = _draw_weights(stream(seed, "graph", 2), graph_kk, dynamics == "nonlinear")
    changes = _draw_changes(stream(seed, "shift"), altered_pv, effect, cut_share)
    process = Dynamics(weight_kk, sd_k, dynamics == "nonlinear", *changes)
    perturbations = [f"P{p + 1:02d}" for p in range(n_perturbations)]
    design_cp = designs(stream(seed, "combination"), n_perturbations, n_combinations)
    conditions = condition_names(perturbations, design_cp)
    measured_ct = _measured(missing, conditions, times, stream(seed, "missing"))

    snapshots = _draw_snapshots(process, design_cp, times, measured_ct, cells_per_snapshot, seed)
    decoder_seed = seed if decoder_seed is None else decoder_seed
    weights = random_weights(stream(decoder_seed, "decoder"), len(sd_k), n_genes, decoder_layers)
    train = [z_nk for (c, _), z_nk in snapshots.items() if c <= n_perturbations]
    decoder = scaled_decoder(weights, np.concatenate(train), n_genes, noise)
    cells = [observe(decoder, z_nk, noise, seed, c, times[t]) for (c, t), z_nk in snapshots.items()]

    record = {
        "simulated": True,
        "process": "temporal_scm",
        "n_genes": n_genes,
        "n_responsive": n_responsive,
        "n_invariant": n_invariant,
        "n_perturbations": n_perturbations,
        "n_combinations": n_combinations,
        "cells_per_snapshot": cells_per_snapshot,
        "graph": graph,
        "effect": effect,
        "cut_share": cut_share,
        "likelihood": likelihood,
        "truth_draws": truth_draws,
        "decoder_layers": decoder_layers,
        "seed": seed,
        "decoder_seed": decoder_seed,
        **noise,
        **_labels(perturbations, conditions, design_cp, times, measured_ct),
        **process.truth(),
        **_true_means(process, decoder, design_cp, times, truth_draws, seed),
    }
    adata = _assemble(snapshots, [x_ng for x_ng, _ in cells], record, numbered("gene", n_genes))
    adata.obs["split"] = pd.Categorical(
        np.where(adata.obs["target"].isin(conditions[n_perturbations + 1 :]), "heldout", "train")
    )
    if "library_size" in noise:
        adata.obs["library_true"] = np.concatenate([np.exp(log_library_n) for _, log_library_n in cells])
    decoder.write(adata)
    return adata


def temporal_cells(
    adata: anndata.AnnData, condition: str, time: int, n_cells: int, seed: int = 0
) -> NDArray[Any]:
    """New cells of any condition and time from the process that made a data set.

    Args:
        adata: What :func:`temporal_scm` made.
        condition: "control", or perturbations of the data joined by "+", measured or not.
        time: Whole units of time since the perturbation, measured or not.
        n_cells: Cells.
        seed: Seed of the draws; they are independent of those of the data's own cells.

    Returns:
        Observations as in ``adata.X``, shape (cells, genes).

    Raises:
        DataError: The data are not of :func:`temporal_scm`, a perturbation is unknown or the time is not
            one of 0, 1, 2, ....
    """
    record = simulation_record(adata, "temporal_scm")
    names = [str(name) for name in record["perturbations"]]
    asked = [] if condition == CONTROL else condition.split("+")
    unknown = sorted(set(asked) - set(names))
    if unknown:
        raise DataError(
            f"expected perturbations of the simulation, found {unknown}; they are {names[:5]} and others."
        )
    times = _checked_times([time])
    own_seed = int(np.random.SeedSequence([int(record["seed"]), seed]).generate_state(1)[0])
    process = Dynamics.from_record(record)
    z_1nk = process.trajectories(np.isin(names, asked), times, n_cells, stream(own_seed, "latent"))
    names_of_noise = ("library_size", "library_log_sd")
    noise: dict[str, float] = {key: float(record[key]) for key in names_of_noise if key in record}
    return observe(Decoder.from_anndata(adata), z_1nk[0], noise, own_seed)[0]


def linear_snapshots(
    weight_kk: Floats = _LINEAR_WEIGHTS,
    *,
    n_perturbations: int = 8,
    times: Sequence[int] = (1, 2, 3, 4),
    cells_per_snapshot: int = 600,
    noise_sd: float = 0.5,
    effect: float = 1.0,
    seed: int = 0,
) -> anndata.AnnData:
    """Simulates snapshots of a linear Gaussian process whose programmes are observed: X is z.

    What can be learnt of a transition from unpaired snapshots is seen here without an encoder in between.
    All programmes are responsive; each perturbation shifts the mean of the innovations of one or two of them,
    the first ones of one each.

    Args:
        weight_kk: Effect of programme j on programme i one step later, [i, j]. By default four programmes
            with self-effects of 0.6 and lagged effects of 0.5, -0.5 and 0.4.
        n_perturbations: Perturbations besides control.
        times: When snapshots are taken, in increasing whole units of time.
        cells_per_snapshot: Cells of each condition at each time; each is seen once.
        noise_sd: Standard deviation of the innovations.
        effect: Largest shift of the mean of innovations; the smallest is half of it, the sign is random.
        seed: Seed of everything.

    Returns:
        AnnData with the programmes in X and in obsm["z_responsive"], obs["target"], obs["time"], and the
        truth in uns["simulation"] as :func:`temporal_scm` names it.

    Raises:
        DataError: if the process would explode or a setting is out of its range.
    """
    check_at_least("n_perturbations", n_perturbations, 1)
    check_at_least("cells_per_snapshot", cells_per_snapshot, 1)
    check_at_least("noise_sd", noise_sd, 0)
    check_at_least("effect", effect, 0)
    times = _checked_times(times)
    weight_kk = np.asarray(weight_kk, dtype=np.float64)
    if weight_kk.ndim != 2 or weight_kk.shape[0] != weight_kk.shape[1]:
        raise DataError(f"expected a square table of weights, found shape {weight_kk.shape}.")
    radius = np.abs(np.linalg.eigvals(weight_kk)).max()
    if radius >= 1:
        raise DataError(
            f"expected weights whose largest eigenvalue is below 1 in size, found {radius:.2f}: the process "
            "would explode. Make the weights smaller."
        )
    altered_pv = sparse_targets(stream(seed, "graph", 1), n_perturbations, len(weight_kk))
    shift_pv, scale_pv, cut_pv = _draw_changes(stream(seed, "shift"), altered_pv, effect, 0.0)
    process = Dynamics(
        weight_kk, np.full(len(weight_kk), noise_sd), False, shift_pv, np.ones_like(scale_pv), cut_pv
    )
    perturbations = [f"P{p + 1:02d}" for p in range(n_perturbations)]
    design_cp = designs(stream(seed, "combination"), n_perturbations, 0)
    measured_ct = np.ones((len(design_cp), len(times)), dtype=bool)
    snapshots = _draw_snapshots(process, design_cp, times, measured_ct, cells_per_snapshot, seed)
    record = {
        "simulated": True,
        "process": "linear_snapshots",
        "n_genes": len(weight_kk),
        "n_responsive": len(weight_kk),
        "n_invariant": 0,
        "n_perturbations": n_perturbations,
        "cells_per_snapshot": cells_per_snapshot,
        "noise_sd": noise_sd,
        "effect": effect,
        "seed": seed,
        **_labels(perturbations, condition_names(perturbations, design_cp), design_cp, times, measured_ct),
        **process.truth(),
    }
    return _assemble(snapshots, list(snapshots.values()), record, numbered("programme", len(weight_kk)))


def _draw_graph(
    rng: np.random.Generator, n_responsive: int, n_invariant: int, graph: Graph
) -> NDArray[np.bool_]:
    """Lagged edges j -> i among all programmes, [i, j], without self-effects."""
    k = n_responsive + n_invariant
    allowed_kk = ~np.eye(k, dtype=bool)
    allowed_kk[:n_invariant, n_invariant:] = False
    if graph == "triangular":
        allowed_kk[n_invariant:, n_invariant:] = np.tri(n_responsive, k=-1, dtype=bool)
    graph_kk: NDArray[np.bool_] = allowed_kk & (rng.random((k, k)) < _EDGE_SHARE)
    for i in range(n_invariant, k):
        if allowed_kk[i].any() and not graph_kk[i].any():
            graph_kk[i, rng.choice(np.flatnonzero(allowed_kk[i]))] = True
    return graph_kk


def _draw_weights(
    rng: np.random.Generator, graph_kk: NDArray[np.bool_], nonlinear: bool
) -> tuple[Floats, Floats]:
    """Weights, and the noise that gives every programme a variance of 1 in control."""
    k = len(graph_kk)
    weight_kk = graph_kk * signed(rng, _EDGE_SIZES, (k, k))
    size_k = np.sqrt(np.square(weight_kk).sum(1) / _LAGGED_VARIANCE)
    weight_kk = weight_kk / np.maximum(size_k, 1.0)[:, None] + np.diag(rng.uniform(*_SELF_EFFECTS, k))
    none_pv = np.zeros((0, k))
    z_nk = rng.standard_normal((_CALIBRATION_CELLS, k))
    sd_k = np.ones(k)
    for _ in range(_BURN_IN):
        drift_nk = Dynamics(weight_kk, sd_k, nonlinear, none_pv, none_pv, none_pv.astype(bool)).drift(z_nk)
        variance_k = drift_nk.var(0)
        gain_k = np.sqrt(np.minimum(1.0, _LARGEST_DRIFT / variance_k))
        weight_kk = weight_kk * gain_k[:, None]
        sd_k = np.sqrt(1 - gain_k**2 * variance_k)
        z_nk = gain_k * drift_nk + sd_k * rng.standard_normal(z_nk.shape)
    return weight_kk, sd_k


def _draw_changes(
    rng: np.random.Generator, altered_pv: NDArray[np.bool_], effect: float, cut_share: float
) -> tuple[Floats, Floats, NDArray[np.bool_]]:
    """Shifts, factors on the noise and cuts of each perturbation."""
    shift_pv = np.where(altered_pv, signed(rng, (effect / 2, effect), altered_pv.shape), 0.0)
    scale_pv = np.exp(np.where(altered_pv, rng.uniform(*_LOG_SDS, altered_pv.shape), 0.0))
    cutters = round(cut_share * len(altered_pv))
    cut_p = np.arange(len(altered_pv)) >= len(altered_pv) - cutters
    return shift_pv, scale_pv, altered_pv & cut_p[:, None]


def _draw_snapshots(
    process: Dynamics,
    design_cp: NDArray[np.bool_],
    times: list[int],
    measured_ct: NDArray[np.bool_],
    n_cells: int,
    seed: int,
) -> dict[tuple[int, int], Floats]:
    """Programmes of the cells of each condition and time that is measured, [n, k]."""
    return {
        (c, t): process.trajectories(
            design_cp[c], times[t : t + 1], n_cells, stream(seed, "latent", c, times[t])
        )[0]
        for c, t in np.argwhere(measured_ct).tolist()
    }


def _true_means(
    process: Dynamics,
    decoder: Decoder,
    design_cp: NDArray[np.bool_],
    times: list[int],
    draws: int,
    seed: int,
) -> dict[str, Floats]:
    """Mean programmes, and mean genes without their noise, of each condition and time."""
    programme_ctk = np.empty((len(design_cp), len(times), len(process.sd_k)))
    gene_ctg = np.empty((len(design_cp), len(times), decoder.weights[-1].shape[1]))
    for c, u_p in enumerate(design_cp):
        z_tnk = process.trajectories(u_p, times, draws, stream(seed, "truth", c))
        programme_ctk[c] = z_tnk.mean(1)
        for t, z_nk in enumerate(z_tnk):
            output_ng = decoder.output(as_tensor(z_nk), as_tensor(np.zeros(draws)))
            gene_ctg[c, t] = (output_ng.exp() if decoder.noise_sd is None else output_ng).mean(0).numpy()
    name = "share_ctg" if decoder.noise_sd is None else "mean_ctg"
    return {"programme_ctk": programme_ctk, name: gene_ctg}


def _measured(
    missing: float | Sequence[tuple[str, int]],
    conditions: list[str],
    times: list[int],
    rng: np.random.Generator,
) -> NDArray[np.bool_]:
    """Which snapshots are taken, [conditions, times]."""
    measured_ct = np.ones((len(conditions), len(times)), dtype=bool)
    if isinstance(missing, int | float):
        most = 1 - 1 / len(times)
        if not 0 <= missing <= most:
            raise DataError(
                f"expected missing between 0 and {most:.2f}, so that every condition keeps one of "
                f"{len(times)} snapshots, found {missing}. Pass a smaller share."
            )
        rank_ct = rng.random((len(conditions) - 1, len(times)))
        np.put_along_axis(rank_ct, rank_ct.argmax(1)[:, None], np.inf, 1)  # each condition keeps one
        left_out = np.argsort(rank_ct, axis=None)[: round(missing * rank_ct.size)]
        measured_ct[1:].flat[left_out] = False
        return measured_ct
    for condition, time in missing:
        if condition not in conditions or time not in times:
            raise DataError(
                f"expected missing snapshots among conditions {conditions[:4]}... and times {times}, found "
                f"{(condition, time)}. Name a condition and a time of the simulation."
            )
        measured_ct[conditions.index(condition), times.index(time)] = False
    if not measured_ct.any(1).all():
        empty = [conditions[c] for c in np.flatnonzero(~measured_ct.any(1))]
        raise DataError(
            f"expected a snapshot of each condition, found none of {empty}. Leave one of them in."
        )
    return measured_ct


def _labels(
    perturbations: list[str],
    conditions: list[str],
    design_cp: NDArray[np.bool_],
    times: list[int],
    measured_ct: NDArray[np.bool_],
) -> dict[str, Any]:
    return {
        "perturbations": np.array(perturbations, dtype=object),
        "conditions": np.array(conditions, dtype=object),
        "design_cp": design_cp,
        "times": np.array(times, dtype=np.float64),
        "measured_ct": measured_ct,
    }


def _assemble(
    snapshots: dict[tuple[int, int], Floats],
    x: list[NDArray[Any]],
    record: dict[str, Any],
    genes: list[str],
) -> anndata.AnnData:
    condition_n, time_n = np.repeat(list(snapshots), [len(z_nk) for z_nk in snapshots.values()], axis=0).T
    z_nk = np.concatenate(list(snapshots.values()))
    n_l = record["n_invariant"]
    return anndata.AnnData(
        X=np.concatenate(x),
        obs=pd.DataFrame(
            {
                "target": pd.Categorical(record["conditions"][condition_n]),
                "time": record["times"][time_n],
            },
            index=numbered("cell", len(z_nk)),
        ),
        var=pd.DataFrame(index=genes),
        obsm={"z_invariant": z_nk[:, :n_l], "z_responsive": z_nk[:, n_l:]},
        uns={"simulation": record},
    )


def _checked_times(times: Sequence[int]) -> list[int]:
    """Whole, increasing times."""
    numbers = [float(time) for time in times]
    whole = all(number.is_integer() and number >= 0 for number in numbers)
    if not numbers or not whole or sorted(set(numbers)) != numbers:
        raise DataError(
            f"expected times as increasing whole numbers from 0, found {list(times)}. A unit is one step of "
            "the process: scale your times to it, sort them and leave out repeats."
        )
    return [int(number) for number in numbers]


def _check_one_of(name: str, value: str, values: Sequence[str]) -> None:
    if value not in values:
        raise DataError(f"expected a {name} of {list(values)}, found {value!r}. Pass one of these.")
