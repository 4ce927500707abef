"""Before training: what a screen's design can identify, and which experiment would mend the rest."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import structural_rank
from scipy.stats import norm
from sklearn.decomposition import PCA

from pyro_causalcell.baselines.means import log_cp10k
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.identifiability import Rank, numerical_rank
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import graph

__all__ = ["Audit", "Check", "audit"]

Status = Literal["ok", "warning", "fails", "unknown"]
Kind = Literal["check", "guarantee", "assumption"]
Floats = NDArray[np.float64]

SHIFT = 0.5
"""The shift that a design should be able to show, in standard deviations of a programme."""
LEVEL, POWER = 0.05, 0.9
"""Error rate over all edges together, and power for one of them."""
EDGE = 0.5
"""Probability above which an edge of a fit counts."""
SPLITS = 20
"""Random halvings that tell the noise of the moments."""
MOST_AXES = 50
"""Principal components in which means are compared."""
PCA_CELLS = 10_000
"""Cells the components are found from; all cells are projected on them."""
_CELLS_AT_ONCE = 4096
_WIDTH = 100


@dataclass(frozen=True)
class Check:
    """One line of an audit.

    Attributes:
        name: What was looked at.
        status: ``"ok"``; ``"warning"``, met in part or by an estimate only; ``"fails"``; or ``"unknown"``.
        found: What the screen has.
        needed: What the theory or the arithmetic asks for.
        mend: What would change the status; empty if nothing needs to.
        kind: ``"check"`` of the data; ``"guarantee"``, what the checks together allow; or
            ``"assumption"``, which no data of this kind can show.
    """

    name: str
    status: Status
    found: str
    needed: str
    mend: str = ""
    kind: Kind = "check"


@dataclass(frozen=True)
class Audit:
    """What a design can identify. Printing it gives a table in plain words.

    Attributes:
        title: The screen in a line.
        checks: Checks, guarantees and assumptions, in this order.
    """

    title: str
    checks: tuple[Check, ...]

    def __getitem__(self, name: str) -> Check:
        """The check or guarantee of that name."""
        found = {check.name: check for check in self.checks}
        if name not in found:
            raise KeyError(f"{name!r} is none of {list(found)}")
        return found[name]

    def to_frame(self) -> pd.DataFrame:
        """One row per check: kind, name, status, found, needed, mend."""
        columns = ["kind", "name", "status", "found", "needed", "mend"]
        return pd.DataFrame([asdict(check) for check in self.checks])[columns]

    def __str__(self) -> str:
        headings = {
            "check": "What the design has",
            "guarantee": "What it can identify, if the assumptions below hold",
            "assumption": "What cannot be known from these data",
        }
        lines = [self.title]
        for kind, heading in headings.items():
            lines += ["", heading]
            for check in self.checks:
                if check.kind == kind:
                    lines += _printed(check)
        return "\n".join(lines)


def audit(
    screen: Screen,
    n_latents: int | None = None,
    *,
    fit: Fit | None = None,
    graph_pk: NDArray[Any] | None = None,
    rows: NDArray[np.int64] | None = None,
    seed: int = 0,
) -> Audit:
    """Check on a design what the theory of each generative process assumes, before anything is trained.

    Counts and ranks come from the design and from moments of the cells in principal components, after
    batches are regressed out. What they cannot show is said to be unknown. What depends on which
    perturbation moves which programme needs a graph: none is known before training, a fit gives an estimate
    (then the best that can be said is a warning), a simulation has the true one.

    Args:
        screen: The screen.
        n_latents: Programmes of the model to be trained; that of the graph or fit if one is given.
        fit: A fit of this screen, for its graph and its training cells.
        graph_pk: True graph [targets, programmes], rows in the order of ``screen.targets``.
        rows: Cells that will be trained on; those of the fit, or all.
        seed: Seed of the random halves.

    Raises:
        DataError: There is no perturbed cell, or ``n_latents``, graph and screen do not agree.

    Source: Lachapelle et al., CLeaR 2022, graphical criterion and sufficient variability, as used by Lopez et
    al., CLeaR 2023, Appendix H; Liu et al., Identifying weight-variant latent causal models, 2022; Khemakhem
    et al., AISTATS 2020, for the number of environments. The arithmetic of cells per condition is that of a
    z-test.
    """
    if rows is None:
        rows = np.arange(screen.n_cells) if fit is None else fit.split.train
    edges_pk = _graph(screen, n_latents, fit, graph_pk)
    k = _n_latents(n_latents, edges_pk)
    seen = _Seen.of(screen, np.asarray(rows))
    z_nd = _components(screen, seen.rows, max(k, min(MOST_AXES, screen.n_genes - 1)), seed)
    is_estimate = graph_pk is None
    checks = [
        _controls(seen, k),
        _cells(seen, k),
        _perturbations(seen, k),
        _directions(seen, z_nd, k, seed, edges_pk, is_estimate),
        *_environments(seen, z_nd, k, seed),
        *_graph_checks(seen, edges_pk, is_estimate),
        _times(screen, seen),
    ]
    title = (
        f"{k} programmes, {len(seen.rows):,} cells of {len(seen.names)} perturbations and "
        f"{seen.n_controls:,} controls"
    )
    return Audit(title, (*checks, *_guarantees(checks), *ASSUMPTIONS))


@dataclass(frozen=True)
class _Seen:
    """The conditions among the cells that will be trained on.

    Attributes:
        rows: The cells, without those of unknown conditions.
        names: Perturbed conditions with cells.
        cells_c: Their numbers of cells.
        u_dp: Distinct design rows of perturbed cells.
        targets_cp: Which targets each of these conditions hits.
        group_n: Condition of each row: 0 is control, then as ``names``.
        n_controls: Control cells.
        batch_nb: Batch columns of the rows.
    """

    rows: NDArray[np.int64]
    names: list[str]
    cells_c: NDArray[np.int64]
    u_dp: Floats
    targets_cp: NDArray[np.bool_]
    group_n: NDArray[np.int64]
    n_controls: int
    batch_nb: Floats

    @classmethod
    def of(cls, screen: Screen, rows: NDArray[np.int64]) -> "_Seen":
        rows = rows[screen.condition_n[rows] >= 0]
        condition_n = screen.condition_n[rows]
        present = np.unique(condition_n[condition_n > 0])
        if not len(present):
            raise DataError(f"expected perturbed cells, found none among {len(rows)} rows. Pass other rows.")
        names = [screen.conditions[c] for c in present]
        u_dp, design_n = screen.designs
        used_dp = u_dp[np.unique(design_n[rows])].toarray()
        return cls(
            rows=rows,
            names=names,
            cells_c=np.bincount(condition_n)[present],
            u_dp=used_dp[used_dp.any(1)].astype(np.float64),
            targets_cp=screen.design(names) > 0,
            group_n=np.searchsorted(np.concatenate([[0], present]), condition_n),
            n_controls=int((condition_n == 0).sum()),
            batch_nb=screen.batch_nb[rows].astype(np.float64),
        )

    def group_names(self) -> list[str]:
        return ["control", *self.names]


# ---------------------------------------------------------------------- counts


def _cells_needed(n_tests: int, n_reference: float = math.inf) -> float:
    """Cells of a condition with which a z-test against a reference shows SHIFT; infinite if none do.

    SHIFT / √(1/n + 1/n_reference) must reach the two quantiles of level (shared by the tests) and power.
    """
    reach = (norm.isf(LEVEL / n_tests / 2) + norm.isf(1 - POWER)) / SHIFT
    left = 1 / reach**2 - 1 / n_reference
    return math.ceil(1 / left) if left > 0 else math.inf


def _controls(seen: _Seen, k: int) -> Check:
    needed = int(2 * _cells_needed(len(seen.names) * k))
    n = seen.n_controls
    status: Status = "ok" if n >= needed else "warning" if n else "fails"
    mend = {
        "ok": "",
        "warning": f"profile {needed - n:,} more unperturbed cells beside the perturbed ones",
        "fails": f"profile {needed:,} unperturbed cells, or use the sparse-shift process, which needs none",
    }
    asked = f"{needed:,} for the processes with an anchor; the sparse-shift process needs none"
    return Check("control cells", status, f"{n:,}", asked, mend[status])


def _cells(seen: _Seen, k: int) -> Check:
    n_tests = len(seen.names) * k
    others_c = [seen.n_controls or len(seen.rows) - int(n) for n in seen.cells_c]
    needed_c = np.array([_cells_needed(n_tests, n) if n else math.inf for n in others_c])
    few = [
        f"{name} ({n})"
        for name, n, needed in zip(seen.names, seen.cells_c, needed_c, strict=True)
        if n < needed
    ]
    enough = len(seen.names) - len(few)
    status: Status = "ok" if not few else "warning" if enough >= k else "fails"
    most = needed_c.max()
    asked = f"{int(most):,} in each" if math.isfinite(most) else "no number suffices with so few controls"
    found = f"{int(seen.cells_c.min()):,} to {int(seen.cells_c.max()):,}"
    if few:
        found += f"; too few in {len(few)} of {len(seen.names)}: {_some(few)}"
    return Check(
        "cells per perturbation",
        status,
        found,
        f"{asked}, to see a shift of {SHIFT} sd of a programme that is read without error",
        "profile more cells of these, or expect to see only their larger shifts" if few else "",
    )


def _perturbations(seen: _Seen, k: int) -> Check:
    design = seen.u_dp if seen.n_controls else seen.u_dp - seen.u_dp.mean(0)
    rank = int(np.linalg.matrix_rank(design))
    beside = "control" if seen.n_controls else "one of them as reference"
    missing = k - rank
    return Check(
        "independent perturbations",
        "ok" if missing <= 0 else "fails",
        f"{rank} beside {beside}",
        f"{k}, one for each programme",
        "" if missing <= 0 else f"perturb {missing} more targets, or fit at most {rank} programmes",
    )


def _times(screen: Screen, seen: _Seen) -> Check:
    name = "time points"
    needed = "two or more, with every perturbation at two neighbouring ones and control at each"
    mend = "harvest every perturbation, and control, at two or more times"
    if screen.time_n is None:
        return Check(name, "fails", "no time column", f"{needed}; for the temporal process only", mend)
    times, time_n = np.unique(screen.time_n[seen.rows], return_inverse=True)
    at_ct = np.zeros((len(seen.names) + 1, len(times)), dtype=bool)
    at_ct[seen.group_n, time_n] = True
    paired_c = (at_ct[1:, :-1] & at_ct[1:, 1:]).any(1)
    lone = [seen.names[c] for c in np.flatnonzero(~paired_c)]
    found = f"{len(times)}"
    if lone:
        found += f"; not at two neighbouring ones: {_some(lone)}"
    bare = [f"{t:g}" for t in times[~at_ct[0]]]
    if bare:
        found += f"; no control at {_some(bare)}"
    status: Status = "fails" if not paired_c.any() else "warning" if lone or bare else "ok"
    return Check(name, status, found, needed, "" if status == "ok" else mend)


# ---------------------------------------------------------------------- ranks of measured moments


def _components(screen: Screen, rows: NDArray[np.int64], n_axes: int, seed: int) -> Floats:
    """Principal components of log1p CP10k (or of normalised values), with a few cells in memory at a time."""

    def expression(some: NDArray[np.int64]) -> NDArray[np.float32]:
        x_ng = screen.x(some)
        return log_cp10k(x_ng, screen.library_n[some]).astype(np.float32) if screen.is_counts else x_ng

    some = np.sort(np.random.default_rng(seed).permutation(rows)[:PCA_CELLS])
    n_axes = min(n_axes, screen.n_genes, len(some))
    pca = PCA(n_axes, svd_solver="randomized", random_state=seed).fit(expression(some))
    starts = range(0, len(rows), _CELLS_AT_ONCE)
    parts = [pca.transform(expression(rows[start : start + _CELLS_AT_ONCE])) for start in starts]
    return np.concatenate(parts).astype(np.float64)


def _without_batches(z_nd: Floats, seen: _Seen) -> Floats:
    design = np.column_stack([np.ones(len(z_nd)), seen.batch_nb])
    return z_nd - design @ np.linalg.lstsq(design, z_nd, rcond=None)[0]


def _halves(group_n: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """Half of each cell, 0 or 1, equal within each group up to one cell."""
    order = np.lexsort((rng.random(len(group_n)), group_n))
    half_n = np.empty(len(group_n), dtype=np.int64)
    half_n[order] = np.arange(len(group_n)) % 2
    return half_n


def _directions(
    seen: _Seen, z_nd: Floats, k: int, seed: int, edges_pk: NDArray[np.bool_] | None, is_estimate: bool
) -> Check:
    """In how many directions the conditions' means differ by more than noise.

    Too few exclude k programmes. Enough do not prove them, since the image of few programmes under a curved
    decoder has many directions; a true graph does, through the rank that its pattern allows.
    """
    used = np.bincount(seen.group_n, minlength=len(seen.names) + 1) >= 4
    rank, n_used = _mean_rank(seen, z_nd, used, seed), int(used.sum())
    found = f"{rank} above noise, in the means of {n_used} conditions{_left_out(seen, used, 4)}"
    known = False
    if edges_pk is not None and not is_estimate:
        known = True
        allowed = structural_rank(sparse.csr_array(_moved(seen, edges_pk).astype(np.int8)))
        found, rank = f"{found}; {allowed} by the graph", min(rank, allowed)
    status: Status = "fails" if rank < k else "ok" if known else "warning"
    mends = {
        "ok": "",
        "warning": "after training, see whether shift_rank(fit) agrees: a curved decoder adds directions of "
        "its own",
        "fails": f"fit at most {max(rank, 1)} programmes, or add perturbations with other effects, or "
        "more cells so that small effects show",
    }
    return Check(
        "directions of effect", status, found, f"at least {k}, one for each programme", mends[status]
    )


def _mean_rank(seen: _Seen, z_nd: Floats, used: NDArray[np.bool_], seed: int) -> int:
    kept = used[seen.group_n]
    group_n = np.unique(seen.group_n[kept], return_inverse=True)[1]
    z_nd = _without_batches(z_nd, seen)[kept]
    n_groups = int(group_n.max()) + 1
    if n_groups < 2:
        return 0
    member = sparse.csr_array((np.ones(len(group_n)), (group_n, np.arange(len(group_n)))))
    cells_c = np.bincount(group_n)[:, None]
    within_nd = z_nd - (member @ z_nd / cells_c)[group_n]
    values, vectors = np.linalg.eigh(within_nd.T @ within_nd / (len(z_nd) - n_groups))
    real = values > 1e-10 * values.max()
    z_nd = z_nd @ (vectors[:, real] / np.sqrt(values[real]))
    weight_c = np.sqrt(cells_c)

    def centred(mean_cd: Floats) -> Floats:
        return weight_c * (mean_cd - (cells_c * mean_cd).sum(0) / cells_c.sum())

    rng = np.random.default_rng(seed)
    noise = []
    for _ in range(SPLITS):
        sign = sparse.csr_array(member * (1 - 2 * _halves(group_n, rng)))
        noise.append(centred(sign @ z_nd / cells_c))  # half the difference of the halves' means
    return numerical_rank(centred(member @ z_nd / cells_c), np.array(noise)).rank


def _environments(seen: _Seen, z_nd: Floats, k: int, seed: int) -> list[Check]:
    """Whether natural parameters differ enough between environments for mechanisms to be told apart.

    For jointly Gaussian programmes, a linear map of the axes changes natural parameters by an invertible
    linear map, so the rank of their differences can be counted in principal components.
    """
    least = 10 * (k + 2)  # halves of fewer cells have precisions that are mostly noise
    used = np.bincount(seen.group_n, minlength=len(seen.names) + 1) >= least
    rank = _natural_rank(seen, z_nd[:, :k], used, seed).rank
    n_environments = len(seen.names) + (seen.n_controls > 0)
    found = (
        f"{n_environments} environments; natural parameters in {k} principal components differ in {rank} "
        f"directions above noise{_left_out(seen, used, least)}"
    )
    asked = {
        "environments, changing noise": 2 * k,
        "environments, changing weights": k * (k + 3) // 2,
    }
    checks = []
    for name, directions in asked.items():
        needed = f"{directions + 1} environments that differ in {directions} directions"
        missing = directions + 1 - n_environments
        if missing > 0:
            most = max(j for j in range(k) if _asked(name, j) < n_environments)
            mend = f"add {missing} perturbations"
            mend += f", or fit at most {most} responsive programmes" if most else ""
            checks.append(Check(name, "fails", found, needed, mend))
        elif rank < directions:
            mend = "add perturbations with other effects, or more cells in each"
            checks.append(Check(name, "fails", found, needed, mend))
        else:
            mend = "none: a curved decoder turns shifts into changes of covariance, so the count may flatter"
            checks.append(Check(name, "warning", found, needed, mend))
    return checks


def _asked(name: str, k: int) -> int:
    return 2 * k if "noise" in name else k * (k + 3) // 2


def _natural_rank(seen: _Seen, z_nk: Floats, used: NDArray[np.bool_], seed: int) -> Rank:
    """Rank of the differences of natural parameters, each condition weighted by its cells."""
    z_nk = _without_batches(z_nk, seen)
    z_nk = z_nk / z_nk.std(0)
    groups = [np.flatnonzero(seen.group_n == c) for c in np.flatnonzero(used)]
    k = z_nk.shape[1]
    n_parameters = k * (k + 3) // 2
    if len(groups) < 2:
        return Rank(0, np.zeros(0), 0.0)
    weight_c = np.sqrt([len(cells) for cells in groups])[:, None]
    rng = np.random.default_rng(seed)
    halves = np.empty((SPLITS, 2, len(groups), n_parameters))
    for s in range(SPLITS):
        for c, cells in enumerate(groups):
            for h, half in enumerate(np.array_split(rng.permutation(cells), 2)):
                halves[s, h, c] = _natural(z_nk[half])
    noise = weight_c * (halves[:, 0] - halves[:, 1]) / 2
    scale = noise.std((0, 1))
    value = weight_c * halves.mean((0, 1))
    # differences from the average environment; the same projection for value and noise
    unit_c = weight_c / np.linalg.norm(weight_c)

    def centred(rows: Floats) -> Floats:
        return (rows - unit_c * (unit_c * rows).sum(-2, keepdims=True)) / scale

    return numerical_rank(centred(value), centred(noise))


def _natural(z_nk: Floats) -> Floats:
    """Precision times mean, and the precision, of a Gaussian; unbiased for any number of cells."""
    n, k = z_nk.shape
    precision_kk = np.linalg.inv(np.cov(z_nk.T).reshape(k, k)) * (n - k - 2) / (n - 1)
    return np.concatenate([precision_kk @ z_nk.mean(0), precision_kk[np.triu_indices(k)]])


# ---------------------------------------------------------------------- the graph


def _graph(
    screen: Screen, n_latents: int | None, fit: Fit | None, graph_pk: NDArray[Any] | None
) -> NDArray[np.bool_] | None:
    """Which target moves which programme, [targets, programmes], if anything says so."""
    if graph_pk is not None:
        edges_pk = np.asarray(graph_pk).astype(bool)
    elif fit is not None:
        if fit.screen.targets != screen.targets:
            raise DataError("expected the fitted screen; pass Screen.from_spec(fit.screen, adata).")
        wide = graph(fit).pivot(index="perturbation", columns="programme", values="probability")
        names = list(dict.fromkeys(graph(fit)["programme"]))
        edges_pk = wide.loc[screen.targets, names].to_numpy() > EDGE
    else:
        return None
    rows, columns = edges_pk.shape if edges_pk.ndim == 2 else (0, 0)
    if rows != len(screen.targets) or n_latents not in (None, columns):
        raise DataError(
            f"expected a graph of {len(screen.targets)} targets x {n_latents or 'n'} programmes, found "
            f"{edges_pk.shape}. Its rows are screen.targets."
        )
    return edges_pk


def _n_latents(n_latents: int | None, edges_pk: NDArray[np.bool_] | None) -> int:
    k = edges_pk.shape[1] if edges_pk is not None else n_latents
    if k is None or k < 1:
        raise DataError(f"expected n_latents, the programmes of the model, of 1 or more; found {n_latents}.")
    return int(k)


def _moved(seen: _Seen, edges_pk: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which condition moves which programme, [conditions, programmes]."""
    moved_ck: NDArray[np.bool_] = (seen.targets_cp.astype(float) @ edges_pk) > 0
    return moved_ck


def _graph_checks(seen: _Seen, edges_pk: NDArray[np.bool_] | None, is_estimate: bool) -> list[Check]:
    """Coverage, graphical criterion and isolation, over conditions: each is one environment."""
    needed = {
        "coverage of programmes": "every programme moved by some perturbation",
        "graphical criterion": "for each programme, the perturbations that move it share no other programme",
        "isolation": "for each programme, a perturbation that moves it alone; the criterion above asks less",
    }
    if edges_pk is None:
        mend = "pass graph_pk= if the targets of perturbations are known; or train a model and pass fit="
        return [Check(name, "unknown", "no graph given", asked, mend) for name, asked in needed.items()]
    moved_ck = _moved(seen, edges_pk)
    idle, together, shared = [], [], []
    for i in range(edges_pk.shape[1]):
        hits_ck = moved_ck[moved_ck[:, i]]
        me = f"programme_{i + 1}"
        if not len(hits_ck):
            idle.append(me)
            continue
        others = np.flatnonzero(hits_ck.all(0))
        if len(others) > 1:
            mates = [f"programme_{j + 1}" for j in others if j != i]
            together.append(f"{me} (always with {_some(mates)})")
        if hits_ck.sum(1).min() > 1:
            shared.append(me)
    k = edges_pk.shape[1]
    mends = {
        "coverage of programmes": f"add a perturbation for each, or fit {k - len(idle)} programmes: the rest "
        "can only be found as one block",
        "graphical criterion": "for each, add a perturbation that moves it without those that move with it",
        "isolation": "for each, add a perturbation that moves nothing else",
    }
    lacking = {
        "coverage of programmes": idle,
        "graphical criterion": idle + together,
        "isolation": idle + shared,
    }
    checks = []
    for name, asked in needed.items():
        bad = lacking[name]
        found = f"{k - len(bad)} of {k}" + (f"; not {_some(bad)}" if bad else "")
        status: Status = "fails" if bad else "ok"
        mend = mends[name] if bad else ""
        if is_estimate:
            found += ", in the fit's own graph"
            if not bad:
                status, mend = "warning", "see whether other seeds find the same graph (seed_agreement)"
        checks.append(Check(name, status, found, asked, mend))
    return checks


# ---------------------------------------------------------------------- what follows


_MOVED = ("independent perturbations", "directions of effect", "cells per perturbation")
_SPARSE = ("coverage of programmes", "graphical criterion")
GUARANTEES: Mapping[str, tuple[str, ...]] = {
    "sparse shift (iVAE): programmes up to a linear map": _MOVED,
    "sparse shift (sVAE+): each programme up to order, sign and scale": (*_MOVED, *_SPARSE),
    "weight-variant SCM (cDAG-VAE): responsive apart from invariant programmes": (
        "control cells",
        "cells per perturbation",
        "coverage of programmes",
    ),
    "weight-variant SCM (cDAG-VAE): each responsive programme, mechanisms changing sparsely": (
        "control cells",
        *_MOVED,
        *_SPARSE,
    ),
    "weight-variant SCM (cDAG-VAE): the richness its theorem asks for": (
        "control cells",
        "environments, changing weights",
    ),
    "temporal process (CITE-VAE): each responsive programme": (
        "control cells",
        "time points",
        "environments, changing noise",
        "isolation",
    ),
}
"""What each process promises, and the checks it rests on."""

ASSUMPTIONS = tuple(
    Check(name, "unknown", "cannot be seen in these data", needed, mend, "assumption")
    for name, needed, mend in [
        (
            "decoder",
            "different programmes give different expected counts (the map is one to one)",
            "predictive checks show a decoder that is too poor, never one that is not one to one",
        ),
        (
            "number of programmes",
            "as many as the cells have",
            "compare held-out likelihood over numbers of programmes",
        ),
        (
            "invariant programmes",
            "the same distribution in every condition; perturbations assigned at random",
            "randomise; look for toxicity, cell-cycle arrest or selection that thin out some cells",
        ),
        (
            "cells in pairs that share invariant programmes (cDAG-VAE, CITE-VAE)",
            "the same cell perturbed and not; a randomly drawn control is no such pair",
            "align whole distributions instead of pairs",
        ),
        (
            "sparse changes",
            "a perturbation changes few mechanisms; if any may change, a rotation of the responsive "
            "programmes fits equally well in any number of environments",
            "train several seeds and compare them (seed_agreement)",
        ),
    ]
)


def _guarantees(checks: Sequence[Check]) -> list[Check]:
    """A guarantee is as good as the worst check it rests on."""
    by_name = {check.name: check for check in checks}
    order: tuple[Status, ...] = ("ok", "warning", "unknown", "fails")
    words = {
        "ok": "holds",
        "warning": "holds with reservations: ",
        "unknown": "cannot be known yet: ",
        "fails": "does not hold: ",
    }
    result = []
    for name, needs in GUARANTEES.items():
        worst = max((by_name[need].status for need in needs), key=order.index)
        blame = [need for need in needs if by_name[need].status == worst] if worst != "ok" else []
        mends = "; ".join(dict.fromkeys(by_name[need].mend for need in blame))
        found = words[worst] + ", ".join(blame)
        result.append(Check(name, worst, found, ", ".join(needs), mends, "guarantee"))
    return result


# ---------------------------------------------------------------------- words


def _some(names: Sequence[str], n: int = 5) -> str:
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


def _left_out(seen: _Seen, used: NDArray[np.bool_], least: int) -> str:
    cells_c = np.bincount(seen.group_n, minlength=len(used))
    few = [f"{n} ({c})" for n, c, u in zip(seen.group_names(), cells_c, used, strict=True) if c and not u]
    return f" (left out, with fewer than {least} cells: {_some(few)})" if few else ""


def _printed(check: Check) -> list[str]:
    """Status and name, then found, needed and mend, each wrapped under its word."""
    lines = [f"  {check.status:<8}{check.name}"]
    said = {"found": check.found, "needed": check.needed, "mend": check.mend}
    if check.kind == "guarantee":  # its checks stand above, with what they need and what mends them
        said = {"": check.found}
    if check.kind == "assumption":
        said = {"needed": check.needed, "mend": check.mend}
    for word, text in said.items():
        if text:
            head = " " * 10 + (f"{word + ':':<8}" if word else "")
            lines += textwrap.wrap(text, _WIDTH, initial_indent=head, subsequent_indent=" " * len(head))
    return lines
