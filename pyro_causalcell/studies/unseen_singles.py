"""Targets that no training cell carries, predicted from embeddings: with informative ones and with noise.

Every job simulates a screen, holds out single targets with every double they are in, trains on the rest (a
tenth of the cells validates), and is scored against the process itself: the mean of new cells, so that the
noise of the held-out cells does not blur the ranking. All data is simulated.
"""

from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_causalcell import evaluate, inference, predict, simulate
from pyro_causalcell.baselines import (
    ModelPredictor,
    PerturbedMean,
    RidgeOnEmbeddings,
    TrainingMeans,
    condition_means,
    log_cp10k,
    training_means,
)
from pyro_causalcell.data import Screen, Split, held_out_perturbations
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

__all__ = ["METHODS", "METRICS", "SETTINGS", "run", "table_jobs"]

STUDY = "unseen-singles"
CONTROL = "control"

SETTINGS = {"informative embeddings": "target_embeddings", "random embeddings": "random_embeddings"}
"""Name of a setting -> the table of ``simulate.combination_screen`` that describes the targets."""

METHODS: dict[str, dict[str, Any]] = {
    "sparse-shift": {},
    "sparse-shift, open gates": {"gates": "open"},
}
"""Settings of the model that make each method."""

REFERENCES = ("perturbed mean", "ridge on embeddings", "measured cells")
"""``"measured cells"`` is the mean of the held-out cells themselves: what an experiment would score."""

SCREEN: dict[str, Any] = {
    "n_targets": 40,
    "n_doubles": 8,
    "n_genes": 500,
    "cells_per_condition": 100,
    "n_control_cells": 600,
    "truth_draws": 1000,
}
QUICK: dict[str, Any] = {
    "n_targets": 10,
    "n_doubles": 0,
    "n_genes": 40,
    "cells_per_condition": 10,
    "n_control_cells": 40,
    "truth_draws": 20,
}
SHARED: dict[str, Any] = {"n_latents": 20, "batch_size": 64, "epochs": 80}
HELD_OUT = 0.2
"""Share of the targets that no training cell carries."""
TRUE_CELLS = 3000
"""New cells of each held-out condition that give its true mean."""
DRAWN_CELLS = 10_000
"""Cells drawn for a predicted mean, so that their noise does not count."""
CLEAR = 0.2
"""True log2 fold change above which a gene counts as changed, for the coverage of intervals."""

FIRST_SEED = 100
"""Added to a job's seed: simulations of lower seeds were looked at while the method was worked out."""

METRICS = {
    "pearson": "Pearson of effects",
    "pearson_vs_mean": "Pearson against the perturbed mean",
    "l2": "L2",
    "width_unseen": "width of 90 % intervals, unseen",
    "width_seen": "the same, seen",
    "coverage_unseen": "coverage, unseen",
    "coverage_seen": "coverage, seen",
    "coverage_changed_unseen": "coverage of changed genes, unseen",
    "coverage_changed_seen": "the same, seen",
}
"""Columns of the table, with their headings. Intervals are those of ``effects``, in log2 fold changes."""


def table_jobs(*, seeds: int = 3, methods: tuple[str, ...] | None = None, quick: bool = False) -> list[Job]:
    """The grid of the study.

    Args:
        seeds: Seeds of each cell, from 0.
        methods: Which of :data:`METHODS`; None is all. References are always there.
        quick: Few genes, cells and epochs: shows that all of it runs, not how good it is.

    Raises:
        CausalCellError: A method is unknown.
    """
    chosen = chosen_methods(methods, list(METHODS))
    return [
        Job(STUDY, setting, method, seed, {"quick": quick})
        for setting in SETTINGS
        for method in (*REFERENCES, *chosen)
        for seed in range(seeds)
    ]


def run(
    out: str | Path = "unseen-singles-study",
    *,
    methods: tuple[str, ...] | None = None,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write ``table.csv`` and ``table.md``.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        methods: See :func:`table_jobs`.
        seeds: Likewise.
        quick: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper (there is none).
    """
    out = Path(out)
    jobs = table_jobs(seeds=seeds, methods=methods, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = in_order(finished(out, quick=quick), list(SETTINGS), [*REFERENCES, *METHODS])
    table = summarise(STUDY, rows, {}, list(METRICS))
    note = "All data is simulated. Held-out single targets against their true means; mean ± sd over seeds."
    write_table(table, out, METRICS, note, quick)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Simulate, hold out, train (or go on with it), score."""
    quick = job.arguments["quick"]
    sizes = QUICK if quick else {}
    seed = FIRST_SEED + job.seed
    adata = simulate.combination_screen(**(SCREEN | sizes), seed=seed)
    table = adata.uns[SETTINGS[job.setting]]
    screen = Screen(adata, "target", CONTROL, embeddings=table, allow_empty=True)
    split = held_out_perturbations(screen, HELD_OUT, seed=seed)
    held = list(split.settings["held_out"])
    means = training_means(screen, split.train)
    n_true = 100 if quick else TRUE_CELLS
    true_cg = np.stack([_true_mean(adata, name, n_true) for name in [CONTROL, *held]])
    if job.method in REFERENCES:
        predicted_cg = _reference(job.method, screen, split, held, means, table)
        return _means_scored(screen, held, true_cg, predicted_cg, means)
    settings = {**SHARED, **METHODS[job.method]} | ({"epochs": 2, "n_latents": 3} if quick else {})
    fit = inference.fit(
        "sparse-shift",
        None,
        screen,
        split=split,
        out=folder,
        resume=True,
        seed=job.seed,
        progress=False,
        **settings,
    )
    predicted_cg = ModelPredictor(fit, n_cells=200 if quick else DRAWN_CELLS).predict(held)
    scores = _means_scored(screen, held, true_cg, predicted_cg, means)
    return scores | _intervals_scored(fit, adata, held, n_samples=3 if quick else 100)


def _true_mean(adata: ad.AnnData, condition: str, n_cells: int) -> np.ndarray:
    x_ng = simulate.screen_cells(adata, condition, n_cells, seed=1).astype(np.float64)
    mean_g: np.ndarray = log_cp10k(x_ng, x_ng.sum(1)).mean(0)
    return mean_g


def _reference(
    method: str, screen: Screen, split: Split, held: list[str], means: TrainingMeans, table: pd.DataFrame
) -> np.ndarray:
    if method == "measured cells":
        return condition_means(screen, split.test, held)
    if method == "perturbed mean":
        return PerturbedMean(means).predict(held)
    return RidgeOnEmbeddings(means, table).predict(held)


def _means_scored(
    screen: Screen, held: list[str], true_cg: np.ndarray, predicted_cg: np.ndarray, means: TrainingMeans
) -> Scores:
    """Averages over the held-out targets; their own genes are left out."""
    control_g, true_cg = true_cg[0], true_cg[1:]
    scored_cg = evaluate.other_genes(screen, held)
    found = {
        "pearson": evaluate.pearson_of_effects(true_cg, predicted_cg, control_g, scored_cg),
        "pearson_vs_mean": evaluate.pearson_of_effects(true_cg, predicted_cg, means.perturbed_g, scored_cg),
        "l2": evaluate.l2(true_cg, predicted_cg, scored_cg),
    }
    # The perturbed mean against itself has no correlation.
    return {
        name: float(values_c.mean()) if np.isfinite(values_c).all() else None
        for name, values_c in found.items()
    }


def _intervals_scored(fit: inference.Fit, adata: ad.AnnData, held: list[str], n_samples: int) -> Scores:
    """Width and coverage of the intervals of effects on genes, for unseen and for seen targets."""
    record = adata.uns["simulation"]
    share_cg = pd.DataFrame(record["share_cg"], [str(name) for name in record["conditions"]])
    names = [str(name) for name in record["targets"]]
    found = predict.effects(fit, names, n_samples=n_samples, n_cells=64)
    true_cg = np.log2(share_cg.loc[names].to_numpy() / share_cg.loc[CONTROL].to_numpy())
    low_cg, high_cg = found["gene_low"].to_numpy(), found["gene_high"].to_numpy()
    inside_cg = (low_cg <= true_cg) & (true_cg <= high_cg)
    scored_cg = evaluate.other_genes(fit.screen, names)
    scores: Scores = {}
    for part, asked_c in (("unseen", np.isin(names, held)), ("seen", ~np.isin(names, held))):
        among_cg = scored_cg & asked_c[:, None]
        scores[f"width_{part}"] = float((high_cg - low_cg)[among_cg].mean())
        scores[f"coverage_{part}"] = float(inside_cg[among_cg].mean())
        changed_cg = among_cg & (np.abs(true_cg) > CLEAR)
        scores[f"coverage_changed_{part}"] = float(inside_cg[changed_cg].mean()) if changed_cg.any() else None
    return scores
