"""The simulation study of the cDAG-VAE paper: its Table 1, and what makes the programmes identifiable.

Every job simulates its data, trains on the training cells (a tenth of them validates), and is scored on the
test cells, which nothing else has seen. All data is simulated.

Source: cDAG-VAE (submitted to ICLR 2026), section 5.1 and appendix C.2.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA

from pyro_causalcell import evaluate, inference, predict, simulate
from pyro_causalcell.data import Screen
from pyro_causalcell.models.weight_variant_scm import PRESETS
from pyro_causalcell.plot import study_table
from pyro_causalcell.studies.components import by_components, components_of
from pyro_causalcell.studies.runner import (
    Executor,
    Job,
    Scores,
    chosen_jobs,
    finished,
    in_order,
    run_jobs,
    summarise,
    write_table,
)

__all__ = ["METHODS", "METRICS", "PAPER", "run", "table_jobs"]

STUDY = "latent-scm"
PAIRS = "ours, true pairs"

METHODS: dict[str, dict[str, Any]] = {
    PAIRS: {"alignment": "pairs", "alpha": 30.0, "anchors": "twin"},
    "ours": {},
    "ours, no alignment": PRESETS["dag-vae"],
    "ours, no warm start": {"warm_start": 0},
    "ours, no warm start, no alignment": {"warm_start": 0, **PRESETS["dag-vae"]},
    "ours, random pairs, no warm start": {
        "warm_start": 0,
        "alignment": "pairs",
        "alpha": 30.0,
        "anchors": "random",
    },
    "dense, true pairs": {**PRESETS["dense"], "alignment": "pairs", "alpha": 30.0, "anchors": "twin"},
    "ours, true pairs, by genes": {"alignment": "pairs", "alpha": 30.0, "anchors": "twin"},
    "ours, by genes": {},
}
"""Settings of the model and of training that make each method."""
BY_GENES = "by genes"
"""What the name of a method ends with that is given x itself, and not its components of unit variance."""

SHARED: dict[str, Any] = {
    "likelihood": "gaussian",
    "n_hidden": 256,
    "activation": "leaky_relu",
    "lr": 4e-3,
    "epochs": 250,
    "warm_start": 120,
}
TRUTH = "true programmes"
REFERENCES = ("PCA", "PCA, turned", TRUTH)
"""Rows that are no model of this study: components of x, the axes of ``block_rotation`` among them, and what
the scores are of the programmes themselves."""

SETTINGS: dict[str, dict[str, Any]] = {
    "sparse changes": {},
    "sparse changes, four layers": {"decoder_layers": 4},
    "dense changes": {"changes": "dense"},
}
"""Name of a setting -> arguments of ``simulate.latent_scm``; the paper's sizes are its defaults."""

FIRST_SEED = 200
"""Added to a job's seed: simulations of lower seeds were looked at while the method was worked out."""

METRICS = {
    "mcc_responsive": "MCC z_v",
    "r2_responsive": "R² z_v",
    "r2_responsive_linear": "linear",
    "r2_responsive_held_out": "held out",
    "r2_invariant": "R² z_l",
    "r2_invariant_linear": "linear",
    "r2_invariant_held_out": "held out",
    "altered_f1": "F1 of altered mechanisms",
    "edges_f1": "F1 of edges among z_v",
    "auc_invariant": "AUC of u from z_l",
    "validation_loss": "validation −ELBO",
}
"""Columns of the table, with their headings. R² of the test cells: of kernel ridge and of linear regression,
cross-validated on them, and of a kernel ridge regression that is fitted to the training cells. A kernel lets
axes bend, but conditions that lie far out leave it few cells to learn from; the training cells have more."""

SHOWN = ("mcc_responsive", "r2_responsive", "r2_invariant")
"""Columns of the figure: those of the paper's table."""

PAPER = {
    ("sparse changes", method, metric): value
    for method, values in {
        PAIRS: (0.86, 0.95, 0.97),
        "ours, no warm start, no alignment": (0.81, 0.93, 0.66),
    }.items()
    for metric, value in zip(SHOWN, values, strict=True)
}
"""Table 1 of the paper: with and without alignment. Its simulator is described in part only."""


def table_jobs(
    settings: tuple[str, ...] = tuple(SETTINGS),
    *,
    seeds: int = 5,
    methods: tuple[str, ...] | None = None,
    quick: bool = False,
) -> list[Job]:
    """The grid of the study.

    Args:
        settings: Which of :data:`SETTINGS`.
        seeds: Seeds of each cell, from 0.
        methods: Which methods and references; None is all.
        quick: Few genes, cells and epochs: shows that all of it runs, not how good it is.

    Raises:
        CausalCellError: A setting or method is unknown.
    """
    known = [*METHODS, *REFERENCES]
    return chosen_jobs(STUDY, settings, list(SETTINGS), methods, known, seeds, quick)


def run(
    out: str | Path = "latent-scm-study",
    *,
    settings: tuple[str, ...] = tuple(SETTINGS),
    methods: tuple[str, ...] | None = None,
    seeds: int = 5,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write ``table.csv``, ``table.md`` and a figure.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        settings: See :func:`table_jobs`.
        methods: Likewise.
        seeds: Likewise.
        quick: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.
    """
    out = Path(out)
    jobs = table_jobs(settings, seeds=seeds, methods=methods, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = in_order(finished(out, quick=quick), list(SETTINGS), [*METHODS, *REFERENCES])
    table = summarise(STUDY, rows, PAPER, list(METRICS))
    note = (
        "All data is simulated. Mean ± sd over seeds; in brackets the paper's number, with and without its "
        "alignment. True pairs are known to simulations alone."
    )
    write_table(table, out, METRICS, note, quick)
    shown = table[table["metric"].isin(SHOWN)].replace({"metric": METRICS})
    study_table(shown).savefig(out / "table-1.png", dpi=150)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Simulate, train (or go on with it), score."""
    quick = job.arguments["quick"]
    sizes: dict[str, Any] = (
        {"n_genes": 60, "n_train": 600, "n_test": 200, "cells_per_combination": 5} if quick else {}
    )
    adata = simulate.latent_scm(**SETTINGS[job.setting], **sizes, seed=FIRST_SEED + job.seed)
    train = adata[(adata.obs["split"] == "train").to_numpy()].copy()
    test = adata[(adata.obs["split"] == "test").to_numpy()].copy()
    n_invariant = adata.obsm["z_invariant"].shape[1]
    if job.method in REFERENCES:
        reference = _reference(job.method, train, n_invariant, job.seed)
        return _recovered(train, test, reference(train), reference(test), job.seed)
    if not job.method.endswith(BY_GENES):
        pca = components_of(train.X)
        train, test = by_components(train, pca), by_components(test, pca)
    settings = {**SHARED, **METHODS[job.method]}
    if PRESETS["dense"].items() <= settings.items():
        settings["warm_start"] = 0  # without gates there are no sparse axes to turn to
    if quick:
        settings |= {"epochs": 6, "warm_start": min(2, settings["warm_start"]), "n_hidden": 32}
    screen = Screen(train, control="control", twin="control_twin" if settings.get("anchors") else None)
    fit = inference.fit(
        "weight-variant-scm",
        None,
        screen,
        n_invariant=n_invariant,
        n_responsive=adata.obsm["z_responsive"].shape[1],
        out=folder,
        resume=True,
        seed=job.seed,
        progress=False,
        **settings,
    )
    fitted_nk, z_nk = (
        predict.latents(fit, Screen.from_spec(fit.screen, cells)).obsm["X_causalcell"]
        for cells in (train, test)
    )
    losses = fit.history.loc[fit.history["stage"] == "training", "validation_loss"]
    scores: Scores = {"validation_loss": float(losses.min())}
    scores |= _recovered(train, test, fitted_nk, z_nk, job.seed)
    if "posterior" in (fit.model.gates, fit.model.edges):
        scores |= _structure(fit, test, z_nk[:, n_invariant:])
    return scores


def _recovered(
    train: ad.AnnData, test: ad.AnnData, fitted_nk: np.ndarray, z_nk: np.ndarray, seed: int
) -> Scores:
    """How well each block is recovered, and how much of the perturbation the invariant one betrays."""
    n_invariant = test.obsm["z_invariant"].shape[1]
    scores: Scores = {}
    for block, columns in (("responsive", slice(n_invariant, None)), ("invariant", slice(n_invariant))):
        site = f"z_{block}"
        found = evaluate.recovery(
            test.obsm[site],
            z_nk[:, columns],
            fitted_on=(train.obsm[site], fitted_nk[:, columns]),
            n_kernel_cells=len(train),
            seed=seed,
        )
        scores[f"mcc_{block}"] = found["pearson_mcc"]
        scores[f"r2_{block}"] = found["r2_kernel"]
        scores[f"r2_{block}_linear"] = found["r2_linear"]
        scores[f"r2_{block}_held_out"] = found["r2_kernel_held_out"]
    target_n = test.obs["target"].to_numpy(str)
    scores["auc_invariant"] = evaluate.perturbation_auc(z_nk[:, :n_invariant], target_n, seed=seed)
    return scores


def _structure(fit: inference.Fit, test: ad.AnnData, z_nv: np.ndarray) -> Scores:
    """F1 of altered mechanisms, and of edges among the responsive programmes, by probability above 1/2."""
    record = test.uns["simulation"]
    match = evaluate.matching(test.obsm["z_responsive"], z_nv)
    place_v = match.estimated_m[np.argsort(match.true_m)]
    model: Any = fit.model
    sites = predict.global_means(fit)
    order_p = [list(record["perturbations"]).index(target) for target in fit.screen.targets]
    found_pv, n_l = sites["gate"].detach().cpu().numpy()[:, place_v] > 0.5, model.n_invariant
    edge_vv = (sites["edge"] * model.allowed_vk).detach().cpu().numpy()[:, n_l:] > 0.5
    return {
        "altered_f1": _f1(np.asarray(record["altered_pv"])[order_p], found_pv),
        "edges_f1": _f1(np.asarray(record["graph_vv"]), edge_vv[np.ix_(place_v, place_v)]),
    }


def _f1(truth: np.ndarray, found: np.ndarray) -> float:
    hits, total = float((truth & found).sum()), float(truth.sum() + found.sum())
    return 2 * hits / total if total else float("nan")


def _reference(
    method: str, train: ad.AnnData, n_invariant: int, seed: int
) -> Callable[[ad.AnnData], np.ndarray]:
    """The true programmes; or components of x, the smallest first; turned, in the axes of sparse changes."""
    if method == TRUTH:
        return lambda cells: np.concatenate([cells.obsm["z_invariant"], cells.obsm["z_responsive"]], 1)
    n_programmes = n_invariant + train.obsm["z_responsive"].shape[1]
    pca = PCA(n_programmes, random_state=seed).fit(train.X)

    def components(cells: ad.AnnData) -> np.ndarray:
        return np.ascontiguousarray(pca.transform(cells.X)[:, ::-1], dtype=np.float32)

    if method == "PCA":
        return components
    u_np = torch.from_numpy(Screen(train, control="control").u_np)
    turn = inference.block_rotation(
        torch.from_numpy(components(train)),
        u_np,
        n_invariant,
        variance_k=torch.zeros(n_programmes),
        seed=seed,
    )
    return lambda cells: components(cells) @ turn.map_kk.numpy().T
