"""Held-out times of a real time course: mouse embryonic stem cells after retinoic acid, Semrau et al. 2017.

All cells are treated alike, so the question is the course of a population. Each setting holds snapshots out;
the settings of the model are chosen on a snapshot of the training cells, which the chosen fit then sees.

Cells were sequenced to unequal depth, at 96 hours to three times that of the others. Means and distances of
log counts depend on it, and nobody can foresee it: so they are scored twice, as predictions come, and as they
come when every method is told the totals of the scored cells. Likelihood and intervals are of counts given
those totals.

Source: Semrau et al. 2017, Nature Communications 8, 1096.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import nbinom

from pyro_causalcell import datasets, evaluate, inference, predict
from pyro_causalcell.baselines import (
    LFADS,
    ScNODE,
    TimeBaseline,
    TimeModelPredictor,
    TimePredictor,
    compare_times,
    halves,
    log_cp10k,
)
from pyro_causalcell.baselines.compare import components
from pyro_causalcell.baselines.means import expression
from pyro_causalcell.baselines.temporal import line_weights
from pyro_causalcell.data import Screen, Split, held_out_times
from pyro_causalcell.evaluate.calibration import interval_coverage, randomised_pit
from pyro_causalcell.studies.runner import (
    Executor,
    Job,
    Scores,
    chosen_methods,
    finished,
    in_order,
    run_jobs,
    summarise,
    write_table,
)

__all__ = ["METHODS", "METRICS", "SETTINGS", "CountsInTime", "run", "table_jobs"]

STUDY = "semrau"
CONTROL = "control"
Floats = NDArray[np.float64]
Rows = NDArray[np.int64]


class Setting(NamedTuple):
    """Snapshots that are held out, and the training snapshot on which settings are chosen; hours."""

    held: tuple[float, ...]
    chosen_on: float


SETTINGS = {
    "36 h": Setting((36.0,), 60.0),
    "12, 36 and 60 h": Setting((12.0, 36.0, 60.0), 24.0),
    "96 h": Setting((96.0,), 72.0),
}
"""What each setting holds out. A middle time is chosen for on a middle one, the last on the last."""

CANDIDATES = ({"transition": "linear"}, {"transition": "additive"})
"""Settings of the model to choose among, by the likelihood of the snapshot they are chosen on."""
SHARED: dict[str, Any] = {
    "n_invariant": 1,
    "n_responsive": 8,
    "likelihood": "nb",
    "n_hidden": 64,
    "epochs": 200,
    "batch_size": 32,  # of 2,000 cells: batches of 128 would make a quarter of the steps
    "norm": "layer",  # 32 cells tell little of the statistics of all
    "sees_time": True,  # a cell has ten counts
}
QUICK: dict[str, Any] = {"n_hidden": 8, "epochs": 2, "compile": False}

OURS = "ours"
METHODS = (OURS, "scNODE", "LFADS")
REFERENCES = ("linear in time", "nearest snapshot", "no change", "technical duplicate")
"""Rows that train no network. The duplicate is the other half of the held-out cells."""

METRICS = {
    "rmse": "RMSE",
    "e_distance": "E-distance",
    "rmse_depth": "RMSE, depth told",
    "e_distance_depth": "E-distance, depth told",
    "nll": "−log-likelihood of a cell",
    "coverage_90": "coverage of 90 % intervals",
    "genes_inside": "genes with 87–93 %",
}
"""Columns of the table, with their headings. Lower is better for the first five. Errors and distances are in
log1p CP10k, the E-distance in principal components of training cells; the likelihood is in nats."""
JUDGED, NEAR = 0.9, 0.03
N_DRAWS, N_COPIES = 10, 200
"""Draws of cells whose E-distances are averaged, and copies of each cell for intervals and means."""


class CountModel(Protocol):
    """What predicts the counts of cells at held-out times, given their totals."""

    def nll(self, rows: Rows) -> Floats:
        """Negative log-likelihood of each cell, nats, shape (n,)."""
        ...

    def draws(self, rows: Rows, n_samples: int, seed: int) -> NDArray[Any]:
        """Counts of the cells drawn anew, shape (s, n, g)."""
        ...


Weights = Callable[[Floats, Sequence[float]], Floats]
"""Weights (t, s) of known times s for times t, each row with sum 1."""


def nearest_weights(known: Floats, times: Sequence[float]) -> Floats:
    """All weight on the nearest known time; the earlier of two."""
    weight_ts: Floats = np.eye(len(known))[np.abs(np.subtract.outer(times, known)).argmin(1)]
    return weight_ts


def last_weights(known: Floats, times: Sequence[float]) -> Floats:
    """All weight on the last known time that is not later; the first where all are."""
    weight_ts: Floats = np.eye(len(known))[np.maximum(np.searchsorted(known, times, side="right") - 1, 0)]
    return weight_ts


COURSES: dict[str, Weights] = {
    "linear in time": line_weights,
    "nearest snapshot": nearest_weights,
    "no change": last_weights,
    "technical duplicate": nearest_weights,
}


class CountsInTime:
    """Independent negative binomial counts whose expected shares follow training snapshots.

    The share of a gene is that of all counts of a snapshot, and on its way between snapshots a weighted mean
    of them. The dispersion of a gene is its maximum likelihood in the training cells, around the shares of
    their own snapshots. A share is at least half a count of all training cells: nothing is impossible.

    Args:
        screen: A time course of counts.
        rows: Training cells.
        weights: How shares at any time follow from those of snapshots.
    """

    def __init__(self, screen: Screen, rows: Rows, weights: Weights):
        self.screen, self.weights = screen, weights
        x_ng, time_n = self._counts(rows), self._times(rows)
        self.known = np.unique(time_n)
        self.least = 0.5 / x_ng.sum()
        total_sg = np.stack([x_ng[time_n == time].sum(0) for time in self.known])
        self.share_sg = total_sg / total_sg.sum(1, keepdims=True)
        mean_ng = self.means(rows)
        self.dispersion_g = np.array(
            [_dispersion(x_n, m_n) for x_n, m_n in zip(x_ng.T, mean_ng.T, strict=True)]
        )

    def means(self, rows: Rows) -> Floats:
        """Expected counts of cells, given their totals, shape (n, g)."""
        weight_ns = self.weights(self.known, self._times(rows).tolist())
        share_ng = np.maximum(weight_ns @ self.share_sg, self.least)
        share_ng = share_ng / share_ng.sum(1, keepdims=True)
        mean_ng: Floats = self.screen.library_n[rows, None] * share_ng
        return mean_ng

    def nll(self, rows: Rows) -> Floats:
        """See :class:`CountModel`."""
        log_p_ng = _negative_binomial(self.means(rows), self.dispersion_g).logpmf(self._counts(rows))
        return np.asarray(-log_p_ng.sum(1))

    def draws(self, rows: Rows, n_samples: int, seed: int) -> NDArray[Any]:
        """See :class:`CountModel`."""
        mean_ng = self.means(rows)
        law = _negative_binomial(mean_ng, self.dispersion_g)
        return np.asarray(law.rvs((n_samples, *mean_ng.shape), random_state=np.random.default_rng(seed)))

    def _counts(self, rows: Rows) -> Floats:
        return self.screen.x(rows).astype(np.float64)

    def _times(self, rows: Rows) -> Floats:
        assert self.screen.time_n is not None
        return self.screen.time_n[rows].astype(np.float64)


class FitCounts:
    """The same of a fit: importance-weighted likelihood, and new cells of the posterior predictive.

    Args:
        fit: The fit.
        screen: The screen it was trained on.
        n_particles: Particles of the likelihood.
    """

    def __init__(self, fit: inference.Fit, screen: Screen, n_particles: int):
        self.fit, self.screen, self.n_particles = fit, screen, n_particles

    def nll(self, rows: Rows) -> Floats:
        """See :class:`CountModel`."""
        found = evaluate.iw_nll(self.fit, self.screen, rows, n_particles=self.n_particles)
        return np.asarray(found["nll"].to_numpy(), dtype=np.float64)

    def draws(self, rows: Rows, n_samples: int, seed: int) -> NDArray[Any]:
        """See :class:`CountModel`."""
        return predict.replicate(self.fit, self.screen, rows, n_samples, seed)


class NearestSnapshot(TimeBaseline):
    """The mean of the training snapshot nearest in time."""

    name = "nearest snapshot"

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        known, mean_sg = self.means.course([self.means.find(condition) or 0])
        return nearest_weights(known, times) @ mean_sg


def table_jobs(*, seeds: int = 3, methods: tuple[str, ...] | None = None, quick: bool = False) -> list[Job]:
    """The grid of the study.

    Args:
        seeds: Seeds of training and of the scored halves, from 0.
        methods: Which of :data:`METHODS`; None is all. References are always there.
        quick: Short fits: shows that all of it runs, not how good it is.

    Raises:
        CausalCellError: A method is unknown.
    """
    chosen = chosen_methods(methods, list(METHODS))
    return [
        Job(STUDY, setting, method, seed, {"quick": quick})
        for setting in SETTINGS
        for method in (*chosen, *REFERENCES)
        for seed in range(seeds)
    ]


def run(
    out: str | Path = "semrau-study",
    *,
    methods: tuple[str, ...] | None = None,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write ``table.csv`` and ``table.md``.

    ``differences.csv`` compares the likelihood of the same cells under ours and under the others;
    ``chosen.csv`` has the settings that were chosen.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        methods: See :func:`table_jobs`.
        seeds: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: See :func:`table_jobs`.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper (there is none).
    """
    out = Path(out)
    jobs = table_jobs(seeds=seeds, methods=methods, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = in_order(finished(out, quick=quick), list(SETTINGS), [*METHODS, *REFERENCES])
    table = summarise(STUDY, rows, {}, list(METRICS))
    note = (
        "Semrau et al. 2017, real data: 2,449 cells, 41 genes, nine times. A table is named for the times "
        "held out. Mean ± sd over seeds of training and of the half of the held-out cells that is scored."
    )
    differences = _differences(rows)
    write_table(table, out, METRICS, note, quick, _differences_page(differences))
    if len(differences):
        differences.to_csv(out / "differences.csv", index=False)
        ours = rows[rows["method"] == OURS]
        ours[["setting", "seed", "chosen", "nll_of_candidates"]].to_csv(out / "chosen.csv", index=False)
    return table


def _differences(rows: pd.DataFrame) -> pd.DataFrame:
    """Negative log-likelihood of cells under ours less that under each other method, and its standard error.

    Cells are paired; means and standard errors over the cells of a seed are averaged over seeds, for the
    halves of the held-out cells that are scored have many cells in common.
    """
    known = rows[rows["nll_of_cells"].notna()].set_index(["setting", "seed", "method"])["nll_of_cells"]
    found = []
    for (setting, seed, method), other_n in known.items():
        if method != OURS and (setting, seed, OURS) in known.index:
            gap_n = np.subtract(known[setting, seed, OURS], other_n)
            found.append((setting, method, gap_n.mean(), gap_n.std(ddof=1) / np.sqrt(len(gap_n)), len(gap_n)))
    table = pd.DataFrame(found, columns=["setting", "method", "difference", "se", "n_cells"])
    return table.groupby(["setting", "method"], sort=False).mean().reset_index()


def _differences_page(differences: pd.DataFrame) -> str:
    """The same in Markdown; bold where ours is better by more than two standard errors."""
    if not len(differences):
        return ""
    lines = [
        "\n### −log-likelihood of a cell, ours less each other method, ± standard error over cells\n",
        "| held out | method | difference | cells |",
        "|---|---|---|---|",
    ]
    for row in differences.to_dict("records"):
        text = f"{row['difference']:+.3f} ± {row['se']:.3f}"
        text = f"**{text}**" if row["difference"] < -2 * row["se"] else text
        lines.append(f"| {row['setting']} | {row['method']} | {text} | {row['n_cells']:.0f} |")
    return "\n".join(["", *lines]) + "\n"


def score_job(job: Job, folder: Path) -> Scores:
    """Choose settings where there are some, train (or go on with it), score."""
    quick = job.arguments["quick"]
    screen = Screen(datasets.semrau2017(), control=CONTROL, time="time_h", allow_empty=True)
    setting = SETTINGS[job.setting]
    split = held_out_times(screen, setting.held, seed=job.seed)
    scored, other = halves(screen, split.test, [CONTROL], job.seed)
    trained = np.union1d(split.train, split.validation)
    if job.method == OURS:
        chosen, nll_of_candidates = _choose(screen, setting, folder, job.seed, quick)
        fit = _fit(screen, split, chosen, folder / "chosen", job.seed, quick)
        predictor = TimeModelPredictor(fit, OURS, seed=job.seed, n_cells=50 if quick else 2000)
        counts = FitCounts(fit, screen, 50 if quick else 1000)
        scores = _means_scored(screen, split, predictor, OURS, quick)
        scores |= _counts_scored(screen, trained, scored, counts, job.seed, quick)
        return scores | {"chosen": chosen, "nll_of_candidates": nll_of_candidates}
    if job.method in METHODS:
        own = _scnode if job.method == "scNODE" else _lfads
        return _means_scored(screen, split, own(screen, split.train, job.seed, quick), job.method, quick)
    nearest = NearestSnapshot.fit(screen, split.train)
    scores = _means_scored(screen, split, nearest, job.method, quick)
    known = other if job.method == "technical duplicate" else trained
    counts_in_time = CountsInTime(screen, known, COURSES[job.method])
    return scores | _counts_scored(screen, trained, scored, counts_in_time, job.seed, quick)


def _choose(
    screen: Screen, setting: Setting, folder: Path, seed: int, quick: bool
) -> tuple[dict[str, Any], list[float]]:
    """The candidate that gives the cells of one training snapshot, left out, the highest likelihood.

    The cells of the held-out times are not in the screen that the candidates see.
    """
    assert screen.time_n is not None
    kept_n = ~np.isin(screen.time_n, np.array(setting.held, dtype=np.float32))
    known = Screen(screen.adata[kept_n].copy(), control=CONTROL, time="time_h", allow_empty=True)
    split = held_out_times(known, setting.chosen_on, seed=seed)
    nll = []
    for i, candidate in enumerate(CANDIDATES):
        fit = _fit(known, split, candidate, folder / f"candidate-{i}", seed, quick)
        nll.append(float(FitCounts(fit, known, 50 if quick else 1000).nll(split.test).mean()))
    return dict(CANDIDATES[int(np.argmin(nll))]), nll


def _fit(
    screen: Screen, split: Split, candidate: dict[str, Any], folder: Path, seed: int, quick: bool
) -> inference.Fit:
    settings = {**SHARED, **(QUICK if quick else {}), **candidate}
    return inference.fit(
        "temporal-scm",
        None,
        screen,
        split=split,
        out=folder,
        resume=True,
        seed=seed,
        progress=False,
        **settings,
    )


def _scnode(screen: Screen, rows: Rows, seed: int, quick: bool) -> ScNODE:
    return ScNODE(screen, rows, seed, **({"n_pretraining": 2, "n_steps": 2} if quick else {}))


def _lfads(screen: Screen, rows: Rows, seed: int, quick: bool) -> LFADS:
    return LFADS(screen, rows, seed, **({"n_steps": 2} if quick else {}))


def _means_scored(screen: Screen, split: Split, method: TimePredictor, name: str, quick: bool) -> Scores:
    """Scores of one method as it predicts, on average over the held-out times and several draws.

    Each draw scores another half of the held-out cells; ``name`` may be a reference that is always there.
    """
    seeds = range(2 if quick else N_DRAWS)
    table = compare_times(screen, [method], [split], seeds=seeds, n_cells=200).table
    mean = table[table["method"] == name].groupby("metric")["value"].mean()
    return {metric: float(mean[metric]) for metric in ("rmse", "e_distance")}


def _counts_scored(
    screen: Screen, trained: Rows, scored: Rows, model: CountModel, seed: int, quick: bool
) -> Scores:
    """Scores of counts given the totals of the scored cells, on average over the held-out times."""
    assert screen.time_n is not None
    pca = components(screen, trained, seed)
    drawn_sng = model.draws(scored, 20 if quick else N_COPIES, seed)
    observed_ng = screen.x(scored)
    nll_n = model.nll(scored)
    pit_ng = randomised_pit(observed_ng, drawn_sng, np.random.default_rng(seed))
    by_time = []
    for time in np.unique(screen.time_n[scored]):
        here_n = screen.time_n[scored] == time
        true_ng = expression(screen, scored[here_n])
        new_sng = [log_cp10k(x_ng[here_n], x_ng[here_n].sum(1)) for x_ng in drawn_sng]
        z_nk = pca.transform(true_ng)
        distances = [evaluate.e_distance(z_nk, pca.transform(x_ng)) for x_ng in new_sng[:N_DRAWS]]
        gap_g = np.mean([x_ng.mean(0) for x_ng in new_sng], axis=0) - true_ng.mean(0)
        coverage_g = np.array([interval_coverage(pit_n, (JUDGED,))[0] for pit_n in pit_ng[here_n].T])
        by_time.append(
            {
                "rmse_depth": np.sqrt((gap_g**2).mean()),
                "e_distance_depth": np.mean(distances),
                "nll": nll_n[here_n].mean(),
                "coverage_90": coverage_g.mean(),
                "genes_inside": (np.abs(coverage_g - JUDGED) <= NEAR).mean(),
            }
        )
    scores: Scores = {str(name): float(value) for name, value in pd.DataFrame(by_time).mean().items()}
    return scores | {"nll_of_cells": nll_n.tolist()}


def _dispersion(x_n: Floats, mean_n: Floats) -> float:
    """Inverse dispersion θ of a gene (variance m + m² / θ) by maximum likelihood."""

    def loss(log_theta: float) -> float:
        return -float(_negative_binomial(mean_n, np.exp(log_theta)).logpmf(x_n).sum())

    return float(np.exp(minimize_scalar(loss, bounds=(-6.0, 8.0), method="bounded").x))


def _negative_binomial(mean: Floats, theta: Floats | float) -> Any:
    """Counts with a mean and an inverse dispersion θ."""
    return nbinom(theta, theta / (theta + mean))
