"""Unseen doubles and held-out cells of singles: Norman 2019, and simulated doubles of known kinds.

Two studies on one set of methods and metrics. ``norman`` follows Tables 2 and 9 to 14 of the paper of the
cDAG-VAE on the user's copy of the public file, and leaves one double out at a time on the subset that comes
with the package. ``simulated-screen`` holds out all doubles, or half of them, of
``simulate.combination_screen``.

Source: "cDAG-VAE", submission to ICLR 2026, section 5 and Appendix C; the reading of its numbers is this
project's.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from sklearn.metrics import f1_score

from pyro_causalcell.baselines import Comparison
from pyro_causalcell.baselines.residuals import RESIDUALS
from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.plot import compare_methods
from pyro_causalcell.studies.combination_jobs import (
    CDAG,
    CDAG_EPISTASIS,
    DAG,
    EFFORTS,
    EPISTASIS,
    GENE_SETS,
    HALF,
    INTERACTIONS,
    METHODS,
    METRICS,
    MOSTLY,
    REFERENCES,
    REGIMES,
    SIZES,
    SUBSET,
    Size,
    complete_doubles,
    schema_of,
    score_job,
    subset_screen,
)
from pyro_causalcell.studies.runner import (
    Executor,
    Job,
    differences_table,
    finished,
    run_jobs,
    summarise,
    write_table,
)

__all__ = ["PAPER", "jobs_of_norman", "jobs_of_simulated", "run_norman", "run_simulated"]

COMPARED = ("l2", "pearson_control", "pearson_perturbed", "e_distance")
"""Metrics of the page of paired differences."""
AGAINST = ("additive", "matching mean", "elastic net")
"""Baselines that every method is compared with, double by double."""
OURS = tuple(f"{name} (" for name in ("sVAE+ (ours)", EPISTASIS, CDAG, CDAG_EPISTASIS))
"""How methods begin that are compared with every other one as well."""


def _paper_numbers() -> dict[tuple[str, str, str], float]:
    """The paper's numbers, under this study's names; which of its metrics each one is, is a reading."""
    rmse = {  # Tables 2 and 9: doubles, then singles, by number of programmes
        "Discrepancy-VAE": ((0.6084, 0.6037, 0.6075, 0.6082), (0.5603, 0.5560, 0.5582, 0.5558)),
        "sVAE+ (ours)": ((0.5663, 0.5667, 0.5665, 0.5664), (0.5012, 0.5005, 0.5003, 0.5002)),
        "SAMS-VAE": ((0.4605, 0.4631, 0.4632, 0.4629), (0.4114, 0.4136, 0.4140, 0.4123)),
        DAG: ((0.4557, 0.4563, 0.4577, 0.4623), (0.4098, 0.4115, 0.4115, 0.4155)),
        CDAG: ((0.4493, 0.4494, 0.4489, 0.4474), (0.4027, 0.3998, 0.3997, 0.3995)),
    }
    numbers = {
        (setting, f"{method} ({size})", "rmse_cell_vs_mean"): value
        for method, both in rmse.items()
        for setting, values in zip(("doubles", "singles"), both, strict=True)
        for size, value in zip(SIZES, values, strict=True)
    }
    capacity = {  # Tables 11 and 12: RMSE and R² of singles, then of doubles
        HALF: (0.4084, 0.9875, 0.4627, 0.9649),
        MOSTLY: (0.4084, 0.9875, 0.4627, 0.9649),
        CDAG: (0.3995, 0.9977, 0.4474, 0.9865),
    }
    for method, (*singles, doubles, r2) in capacity.items():
        for setting, values in (("singles", singles), ("doubles", (doubles, r2))):
            for metric, value in zip(("rmse_cell_vs_mean", "r2_regression"), values, strict=True):
                numbers[setting, f"{method} (105)", metric] = value
    columns = ("l2", "pearson_control", "rmse", "r2_regression", "rmse_cell_vs_mean", "r2_paired")
    tables: dict[tuple[str, str], tuple[float | None, ...]] = {  # Tables 13 and 14
        ("doubles", "additive"): (2.5407, 0.9076, 0.0887, 0.6431, 0.4424, None),
        ("doubles", f"{CDAG} (35)"): (3.7238, 0.6869, 0.1285, 0.9965, 0.4494, 0.9840),
        ("doubles, top 1,000 genes", "additive"): (2.4906, 0.9101, 0.0870, 0.6470, 0.4332, None),
        ("doubles, top 1,000 genes", f"{CDAG} (35)"): (3.6491, 0.6936, 0.1259, 0.9951, 0.4411, 0.9758),
    }
    for (setting, method), row in tables.items():
        for metric, number in zip(columns, row, strict=True):
            if number is not None:
                numbers[setting, method, metric] = number
    table10 = {"r2_regression": 0.9916, "mmd_paired": 0.3243}
    return numbers | {("singles", "Discrepancy-VAE (105)", metric): v for metric, v in table10.items()}


PAPER = _paper_numbers()
"""(setting, method, metric) -> the paper's number, of Norman 2019."""


# ---------------------------------------------------------------------- the two grids


def jobs_of_simulated(
    *, size: Size = "small", methods: Sequence[str] | None = None, seeds: int = 3
) -> list[Job]:
    """The grid of the simulated screen.

    Args:
        size: "small" is 30 targets, 40 doubles, 1,000 genes, 100 cells of each condition and 1,000 control
            cells; "full" the size of Norman 2019, with the paper's four numbers of programmes.
        methods: Names of METHODS; None is all that apply. The references are always there.
        seeds: Seeds of data and training, from 0.

    Raises:
        CausalCellError: A method is unknown.
    """
    return [
        Job("simulated-screen", regime, label, seed, arguments | {"size": size})
        for regime in REGIMES
        for label, arguments in _rows(methods, EFFORTS[size].sizes, regime != "no double seen")
        for seed in range(seeds)
    ]


def jobs_of_norman(
    *,
    data: str | Path | None = None,
    quick: bool = False,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
) -> list[Job]:
    """The grid on Norman 2019: the user's file, or the subset in the package, one double out at a time.

    Args:
        data: As :func:`run_norman`.
        quick: Two epochs, and two doubles of the subset.
        methods: As :func:`jobs_of_simulated`.
        seeds: Likewise.

    Raises:
        CausalCellError: A method is unknown, or there is no such file.
    """
    size = "quick" if quick else "full"
    if data is not None:
        schema_of(Path(data))  # a wrong path is told before the work
        sizes = EFFORTS["quick"].sizes if quick else SIZES
        place = str(Path(data).resolve())
        return [
            Job("norman", "file", label, seed, arguments | {"size": size, "data": place})
            for label, arguments in _rows(methods, sizes, seen_doubles=False)
            for seed in range(seeds)
        ]
    sizes = (EFFORTS["quick"] if quick else SUBSET).sizes
    doubles = complete_doubles(subset_screen())
    return [
        Job("norman", "subset", label, seed, arguments | {"size": size, "double": double})
        for label, arguments in _rows(methods, sizes, seen_doubles=True)
        for double in doubles[: 2 if quick else None]
        for seed in range(seeds)
    ]


def _rows(
    methods: Sequence[str] | None, sizes: Sequence[int], seen_doubles: bool
) -> list[tuple[str, dict[str, Any]]]:
    """Labels of the rows of a table, with the arguments of their jobs."""
    unknown = [name for name in methods or () if name not in METHODS]
    if unknown:
        raise CausalCellError(f"unknown methods {unknown}; they are {list(METHODS)}")
    rows: list[tuple[str, dict[str, Any]]] = [(REFERENCES, {})]
    for name in METHODS if methods is None else methods:
        if name == INTERACTIONS and not seen_doubles:
            continue  # there are none to learn
        for size in sizes:
            if name in (HALF, MOSTLY) and size != max(SIZES):
                continue
            rows.append((f"{name} ({size})", {"method": name, "n_latents": size}))
    return rows


def run_simulated(
    out: str | Path = "simulated-screen",
    *,
    full: bool = False,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study of simulated doubles, or go on with it, and write tables and figures.

    ``table.csv`` and ``table.md`` hold means over doubles; ``rows.csv`` the same seed by seed; ``scores.csv``
    every double; ``differences.csv`` paired differences from the baselines with 95 % intervals over doubles;
    ``by_kind.csv`` the means for each kind of double; ``kinds.csv`` true and predicted kinds. They hold every
    finished job of the folder.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        full: The size of Norman 2019 instead of a small one.
        methods: See :func:`jobs_of_simulated`.
        seeds: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: A size that shows that all of it runs, not how good it is.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.
    """
    size: Size = "quick" if quick else "full" if full else "small"
    jobs = jobs_of_simulated(size=size, methods=methods, seeds=seeds)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    note = (
        f"All data is simulated ({size} size). Mean ± sd over seeds. The number of programmes of a method is "
        "in brackets. The oracle is the process that made the cells; the duplicates see held-out cells."
    )
    return _report("simulated-screen", Path(out), {"size": size}, note, quick)


def run_norman(
    out: str | Path = "norman",
    *,
    data: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: int = 3,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study of Norman 2019, or go on with it, and write tables and figures.

    Args:
        out: Folder of results, as :func:`run_simulated`.
        data: One of the public forms that ``datasets.read_norman2019`` reads: GEO's folder, or an h5ad file
            of scPerturb or CPA. All controls and singles train; the doubles whose targets were both measured
            alone, and the first 96 cells of the paper's 14 singles, are held out. None takes the subset in
            the package: each of its five complete doubles is held out once, all else trains.
        methods: See :func:`jobs_of_norman`.
        seeds: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: Likewise.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.
    """
    jobs = jobs_of_norman(data=data, quick=quick, methods=methods, seeds=seeds)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    note = (
        "Norman et al. 2019. Mean ± sd over seeds; the paper's number in brackets, under the metric it is "
        "most likely to be. The number of programmes of a method is in brackets behind its name."
    )
    chosen = {"size": "quick" if quick else "full"}
    if data is not None:
        chosen["data"] = str(Path(data).resolve())
    return _report("norman", Path(out), chosen, note, quick)


# ---------------------------------------------------------------------- tables of all jobs


def _report(study: str, out: Path, chosen: Mapping[str, Any], note: str, quick: bool) -> pd.DataFrame:
    """Tables and figures of every finished job of a folder that was called with these arguments."""
    jobs = finished(out, **chosen)
    scores, kinds = _long(jobs)
    rows = _averaged(scores, kinds)
    table = summarise(study, rows, PAPER if study == "norman" else {}, list(METRICS))
    rows.to_csv(out / "rows.csv", index=False)
    if study == "simulated-screen":  # every seed has doubles of its own
        scores["condition"] = "seed " + scores["seed"].astype(str) + ": " + scores["condition"]
        kinds["condition"] = "seed " + kinds["seed"].astype(str) + ": " + kinds["condition"]
    scores.to_csv(out / "scores.csv", index=False)
    differences = _differences(scores)
    differences.to_csv(out / "differences.csv", index=False)
    if len(kinds):
        kinds.to_csv(out / "kinds.csv", index=False)
        _by_kind(scores, kinds).to_csv(out / "by_kind.csv", index=False)
    write_table(table, out, METRICS, note, quick, _differences_page(differences))
    for setting, block in scores[scores["metric"].isin(COMPARED)].groupby("setting", sort=False):
        name = "".join(c if c.isalnum() else "-" for c in str(setting).lower())
        compare_methods(block).savefig(out / f"{name}.png", dpi=150)
    return table


def _long(jobs: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores (setting, method, seed, condition, metric, value) and kinds of all jobs, in order."""
    tables, kinds = [], []
    for job in jobs.to_dict("records"):
        table = pd.DataFrame(job["scores"])
        setting = table.pop("part") + table.pop("genes").map(GENE_SETS)
        tables.append(table.assign(setting=setting, seed=job["seed"]))
        kinds += [(job["setting"], job["seed"], *row) for row in job["kinds"]]
    scores = pd.concat(tables, ignore_index=True)
    at = {name: i for i, name in enumerate([*METHODS, *dict.fromkeys(scores["method"])])}
    place = scores["method"].map(lambda name: at.get(name.rsplit(" (", 1)[0], at[name]))
    scores = scores.assign(place=place).sort_values(["setting", "place", "method", "seed"], kind="stable")
    columns = ["setting", "method", "seed", "condition", "metric", "value"]
    frame = pd.DataFrame(kinds, columns=["setting", "seed", "method", "condition", "kind", "predicted"])
    return scores[columns].reset_index(drop=True), frame


def _averaged(scores: pd.DataFrame, kinds: pd.DataFrame) -> pd.DataFrame:
    """One row a setting, method and seed: means over conditions where a metric is defined, and macro-F1."""
    keys = ["setting", "method", "seed"]
    order = scores[keys].drop_duplicates()
    rows = scores.pivot_table(index=keys, columns="metric", values="value", aggfunc="mean")
    rows = rows.reindex(pd.MultiIndex.from_frame(order))
    if len(kinds):
        rows["kind_f1"] = pd.Series({key: _macro_f1(of) for key, of in kinds.groupby(keys)})
    return rows.reset_index()[[*keys, *(m for m in METRICS if m in rows)]]


def _macro_f1(kinds: pd.DataFrame) -> float:
    """Mean over the true kinds of the F1 of calling it; a kind that does not exist is called in vain."""
    true, predicted = kinds["kind"], kinds["predicted"]
    return float(f1_score(true, predicted, labels=sorted(set(true)), average="macro", zero_division=0.0))


def _differences(scores: pd.DataFrame) -> pd.DataFrame:
    """Paired differences over conditions, from some baselines, and of ours from every method.

    Seeds of a condition are averaged first.
    """
    parts = []
    for setting, block in scores.groupby("setting", sort=False):
        compared = Comparison(block, pd.DataFrame())
        for reference in compared.methods:
            found = compared.differences(reference).assign(setting=setting, reference=reference)
            is_ours = found["method"].str.startswith(OURS)
            parts.append(found if reference in AGAINST else found[is_ours])
    table = pd.concat(parts, ignore_index=True).dropna(subset=["difference"])
    return table[["setting", "reference", *table.columns.drop(["setting", "reference"])]]


def _by_kind(scores: pd.DataFrame, kinds: pd.DataFrame) -> pd.DataFrame:
    """Means over the doubles of each true kind."""
    kind = kinds.drop_duplicates(["seed", "condition"]).set_index(["seed", "condition"])["kind"]
    keys = pd.MultiIndex.from_frame(scores[["seed", "condition"]])
    named = scores.assign(kind=kind.reindex(keys).to_numpy())
    grouped = named.groupby(["setting", "kind", "method", "metric"], sort=False)["value"]
    return grouped.agg(mean="mean", n="count").reset_index()


def _differences_page(differences: pd.DataFrame) -> str:
    """Differences in Markdown: bold where the 95 % interval is on the better side of zero."""
    shown = differences[differences["metric"].isin(COMPARED)]
    shown_as = {metric: METRICS[metric] for metric in COMPARED}
    against = shown[shown["reference"].isin(AGAINST)]
    parts = [
        differences_table(block, _title(block, f"{setting}: difference from {reference}"), "method", shown_as)
        for (setting, reference), block in against.groupby(["setting", "reference"], sort=False)
    ]
    ours = shown[shown["method"].str.startswith(OURS) & shown["method"].str.endswith(RESIDUALS)]
    parts += [
        differences_table(
            block, _title(block, f"{setting}: difference of {method} from each"), "reference", shown_as
        )
        for (setting, method), block in ours.groupby(["setting", "method"], sort=False)
    ]
    return "\n".join(["", *parts]) + "\n"


def _title(block: pd.DataFrame, title: str) -> str:
    return f"{title}, {int(block['n_conditions'].max())} conditions, 95 % interval"
