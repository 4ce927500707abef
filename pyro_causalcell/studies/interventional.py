"""Likelihood of perturbations that were never trained, on real screens: a new shift is all that is fitted.

With the user's copy of a public file: Table 2 of the sVAE+ paper (Norman 2019) or its Figure 3 (Replogle
2022, eight pathways, one held out at a time). Without: the interferon pathway of ``papalexi2021`` and the
complete doubles of ``norman2019_subset``, which come with the package.

Every condition is a perturbation of its own here, combinations too, as in the paper.

Source: Lopez et al., CLeaR 2023, sections 5.1 and 5.2, Table 2, Figure 3 and Appendix F. The surviving text
does not say which cells of Norman 2019 were held out; here it is a fifth of the combinations, drawn by the
seed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from pyro_causalcell import datasets, inference
from pyro_causalcell.data import Screen, random_cells
from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import CausalCellError, DataError
from pyro_causalcell.plot import study_table
from pyro_causalcell.studies.combination_jobs import complete_doubles, most_variable, schema_of, subset_screen
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
from pyro_causalcell.studies.sparse_shift import (
    MEANS,
    METHODS,
    RELEASED,
    SHARED,
    best_validation_loss,
    interventional_scores,
    mean_scores,
)

__all__ = ["PAPER", "SETTINGS", "run", "table_jobs"]

STUDY = "interventional"
NORMAN = "Norman 2019"
REPLOGLE = "Replogle 2022: "
INTERFERON = ("IFNGR1", "IFNGR2", "IRF1", "JAK2", "STAT1", "STAT2")
"""Targets of papalexi2021 in the response to interferons."""
REFINE = 20
"""Epochs of refinement, of the method that has it."""
SHARE_HELD_OUT = 0.2
"""Of the combinations of Norman 2019."""
WHOLE = "\n"
"""A separator that no name has: combinations are perturbations of their own."""


class Size(NamedTuple):
    """What a setting takes: programmes, epochs at most, and the most variable genes of its training cells."""

    n_latents: int
    max_epochs: int
    n_genes: int


SETTINGS: dict[str, Size] = {
    "papalexi2021: interferon pathway held out": Size(10, 300, 299),
    "norman2019_subset: five doubles held out": Size(10, 300, 120),
    NORMAN: Size(50, 300, 3000),
    **{f"{REPLOGLE}{name} held out": Size(50, 100, 1187) for name in datasets.replogle_pathways()},
}
"""Settings, the first two on data of the package; sizes of the others are the paper's."""
EMBEDDED = tuple(SETTINGS)[:2]

METRICS = {
    "i_nll_clean": "I-NLL, clean",
    "i_nll_paper": "I-NLL, paper's protocol",
    "validation_loss": "validation −ELBO",
    "pareto_k_bad": "share of Pareto k > .7",
}
"""Columns of the table, with their headings. Nats per cell; lower is better."""

PAPER = {
    (NORMAN, method, metric): value
    for method, values in {
        "VAE": (717.00, 776.26),
        "β-VAE": (718.75, 777.18),
        "iVAE": (715.69, 777.87),
        "sVAE": (715.66, 776.02),
        RELEASED: (716.30, 775.33),
    }.items()
    for metric, value in zip(("validation_loss", "i_nll_paper"), values, strict=True)
}
"""Table 2 of the paper. Figure 3 prints no numbers."""


def table_jobs(
    data: str | Path | None = None,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    quick: bool = False,
) -> list[Job]:
    """The grid of the study.

    Args:
        data: As :func:`run`.
        methods: Methods of the study ``sparse-shift`` and the means; None is all.
        seeds: Seeds of training, from 0.
        quick: Two epochs of a small network.

    Raises:
        CausalCellError: A method is unknown, or there is no such file.
    """
    asked = chosen_methods(methods, [*METHODS, *MEANS])
    settings, place = EMBEDDED, {}
    if data is not None:
        place = {"data": str(Path(data).resolve())}
        known = [name for name in SETTINGS if name.startswith(REPLOGLE)]
        settings = tuple(known) if _is_replogle(Path(data)) else (NORMAN,)
    return [
        Job(STUDY, setting, method, seed, {"quick": quick, **place})
        for setting in settings
        for method in (*METHODS, *MEANS)
        if method in asked
        for seed in range(seeds)
    ]


def run(
    out: str | Path = "interventional-study",
    *,
    data: str | Path | None = None,
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    workers: int = 1,
    executor: Executor = "processes",
    quick: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    """Run the study, or go on with it, and write ``table.csv``, ``table.md`` and a figure.

    Args:
        out: Folder of results; finished jobs in it are not run again.
        data: Norman 2019 (h5ad of scPerturb or CPA with counts, or GEO's folder) or Replogle 2022
            (single-cell h5ad of gwps.wi.mit.edu, or a part of it with the same columns). None takes the data
            in the package.
        methods: See :func:`table_jobs`.
        seeds: Likewise.
        workers: Fits that run side by side.
        executor: What runs them, see :func:`run_jobs`.
        quick: Likewise.
        progress: Show a progress bar.

    Returns:
        The table: study, setting, method, metric, mean, sd, n_seeds, paper.
    """
    out = Path(out)
    jobs = table_jobs(data, methods=methods, seeds=seeds, quick=quick)
    run_jobs(jobs, score_job, out, workers=workers, executor=executor, progress=progress)
    rows = in_order(finished(out, quick=quick), list(SETTINGS), [*METHODS, *MEANS])
    rows.drop(columns="arguments").to_csv(out / "rows.csv", index=False)
    table = summarise(STUDY, rows, PAPER, list(METRICS))
    note = (
        "Real data. Mean ± sd over seeds, the paper's number in brackets, in nats per cell. Clean: the shift "
        "of a held-out condition is fitted on half of its cells, and the other half is scored. Condition "
        "mean: the same halves, NB with the mean of the first."
    )
    write_table(table, out, METRICS, note, quick)
    shown = table[table["metric"].isin(["i_nll_clean", "i_nll_paper"])]
    study_table(shown.replace({"metric": METRICS})).savefig(out / "table.png", dpi=150)
    return table


def score_job(job: Job, folder: Path) -> Scores:
    """Read, train (or go on with it), score."""
    quick = job.arguments["quick"]
    train, held = _cells(job)
    if job.method in MEANS:
        return mean_scores(job.method, train, held, "condition", job.seed)
    screen = Screen(train, "condition", CONTROL, separator=WHOLE, allow_empty=True)
    size = SETTINGS[job.setting]
    chosen = {**SHARED, **METHODS[job.method], "n_latents": size.n_latents}
    chosen |= {"epochs": None, "max_epochs": size.max_epochs}  # until the validation ELBO stops improving
    if "refine" in chosen:
        chosen["refine"] = REFINE
    if "alpha" in chosen:
        chosen["alpha"] = float(len(screen.targets))
    if quick:
        chosen |= {"epochs": 2, "warmup": {"z": 1}, "n_hidden": 16, "n_latents": 4, "warm_start": 0}
        chosen |= {"refine": 1} if "refine" in chosen else {}
    chosen |= {"split": random_cells(screen, seed=job.seed), "seed": job.seed, "progress": False}
    fit = inference.fit("sparse-shift", None, screen, out=folder, resume=True, **chosen)
    new = Screen(held, "condition", None, separator=WHOLE, allow_empty=True)
    scores, _ = interventional_scores(fit, new, chosen, 30 if quick else 1000, job.seed)
    return {"validation_loss": best_validation_loss(fit), **scores}


def _cells(job: Job) -> tuple[ad.AnnData, ad.AnnData]:
    """Counts of training and of held-out cells, of the same genes, with their ``condition``."""
    adata, held = _read(job)
    condition_n = adata.obs["condition"].astype(str).to_numpy()
    held_n = np.isin(condition_n, held)
    screen = Screen(adata, "condition", CONTROL, separator=WHOLE, allow_empty=True)
    n_genes = SETTINGS[job.setting].n_genes
    if screen.n_genes > n_genes:
        adata = adata[:, most_variable(screen, np.flatnonzero(~held_n), n_genes)]
    few = 60 if job.arguments["quick"] else adata.n_obs  # of each condition
    first_n = adata.obs.groupby("condition", observed=True).cumcount().to_numpy() < few
    return adata[first_n & ~held_n].copy(), adata[first_n & held_n].copy()


def _read(job: Job) -> tuple[ad.AnnData, list[str]]:
    """Counts with their ``condition``, control spelt as :data:`CONTROL`, and what is held out."""
    if job.setting.startswith("papalexi"):
        adata = datasets.papalexi2021()
        return _with_conditions(adata, adata.obs["target"], "non-targeting"), list(INTERFERON)
    if job.setting.startswith("norman"):
        screen = subset_screen()
        adata = ad.AnnData(screen.adata.layers["counts"], screen.adata.obs, screen.adata.var)
        return _with_conditions(adata, adata.obs["perturbation"], CONTROL), complete_doubles(screen)
    path = Path(job.arguments["data"])
    if job.setting == NORMAN:
        adata = datasets.read_norman2019(path, schema_of(path))
        adata = ad.AnnData(adata.layers.get("counts", adata.X), adata.obs, adata.var)
        adata = _with_conditions(adata, adata.obs["target"], CONTROL)
        names = adata.obs["condition"].unique()
        doubles = sorted(name for name in names if "+" in name)
        rng = np.random.default_rng(job.seed)
        n_held = max(1, round(SHARE_HELD_OUT * len(doubles)))
        return adata, [str(name) for name in rng.choice(doubles, n_held, replace=False)]
    adata = datasets.read_replogle2022(path)
    adata = _with_conditions(adata, adata.obs["target"], "non-targeting")
    pathway = job.setting.removeprefix(REPLOGLE).removesuffix(" held out")
    held = sorted(set(datasets.replogle_pathways()[pathway]) & set(adata.obs["condition"]))
    if not held:
        raise DataError(f"expected cells of targets of {pathway} in {path}, found none; is the file whole?")
    return adata, held


def _with_conditions(adata: ad.AnnData, target_n: pd.Series, control: str) -> ad.AnnData:
    names = target_n.astype(str).replace(control, CONTROL)
    adata.obs = adata.obs.assign(condition=pd.Categorical(names))
    return adata


def _is_replogle(path: Path) -> bool:
    """Whether a file has the columns of Replogle 2022."""
    if path.is_dir():
        return False
    try:
        with h5py.File(path, "r") as file:
            return "sgID_AB" in file["obs"]
    except (OSError, KeyError) as error:
        raise CausalCellError(f"expected an h5ad file, or GEO's folder, found {path}: {error}") from error
