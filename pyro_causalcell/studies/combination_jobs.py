"""One job of the studies of doubles: read or simulate cells, train, predict, score.

Training cells alone choose everything: genes, changed genes, validation.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_causalcell import datasets, inference, simulate
from pyro_causalcell.baselines import (
    RATES,
    CellPredictor,
    CountBaseline,
    InterpolatedDuplicate,
    ModelPredictor,
    Predictor,
    TechnicalDuplicate,
    TrainingMeans,
    WithResiduals,
    halves,
    log_cp10k,
    training_means,
)
from pyro_causalcell.baselines.compare import CEILING, Space, measured_truth, references
from pyro_causalcell.baselines.means import Moments, condition_moments, moments
from pyro_causalcell.data import Screen, Split, held_out_combinations
from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import (
    Truth,
    discrepancy_vae_scores,
    interaction_classes,
    iw_nll,
    posterior_predictive_checks,
    response_scores,
)
from pyro_causalcell.evaluate.response import top_expressed
from pyro_causalcell.models.sams_vae import PRESETS as SAMS
from pyro_causalcell.studies.runner import Job, Scores

__all__ = ["EFFORTS", "METHODS", "METRICS", "Drawn", "Effort", "Task", "TrueProcess", "score_job"]

Law = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Negative log-likelihoods of the cells in some rows."""
Judge = Callable[[Sequence[str], NDArray[np.int64]], pd.DataFrame]
"""Scores of conditions by their cells in some rows; columns method, genes, condition, metric, value."""
REFERENCES = "references"
"""The job that scores every baseline, the duplicates and the oracle."""
INTERACTIONS, EPISTASIS = "sVAE+ (ours), interactions", "sVAE+ (ours), epistasis"
DIRECT = "sVAE+ (ours), direct effects"
CDAG, DAG = "cDAG-VAE (ours)", "DAG-VAE (ours)"
CDAG_EPISTASIS, CDAG_DIRECT = "cDAG-VAE (ours), epistasis", "cDAG-VAE (ours), direct effects"
HALF, MOSTLY = "cDAG-VAE (ours), half responsive", "cDAG-VAE (ours), mostly responsive"

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "sVAE+ (ours)": ("sparse-shift", {"warmup": {"z": 15}}),
    INTERACTIONS: ("sparse-shift", {"warmup": {"z": 15}, "interactions": "seen"}),
    EPISTASIS: ("sparse-shift", {"warmup": {"z": 15}, "epistasis": True}),
    DIRECT: ("sparse-shift", {"warmup": {"z": 15}, "direct": True}),
    "SAMS-VAE": ("sams-vae", {"warmup": {"z": 15}}),
    "CPA-VAE": ("sams-vae", {"warmup": {"z": 15}, **SAMS["cpa-vae"]}),
    "conditional VAE": ("conditional-vae", {"warmup": {"z": 15}}),
    "Discrepancy-VAE": (
        "discrepancy-vae",
        {"likelihood": "gaussian", "warmup": {"mmd": 20}, "batch_size": 512},
    ),
    CDAG: ("weight-variant-scm", {}),
    CDAG_EPISTASIS: ("weight-variant-scm", {"epistasis": True}),
    CDAG_DIRECT: ("weight-variant-scm", {"direct": True}),
    DAG: ("weight-variant-scm", {"alignment": "none"}),
    HALF: ("weight-variant-scm", {"n_responsive": 53, "n_invariant": 52}),
    MOSTLY: ("weight-variant-scm", {"n_responsive": 85, "n_invariant": 20}),
}
"""Name -> model and settings of ``fit``; ``"interactions": "seen"`` stands for the doubles of the training
cells. A method's row is named ``NAME (K)``, K its number of programmes."""

REST = "all other genes"
"""Column of what the genes of a screen leave of a cell's total."""
LR, PATIENCE = 5e-3, 10
"""Learning rate of every fit, and epochs without a better validation ELBO before it drops."""
SIZES = (10, 35, 75, 105)
"""Numbers of programmes of the paper."""
RESPONSIVE = {4: 2, 10: 4, 20: 10, 35: 7, 75: 15, 105: 20}
"""Programmes -> how many of them are responsive in models that have both; the others are invariant."""

METRICS = {
    "l2": "L2",
    "rmse": "RMSE of means",
    "rmse_cell_vs_mean": "RMSE of cells",
    "pearson_control": "Pearson, from control",
    "pearson_perturbed": "Pearson, from perturbed mean",
    "r2_means": "R² of means",
    "r2_regression": "R² by regression",
    "r2_effects": "R² of effects",
    "e_distance": "E-distance",
    "mmd": "MMD²",
    "rel_rmse_paired": "relative RMSE, paired cells",
    "r2_paired": "R², 32 cells",
    "mmd_paired": "MMD, 32 cells",
    "nll": "NLL of a cell",
    "zeros_in_band": "zeros in 90 % bands",
    "spread_in_band": "spread in 90 % bands",
    "kind_f1": "macro-F1 of the kind",
}
"""Columns of the table, with their headings. log1p CP10k; higher is better for Pearson, R² and F1."""

GENE_SETS = {"all": "", "top": ", top 1,000 genes", "de": ", 20 DE genes"}
"""Sets of genes that means are scored on, and what they add to the name of a setting."""

N_GENES = 5000  # of Norman 2019
N_TOP, N_DE = 1000, 20
N_PARTICLES = 200  # of the likelihood of a cell
N_REPLICATES = 100  # behind predictive bands
BANDS = {"gene_zero_fraction": "zeros_in_band", "gene_sd": "spread_in_band"}
"""Statistics of predictive bands -> their metrics."""
N_SINGLE_CELLS = 96  # held out of each of the paper's singles
SINGLES = (
    *("KLF1", "BAK1", "CEBPE", "UBASH3B", "ETS2", "OSR2", "SLC4A1"),
    *("SET", "ELMSAN1", "MAP2K6", "FOXF1", "C19orf26", "FOXA1", "UBASH3A"),
)
"""Singles of which the paper holds out the first 96 cells of the file."""


class Effort(NamedTuple):
    """How much computing a study takes.

    Attributes:
        epochs: Of every fit; None trains until the validation ELBO stops improving.
        n_drawn: Cells behind each predicted mean.
        n_cells: Measured and predicted cells of a condition, at most, for distances. Two draws of 100 from
            one fit differ by as much as methods do.
        sizes: Numbers of programmes.
        screen: Arguments of ``simulate.combination_screen``.
    """

    epochs: int | None
    n_drawn: int
    n_cells: int
    sizes: tuple[int, ...]
    screen: Mapping[str, Any]


Size = Literal["quick", "small", "full"]
EFFORTS: dict[Size, Effort] = {
    "quick": Effort(
        epochs=2,
        n_drawn=60,
        n_cells=20,
        sizes=(4,),
        screen={
            "n_targets": 14,
            "n_doubles": 8,
            "n_genes": 100,
            "cells_per_condition": 20,
            "n_control_cells": 60,
            "truth_draws": 50,
        },
    ),
    "small": Effort(
        epochs=None,
        n_drawn=5000,
        n_cells=1000,
        sizes=(20,),
        screen={
            "n_targets": 30,
            "n_doubles": 40,
            "n_genes": 1000,
            "cells_per_condition": 100,
            "n_control_cells": 1000,
        },
    ),
    "full": Effort(epochs=None, n_drawn=1000, n_cells=200, sizes=SIZES, screen={}),
}
SUBSET = Effort(epochs=None, n_drawn=5000, n_cells=1000, sizes=(10,), screen={})
"""Of the subset of Norman 2019 in the package."""

REGIMES = {"no double seen": "split_no_doubles", "half of the doubles seen": "split_half_doubles"}
"""Settings of the simulated screen, and the split that makes each."""

# ---------------------------------------------------------------------- one job


class Task(NamedTuple):
    """What a job trains on and is scored on.

    Attributes:
        screen: The cells.
        split: Which of them train.
        parts: Setting -> conditions scored there, and the rows of their cells.
        duplicate: Held-out cells that are not scored but predict those that are; None where all are scored.
        kinds: Double -> its true kind, where it is known.
    """

    screen: Screen
    split: Split
    parts: Mapping[str, tuple[list[str], NDArray[np.int64]]]
    duplicate: NDArray[np.int64] | None = None
    kinds: Mapping[str, str] = {}

    @property
    def conditions(self) -> list[str]:
        """Conditions that have to be predicted: those of the training cells, and scored ones."""
        seen = np.unique(self.screen.condition_n[self.split.train])
        scored = [name for names, _ in self.parts.values() for name in names]
        return list(dict.fromkeys([*(self.screen.conditions[c] for c in seen), *scored]))


def score_job(job: Job, folder: Path) -> Scores:
    """Read or simulate, train (or go on with it), predict, score."""
    effort = _effort(job)
    task = _task(job, effort)
    means = training_means(task.screen, task.split.train)
    further: list[Judge] = []
    if job.method == REFERENCES:
        predictors = _references(job, task, means, effort)
        if task.screen.is_counts:
            further.append(partial(_likelihoods, task.screen, _count_baselines(task)))
    else:
        fit, screen = _trained(job, task, effort, folder)
        control = task.split.train[screen.condition_n[task.split.train] == 0]
        basal = Screen.from_spec(fit.screen, screen.adata[control].copy())
        drawn = _drawn(ModelPredictor(fit, job.method, basal=basal), task, effort, job.seed)
        predictors = [drawn, WithResiduals(drawn, task.screen, task.split.train)]
        if fit.screen.is_counts:
            law = partial(_nll, fit, screen, job.seed)
            further.append(partial(_likelihoods, task.screen, {job.method: law}))
            further.append(partial(_in_bands, job, fit, screen))
    judges: list[Judge] = [partial(_scores, task.screen, means, predictors, effort, job.seed), *further]
    tables = [judge(*part).assign(part=name) for name, part in task.parts.items() for judge in judges]
    kinds = [
        (method.name, name, task.kinds[name], kind)
        for method in predictors
        for name, kind in (_kinds(task, method) if task.kinds else {}).items()
    ]
    return {"scores": pd.concat(tables, ignore_index=True).to_dict("list"), "kinds": kinds}


def _effort(job: Job) -> Effort:
    if job.setting == "subset" and job.arguments["size"] != "quick":
        return SUBSET
    return EFFORTS[job.arguments["size"]]


def _task(job: Job, effort: Effort) -> Task:
    if job.study == "simulated-screen":
        return _simulated(job, effort)
    return _of_subset(job) if job.setting == "subset" else _of_file(job)


def _simulated(job: Job, effort: Effort) -> Task:
    adata = simulate.combination_screen(**effort.screen, seed=job.seed)
    table = adata.uns["target_embeddings"]
    screen = Screen(adata, "target", CONTROL, embeddings=table, allow_empty=True)
    held_n = (adata.obs[REGIMES[job.setting]] == "heldout").to_numpy()
    held = [screen.conditions[c] for c in np.unique(screen.condition_n[held_n])]
    split = held_out_combinations(screen, held, seed=job.seed)
    scored, duplicate = halves(screen, split.test, held, job.seed)
    record = adata.uns["simulation"]
    kind = dict(zip(record["conditions"], record["kind_c"], strict=True))
    return Task(screen, split, {job.setting: (held, scored)}, duplicate, {name: kind[name] for name in held})


def subset_screen() -> Screen:
    adata = datasets.norman2019_subset()
    return Screen(adata, "perturbation", CONTROL, layer="counts", library="ncounts")


def _of_subset(job: Job) -> Task:
    screen, held = subset_screen(), [job.arguments["double"]]
    split = held_out_combinations(screen, held, seed=job.seed)
    scored, duplicate = halves(screen, split.test, held, job.seed)
    return Task(screen, split, {"subset: one double left out": (held, scored)}, duplicate)


def _of_file(job: Job) -> Task:
    path = Path(job.arguments["data"])
    adata = datasets.read_norman2019(path, schema_of(path))
    layer = "counts" if "counts" in adata.layers else None
    screen = Screen(adata, "target", CONTROL, layer=layer, allow_empty=True)
    split = _paper_split(screen, job.seed)
    if screen.n_genes > N_GENES:
        # Totals are those of all genes, whichever are kept.
        adata.obs["total_counts"] = screen.library_n
        library = "total_counts" if screen.is_counts else None
        adata = adata[:, most_variable(screen, split.train, N_GENES)].copy()
        screen = Screen(adata, "target", CONTROL, layer=layer, library=library, allow_empty=True)
    doubles = complete_doubles(screen)
    code_n = screen.condition_n[split.test]
    parts = {}
    for part, names in (("doubles", doubles), ("singles", [s for s in SINGLES if s in screen.targets])):
        codes = [screen.conditions.index(name) for name in names if name in screen.conditions]
        found = [screen.conditions[c] for c in codes if (code_n == c).sum() > 1]
        if found:
            parts[part] = (found, split.test[np.isin(code_n, codes)])
    return Task(screen, split, parts)


def schema_of(path: Path) -> Literal["geo", "scperturb", "cpa"]:
    if path.is_dir():
        return "geo"
    if not path.is_file():
        raise DataError(f"expected Norman 2019 at {path}, found nothing; pass the file, or GEO's folder")
    try:
        with h5py.File(path, "r") as file:
            return "cpa" if "guide_ids" in file["obs"] else "scperturb"
    except (OSError, KeyError) as error:
        raise DataError(f"expected an h5ad file, found {path} that cannot be read: {error}") from error


def complete_doubles(screen: Screen) -> list[str]:
    """Doubles of which both targets were measured alone."""
    spec, singles = screen.describe(), set(screen.conditions)
    parts = {name: spec.split(name) for name in screen.conditions}
    doubles = [name for name, of in parts.items() if len(of) == 2 and set(of) <= singles]
    if not doubles:
        raise DataError("expected doubles of which both targets were measured alone, found none.")
    return doubles


def _paper_split(screen: Screen, seed: int) -> Split:
    """All doubles and the first 96 cells of some singles are test cells; a tenth of the others validates."""
    spec = screen.describe()
    combined = [name for name in screen.conditions if len(spec.split(name)) > 1]
    split = held_out_combinations(screen, combined, seed=seed)
    rows = [np.flatnonzero(screen.condition_n == c) for c, n in enumerate(screen.conditions) if n in SINGLES]
    # In the public files these singles have more than 800 cells each.
    firsts = [of[:N_SINGLE_CELLS] for of in rows if len(of) > 2 * N_SINGLE_CELLS]
    first = np.concatenate([*firsts, np.empty(0, dtype=np.int64)])
    return Split(
        "norman",
        np.setdiff1d(split.train, first),
        np.setdiff1d(split.validation, first),
        np.union1d(split.test, first),
        seed,
        split.settings | {"first_cells_of": list(SINGLES)},
    )


def most_variable(screen: Screen, rows: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """The n genes with the largest variance of log1p CP10k in some cells, in the order of the screen."""
    found = moments(screen, rows)
    weight_c = found.cells_c / found.cells_c.sum()
    mean_cg = np.nan_to_num(found.mean_cg)
    between_g = weight_c @ (mean_cg - weight_c @ mean_cg) ** 2
    variance_g = weight_c @ np.nan_to_num(found.variance_cg) + between_g
    return np.sort(np.argsort(-variance_g, kind="stable")[:n])


# ---------------------------------------------------------------------- methods


class Drawn:
    """A predictor that was asked once: means and variances of its cells, and a few of them.

    Args:
        method: What draws cells.
        conditions: All that will be asked for. Each has draws of its own.
        n_cells: Cells drawn of each.
        n_kept: How many of them are kept.
        seed: Of the draws.
        n_genes: Columns to keep, the first ones.
    """

    def __init__(
        self,
        method: CellPredictor,
        conditions: Sequence[str],
        n_cells: int,
        n_kept: int,
        seed: int,
        n_genes: int,
    ):
        self.name = method.name
        rng = np.random.default_rng(seed)
        self.mean, self.variance, self.kept = {}, {}, {}
        for i, name in enumerate(conditions):
            x_ng = method.cells([name], n_cells, seed + i)[0][:, :n_genes]
            self.mean[name], self.variance[name] = x_ng.mean(0), x_ng.var(0, ddof=1)
            self.kept[name] = x_ng[rng.permutation(n_cells)[:n_kept]]
        self.n_cells = n_cells

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k."""
        return np.stack([self.mean[name] for name in conditions])

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """At most ``n_cells`` of the kept cells of each condition."""
        return [self.kept[name][:n_cells] for name in conditions]

    def moments(self, conditions: Sequence[str]) -> Moments:
        """Means and variances of the drawn cells."""
        variance_cg = np.stack([self.variance[name] for name in conditions])
        return Moments(self.predict(conditions), variance_cg, np.full(len(conditions), self.n_cells))


class TrueProcess:
    """The process that simulated a screen, as a predictor: new cells of a condition. It has seen nothing.

    Args:
        adata: What ``simulate.combination_screen`` made.
    """

    name = "oracle"

    def __init__(self, adata: ad.AnnData):
        self.adata = adata

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean of 1,000 new cells of each condition, shape (c, g), in log1p CP10k."""
        return np.stack([cells.mean(0) for cells in self.cells(conditions, 1000)])

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """New cells of each condition, in log1p CP10k."""
        drawn = [simulate.screen_cells(self.adata, name, n_cells, seed) for name in conditions]
        return [log_cp10k(x_ng.astype(np.float64), x_ng.sum(1)) for x_ng in drawn]


def _references(job: Job, task: Task, means: TrainingMeans, effort: Effort) -> list[Predictor]:
    methods: list[Predictor] = [*references(means, job.seed)]
    if task.duplicate is not None:
        methods += [
            InterpolatedDuplicate(task.screen, task.split.train, task.duplicate),
            TechnicalDuplicate(task.screen, task.duplicate),
        ]
    if job.study == "simulated-screen":
        process = TrueProcess(task.screen.adata)
        methods.append(_drawn(process, task, effort, job.seed))
    return methods


def _count_baselines(task: Task) -> dict[str, Law]:
    screen = task.screen if task.screen.describe().library is None else _with_rest(task.screen)
    baseline = CountBaseline(screen, task.split.train)
    return {f"{rates} rates": partial(baseline.nll, rates=rates) for rates in RATES}


def _nll(fit: inference.Fit, screen: Screen, seed: int, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    cells = Screen.from_spec(fit.screen, screen.adata)
    return np.asarray(iw_nll(fit, cells, rows, n_particles=N_PARTICLES, seed=seed)["nll"])


def _trained(job: Job, task: Task, effort: Effort, folder: Path) -> tuple[inference.Fit, Screen]:
    """The fit, and the cells as it sees them."""
    model, chosen = METHODS[job.arguments["method"]]
    settings: dict[str, Any] = {"epochs": effort.epochs, "lr": LR, "patience": PATIENCE}
    settings |= {**_of_size(model, job.arguments["n_latents"]), **chosen}
    # Models of this study know targets by their names alone, as the published ones do.
    screen = Screen.from_spec(task.screen.describe(), task.screen.adata)
    if not screen.is_counts:
        settings["likelihood"] = "gaussian"
    elif settings.get("likelihood") == "gaussian":
        screen = _logged(screen)
    elif screen.describe().library is not None:
        screen = _with_rest(screen)
    if settings.get("interactions") == "seen":
        settings["interactions"] = _seen_pairs(screen, task.split)
    if effort.epochs is not None:  # too few for a warm-up
        settings["warmup"] = dict.fromkeys(settings.get("warmup", {}), 1)
    fit = inference.fit(
        model,
        None,
        screen,
        split=task.split,
        out=folder,
        resume=True,
        seed=job.seed,
        progress=False,
        **settings,
    )
    return fit, screen


def _drawn(method: CellPredictor, task: Task, effort: Effort, seed: int) -> Drawn:
    n_genes = task.screen.n_genes
    return Drawn(method, task.conditions, effort.n_drawn, effort.n_cells, seed, n_genes)


def _of_size(model: str, n_latents: int) -> dict[str, int]:
    if model != "weight-variant-scm":
        return {"n_latents": n_latents}
    responsive = RESPONSIVE[n_latents]
    return {"n_responsive": responsive, "n_invariant": n_latents - responsive}


def _seen_pairs(screen: Screen, split: Split) -> tuple[tuple[int, int], ...]:
    """Targets of the doubles among the training cells."""
    seen = [screen.describe().split(screen.conditions[c]) for c in np.unique(screen.condition_n[split.train])]
    at = {target: i for i, target in enumerate(screen.targets)}
    return tuple((at[pair[0]], at[pair[1]]) for pair in seen if len(pair) == 2)


def _with_rest(screen: Screen) -> Screen:
    """The same cells with one more column, the counts of all genes that the screen leaves out.

    Models share the total of a cell out among the genes they know, so something has to take the rest.
    """
    counts_ng = _counts(screen)
    rest_n = np.maximum(np.round(screen.library_n - counts_ng.sum(1)), 0.0)
    var = pd.DataFrame(index=[*screen.genes, REST])
    whole_ng = sp.hstack([counts_ng, sp.csr_array(rest_n[:, None].astype(np.float32))], format="csr")
    whole = ad.AnnData(sp.csr_matrix(whole_ng), screen.adata.obs, var)
    return Screen(whole, screen.describe().perturbation, CONTROL, allow_empty=True)


def _counts(screen: Screen) -> sp.csr_array:
    spec, adata = screen.describe(), screen.adata
    return sp.csr_array(adata.X if spec.layer is None else adata.layers[spec.layer], dtype=np.float32)


def _logged(screen: Screen) -> Screen:
    """The same cells as log1p CP10k, sparse."""
    scaled_ng = _counts(screen).multiply(1e4 / np.maximum(screen.library_n, 1.0)[:, None])
    logged_ng = sp.csr_matrix(scaled_ng, dtype=np.float32).log1p()
    logged = ad.AnnData(logged_ng, screen.adata.obs, screen.adata.var)
    return Screen(logged, screen.describe().perturbation, CONTROL, allow_empty=True)


# ---------------------------------------------------------------------- scores of one job


def _scores(
    screen: Screen,
    means: TrainingMeans,
    predictors: Sequence[Predictor],
    effort: Effort,
    seed: int,
    conditions: Sequence[str],
    rows: NDArray[np.int64],
) -> pd.DataFrame:
    """Columns method, genes, condition, metric, value."""
    truth = measured_truth(screen, means, rows, conditions)
    sets = _gene_sets(truth, means, screen)
    space = Space(screen, means.rows, rows, conditions, effort.n_cells, seed)
    tables = []
    for method in predictors:
        mean_cg = method.predict(conditions)
        found = {
            (genes, metric): value_c
            for genes, among in sets.items()
            for metric, value_c in response_scores(among, mean_cg, method.name).items()
        }
        if isinstance(method, CellPredictor):
            found |= {("all", metric): value_c for metric, value_c in space.distances(method).items()}
            pairs = zip(space.measured, method.cells(conditions, effort.n_cells, seed), strict=True)
            paired = pd.DataFrame([discrepancy_vae_scores(x_ng, y_ng, seed) for x_ng, y_ng in pairs])
            found |= {("all", metric): paired[metric].to_numpy() for metric in paired}
        for (genes, metric), value_c in found.items():
            if metric in METRICS:
                columns = {"method": method.name, "genes": genes, "metric": metric}
                tables.append(pd.DataFrame({"condition": conditions, "value": value_c}).assign(**columns))
    return pd.concat(tables, ignore_index=True)


def _likelihoods(
    screen: Screen, laws: Mapping[str, Law], conditions: Sequence[str], rows: NDArray[np.int64]
) -> pd.DataFrame:
    """Mean negative log-likelihood of the cells of each condition."""
    names = np.array(screen.conditions, dtype=object)[screen.condition_n[rows]]
    tables = []
    for method, law in laws.items():
        value_c = pd.Series(law(rows)).groupby(names).mean()[list(conditions)]
        columns = {"method": method, "genes": "all", "metric": "nll"}
        tables.append(value_c.rename_axis("condition").reset_index(name="value").assign(**columns))
    return pd.concat(tables, ignore_index=True)


def _in_bands(
    job: Job, fit: inference.Fit, screen: Screen, conditions: Sequence[str], rows: NDArray[np.int64]
) -> pd.DataFrame:
    """Share of the genes whose zeros and spread over the cells of a condition lie in 90 % intervals."""
    cells = Screen.from_spec(fit.screen, screen.adata)
    checks = posterior_predictive_checks(
        fit, cells, rows, statistic=list(BANDS), n_samples=N_REPLICATES, seed=job.seed
    )
    table = checks.table(interval=0.9)
    table = table[table["gene"] != REST].assign(metric=lambda t: t["statistic"].map(BANDS))
    table["value"] = table["observed"].between(table["low"], table["high"])
    shares = table.groupby(["condition", "metric"])["value"].mean()[list(conditions)]
    return shares.reset_index().assign(method=job.method, genes="all")


def _gene_sets(truth: Truth, means: TrainingMeans, screen: Screen) -> dict[str, Truth]:
    """The truth on all genes, on the top expressed ones if there are others, and on those that change."""
    masks = {"all": truth.scored_cg, "de": truth.scored_cg & _changed(truth, means, screen)}
    if truth.control_g is not None and screen.n_genes > N_TOP:
        masks["top"] = truth.scored_cg & top_expressed(truth.control_g, N_TOP)
    bare = replace(truth, weight_train_cg=None, weight_test_cg=None)
    return {name: replace(bare, scored_cg=masks[name]) for name in GENE_SETS if name in masks}


def _changed(truth: Truth, means: TrainingMeans, screen: Screen) -> NDArray[np.bool_]:
    """The 20 genes that a condition's targets alone change most: |t| against control, of training cells."""
    found = moments(screen, means.rows)
    error_cg = found.variance_cg / found.cells_c[:, None]
    spread_cg = np.sqrt(error_cg + error_cg[0])
    size_cg = np.abs(found.mean_cg - found.mean_cg[0]) / np.where(spread_cg > 0, spread_cg, np.inf)
    label_cg = np.zeros_like(truth.scored_cg)
    for c, name in enumerate(truth.conditions):
        alone = [screen.conditions.index(target) for target in screen.describe().split(name)]
        size_g = np.where(truth.scored_cg[c], np.nan_to_num(size_cg[alone].max(0)), -1.0)
        label_cg[c, np.argsort(-size_g, kind="stable")[:N_DE]] = True
    return label_cg


def _kinds(task: Task, method: Predictor) -> dict[str, str]:
    """Predicted kind of each double.

    Fits and the oracle are read off drawn cells, whose noise is taken off; methods that predict means, off
    these; the technical duplicate, off the duplicate's and the training cells.
    """
    names = task.conditions
    if method.name == CEILING and task.duplicate is not None:
        rows = np.concatenate([task.split.train, task.duplicate])
        found = condition_moments(task.screen, rows, names)
    elif isinstance(method, Drawn):
        found = method.moments(names)
    elif method.name == InterpolatedDuplicate.name:
        return {}  # it knows held-out conditions alone
    else:
        mean_cg = method.predict(names)
        found = Moments(mean_cg, np.zeros_like(mean_cg), np.full(len(names), 2))
    table = interaction_classes(task.screen.describe(), names, found).set_index("double")["kind"]
    return {name: str(table[name]) for name in task.kinds}
