"""Unseen knock-outs over time, one left out at a time: both such studies of the CITE-VAE paper.

Each fold holds out all cells of one knock-out, at all times; embeddings of the targets are all that is known
of it. ``hipsc`` has 23 knock-outs of hiPSCs on days 2 to 5, ``ipsc2`` five knock-downs of differentiating
heart cells on days 0 to 12. Without a file the screens are simulated, in the shape of either. Genes, changed
genes and settings come from training cells alone.

Source: CITE-VAE (arXiv 2605.25581), section 5, its Tables 2, 4 and 5; Ishikawa et al., Communications Biology
2023, for the data of hipsc; Balmas et al. 2025 (ArrayExpress E-MTAB-14065) for those of ipsc2.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell import inference, simulate
from pyro_causalcell.baselines import (
    LFADS,
    RENGE,
    Comparison,
    ScNODE,
    TimeModelPredictor,
    TimePredictor,
    compare_times,
    pca_embedding,
    random_embedding,
    training_means,
)
from pyro_causalcell.baselines.means import group_moments
from pyro_causalcell.data import Screen, held_out_perturbations, read, read_embeddings
from pyro_causalcell.errors import CausalCellError, DataError
from pyro_causalcell.models.temporal_scm import PRESETS
from pyro_causalcell.studies.runner import (
    Executor,
    Job,
    Scores,
    chosen_methods,
    differences_table,
    finished,
    run_jobs,
    summarise,
    write_table,
)

__all__ = [
    "HIPSC",
    "IPSC2",
    "METHODS",
    "METRICS",
    "SETTINGS",
    "Protocol",
    "read_screen",
    "run",
    "run_hipsc",
    "run_ipsc2",
    "simulated_screen",
    "table_jobs",
]

OURS, REFERENCES = "ours", "references"

MODELS: dict[str, dict[str, Any]] = {
    OURS: {},
    "ours, no alignment": PRESETS["no-alignment"],
    "ours, no sparsity": PRESETS["no-sparsity"],
    "ours, neither": PRESETS["no-alignment"] | PRESETS["no-sparsity"],
}
"""Settings of the model that make each row of ours."""
OTHERS = ("RENGE", "scNODE", "LFADS")
METHODS = (*MODELS, *OTHERS)

INFORMATIVE, RANDOM = "informative embeddings", "random embeddings"
PRINCIPAL, GIVEN = "PCA embeddings", "given embeddings"
SETTINGS = (INFORMATIVE, RANDOM)
"""What describes the targets of a simulated screen: its true mechanisms, turned and with noise, or noise."""

METRICS = {
    "pearson_control": "Pearson of effects",
    "rmse": "RMSE",
    "mae": "MAE",
    "auprc_train_de": "AUPRC, training DE",
    "auprc_lift_train_de": "the same / prevalence",
    "auroc_train_de": "AUROC, training DE",
    "auprc_lift_test_top": "AUPRC / prevalence, top 100",
    "e_distance": "E-distance",
}
"""Columns of the table, with their headings; see ``compare_times``. Training DE genes are those that any
training knock-out changes at any time. Where that is all of them, they have no scores; so it is in simulated
screens, where every gene follows every programme, and the 100 genes of largest effect take their place."""
COMPARED = ("pearson_control", "rmse", "mae", "auprc_lift_train_de", "auprc_lift_test_top", "e_distance")
"""Metrics of the page of paired differences."""


Paper = dict[tuple[str, str, str], float]
"""(setting, method, metric) -> the paper's number, of the real screen."""


def _paper_numbers(columns: Sequence[str], rows: Mapping[str, Sequence[float | None]]) -> Paper:
    """A table of the paper under the names of the study; it has no row for the others' baselines."""
    return {
        (setting, method, metric): value
        for setting in (PRINCIPAL, GIVEN)
        for method, values in rows.items()
        for metric, value in zip(columns, values, strict=True)
        if value is not None
    }


class Protocol(NamedTuple):
    """What one study of knock-outs over time has that the other has not.

    Attributes:
        name: Name of the study.
        mark: Arguments of its jobs that tell them from those of another study in the same folder.
        spellings: obs columns that it needs, and their names in a file, looked for in this order.
        controls: Spellings of control.
        symbols: A target's name in a file -> the symbol of its gene.
        times: Times that are kept of a file; None is all.
        onset: When knock-outs of a file are induced, on the scale of times; None if that is not known.
            Simulated ones act from time 0 on.
        excluded: Targets of a file that are left out.
        smallest_stratum: Cells that a knock-out needs at a time (in a clone, if the study has those) to be
            kept.
        screens: Size -> arguments of ``simulate.temporal_scm``. Ours has as many programmes, of a file too.
        control_share: Control cells of a simulated snapshot, as a share of those of a knock-out.
        metrics: Columns of the table, with their headings; see ``compare_times``.
        paper: The paper's numbers.
    """

    name: str
    mark: Mapping[str, str]
    spellings: Mapping[str, Sequence[str]]
    controls: Sequence[str]
    symbols: Mapping[str, str]
    times: Sequence[int] | None
    onset: float | None
    excluded: Sequence[str]
    smallest_stratum: int
    screens: Mapping[str, Mapping[str, Any]]
    control_share: float
    metrics: Mapping[str, str]
    paper: Paper


SPELLINGS = {"target": ("target", "perturbation", "gene"), "time": ("time", "day", "stage")}
LARGE: dict[str, Any] = {"n_genes": 1000, "n_invariant": 10, "library_size": 5000.0}
SMALL: dict[str, Any] = {
    "n_genes": 60,
    "n_responsive": 3,
    "n_invariant": 2,
    "n_perturbations": 5,
    "cells_per_snapshot": 24,
    "library_size": 1000.0,
}
"""What the screens of both studies share, for ``simulate.temporal_scm``."""

HIPSC = Protocol(
    name="hipsc",
    mark={},
    spellings=SPELLINGS,
    controls=("control", "ctrl", "non-targeting", "NT", "WT"),
    symbols={},
    times=None,
    onset=0.0,
    excluded=(),
    smallest_stratum=0,
    screens={
        "full": LARGE
        | {"n_responsive": 6, "n_perturbations": 23, "times": (2, 3, 4, 5), "cells_per_snapshot": 263},
        "quick": SMALL | {"times": (2, 3, 4, 5)},
    },
    control_share=1.0,
    metrics=METRICS,
    paper=_paper_numbers(
        ("rmse", "mae", "pearson_control", "auroc_train_de", "auprc_train_de"),
        {
            OURS: (0.086, 0.033, 0.691, 0.931, 0.617),
            "ours, no alignment": (0.116, 0.048, 0.389, 0.938, 0.547),
            "ours, no sparsity": (0.111, 0.046, 0.399, 0.943, 0.559),
            "ours, neither": (0.108, 0.044, 0.385, 0.940, 0.537),
            "RENGE": (0.857, None, None, 0.594, 0.970),
            "scNODE": (0.106, 0.183, 0.455, None, None),
            "LFADS": (0.531, 0.275, 0.401, 0.854, 0.528),
            "elastic net in time, PCA embedding": (0.105, 0.011, None, 0.925, 0.625),
        },
    ),
)
"""Tables 2 and 4: 23 knock-outs and control on days 2 to 5; simulated with 1,000 genes and 25,248 cells.
Which genes the paper calls changed is a reading of its text."""

IPSC2 = Protocol(
    name="ipsc2",
    mark={"study": "ipsc2"},
    spellings=SPELLINGS | {"clone": ("clone",)},
    controls=("SCR",),
    symbols={"NKX2.5": "NKX2-5"},
    times=(0, 2, 6, 12),
    onset=None,
    excluded=("B2M",),
    smallest_stratum=20,
    screens={
        # few programmes, so that several of the five knock-downs change each
        "full": LARGE
        | {"n_responsive": 3, "n_perturbations": 5, "times": (0, 2, 6, 12), "cells_per_snapshot": 1170},
        "quick": SMALL | {"times": (0, 2, 6, 12)},
    },
    control_share=0.29,
    metrics=METRICS
    | {
        "r2_means": "R² of means",
        "auroc_test_top": "AUROC, top 100",
        "auprc_test_top": "AUPRC, top 100",
    },
    paper=_paper_numbers(
        ("rmse", "r2_means", "mae", "pearson_control", "auroc_test_top", "auprc_test_top"),
        {
            OURS: (0.6346, 0.9852, 0.4712, 0.7510, 0.8303, 0.3061),
            "RENGE": (0.7724, 0.8601, 0.8070, 0.2496, 0.8787, 0.9944),
            "scNODE": (0.6719, 0.9718, 0.4849, 0.3428, 0.7845, 0.2640),
            "LFADS": (0.6347, 0.9583, 0.4644, 0.7511, 0.7454, 0.1956),
            "elastic net in time, PCA embedding": (0.7075, 0.7212, 0.5502, 0.7354, 0.8662, 0.3846),
        },
    ),
)
"""Table 5: five knock-downs and a scrambled control on days 0, 2, 6 and 12; simulated with 1,000 genes,
23,400 perturbed and 1,356 control cells. Clones are not batches of the model: each carries one knock-down, so
its own effect cannot be told from the knock-down's. The paper does not say what the RMSE and MAE of its Table
5 are errors of: those of its model are 7 and 14 times what its Table 2 has. Which genes it calls changed is a
reading of its text."""

PROTOCOLS = {protocol.name: protocol for protocol in (HIPSC, IPSC2)}


class Effort(NamedTuple):
    """How much computing the study takes.

    Attributes:
        model: Settings of the model and of training.
        n_drawn: Cells behind each predicted mean.
        n_cells: Cells of a condition at a time, for distances.
        n_steps: Steps of RENGE, scNODE and LFADS; None is their own.
        n_folds: Folds; None is every target.
        n_genes: Genes of a file, the most variable in training cells.
    """

    model: Mapping[str, Any]
    n_drawn: int
    n_cells: int
    n_steps: int | None
    n_folds: int | None
    n_genes: int


EFFORTS = {
    "full": Effort(
        model={"epochs": 45, "warm_start": 30},
        n_drawn=2000,
        n_cells=200,
        n_steps=None,
        n_folds=None,
        n_genes=1000,
    ),
    "quick": Effort(
        model={
            "epochs": 2,
            "warm_start": 0,
            "n_hidden": 8,
            "compile": False,
        },
        n_drawn=10,
        n_cells=10,
        n_steps=3,
        n_folds=1,
        n_genes=30,
    ),
}
KNOCK_DOWN = 0.1
"""Share of its transcripts that a simulated target keeps."""
NOISE = 0.3
"""Standard deviation of the noise of informative embeddings, whose columns have one of 1."""
FIRST_SEED = 100
"""Added to a job's seed: simulations of lower seeds were looked at while the method was worked out."""


def table_jobs(
    protocol: Protocol,
    *,
    data: str | Path | None = None,
    embeddings: str | Path | None = None,
    seeds: int = 3,
    methods: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Job]:
    """The grid of the study.

    Args:
        protocol: Which study: :data:`HIPSC` or :data:`IPSC2`.
        data: As :func:`run`.
        embeddings: Likewise.
        seeds: Seeds of simulation and training, from 0.
        methods: Which of :data:`METHODS`; None is all. The baselines are always there.
        quick: Few genes, cells, folds and epochs: shows that all of it runs, not how good it is.

    Raises:
        CausalCellError: A method is unknown, or embeddings are given without a file.
        DataError: There is no such file, or it lacks a column.
    """
    chosen = chosen_methods(methods, list(METHODS))
    size = "quick" if quick else "full"
    arguments: dict[str, Any] = {"size": size, **protocol.mark}
    settings: tuple[str, ...] = SETTINGS
    if data is None:
        if embeddings is not None:
            raise CausalCellError("embeddings= describe the targets of a file; pass data= as well")
        targets = [f"P{p + 1:02d}" for p in range(protocol.screens[size]["n_perturbations"])]
    else:
        settings = (PRINCIPAL, RANDOM) if embeddings is None else (GIVEN, PRINCIPAL, RANDOM)
        targets = _screen_of(read_screen(data, protocol), protocol).targets
        arguments["data"] = str(Path(data).resolve())
    return [
        Job(
            protocol.name,
            setting,
            method,
            seed,
            arguments | {"target": target} | _table_of(setting, embeddings),
        )
        for setting in settings
        for method in (REFERENCES, *chosen)
        for target in targets[: EFFORTS[size].n_folds]
        for seed in range(seeds)
    ]


def _table_of(setting: str, embeddings: str | Path | None) -> dict[str, str]:
    """Where the embeddings of a setting come from, for the job's arguments."""
    if setting != GIVEN or embeddings is None:
        return {}
    return {"embeddings": str(Path(embeddings).resolve())}


def run(
    protocol: Protocol,
    out: str | Path,
    *,
    data: str | Path | None = None,
    embeddings: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write tables.

    ``scores.csv`` holds the score of every knock-out at every time. ``table.csv`` and ``table.md`` have means
    over both; ``differences.csv`` differences of ours from every other method, paired by knock-out, with 95 %
    intervals. These two leave out time 0 of simulated screens, when nothing has acted.

    Args:
        protocol: Which study: :data:`HIPSC` or :data:`IPSC2`.
        out: Folder of results; finished jobs in it are not run again.
        data: A real screen: h5ad with counts in X, obs columns of the knock-out (``target``,
            ``perturbation`` or ``gene``), of the time (``time``, ``day`` or ``stage``) and, for
            :data:`IPSC2`, of the ``clone``. None simulates.
        embeddings: CSV of embeddings of the file's targets, the first column holding their names.
        methods: See :func:`table_jobs`.
        seeds: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: See :func:`table_jobs`.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.
    """
    out = Path(out)
    jobs = table_jobs(protocol, data=data, embeddings=embeddings, seeds=seeds, methods=methods, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    done = finished(out, size="quick" if quick else "full")
    own = {"data": None if data is None else str(Path(data).resolve()), "study": protocol.mark.get("study")}
    is_own = done["arguments"].map(lambda arguments: all(arguments.get(k) == v for k, v in own.items()))
    scores = _long(done[is_own], simulated=data is None)
    scores.to_csv(out / "scores.csv", index=False)
    if data is None:  # at time 0 nothing has acted: an effect is the noise of the control cells
        scores = scores[scores["time"] > 0]
    keys = ["setting", "method", "seed"]
    rows = scores.pivot_table(index=keys, columns="metric", values="value", sort=False).reset_index()
    table = summarise(protocol.name, rows, {} if data is None else protocol.paper, list(protocol.metrics))
    differences = _differences(scores)
    differences.to_csv(out / "differences.csv", index=False)
    note = f"{_source(data, protocol)} One knock-out held out at a time; mean ± sd over seeds."
    write_table(table, out, protocol.metrics, note, quick, _differences_page(differences))
    return table


run_hipsc = partial(run, HIPSC)
"""``run`` of the study hipsc."""
run_ipsc2 = partial(run, IPSC2)
"""``run`` of the study ipsc2."""


def score_job(job: Job, folder: Path) -> Scores:
    """Simulate or read, hold one knock-out out, train (or go on with it), score."""
    effort, target = EFFORTS[job.arguments["size"]], job.arguments["target"]
    metrics = PROTOCOLS[job.study].metrics
    screen, trained = _screen_without(job, effort, target)
    split = held_out_perturbations(screen, [target], seed=job.seed, validation=0.0)
    table = pd.DataFrame(screen.embedding_pe, screen.targets)
    own: list[TimePredictor] = []
    if job.method in MODELS:
        own.append(_ours(job, screen, effort, folder))
    elif job.method in OTHERS:
        own.append(_other(job.method, screen, trained, job.seed, table, effort.n_steps))
    found = compare_times(screen, own, [split], seeds=(job.seed,), n_cells=effort.n_cells).table
    found = found[found["method"] == job.method] if own else found
    columns = ["method", "condition", "time", "metric", "value"]
    return {"scores": found.loc[found["metric"].isin(metrics), columns].to_dict("list")}


def _ours(job: Job, screen: Screen, effort: Effort, folder: Path) -> TimeModelPredictor:
    fit = inference.fit(
        "temporal-scm",
        None,
        screen,
        split=held_out_perturbations(screen, [job.arguments["target"]], seed=job.seed),
        out=folder,
        resume=True,
        seed=job.seed,
        progress=False,
        **_settings(job, effort),
    )
    return TimeModelPredictor(fit, job.method, n_cells=effort.n_drawn, seed=job.seed)


def _settings(job: Job, effort: Effort) -> dict[str, Any]:
    """Settings of ours: with as many programmes as the simulated screen has."""
    protocol, size = PROTOCOLS[job.study], job.arguments["size"]
    programmes = {name: protocol.screens[size][name] for name in ("n_invariant", "n_responsive")}
    onset = protocol.onset if "data" in job.arguments else 0.0
    settings = {"likelihood": "nb", "onset": onset, **programmes, **effort.model, **MODELS[job.method]}
    if settings.get("gates") == "open":
        settings["warm_start"] = 0  # no gates, no sparse axes to turn to
    return settings


def _other(
    method: str, screen: Screen, rows: NDArray[np.int64], seed: int, table: pd.DataFrame, n_steps: int | None
) -> TimePredictor:
    steps: dict[str, Any] = {} if n_steps is None else {"n_steps": n_steps}
    if method == "RENGE":
        return RENGE(screen, rows, seed, **steps)
    if method == "LFADS":
        return LFADS(screen, rows, seed, embedding=table, **steps)
    return ScNODE(screen, rows, seed, embedding=table, **steps)


# ---------------------------------------------------------------- screens


def simulated_screen(protocol: Protocol, size: str = "full", seed: int = 0) -> ad.AnnData:
    """Simulates a screen of knock-outs over time whose targets are genes.

    Snapshots of ``simulate.temporal_scm``; each target is also one of the better expressed genes, of whose
    transcripts its cells keep a tenth after time 0. uns["informative embeddings"] describes a target by its
    true shift, change of noise and cuts of each programme, standardised, in turned axes and with noise;
    uns["random embeddings"] by noise.

    Args:
        protocol: Which study it is the shape of.
        size: "full" or "quick".
        seed: Seed of everything.
    """
    arguments = protocol.screens[size]
    cells = simulate.temporal_scm(**arguments, n_combinations=0, likelihood="nb", truth_draws=10, seed=seed)
    n_control = round(protocol.control_share * arguments["cells_per_snapshot"])
    number_n = cells.obs.groupby(["target", "time"], observed=True).cumcount()
    cells = cells[(cells.obs["target"] != "control") | (number_n < n_control)].copy()
    rng = np.random.default_rng(np.random.SeedSequence([seed, 1]))
    record = cells.uns["simulation"]
    targets = [str(name) for name in record["perturbations"]]
    x_ng = np.asarray(cells.X)
    expressed = np.argsort(-x_ng.mean(0))[: cells.n_vars // 2]
    genes = cells.var_names.to_numpy().astype(object)
    for target, gene in zip(targets, rng.choice(expressed, len(targets), replace=False), strict=True):
        genes[gene] = target
        own_n = ((cells.obs["target"] == target) & (cells.obs["time"] > 0)).to_numpy()
        x_ng[own_n, gene] = rng.binomial(x_ng[own_n, gene].astype(np.int64), KNOCK_DOWN)
    cells.var_names = genes.astype(str)
    mechanism_pe = np.concatenate(
        [record["shift_pv"], np.log(record["scale_pv"]), record["cut_pv"].astype(np.float64)], 1
    )
    varies_e = mechanism_pe.std(0) > 0
    unit_pe = mechanism_pe[:, varies_e] / mechanism_pe[:, varies_e].std(0)
    turn_ee = np.linalg.qr(rng.standard_normal((unit_pe.shape[1],) * 2))[0]
    noise_pe = NOISE * rng.standard_normal(unit_pe.shape)
    cells.uns[INFORMATIVE] = pd.DataFrame(unit_pe @ turn_ee + noise_pe, targets)
    cells.uns[RANDOM] = random_embedding(targets, seed, unit_pe.shape[1])
    return cells


def read_screen(path: str | Path, protocol: Protocol) -> ad.AnnData:
    """Reads the cells of a real screen that a study keeps.

    Args:
        path: h5ad with counts in X.
        protocol: Which study.

    Returns:
        obs["target"], obs["time"] and the totals over all genes in obs["total"], beside the columns of the
        file. uns["dropped_cells"] counts the cells that were left out, each under its first reason.

    Raises:
        DataError: There is no such file, it has none of the columns looked for, a column has missing values,
            or no cell is of one of the study's times.
    """
    cells = read(path)
    columns = list(cells.obs)
    for name, spellings in protocol.spellings.items():
        found = [column for column in spellings if column in columns]
        if not found:
            raise DataError(
                f"expected an obs column {' or '.join(spellings)} in {path}, found {columns}; rename yours"
            )
        cells.obs[name] = cells.obs[found[0]]
    reasons = _reasons_to_drop(cells.obs, protocol)
    first_n = np.select(list(reasons.values()), list(reasons), default="")
    cells = cells[first_n == ""].copy()
    cells.uns["dropped_cells"] = {reason: int((first_n == reason).sum()) for reason in reasons}
    cells.obs["target"] = cells.obs["target"].astype(object).replace(dict(protocol.symbols))
    cells.obs["total"] = np.asarray(cells.X.sum(1), dtype=np.float64).ravel()
    return cells


def _reasons_to_drop(obs: pd.DataFrame, protocol: Protocol) -> dict[str, NDArray[np.bool_]]:
    """Cells that a study leaves out of a file, by reason."""
    clones = [name for name in protocol.spellings if name not in SPELLINGS]
    no_genes = ad.AnnData(np.ones((len(obs), 1), dtype=np.float32), obs)
    labels = Screen(no_genes, control=protocol.controls, time="time", batch=clones)
    assert labels.time_n is not None
    found = labels.describe().times
    times = found if protocol.times is None else protocol.times
    if not set(times) <= set(found):
        raise DataError(
            f"expected cells of the days {list(times)}, found the times {found}; write the column in days"
        )
    name_n = np.array(labels.conditions)[labels.condition_n]
    strata = pd.DataFrame({"target": name_n, "time": labels.time_n, **{name: obs[name] for name in clones}})
    n_alike = strata.groupby(list(strata), observed=True)["time"].transform("size").to_numpy()
    return {
        "at other times": ~np.isin(labels.time_n, times),
        **{f"of {name}": name_n == name for name in protocol.excluded},
        f"in strata of fewer than {protocol.smallest_stratum}": n_alike < protocol.smallest_stratum,
    }


def _screen_of(cells: ad.AnnData, protocol: Protocol, **settings: Any) -> Screen:
    library = "total" if "total" in cells.obs else None
    return Screen(
        cells, control=protocol.controls, time="time", library=library, allow_empty=True, **settings
    )


def _screen_without(job: Job, effort: Effort, target: str) -> tuple[Screen, NDArray[np.int64]]:
    """The screen of a job with embeddings, and its training cells: those of other conditions."""
    protocol = PROTOCOLS[job.study]
    if "data" not in job.arguments:
        cells = simulated_screen(protocol, job.arguments["size"], FIRST_SEED + job.seed)
        screen = _screen_of(cells, protocol, embeddings=cells.uns[job.setting])
        return screen, _rows_without(screen, target)
    cells = read_screen(job.arguments["data"], protocol)
    whole = _screen_of(cells, protocol)
    rows = _rows_without(whole, target)
    cells = cells[:, _variable_genes(whole, rows, effort.n_genes)].copy()
    if job.setting == GIVEN:
        table = read_embeddings(job.arguments["embeddings"])
    elif job.setting == RANDOM:
        table = random_embedding(whole.targets, job.seed)
    else:
        table = pca_embedding(training_means(_screen_of(cells, protocol), rows))
    return _screen_of(cells, protocol, embeddings=table), rows


def _rows_without(screen: Screen, target: str) -> NDArray[np.int64]:
    """Cells that do not carry a target."""
    return np.flatnonzero(screen.u_np[:, screen.targets.index(target)] == 0)


def _variable_genes(screen: Screen, rows: NDArray[np.int64], n_genes: int) -> NDArray[np.bool_]:
    """The genes that vary most in log1p CP10k over training cells, and the targets' own."""
    variance_g = group_moments(screen, rows, np.zeros(len(rows), dtype=np.int64), 1).variance_cg[0]
    chosen_g = np.isin(screen.genes, screen.targets)
    chosen_g[np.argsort(-variance_g, kind="stable")[:n_genes]] = True
    return chosen_g


# ---------------------------------------------------------------- tables


def _source(data: str | Path | None, protocol: Protocol) -> str:
    """Where the cells of the table are from, and how many of a file are not in it."""
    if data is None:
        from_0 = 0 in protocol.screens["full"]["times"]
        return "All data is simulated." + (" Means leave out day 0: nothing has acted." if from_0 else "")
    dropped = read_screen(data, protocol).uns["dropped_cells"]
    listed = ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)
    return f"Real data: {Path(data).name}." + (f" Cells left out: {listed}." if listed else "")


def _long(jobs: pd.DataFrame, simulated: bool) -> pd.DataFrame:
    """Columns setting, method, seed, condition, time, metric, value of all jobs, in the order of methods."""
    parts = [
        pd.DataFrame(job["scores"]).assign(setting=job["setting"], seed=job["seed"])
        for job in jobs.to_dict("records")
    ]
    scores = pd.concat(parts, ignore_index=True)
    if simulated:  # every seed has a screen of its own
        scores["condition"] = "seed " + scores["seed"].astype(str) + ": " + scores["condition"]
    place = {name: i for i, name in enumerate(dict.fromkeys([*METHODS, *scores["method"]]))}
    place |= {name: i for i, name in enumerate([INFORMATIVE, GIVEN, PRINCIPAL, RANDOM])}
    by = ["setting", "method", "seed", "condition", "time"]
    scores = scores.sort_values(by, key=lambda c: c.map(lambda v: place.get(v, v)), kind="stable")
    return scores[[*by, "metric", "value"]].reset_index(drop=True)


def _differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Ours less every other method, paired by knock-out; times and seeds of one are averaged first."""
    parts = []
    for setting, block in scores.groupby("setting", sort=False):
        compared = Comparison(block, pd.DataFrame())
        if OURS not in compared.methods:
            continue
        for reference in compared.methods:
            if reference != OURS:
                found = compared.differences(reference)
                found = found[found["method"] == OURS].dropna(subset=["difference"])
                parts.append(found.assign(setting=setting, reference=reference))
    columns = ["setting", "reference", "metric", "difference", "low", "high", "better", "n_conditions"]
    return pd.concat(parts, ignore_index=True)[columns] if parts else pd.DataFrame(columns=columns)


def _differences_page(differences: pd.DataFrame) -> str:
    """Differences in Markdown: bold where the 95 % interval is on the better side of zero."""
    shown_as = {metric: METRICS[metric] for metric in COMPARED}
    parts = []
    for setting, block in differences.groupby("setting", sort=False):
        n = int(block["n_conditions"].max())
        title = f"{setting}: ours less each other method, {n} knock-outs, 95 % interval, bold if better"
        parts.append(differences_table(block.rename(columns={"reference": "from"}), title, "from", shown_as))
    return "\n".join(["", *parts]) + "\n"
