"""The simulation study of the sVAE+ paper: Tables 1, 4-8, 10 and Figure 4.

Every job simulates its data, trains on the cells of the first 80 interventions, and is scored against the
truth and on the cells of the other 20. Training cells alone choose everything: a tenth of them validates.
All data is simulated.

Source: Lopez et al., CLeaR 2023, section 4.2 and Appendix E.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.stats import nbinom
from sklearn.decomposition import PCA

from pyro_causalcell import evaluate, inference, predict, simulate
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.models.sparse_shift import PRESETS
from pyro_causalcell.plot import reliability, study_table
from pyro_causalcell.studies.runner import (
    Executor,
    Job,
    Scores,
    finished,
    in_order,
    run_jobs,
    summarise,
    write_table,
)

__all__ = ["METHODS", "METRICS", "PAPER", "run", "table_jobs"]

STUDY = "sparse-shift"
DEFAULT = "sVAE+ (ours)"
UNREFINED = "sVAE+ (ours, not refined)"
RELEASED = "sVAE+ (released)"

_OURS: dict[str, Any] = {"n_hidden": 256, "activation": "silu", "lr": 4e-3, "epochs": 150}
METHODS: dict[str, dict[str, Any]] = {
    "VAE": PRESETS["vae"],
    "β-VAE": PRESETS["beta-vae"],
    "iVAE": PRESETS["ivae"],
    "sVAE": PRESETS["svae"],
    RELEASED: {**PRESETS["released"], "alpha": 100.0},
    UNREFINED: _OURS,
    DEFAULT: {**_OURS, "refine": 100},
}
"""Settings of the one model class and of training that make each method."""

SHARED = {"epochs": 100, "batch_size": 256, "lr": 2e-3, "warmup": {"z": 15}}

MAX_SCORED = 100
"""Cells of each held-out intervention whose likelihood is measured: an error of about .25 nats."""

N_ROUNDS = 12
"""Rounds in which each cell's proposal is fitted: decoders that fit well have narrow, curved posteriors."""

METRICS = {
    "pearson_mcc": "Pearson MCC",
    "spearman_mcc": "Spearman MCC",
    "r2_linear": "linear R²",
    "graph_precision": "precision",
    "graph_recall": "recall",
    "graph_f1": "F1",
    "i_nll_clean": "I-NLL, clean",
    "i_nll_paper": "I-NLL, paper's protocol",
    "excess_clean": "excess over oracle",
    "pearson_mcc_heldout": "MCC, held-out interventions",
    "sure_edges_true": "share of edges with probability ≥ .9 that are true",
    "pareto_k_bad": "share of Pareto k > .7",
    "validation_loss": "validation −ELBO",
}
"""Columns of the table, with their headings. NLL in nats per cell."""


def _paper_numbers() -> dict[tuple[str, str, str], float]:
    """The paper's numbers, under this study's names of settings, methods and metrics."""
    table1 = {
        "VAE": (0.46, 0.40, 0.82, None, None, None, 327.10),
        "β-VAE": (0.48, 0.42, 0.83, None, None, None, 392.68),
        "iVAE": (0.47, 0.39, 0.85, 0.16, 0.18, 0.17, 323.26),
        "sVAE": (0.72, 0.63, 0.84, 0.43, 0.39, 0.31, 318.26),
        RELEASED: (0.88, 0.79, 0.86, 0.54, 0.47, 0.51, 315.43),
    }
    columns = [*list(METRICS)[:6], "i_nll_paper"]
    numbers = {
        ("Table 1: p = 15", method, metric): value
        for method, values in table1.items()
        for metric, value in zip(columns, values, strict=True)
        if value is not None
    }
    table4 = {
        "VAE": (0.59, 0.55, 0.47),
        "iVAE": (0.69, 0.66, 0.59),
        "sVAE": (0.71, 0.72, 0.70),
        RELEASED: (0.94, 0.91, 0.76),
        "β-VAE": (0.63, 0.58, 0.55),
    }
    for method, values in table4.items():
        for p, value in zip((5, 10, 20), values, strict=True):
            numbers[f"Table 4: p = {p}", method, "pearson_mcc_heldout"] = value
    tables = {  # setting -> pMCC and NLL of iVAE, sVAE, sVAE+
        "Table 5: s = 0.2": (0.53, 319.27, 0.79, 318.69, 0.83, 309.45),
        "Table 5: s = 0.5": (0.58, 330.56, 0.58, 329.68, 0.57, 322.01),
        "Table 5: s = 0.9": (0.60, 333.28, 0.52, 333.98, 0.59, 322.51),
        "Table 6: e = 1": (0.78, 341.08, 0.78, 341.03, 0.78, 338.78),
        "Table 6: e = 2": (0.68, 356.84, 0.68, 349.55, 0.73, 339.80),
        "Table 6: e = 5": (0.67, 381.62, 0.66, 375.80, 0.92, 341.40),
        "Table 7: s = 0.2 to 0.5": (0.44, 667.77, 0.40, 676.64, 0.41, 656.61),
        "Table 7: s = 0.5 to 0.7": (0.38, 721.55, 0.38, 720.33, 0.42, 675.15),
        "Table 7: s = 0.7 to 0.99": (0.44, 762.35, 0.37, 710.88, 0.49, 681.25),
        "Table 8: e = 1 to 3": (0.47, 1179.31, 0.47, 1173.11, 0.47, 1103.91),
        "Table 8: e = 2 to 4": (0.59, 1153.24, 0.44, 1168.79, 0.51, 1104.70),
        "Table 8: e = 5 to 7": (0.58, 1224.26, 0.43, 1229.12, 0.46, 1179.39),
    }
    for setting, row in tables.items():
        for method, mcc, nll in zip(("iVAE", "sVAE", RELEASED), row[::2], row[1::2], strict=True):
            numbers[setting, method, "pearson_mcc_heldout"] = mcc
            numbers[setting, method, "i_nll_paper"] = nll
    for n, value in zip((1, 4, 7, 12, 15), (0.5, 0.59, 0.71, 0.85, 0.88), strict=True):
        numbers[f"Table 10: {n} of 15 latents targeted", RELEASED, "pearson_mcc"] = value
    return numbers


PAPER = _paper_numbers()
"""(setting, method, metric) -> the paper's number."""

_TRIO = ("iVAE", "sVAE", RELEASED, DEFAULT)
_TABLES: dict[str, list[tuple[str, dict[str, Any], tuple[str, ...]]]] = {
    "1": [("Table 1: p = 15", {"n_latents": 15}, tuple(METHODS))],
    "4": [(f"Table 4: p = {p}", {"n_latents": p}, tuple(METHODS)) for p in (5, 10, 20)],
    "5": [(f"Table 5: s = {s}", {"n_latents": 10, "sparsity": s}, _TRIO) for s in (0.2, 0.5, 0.9)],
    "6": [
        (f"Table 6: e = {e}", {"n_latents": 5, "sparsity": 0.2, "effect": float(e)}, _TRIO) for e in (1, 2, 5)
    ],
    "7": [
        (
            f"Table 7: s = {a} to {b}",
            {"preset": "clean", "n_latents": 10, "sparsity": a, "out_of_domain": {"sparsity": b}},
            _TRIO,
        )
        for a, b in ((0.2, 0.5), (0.5, 0.7), (0.7, 0.99))
    ],
    "8": [
        (
            f"Table 8: e = {a} to {b}",
            {
                "preset": "clean",
                "n_latents": 5,
                "sparsity": 0.2,
                "effect": float(a),
                "out_of_domain": {"effect": float(b)},
            },
            _TRIO,
        )
        for a, b in ((1, 3), (2, 4), (5, 7))
    ],
    "10": [
        (
            f"Table 10: {n} of 15 latents targeted",
            {"n_latents": 15, "n_targeted_latents": n},
            (RELEASED, DEFAULT),
        )
        for n in (1, 4, 7, 12, 15)
    ],
    "figure-4": [
        (f"Figure 4: alpha = {a}", {"n_latents": 15, "alpha": float(a)}, (RELEASED, DEFAULT))
        for a in (10, 20, 40, 60, 80, 100)
    ],
}
MEANS = ("training mean", "condition mean")
REFERENCES = ("oracle", *MEANS, "PCA", "PCA, turned")
"""Rows of every table that are no latent variable model of this study."""


class Effort(NamedTuple):
    """How much computing the scores take."""

    n_particles: int = 1000
    n_kernel_cells: int = 1000
    n_oracle_cells: int = 300


QUICK = Effort(n_particles=30, n_kernel_cells=200, n_oracle_cells=30)


def table_jobs(
    tables: Sequence[str] = ("1", "4", "5", "6", "7", "8", "10", "figure-4"),
    *,
    seeds: int = 5,
    methods: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Job]:
    """The grid of a study.

    Args:
        tables: Which tables and figures of the paper.
        seeds: Seeds of each cell, from 0.
        methods: Which methods; None is all that a table has, and the references.
        quick: A quarter of the interventions, a tenth of their cells, half the genes and a few epochs: shows
            that all of it runs, not how good it is.

    Raises:
        CausalCellError: A table or method is unknown.
    """
    unknown = [t for t in tables if t not in _TABLES]
    unknown += [m for m in methods or () if m not in {*METHODS, *REFERENCES}]
    if unknown:
        raise CausalCellError(f"unknown {unknown}; tables are {list(_TABLES)}, methods {list(METHODS)}")
    return [
        Job(STUDY, setting, method, seed, {**arguments, "quick": quick})
        for table in tables
        for setting, arguments, names in _TABLES[table]
        for method in (*names, *REFERENCES)
        if methods is None or method in methods
        for seed in range(seeds)
    ]


def run(
    out: str | Path = "sparse-shift-study",
    *,
    tables: Sequence[str] = ("1", "4", "5", "6", "7", "8", "10", "figure-4"),
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write ``table.csv``, ``table.md`` and figures.

    The tables hold every finished job of the folder, so that a grid can be filled in several calls.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        tables: See :func:`table_jobs`.
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
    jobs = table_jobs(tables, seeds=seeds, methods=methods, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = _excess(_in_order(finished(out, quick=quick)))
    table = summarise(STUDY, rows, PAPER, list(METRICS))
    note = (
        "All data is simulated. Ours: mean ± sd over seeds; the paper's number in brackets. The oracle is "
        "the model that made the data; no method can be expected below it."
    )
    write_table(table, out, METRICS, note, quick)
    _figures(rows, table, out)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Simulate, train (or go on with it), score."""
    arguments = dict(job.arguments)
    quick = arguments.pop("quick")
    shifted = arguments.pop("out_of_domain", None)
    alpha = arguments.pop("alpha", None)
    effort = QUICK if quick else Effort()
    if quick:
        arguments |= {"n_interventions": 25, "cells_per_intervention": 50, "n_genes": 50}
    adata = simulate.sparse_shift(**{"preset": "released", **arguments}, seed=job.seed)
    train = adata[(adata.obs["split"] == "train").to_numpy()].copy()
    held = adata[(adata.obs["split"] == "heldout").to_numpy()].copy()
    if shifted:
        held = simulate.out_of_domain(adata, **shifted, seed=job.seed)
    if job.method in REFERENCES:
        return _reference(job.method, train, held, job.seed, effort)
    settings = {**SHARED, **METHODS[job.method]}
    if alpha is not None:
        settings["alpha"] = alpha
    if quick:
        settings |= {"epochs": 4, "warmup": {"z": 1}, "n_hidden": 32, "batch_size": 128}
        settings |= {"refine": 1} if "refine" in settings else {}
    return _trained(job, train, held, settings, effort, folder)


def _trained(
    job: Job,
    train: ad.AnnData,
    held: ad.AnnData,
    settings: Mapping[str, Any],
    effort: Effort,
    folder: Path,
) -> Scores:
    """Scores of one trained model; it is kept in the job's folder."""
    method, seed = job.method, job.seed
    screen, new = (
        Screen(train, "target", None, allow_empty=True),
        Screen(held, "target", None, allow_empty=True),
    )
    n_latents = train.obsm["z"].shape[1]
    resumed: dict[str, Any] = {"seed": seed, "resume": True, "progress": False}
    fit = inference.fit(STUDY, None, screen, n_latents=n_latents, out=folder, **resumed, **settings)
    z_nk = predict.latents(fit, screen).obsm["X_causalcell"]
    truth_pk = _true_graph(train, screen.targets)
    edges = None if settings.get("gates") == "closed" else predict.graph(fit)
    scores: Scores = {"validation_loss": best_validation_loss(fit)}
    scores |= evaluate.recovery(
        train.obsm["z"],
        z_nk,
        graph_true_pk=None if edges is None else truth_pk,
        graph_est_pk=None if edges is None else _estimated_graph(edges, method, truth_pk.shape),
        n_kernel_cells=effort.n_kernel_cells,
        seed=seed,
    )
    if edges is not None and method in (UNREFINED, DEFAULT):
        scores |= _edge_reliability(edges, train.obsm["z"], z_nk, truth_pk)
    likelihoods, nll = interventional_scores(fit, new, settings, effort.n_particles, seed)
    scores |= likelihoods
    at = held.obs_names.get_indexer(nll["cell"].to_numpy())
    match = evaluate.matching(held.obsm["z"][at], nll["latent"].to_numpy())
    scores["pearson_mcc_heldout"] = float(np.abs(match.correlation_m).mean())
    return scores


def interventional_scores(
    fit: inference.Fit, new: Screen, settings: Mapping[str, Any], n_particles: int, seed: int
) -> tuple[Scores, xr.Dataset]:
    """Interventional NLL by the clean protocol and by the paper's, and every cell of the latter."""
    scores: Scores = {}
    for protocol in ("clean", "paper"):
        nll = evaluate.interventional_nll(
            fit,
            new,
            protocol=protocol,
            n_particles=n_particles,
            n_rounds=N_ROUNDS,
            max_scored=MAX_SCORED,
            adapt=settings.get("gates") != "closed",
            seed=seed,
        )
        scores[f"i_nll_{protocol}"] = nll.attrs["interventional_nll"]
        scores[f"pareto_k_bad_{protocol}"] = float((nll["pareto_k"] > 0.7).mean())
    scores["pareto_k_bad"] = scores["pareto_k_bad_clean"]
    return scores, nll


def _true_graph(adata: ad.AnnData, targets: Sequence[str]) -> np.ndarray:
    """True edges of the trained interventions, in the order of the screen's targets, p × k."""
    record = adata.uns["simulation"]
    row = {str(name): i for i, name in enumerate(record["interventions"])}
    return np.asarray(record["graph_pk"])[[row[t] for t in targets]].astype(bool)


def _estimated_graph(edges: pd.DataFrame, method: str, shape: tuple[int, int]) -> np.ndarray:
    """Edge probabilities p × k; for the iVAE the paper's two largest shifts of each intervention."""
    if method == "iVAE":
        return evaluate.top_two_graph(edges["effect"].to_numpy().reshape(shape)).astype(float)
    return edges["probability"].to_numpy().reshape(shape)


def _edge_reliability(
    edges: pd.DataFrame, z_true: np.ndarray, z_est: np.ndarray, truth_pk: np.ndarray
) -> Scores:
    """How often edges are true, by their probability, after matching latents."""
    match = evaluate.matching(z_true, z_est)
    probability_pk = edges["probability"].to_numpy().reshape(truth_pk.shape)[:, match.estimated_m]
    truth = truth_pk[:, match.true_m]
    sure = probability_pk >= 0.9
    return {
        "sure_edges_true": float(truth[sure].mean()) if sure.any() else float("nan"),
        "edge_probability": np.round(probability_pk.ravel(), 4).tolist(),
        "edge_truth": truth.ravel().astype(int).tolist(),
    }


def _reference(method: str, train: ad.AnnData, held: ad.AnnData, seed: int, effort: Effort) -> Scores:
    """Scores of what a model has to beat, and of what it cannot beat."""
    if method == "oracle":
        n_cells = min(effort.n_oracle_cells, held.n_obs)
        rows = np.random.default_rng(seed).choice(held.n_obs, n_cells, replace=False)
        nll = float(simulate.oracle_nll(held, np.sort(rows), seed=seed).mean())
        return {"i_nll_clean": nll, "i_nll_paper": nll}
    if method in MEANS:
        return mean_scores(method, train, held, "target", seed)
    x_ng = _counts(train)
    logged = np.log1p(x_ng / np.maximum(x_ng.sum(1, keepdims=True), 1) * 1e4)
    z_nk = PCA(train.obsm["z"].shape[1], random_state=seed).fit_transform(logged).astype(np.float32)
    if method == "PCA, turned":
        u_np = pd.get_dummies(train.obs["target"].astype(str)).to_numpy(np.float32)
        turn = inference.sparse_rotation(torch.from_numpy(z_nk), torch.from_numpy(u_np), seed=seed)
        z_nk = z_nk @ turn.map_kk.numpy().T
    few = effort.n_kernel_cells
    return dict(evaluate.recovery(train.obsm["z"], z_nk, n_kernel_cells=few, seed=seed))


def mean_scores(method: str, train: ad.AnnData, held: ad.AnnData, column: str, seed: int) -> Scores:
    """Likelihood of held-out cells under a mean: of all training cells, or of half of their own condition."""
    if method == "training mean":
        nll = float(_count_nll(_counts(train), _counts(held)).mean())
        return {"i_nll_clean": nll, "i_nll_paper": nll}
    parts, rng = [], np.random.default_rng(seed)
    for condition in held.obs[column].unique():
        x_ng = _counts(held[(held.obs[column] == condition).to_numpy()])
        half = np.array_split(rng.permutation(len(x_ng)), 2)
        parts.append(_count_nll(x_ng[half[0]], x_ng[half[1]]).mean())
    return {"i_nll_clean": float(np.mean(parts))}


def _count_nll(fitted_ng: np.ndarray, scored_ng: np.ndarray) -> np.ndarray:
    """−log NB of each cell: gene shares and dispersions by moments from other cells, library known."""
    share_g = (fitted_ng.sum(0) + 0.5) / (fitted_ng.sum() + 0.5 * fitted_ng.shape[1])
    mean_ng = fitted_ng.sum(1, keepdims=True) * share_g
    excess_g = ((fitted_ng - mean_ng) ** 2 - mean_ng).mean(0)
    theta_g = (mean_ng**2).mean(0) / np.maximum(excess_g, 1e-3)
    mean_ng = np.maximum(scored_ng.sum(1, keepdims=True), 1) * share_g
    return -nbinom.logpmf(scored_ng, theta_g, theta_g / (theta_g + mean_ng)).sum(1)


def _counts(adata: ad.AnnData) -> np.ndarray:
    x = adata.X
    return np.asarray(x.toarray() if hasattr(x, "toarray") else x, dtype=np.float64)


def _in_order(rows: pd.DataFrame) -> pd.DataFrame:
    """Settings and methods in the order of the tables, seeds ascending."""
    settings = [setting for table in _TABLES.values() for setting, _, _ in table]
    return in_order(rows, settings, [*METHODS, *REFERENCES])


def _excess(rows: pd.DataFrame) -> pd.DataFrame:
    """Adds the excess of each job's clean I-NLL over the oracle of the same setting and seed."""
    if "oracle" not in set(rows["method"]):
        return rows
    oracle = rows[rows["method"] == "oracle"].set_index(["setting", "seed"])["i_nll_clean"]
    keys = pd.MultiIndex.from_frame(rows[["setting", "seed"]])
    excess = rows["i_nll_clean"].to_numpy() - oracle.reindex(keys).to_numpy()
    return rows.assign(excess_clean=np.where(rows["method"] == "oracle", np.nan, excess))


def _figures(rows: pd.DataFrame, table: pd.DataFrame, out: Path) -> None:
    """One figure per table with dots and the paper's marks; the reliability curve of the edges."""
    shown = ["pearson_mcc", "r2_linear", "graph_f1", "i_nll_clean"]
    part = table[table["metric"].isin(shown)].replace({"metric": METRICS})
    for name, block in part.groupby(part["setting"].str.split(":").str[0], sort=False):
        stem = str(name).lower().replace(" ", "-")
        study_table(block).savefig(out / f"{stem}.png", dpi=150)
    if "edge_probability" in rows:
        known = rows.dropna(subset=["edge_probability"])
        curves = {str(m): _reliability(part) for m, part in known.groupby("method", sort=False)}
        pd.concat(curves, names=["method"]).droplevel(1).to_csv(out / "edge_reliability.csv")
        filled = {method: curve.dropna() for method, curve in curves.items()}
        figure = reliability(
            {method: (curve["mean_probability"], curve["fraction_true"]) for method, curve in filled.items()},
            xlabel="posterior probability of an edge",
            ylabel="share of edges that are true",
            title="Edge probabilities (simulated data)",
        )
        figure.savefig(out / "edge_reliability.png", dpi=150)


def _reliability(rows: pd.DataFrame) -> pd.DataFrame:
    """Curve over the edges of several jobs."""
    probability = np.concatenate([np.asarray(p, dtype=float) for p in rows["edge_probability"]])
    truth = np.concatenate([np.asarray(t, dtype=float) for t in rows["edge_truth"]])
    return evaluate.reliability(probability, truth)


def best_validation_loss(fit: inference.Fit) -> float:
    """Lowest validation −ELBO of the last stage, once no term was annealed any more."""
    stage = fit.history["stage"]
    whole = fit.history.index >= max(fit.training["warmup"].values(), default=1) - 1
    return float(fit.history.loc[whole & (stage == stage.iloc[-1]), "validation_loss"].min())
