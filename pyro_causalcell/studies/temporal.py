"""What the temporal model recovers of a simulated truth, and what alignment and sparsity are good for.

Every job simulates snapshots, sets a tenth of the cells of single perturbations and control aside for scoring
and another for validation, trains on the rest, and is scored on cells that nothing has seen. All data is
simulated.

Source: CITE-VAE (arXiv 2605.25581), section 4 and the ablation of its Table 4, on data with a known truth.
"""

from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.metrics import f1_score

from pyro_causalcell import evaluate, inference, predict, simulate
from pyro_causalcell.batch import Rotation
from pyro_causalcell.data import Screen, Split, random_cells
from pyro_causalcell.inference.lagged_rotation import lagged_rotation
from pyro_causalcell.models.temporal_scm import PRESETS
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

__all__ = ["METHODS", "METRICS", "SETTINGS", "run", "table_jobs"]

STUDY = "temporal-scm"

METHODS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, no alignment": PRESETS["no-alignment"],
    "ours, no sparsity": PRESETS["no-sparsity"],
    "ours, neither": PRESETS["no-alignment"] | PRESETS["no-sparsity"],
    "ours, mixture of pasts": {"join": "mixture"},
    "ours, independent pairs": PRESETS["independent-pairs"],
    "ours, no warm start": {"warm_start": 0},
    "paper": PRESETS["paper"],
    "ours, by genes": {},
}
"""Settings of the model and of training that make each method; ``"paper"`` is a reading of it."""
BY_GENES = "by genes"
"""What the name of a method ends with that is given x itself, and not its components of unit variance."""

PCA_TURNED, ORACLE = "PCA, turned", "true programmes, turned"
REFERENCES = (PCA_TURNED, ORACLE)
"""Rows that train no model: components of x, and the true programmes, in the axes that the moments of the
snapshots show. The second is what the axes could be if nothing were lost on the way from x to programmes."""

ONSET = 0.0
"""When perturbations begin to act in ``simulate.temporal_scm``."""

SHARED: dict[str, Any] = {
    "onset": ONSET,
    "likelihood": "gaussian",
    "n_hidden": 256,
    "activation": "leaky_relu",
}
QUICK: dict[str, Any] = {"n_hidden": 16, "epochs": 3, "warm_start": 1, "compile": False}
QUICK_CELLS: dict[str, Any] = {
    "n_genes": 60,
    "n_invariant": 2,
    "n_responsive": 2,
    "n_perturbations": 5,
    "n_combinations": 0,
    "cells_per_snapshot": 30,
    "truth_draws": 10,
}

SETTINGS: dict[str, dict[str, Any]] = {
    "linear dynamics": {"dynamics": "linear", "cells_per_snapshot": 500},
    "nonlinear dynamics": {"dynamics": "nonlinear", "cells_per_snapshot": 500},
    "linear dynamics, 150 cells": {"dynamics": "linear", "cells_per_snapshot": 150},
    "linear dynamics, four layers": {"dynamics": "linear", "cells_per_snapshot": 500, "decoder_layers": 4},
}
"""Name of a setting -> arguments of ``simulate.temporal_scm``; all else is its default. 500 cells of each
condition at each time are 26,000 cells, as many as the hiPSC screen of the paper has."""
EPOCHS = {150: {"epochs": 110, "warm_start": 40}, 500: {"epochs": 100, "warm_start": 40}}
"""Cells of a snapshot -> length of training."""

FIRST_SEED = 100
"""Added to a job's seed: simulations of lower seeds were looked at while the method was worked out."""
HELD_BACK = 0.1
"""Share of the cells of every training condition to score on, and to validate on."""
ALTERED_ABOVE, EDGE_ABOVE = 0.5, 0.15
"""Shifts and slopes that count as found where a method has no probabilities: those of the model's
``min_effect`` and ``min_weight``."""

METRICS = {
    "mcc_responsive": "MCC z_v",
    "mcc_responsive_spearman": "the same, Spearman",
    "r2_responsive": "R² z_v",
    "r2_responsive_kernel": "the same, kernel",
    "r2_invariant": "R² z_l",
    "r2_invariant_kernel": "the same, kernel",
    "leak": "R² z_v from z_l",
    "auc_invariant": "AUC of u from z_l",
    "altered_f1": "F1 altered",
    "cuts_f1": "F1 cuts",
    "edges_f1": "F1 edges among z_v",
    "background_edges_f1": "F1 edges from z_l",
    "self_effect_error": "error of self-effects",
    "validation_loss": "validation −ELBO",
}
"""Columns of the table, with their headings. R² is cross-validated on the scored cells. Leak is what an
invariant block says of the true responsive programmes; the true block says something too, for it acts on
them. Edges from z_l are scored with z_l matched column by column, though few things but its own dynamics tell
its axes. Lower is better for leak, AUC and the last two."""


class Structure(NamedTuple):
    """What is said to be there, of the estimated programmes.

    Attributes:
        altered_pv: Mechanisms that a perturbation changes in any way.
        cut_pv: Parents cut; None where a method says nothing of cuts.
        edge_vk: Lagged edges into responsive programmes, invariant parents first.
        weight_vk: Their slopes, on average over a standard normal parent; zero where there is no edge.
    """

    altered_pv: NDArray[np.bool_]
    cut_pv: NDArray[np.bool_] | None
    edge_vk: NDArray[np.bool_]
    weight_vk: NDArray[np.float64]


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
    out: str | Path = "temporal-scm-study",
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
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: See :func:`table_jobs`.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper (there is none).
    """
    out = Path(out)
    jobs = table_jobs(settings, seeds=seeds, methods=methods, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = in_order(finished(out, quick=quick), list(SETTINGS), [*METHODS, *REFERENCES])
    table = summarise(STUDY, rows, {}, list(METRICS))
    note = (
        "All data is simulated. Mean ± sd over seeds, on cells of the training conditions that nothing was "
        f"trained on. Found is what has a probability above 1/2; without probabilities, shifts above "
        f"{ALTERED_ABOVE} and slopes above {EDGE_ABOVE}."
    )
    write_table(table, out, METRICS, note, quick)
    shown = table[table["metric"].isin(["mcc_responsive", "r2_invariant", "edges_f1"])]
    study_table(shown.replace({"metric": METRICS})).savefig(out / "table.png", dpi=150)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Simulate, train (or go on with it), score."""
    quick = job.arguments["quick"]
    sizes = QUICK_CELLS if quick else {}
    simulated = SETTINGS[job.setting]
    adata = simulate.temporal_scm(**{**simulated, **sizes}, seed=FIRST_SEED + job.seed)
    screen = Screen(adata[adata.obs["split"] == "train"].copy(), control="control", time="time")
    split = random_cells(screen, validation=HELD_BACK, test=HELD_BACK, seed=job.seed)
    n_invariant = adata.obsm["z_invariant"].shape[1]
    if job.method in REFERENCES:
        z_nk, turn = _turned(job.method, screen, split, n_invariant, job.seed)
        structure, test = _structure_of_moments(turn), screen.adata[split.test]
        return _recovered(test, z_nk, n_invariant, job.seed) | _found(
            test, z_nk, n_invariant, structure, screen.targets
        )
    if not job.method.endswith(BY_GENES):
        pca = components_of(screen.adata.X[split.train])
        screen = Screen(by_components(screen.adata, pca), control="control", time="time")
    test = screen.adata[split.test]
    length = QUICK if quick else EPOCHS[simulated["cells_per_snapshot"]]
    settings = {**SHARED, **length, **METHODS[job.method]}
    if settings.get("gates") == "open":
        settings["warm_start"] = 0  # no gates, no sparse axes to turn to
    fit = inference.fit(
        STUDY,
        None,
        screen,
        split=split,
        n_invariant=n_invariant,
        n_responsive=adata.obsm["z_responsive"].shape[1],
        out=folder,
        resume=True,
        seed=job.seed,
        progress=False,
        **settings,
    )
    z_nk = predict.latents(fit, Screen.from_spec(fit.screen, test)).obsm["X_causalcell"]
    losses = fit.history.loc[fit.history["stage"] == "training", "validation_loss"]
    scores: Scores = {"validation_loss": float(losses.min())}
    scores |= _recovered(test, z_nk, n_invariant, job.seed)
    return scores | _found(test, z_nk, n_invariant, _structure_of_fit(fit), fit.screen.targets)


def _recovered(test: ad.AnnData, z_nk: np.ndarray, n_invariant: int, seed: int) -> Scores:
    """How well each block is recovered, and how much the invariant one knows that it should not."""
    z_nl, z_nv = z_nk[:, :n_invariant], z_nk[:, n_invariant:]
    responsive = evaluate.recovery(test.obsm["z_responsive"], z_nv, seed=seed)
    invariant = evaluate.recovery(test.obsm["z_invariant"], z_nl, seed=seed)
    leak = evaluate.recovery(test.obsm["z_responsive"], z_nl, seed=seed)
    return {
        "mcc_responsive": responsive["pearson_mcc"],
        "mcc_responsive_spearman": responsive["spearman_mcc"],
        "r2_responsive": responsive["r2_linear"],
        "r2_responsive_kernel": responsive["r2_kernel"],
        "r2_invariant": invariant["r2_linear"],
        "r2_invariant_kernel": invariant["r2_kernel"],
        "leak": leak["r2_linear"],
        "auc_invariant": evaluate.perturbation_auc(z_nl, test.obs["target"].to_numpy(str), seed=seed),
    }


def _found(
    test: ad.AnnData, z_nk: np.ndarray, n_invariant: int, said: Structure, targets: list[str]
) -> Scores:
    """What is said of mechanisms against the truth, once programmes are matched within their blocks."""
    record = test.uns["simulation"]
    place_v = _places(test.obsm["z_responsive"], z_nk[:, n_invariant:])
    place_l = _places(test.obsm["z_invariant"], z_nk[:, :n_invariant])
    place_k = np.concatenate([place_l, n_invariant + place_v])
    order_p = [list(record["perturbations"]).index(target) for target in targets]
    edge_vk = said.edge_vk[place_v][:, place_k]
    own_v = said.weight_vk[place_v, n_invariant + place_v]
    true_vk = np.asarray(record["adjacency_vk"], dtype=bool)
    others_vv = ~np.eye(len(place_v), dtype=bool)
    true_own_v = np.diag(record["weight_kk"])[n_invariant:]
    scores = {
        "altered_f1": _f1(np.asarray(record["altered_pv"])[order_p], said.altered_pv[:, place_v]),
        "edges_f1": _f1(true_vk[:, n_invariant:][others_vv], edge_vk[:, n_invariant:][others_vv]),
        "background_edges_f1": _f1(true_vk[:, :n_invariant], edge_vk[:, :n_invariant]),
        "self_effect_error": float(np.abs(own_v - true_own_v).mean()),
    }
    if said.cut_pv is not None:
        scores["cuts_f1"] = _f1(np.asarray(record["cut_pv"])[order_p], said.cut_pv[:, place_v])
    return scores


def _places(z_true_nk: np.ndarray, z_est_nk: np.ndarray) -> NDArray[np.int64]:
    """Estimated programme of each true one."""
    match = evaluate.matching(z_true_nk, z_est_nk)
    return match.estimated_m[np.argsort(match.true_m)]


def _f1(truth: NDArray[np.bool_], found: NDArray[np.bool_]) -> float:
    """F1 of what was found; NaN where there is nothing and nothing was found."""
    return float(f1_score(truth.ravel(), found.ravel(), zero_division=np.nan))


def _structure_of_fit(fit: inference.Fit) -> Structure:
    """By probability above 1/2; where gates or edges are open, by size."""
    model: Any = fit.model
    sites = {name: value.detach().cpu().numpy() for name, value in predict.global_means(fit).items()}
    slope_vk = sites["weight"] + _slopes_of_bends(model)
    allowed_vk, own_vk = (part.cpu().numpy() > 0 for part in (model.allowed_vk, model.own_vk))
    if "edge" in sites:
        edge_vk = (sites["edge"] > 0.5) & allowed_vk | own_vk
    else:
        edge_vk = (np.abs(slope_vk) > EDGE_ABOVE) & allowed_vk
    weight_vk = np.where(edge_vk, slope_vk, 0.0)
    if "gate" not in sites:
        altered_pv = np.abs(sites["shift"]) > ALTERED_ABOVE
        return Structure(altered_pv, None, edge_vk, weight_vk)
    cut_pv = sites["cut"] > 0.5
    return Structure((sites["gate"] > 0.5) | cut_pv, cut_pv, edge_vk, weight_vk)


@torch.no_grad()
def _slopes_of_bends(model: Any) -> NDArray[np.float64]:
    """What the bends of effects add to their slopes: regression over a standard normal parent."""
    z_m = torch.special.ndtri((torch.arange(200) + 0.5) / 200)
    bent_mvk = model.responsive_map(z_m.unsqueeze(-1).expand(-1, model.n_invariant + model.n_responsive))
    slope_vk = torch.einsum("m,mvk->vk", z_m, bent_mvk) / z_m.square().sum()
    return slope_vk.double().numpy()


def _structure_of_moments(turn: Rotation) -> Structure:
    """What the moments of snapshots show, as training starts from it."""
    seen: Any = turn.mechanisms
    weight_vk = seen.weight_vk.numpy().astype(np.float64)
    edge_vk, cut_pv = np.abs(weight_vk) > EDGE_ABOVE, seen.cut_pv.numpy()
    return Structure(seen.altered_pv.numpy() | cut_pv, cut_pv, edge_vk, np.where(edge_vk, weight_vk, 0.0))


def _turned(
    method: str, screen: Screen, split: Split, n_invariant: int, seed: int
) -> tuple[np.ndarray, Rotation]:
    """Latents of the test cells in the axes found in training cells, and what was found."""
    cells = screen.adata
    n_programmes = n_invariant + cells.obsm["z_responsive"].shape[1]
    if method == ORACLE:
        z_nk = np.concatenate([cells.obsm["z_invariant"], cells.obsm["z_responsive"]], 1)
    else:
        z_nk = PCA(n_programmes, random_state=seed).fit(cells.X[split.train]).transform(cells.X)
    assert screen.time_n is not None
    turn = lagged_rotation(
        torch.from_numpy(z_nk[split.train]),
        torch.from_numpy(screen.u_np[split.train]),
        torch.from_numpy(screen.time_n[split.train]),
        n_invariant,
        variance_k=torch.zeros(n_programmes),
        onset=ONSET,
        seed=seed,
    )
    return z_nk[split.test] @ turn.map_kk.numpy().T + turn.offset_k.numpy(), turn
