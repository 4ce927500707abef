"""The command line: ``pyro-causalcell simulate | fit | latents | graph | predict | evaluate | report | ...``.

Each command is a plain function; its signature gives the options, its docstring their help. Options can
stand in a YAML file (``--config``). Rooms are imported where they are used, so that ``--help`` stays fast.
"""

import argparse
import difflib
import inspect
import json
import os
import re
import shlex
import sys
import types
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from pyro_causalcell import __version__
from pyro_causalcell.errors import CausalCellError, CheckpointError, DataError, PredictionError

if TYPE_CHECKING:
    import anndata as ad
    import numpy as np
    import pandas as pd
    import xarray as xr
    from matplotlib.figure import Figure

    from pyro_causalcell.baselines import Comparison
    from pyro_causalcell.data import Screen, Split
    from pyro_causalcell.inference import Fit

__all__ = [
    "audit",
    "check",
    "compare",
    "demo",
    "evaluate",
    "fit",
    "graph",
    "interpret",
    "latents",
    "main",
    "predict",
    "report",
    "sbc",
    "simulate",
    "study",
    "trajectories",
]

PROGRAM = "pyro-causalcell"
GOOD_K = 0.7
"""Pareto k above which an importance-weighted estimate cannot be trusted."""
MIN_PARTICLES = 25
"""Particles below which Pareto k cannot be estimated."""
SURE = 0.9
"""Probability above which an edge counts as found."""
LOW_FDR = 0.05
"""False discovery rate below which a gene set counts as found."""
MOVEMENTS = 5
"""Largest movements of programmes that are printed."""
DEMO_LATENTS = 10
DEMO_EPOCHS = 60

# ---------------------------------------------------------------------- commands


def simulate(
    out: Path,
    *,
    process: Literal["sparse-shift", "latent-scm", "temporal-scm", "screen"] = "sparse-shift",
    seed: int = 0,
    decoder_seed: int | None = None,
    n_genes: int | None = None,
    n_control_cells: int | None = None,
    n_train: int | None = None,
    effect: float | None = None,
    library_size: float | None = None,
    library_log_sd: float | None = None,
    inverse_dispersion: float | None = None,
    preset: Literal["released", "paper", "clean"] | None = None,
    n_latents: int | None = None,
    n_interventions: int | None = None,
    cells_per_intervention: int | None = None,
    sparsity: float | None = None,
    n_targeted_latents: int | None = None,
    n_responsive: int | None = None,
    n_invariant: int | None = None,
    n_perturbations: int | None = None,
    n_combinations: int | None = None,
    n_test: int | None = None,
    cells_per_combination: int | None = None,
    changes: Literal["sparse", "dense"] | None = None,
    likelihood: Literal["none", "gaussian", "nb", "poisson"] | None = None,
    noise_sd: float | None = None,
    decoder_layers: int | None = None,
    times: list[int] | None = None,
    cells_per_snapshot: int | None = None,
    missing: float | None = None,
    graph: Literal["full", "triangular"] | None = None,
    dynamics: Literal["linear", "nonlinear"] | None = None,
    cut_share: float | None = None,
    n_targets: int | None = None,
    n_doubles: int | None = None,
    cells_per_condition: int | None = None,
    n_background: int | None = None,
    controls: Path | None = None,
    layer: str | None = None,
    library: str | None = None,
    n_embedding: int | None = None,
    embedding_noise: float | None = None,
    truth_draws: int | None = None,
) -> None:
    """Simulate a screen whose true programmes and effects are known.

    Args:
        out: File to write (h5ad): cells, and the truth beside them.
        process: "sparse-shift" (each perturbation moves a few programmes), "latent-scm" (perturbations change
            how programmes act on each other), "temporal-scm" (responses that unfold over time, in snapshots)
            or "screen" (singles and doubles, each double of a known kind).
        seed: Seed of every draw; the same seed gives the same file.
        decoder_seed: Another seed for the map from programmes to genes (not for "screen").
        n_genes: Genes; 100, 500 or 5,000 if not given.
        n_control_cells: Unperturbed cells, named "control"; none for "sparse-shift" and 8,000 for "screen" if
            not given.
        n_train: Perturbations of the training set, the first ones, 80 % if not given ("sparse-shift");
            training cells, 3,000 if not given ("latent-scm").
        effect: Size of a shift, in standard deviations of a programme; 5, 2 or 2 if not given.
        library_size: Median total count of a cell (preset "clean"; "latent-scm" and "temporal-scm" with
            counts).
        library_log_sd: Spread of the log total count (the same).
        inverse_dispersion: Of negative binomial counts (preset "clean"; likelihood "nb").
        preset: "released" (if not given) is what the sVAE+ authors' code does, "paper" what they print,
            "clean" has a varying library as real cells do.
        n_latents: Programmes; 15 if not given.
        n_interventions: Perturbations; 100 if not given.
        cells_per_intervention: Cells of each perturbation; 500 if not given.
        sparsity: Fraction of the programmes that a perturbation moves; one to three of them if not given.
        n_targeted_latents: Only the first so many programmes are ever moved.
        n_responsive: Programmes that perturbations act on; 4 if not given.
        n_invariant: Background programmes; 7 if not given.
        n_perturbations: Perturbations; 12 if not given.
        n_combinations: Held-out pairs of perturbations; 6 if not given.
        n_test: Test cells; 1,000 if not given.
        cells_per_combination: Cells of each pair; 100 if not given.
        changes: "sparse" (if not given): a perturbation alters one or two programmes; "dense": all of them.
        likelihood: "none" (if not given), "gaussian", "nb" or "poisson".
        noise_sd: Standard deviation of the noise of likelihood "gaussian"; 0.2 if not given.
        decoder_layers: Layers of the map from programmes to genes; 3 if not given.
        times: When snapshots are taken, in whole steps of the process, as a list; [1, 2, 3, 4] if not given.
        cells_per_snapshot: Cells of each condition at each time; 150 if not given.
        missing: Share of the snapshots of perturbed cells that are left out; 0.0 if not given.
        graph: "full" (if not given) or "triangular": which responsive programmes may act on which, a step
            later.
        dynamics: "linear" (if not given), or "nonlinear": lagged effects saturate.
        cut_share: Share of the perturbations that cut the parents of what they alter; 0.33 if not given.
        n_targets: Targets, all measured alone; 105 if not given.
        n_doubles: Pairs of targets; 131 if not given.
        cells_per_condition: Cells of each single and double; 410 if not given.
        n_background: Background programmes; 5 if not given.
        controls: Real control cells (h5ad file) whose means and dispersions are taken; those of Norman 2019
            in the package if not given.
        layer: Layer of that file with counts.
        library: Column of obs of that file with total counts.
        n_embedding: Length of a target's embedding; 32 if not given.
        embedding_noise: Noise of the informative embeddings; 0.2 if not given.
        truth_draws: Draws behind each true mean; 400 or 1,000 if not given.
    """
    chosen = {
        name: value
        for name, value in locals().items()
        if value is not None and name not in ("out", "process", "controls")
    }
    _check_out(out, *([controls] if controls else []))
    from pyro_causalcell import simulate as rooms
    from pyro_causalcell.data import read

    simulators: dict[str, Callable[..., ad.AnnData]] = {
        "sparse-shift": rooms.sparse_shift,
        "latent-scm": rooms.latent_scm,
        "temporal-scm": rooms.temporal_scm,
        "screen": rooms.combination_screen,
    }
    run = simulators[process]
    takes = set(inspect.signature(run).parameters)
    foreign = sorted({*chosen, *(["controls"] if controls else [])} - takes)
    if foreign:
        raise DataError(
            f"expected settings of process {process}, found {', '.join(f'--{_dashed(n)}' for n in foreign)}. "
            f"Leave it out, or choose another process; this one takes {', '.join(sorted(takes))}."
        )
    adata = run(**chosen) if controls is None else run(**chosen, controls=read(controls))
    _write_h5ad(adata, out)
    targets = adata.obs["target"].cat.categories
    control = "--control control" if "control" in targets else "--no-controls"
    said = sum(name != "control" for name in targets)
    record = adata.uns["simulation"]
    print(f"{adata.n_obs:,} cells x {adata.n_vars} genes, {said} perturbations: {out}")
    values = "" if record.get("noise_sd") is None else " --likelihood gaussian"
    words = f"--perturbation target {control}{values} {_model_words(process, record)} --out run"
    print(f"next: {PROGRAM} fit {out} {words}")


def _model_words(process: str, record: Mapping[str, Any]) -> str:
    """Options of ``fit`` for the model that a simulation was drawn from."""
    models = {"latent-scm": "weight-variant-scm", "temporal-scm": "temporal-scm"}
    if process in models:
        time = "--time time " if process == "temporal-scm" else ""
        sizes = f"--invariant {record['n_invariant']} --responsive {record['n_responsive']}"
        return f"{time}--model {models[process]} {sizes}"
    return f"--latents {record['shift_pk'].shape[1] if 'shift_pk' in record else record['mean_ck'].shape[1]}"


def fit(
    data: Path,
    perturbation: str,
    out: Path,
    *,
    control: list[str] | str | None = None,
    no_controls: bool = False,
    layer: str | None = None,
    batch: list[str] | str | None = None,
    separator: str = "+",
    time: str | None = None,
    dose: str | None = None,
    library: str | None = None,
    gene_symbols: str | None = None,
    twin: str | None = None,
    track: str | None = None,
    embeddings: str | None = None,
    unseen: list[str] | str | None = None,
    min_cells: PositiveInt = 1,
    allow_empty: bool = False,
    backed: bool = False,
    validation: float = 0.1,
    test: float = 0.0,
    hold_out: list[str] | str | None = None,
    model: str = "sparse-shift",
    guide: str | None = None,
    latents: PositiveInt | None = None,
    invariant: PositiveInt | None = None,
    responsive: PositiveInt | None = None,
    likelihood: Literal["nb", "zinb", "poisson", "gaussian"] | None = None,
    gates: Literal["posterior", "open", "closed", "sampled"] | None = None,
    settings: dict[str, Any] | None = None,
    epochs: PositiveInt | None = None,
    max_epochs: PositiveInt = 400,
    refine: NonNegativeInt = 0,
    patience: PositiveInt = 15,
    warm_start: NonNegativeInt | None = None,
    batch_size: PositiveInt = 256,
    lr: PositiveFloat = 2e-3,
    lr_drops: NonNegativeInt = 3,
    adam_eps: PositiveFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.0,
    clip: PositiveFloat | None = 100.0,
    weights: dict[str, NonNegativeFloat] | None = None,
    warmup: dict[str, PositiveInt] | None = None,
    particles: PositiveInt = 1,
    compile: bool | None = None,
    matmul_precision: Literal["highest", "high", "medium"] = "highest",
    anchors: Literal["batch", "random", "twin"] | None = None,
    memory_budget_gb: PositiveFloat = 4.0,
    seed: NonNegativeInt = 0,
    device: str = "auto",
    threads: PositiveInt | None = 1,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> None:
    """Train a model on a screen: which perturbation moves which programme.

    Args:
        data: The screen (h5ad file): cells x genes.
        perturbation: Column of obs that says how each cell was perturbed, such as "A" or "A+B".
        out: Run folder to write. A checkpoint is kept there after every epoch.
        control: How control cells are called in that column; repeat it for several spellings.
        no_controls: The screen has no control cells.
        layer: Layer with the counts (or normalised values); X if not given.
        batch: Column of obs with batches, donors or other covariates to correct for; repeat it for
            several columns.
        separator: What joins the targets of a combination.
        time: Column of obs with the time of each cell, for models that use it.
        dose: Column of obs with the dose of each cell.
        library: Column of obs with total counts; the sum over these genes if not given.
        gene_symbols: Column of var with gene names; the index if not given.
        twin: Layer with, for each cell, a control cell of the same background, as simulations know it.
        track: Column of obs that tells which cells are one and the same at several times, as in a film.
        embeddings: Table that describes targets (CSV file: names, then numbers), so that targets without
            training cells can be predicted; or "pca" for how each target's own gene varies over the training
            conditions.
        unseen: Target that no cell carries, to be predicted; repeat it for several.
        min_cells: Stop if a perturbation has fewer cells than this.
        allow_empty: Accept cells and genes without any count.
        backed: Leave the matrix on disk and read cells as needed, for files larger than memory.
        validation: Fraction of cells that decide when to stop.
        test: Fraction of cells kept for a later test.
        hold_out: Keep a perturbation (A) or a combination (A+B) out of training, for a later test;
            repeat it for several.
        model: Name of a model, or your own as FILE.py:Class.
        guide: Its guide; the one of the same name, or of the same file, if not given.
        latents: Number of programmes.
        invariant: Number of background programmes, of models that have them.
        responsive: Number of programmes that perturbations act on, of such models.
        likelihood: "nb", "zinb" or "poisson" for counts, "gaussian" for log-normalised values.
        gates: Member of the model family: "posterior" gives each edge a probability, "open" is the iVAE,
            "closed" the VAE, "sampled" the sVAE and sVAE+ of the authors' code.
        settings: Any other argument of the model or the guide, as --settings.n_hidden 64.
        epochs: Train this many epochs; until the validation loss stops improving if not given.
        max_epochs: Upper limit when --epochs is not given.
        refine: Epochs that follow, trained with ten draws of each cell: slower, and closer to the likelihood.
        patience: Epochs without improvement before the learning rate drops.
        warm_start: Epochs with all gates open before the programmes are turned; 0 for none.
        batch_size: Cells in a minibatch.
        lr: Learning rate.
        lr_drops: How often the learning rate drops before training ends.
        adam_eps: Epsilon of Adam.
        weight_decay: Weight decay of Adam.
        clip: Largest gradient norm; null does not clip.
        weights: Weight of a site's term, as --weights.z 8 for a beta-VAE.
        warmup: Epochs over which a site's term grows from zero, as --warmup.z 50.
        particles: Draws of each cell's programmes in a step; more than one trains the importance-weighted
            bound, which is closer to the likelihood and takes longer.
        compile: Compile the training step: true at once, false never; where training is long enough to repay
            it if not given.
        matmul_precision: "highest" is float32; "high" lets GPUs take TF32 in matrix products, "medium"
            processors bfloat16: faster on large minibatches, and on images, less exact.
        anchors: Control cell that a cell is compared with, for models that do: "batch" draws one of the same
            batch, "random" any, "twin" takes its own from --twin; its own if there is one, else one of the
            same batch, if not given.
        memory_budget_gb: Memory the counts may take; larger screens are read piece by piece.
        seed: Seed of everything random; the same seed gives the same fit.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
        threads: CPU threads; one is fastest for small models.
        resume: Go on from the checkpoint in the run folder.
        overwrite: Replace the run in the run folder.
        quiet: No progress bar.
    """
    options = locals()
    training = {name: options[name] for name in TRAINING_SETTINGS}
    _claim_run(out, resume, overwrite)
    chosen = _chosen_settings(
        settings,
        n_latents=latents,
        n_invariant=invariant,
        n_responsive=responsive,
        likelihood=likelihood,
        gates=gates,
    )
    _control(control, no_controls)
    from pyro_causalcell import inference
    from pyro_causalcell.inference.distributed import is_first_process

    screen, split = _described_screen(options)
    trained = inference.fit(
        model, guide, screen, split=split, out=out, resume=resume, progress=not quiet, **training, **chosen
    )
    if not is_first_process():
        return
    _print_fit(trained)
    print(f"next: {PROGRAM} graph {out} --out graph.csv, or {PROGRAM} report {out} {data} --out report.html")


def audit(
    data: Path,
    perturbation: str,
    *,
    control: list[str] | str | None = None,
    no_controls: bool = False,
    layer: str | None = None,
    batch: list[str] | str | None = None,
    separator: str = "+",
    time: str | None = None,
    dose: str | None = None,
    library: str | None = None,
    gene_symbols: str | None = None,
    allow_empty: bool = False,
    backed: bool = False,
    latents: PositiveInt = 10,
    out: Path | None = None,
    seed: NonNegativeInt = 0,
) -> None:
    """Say, before anything is trained, what a screen can identify and which experiment would mend the rest.

    Args:
        data: The screen (h5ad file): cells x genes.
        perturbation: Column of obs that says how each cell was perturbed, such as "A" or "A+B".
        control: How control cells are called in that column; repeat it for several spellings.
        no_controls: The screen has no control cells.
        layer: Layer with the counts (or normalised values); X if not given.
        batch: Column of obs with batches, donors or other covariates; repeat it for several columns.
        separator: What joins the targets of a combination.
        time: Column of obs with the time of each cell.
        dose: Column of obs with the dose of each cell.
        library: Column of obs with total counts; the sum over these genes if not given.
        gene_symbols: Column of var with gene names; the index if not given.
        allow_empty: Accept cells and genes without any count.
        backed: Leave the matrix on disk and read cells as needed, for files larger than memory.
        latents: Programmes of the model that is to be trained.
        out: Table to write as well (CSV): kind, name, status, found, needed, mend.
        seed: Seed of the random halves of the cells.
    """
    options = locals()
    if out is not None:
        _check_out(out, data)
    _control(control, no_controls)
    from pyro_causalcell.evaluate.audit import audit as audit_design

    screen = _screen(options)
    result = audit_design(screen, latents, seed=seed)
    print(result)
    if out is not None:
        _write_csv(result.to_frame(), out)


def latents(run: Path, data: Path, out: Path, *, backed: bool = False, device: str = "auto") -> None:
    """Write the activity of each programme in each cell.

    Args:
        run: Run folder of the fit.
        data: Cells (h5ad file), the fitted ones or others of the same genes and perturbations.
        out: File to write (h5ad): obsm["X_causalcell"] holds posterior means, obsm["X_causalcell_sd"]
            standard deviations, uns["causalcell"]["programmes"] the names.
        backed: Leave the matrix on disk and read cells as needed.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    _check_out(out, data)
    from pyro_causalcell import predict as rooms
    from pyro_causalcell.data import Screen, read

    fitted = _load(run, device)
    result = rooms.latents(fitted, Screen.from_spec(fitted.screen, read(data, backed)))
    _write_h5ad(result, out)
    print(f"{result.n_obs:,} cells x {result.obsm['X_causalcell'].shape[1]} programmes: {out}")


def graph(run: Path, out: Path) -> None:
    """Write which perturbation moves which programme, how sure that is, and how strongly.

    Args:
        run: Run folder of the fit.
        out: Table to write (CSV): perturbation, programme, probability of the edge, effect (in standard
            deviations of a control programme) and its standard deviation. With epistasis, the share that
            it takes away of what other perturbations do to the programme. A model that follows cells over
            time adds the probability that the programme is cut off from its parents, and a second table
            beside this one, FILE_lagged.csv: which programme acts on which a step later. Direct effects on
            genes, where they were fitted, go to FILE_direct.csv.
    """
    _check_out(out)
    beside = {name: out.with_name(f"{out.stem}_{name}.csv") for name in ("lagged", "direct")}
    for path in beside.values():
        _check_out(path)
    from pyro_causalcell.predict import direct_effects, lagged_graph
    from pyro_causalcell.predict import graph as edges_of

    fitted = _load(run, "cpu")
    edges, lagged, direct = edges_of(fitted), _if_any(lagged_graph, fitted), _if_any(direct_effects, fitted)
    _write_csv(edges, out)
    sure = edges[edges["probability"] > SURE]
    moved = sure["perturbation"].nunique()
    print(f"{len(edges)} possible edges, {len(sure)} with probability above {SURE}: {out}")
    print(f"{moved} of {edges['perturbation'].nunique()} perturbations move a programme")
    if lagged is not None:
        _write_csv(lagged, beside["lagged"])
        n = int((lagged["probability"] > SURE).sum())
        print(f"{len(lagged)} possible lagged edges, {n} with probability above {SURE}: {beside['lagged']}")
    if direct is not None:
        _write_csv(direct, beside["direct"])
        n = int((direct["effect"].abs() > 2 * direct["effect_sd"]).sum())
        print(f"{len(direct)} direct effects on genes, {n} above two standard deviations: {beside['direct']}")


def predict(
    run: Path,
    perturb: list[str] | str,
    out: Path,
    *,
    cells: PositiveInt = 500,
    time: list[str] | str | None = None,
    basal: Path | None = None,
    measured: Path | None = None,
    units: Literal["counts", "lognorm"] | None = None,
    library: PositiveFloat | None = None,
    seed: NonNegativeInt = 0,
    device: str = "auto",
) -> None:
    """Predict cells under a perturbation, or a combination nobody measured.

    Args:
        run: Run folder of the fit.
        perturb: Perturbation to predict, such as A, A+B or control; repeat it for several.
        out: File to write (h5ad): the predicted cells, with obs["condition"], and obs["time"] where times
            matter.
        cells: Cells of each perturbation, at each time.
        time: Time to predict, for models that follow cells over time; repeat it for several. Every snapshot
            of the fit if not given.
        basal: Screen (h5ad file) whose control cells are perturbed; cells are drawn anew if not given.
        measured: Screen (h5ad file) of measured conditions, such as the fitted file: what the fit leaves of
            their means is added to what it predicts, in log(1 + counts per 10,000).
        units: "counts", or "lognorm" for log(1 + counts per 10,000).
        library: Total count of the predicted cells; as in the fitted cells (or the basal ones) if not given.
        seed: Seed of the draws.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    _check_out(out, *(path for path in (basal, measured) if path))
    if measured is not None and units == "counts":
        raise CausalCellError("--measured corrects log(1 + counts per 10,000); leave out --units counts")
    from pyro_causalcell import predict as rooms

    fitted = _load(run, device)
    conditions = _listed(perturb)
    fitted.screen.design(conditions)  # a misspelt name is told before the basal cells are read
    times = _asked_times(fitted, _listed(time))
    if measured is not None:
        units = None
        if fitted.dims.times:
            raise CausalCellError("--measured is for models without time; leave it out")
    start = None if basal is None else _basal_cells(fitted, basal)
    result = rooms.predict(
        fitted, conditions, cells, basal=start, times=times, units=units, library=library, seed=seed
    )
    if measured is not None:
        _add_residuals(result, fitted, start, measured, seed)
    _write_h5ad(result, out)
    said = {"counts": "in counts", "lognorm": "in log(1 + counts per 10,000)"}
    shown = said.get(result.uns["causalcell"]["units"], "in the units of the training data")
    at = ""
    if "time" in result.obs:
        seen = list(dict.fromkeys(result.obs["time"]))
        at = f" at {_many(len(seen), 'time')} ({_numbers(seen)})"
    of = f"{_many(len(conditions), 'perturbation')}{at}"
    print(f"{result.n_obs:,} cells of {of} x {result.n_vars} genes {shown}: {out}")


def trajectories(
    run: Path,
    perturb: list[str] | str,
    out: Path,
    *,
    time: list[str] | str | None = None,
    samples: PositiveInt = 50,
    cells: PositiveInt = 256,
    seed: NonNegativeInt = 0,
    device: str = "auto",
) -> None:
    """Follow programmes over time under perturbations, measured or not, with intervals.

    Args:
        run: Run folder of a fit of a model that follows cells over time.
        perturb: Perturbation to follow, such as A, A+B or control; repeat it for several.
        out: File to write (netCDF): mean, low and high of each programme over condition and time, and the
            standard deviation of single cells.
        time: Time, from the first snapshot on; repeat it for several. Every snapshot of the fit if not given.
        samples: Draws of what the fit is unsure of, behind the 90 % intervals.
        cells: Simulated cells of each draw.
        seed: Seed of the draws.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    _check_out(out)
    from pyro_causalcell import predict as rooms

    fitted = _load(run, device)
    conditions = _listed(perturb)
    times = _asked_times(fitted, _listed(time))
    paths = rooms.trajectories(fitted, conditions, times, n_samples=samples, n_cells=cells, seed=seed)
    with _whole(out) as part:
        paths.to_netcdf(part, engine="h5netcdf")
    size = " x ".join(_many(paths.sizes[name], name) for name in ("condition", "time", "programme"))
    print(f"{size}, in {paths.attrs['units']}: {out}")
    _print_movements(paths)


def evaluate(
    run: Path,
    data: Path,
    out: Path,
    *,
    particles: int = 1000,
    cells: Literal["validation", "test", "all"] | None = None,
    memory_budget_gb: PositiveFloat = 0.5,
    seed: NonNegativeInt = 0,
    threads: PositiveInt | None = None,
    backed: bool = False,
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Measure how well a fit explains cells it was not trained on, and whether the number can be trusted.

    Args:
        run: Run folder of the fit.
        data: Cells (h5ad file): the fitted ones, or others.
        out: Table to write (netCDF): negative log-likelihood, Pareto k, effective particles and Monte Carlo
            error of each cell.
        particles: Draws per cell. More are slower and better.
        cells: Which cells of the fitted file. The test cells if not given, or the validation cells where no
            test cells were kept; all cells of any other file.
        memory_budget_gb: Memory that the draws may take at once.
        seed: Seed of the draws.
        threads: CPU threads; all if not given.
        backed: Leave the matrix on disk and read cells as needed.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
        quiet: No progress bar.
    """
    _check_particles(particles)
    _check_out(out, data)
    from pyro_causalcell.data import Screen, read
    from pyro_causalcell.evaluate.likelihood import iw_nll

    fitted = _load(run, device)
    _use_threads(threads)
    screen = Screen.from_spec(fitted.screen, read(data, backed))
    rows, words = _evaluated_rows(fitted, screen, cells)
    table = iw_nll(
        fitted,
        screen,
        rows,
        n_particles=particles,
        memory_budget_gb=memory_budget_gb,
        seed=seed,
        progress=not quiet,
    )
    table.attrs |= {"cells": words, "data": str(data), "run": str(run)}
    with _whole(out) as part:
        table.to_netcdf(part, engine="h5netcdf")
    _print_likelihood(table)


def check(
    run: Path,
    data: Path,
    out: Path,
    *,
    statistic: list[str] | str | None = None,
    by: str = "condition",
    prior: bool = False,
    samples: PositiveInt = 100,
    cells: Literal["validation", "test", "all"] | None = None,
    seed: NonNegativeInt = 0,
    threads: PositiveInt | None = 1,
    backed: bool = False,
    device: str = "auto",
) -> None:
    """Compare cells with cells that the model draws: predictive checks, and calibration of its intervals.

    Args:
        run: Run folder of the fit.
        data: Cells (h5ad file): the fitted ones, or others.
        out: Folder to write: checks.csv, checks.png and checks.nc (for ArviZ); calibration.csv, coverage.png,
            pit.png and risk.png for the fitted file.
        statistic: What to compare: total_mean, total_sd, zero_fraction, mean_variance_slope, dispersion,
            correlation, maximum, gene_mean, gene_sd or gene_zero_fraction; repeat it for several. Totals,
            zeros and dispersion (for counts) if not given.
        by: What groups the cells: condition, batch, time, any column of obs, or all for one group.
        prior: Draw which perturbation does what from the prior, not the posterior. No calibration then.
        samples: Draws of each cell.
        cells: Which cells of the fitted file. The test cells if not given, or the validation cells where no
            test cells were kept; all cells of any other file.
        seed: Seed of the draws.
        threads: CPU threads; one is fastest for small models.
        backed: Leave the matrix on disk and read cells as needed.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    _check_out(out / "checks.csv", data)
    from pyro_causalcell import plot
    from pyro_causalcell.data import Screen, read
    from pyro_causalcell.evaluate import calibration, posterior_predictive_checks, prior_predictive_checks

    fitted = _load(run, device)
    _use_threads(threads)
    screen = Screen.from_spec(fitted.screen, read(data, backed))
    rows, words = _evaluated_rows(fitted, screen, cells)
    checks = prior_predictive_checks if prior else posterior_predictive_checks
    group = None if by == "all" else by
    chosen = _listed(statistic) or None
    result = checks(fitted, screen, rows, statistic=chosen, by=group, n_samples=samples, seed=seed)
    table = result.table()
    _write_csv(table, out / "checks.csv")
    _write_png(plot.predictive_statistics(table), out / "checks.png")
    with _whole(out / "checks.nc") as part:
        result.to_inference_data().to_netcdf(part, engine="h5netcdf")
    print(f"cells: {len(rows):,} {words}")
    _print_checks(table)
    if not prior and not _is_fitted_file(fitted, screen):
        print("calibration: left out, its gene classes need the fitted file")
    elif not prior:
        measured = calibration(fitted, screen, rows, n_samples=samples, seed=seed)
        _write_csv(measured.classes, out / "calibration.csv")
        _write_png(plot.coverage(measured.classes), out / "coverage.png")
        _write_png(plot.pit(measured.pit), out / "pit.png")
        _write_png(plot.risk_coverage(measured.risk), out / "risk.png")
        print(f"calibration: {measured.verdict}")
    print(f"checks: {out}")


def sbc(
    model: str,
    out: Path,
    *,
    guide: str | None = None,
    latents: PositiveInt | None = None,
    likelihood: Literal["nb", "zinb", "poisson", "gaussian"] | None = None,
    gates: Literal["posterior", "open", "closed", "sampled"] | None = None,
    settings: dict[str, Any] | None = None,
    targets: PositiveInt = 4,
    genes: PositiveInt = 30,
    cells: PositiveInt = 50,
    library: PositiveFloat = 2000.0,
    replicates: PositiveInt = 100,
    draws: PositiveInt = 99,
    epochs: PositiveInt = 200,
    batch_size: PositiveInt = 64,
    lr: PositiveFloat = 3e-2,
    quick: bool = False,
    workers: PositiveInt = 1,
    seed: NonNegativeInt = 0,
    quiet: bool = False,
) -> None:
    """Ask whether a guide finds what its own model has drawn: simulation-based calibration.

    Args:
        model: Name of a model, or your own as FILE.py:Class.
        out: Folder to write: sbc.csv (tests of each latent), ranks.csv and sbc.png.
        guide: Its guide; the one of the same name, or of the same file, if not given.
        latents: Number of programmes.
        likelihood: "nb", "zinb" or "poisson" for counts, "gaussian" for log-normalised values.
        gates: Member of the model family, as in fit.
        settings: Any other argument of the model or the guide, as --settings.min_effect 0.
        targets: Perturbations of the simulated screens.
        genes: Their genes.
        cells: Their cells of each condition.
        library: Their total counts of a cell.
        replicates: Screens to simulate and fit.
        draws: Posterior draws of each.
        epochs: Epochs to train each.
        batch_size: Cells in a minibatch.
        lr: Learning rate.
        quick: At most 20 replicates of 50 epochs: shows that all works, and large errors only.
        workers: Processes, one for each core.
        seed: Seed of everything random.
        quiet: No progress bar.
    """
    _check_out(out / "sbc.csv")
    chosen = _chosen_settings(settings, n_latents=latents, likelihood=likelihood, gates=gates)
    from pyro_causalcell import evaluate, plot

    result = evaluate.sbc(
        model,
        guide,
        evaluate.design_screen(targets, genes, cells, library),
        n_replicates=replicates,
        n_draws=draws,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        quick=quick,
        workers=workers,
        seed=seed,
        progress=not quiet,
        **chosen,
    )
    _write_csv(result.table, out / "sbc.csv")
    _write_csv(result.ranks, out / "ranks.csv")
    band = evaluate.ecdf_band(len(result.ranks), result.n_draws)
    _write_png(plot.sbc_ranks(result.ranks, band, result.table), out / "sbc.png")
    print(result.verdict)
    print(f"sbc: {out}")


def report(
    run: Path,
    data: Path,
    out: Path,
    *,
    sbc: Path | None = None,
    gmt: Path | None = None,
    particles: int = 200,
    seed: NonNegativeInt = 0,
    threads: PositiveInt | None = 1,
    device: str = "auto",
) -> None:
    """Write one web page about a fit: graph, programmes, effects, and how far to trust them.

    Args:
        run: Run folder of the fit.
        data: The fitted cells (h5ad file), all of them.
        out: Page to write (HTML). It holds everything and opens without a network.
        sbc: Folder that the command sbc wrote for the same model, to show its results as well.
        gmt: Gene sets (GMT file) to look for among the genes of programmes.
        particles: Draws per cell of the likelihood.
        seed: Seed of every random choice.
        threads: CPU threads; one is fastest for small models.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    _check_particles(particles)
    _check_out(out, data)
    from pyro_causalcell.data import read
    from pyro_causalcell.report import write_report

    _use_threads(threads)
    write_report(_load(run, device), read(data), out, sbc=sbc, gmt=gmt, n_particles=particles, seed=seed)
    print(f"report: {out}")


def interpret(
    run: Path,
    out: Path = Path("interpretation"),
    *,
    data: Path | None = None,
    gmt: Path | None = None,
    cells: PositiveInt = 1000,
    seed: NonNegativeInt = 0,
    threads: PositiveInt | None = 1,
    device: str = "auto",
) -> None:
    """Say what programmes and doubles mean: genes, gene sets, kinds of interaction.

    Args:
        run: Run folder of the fit.
        out: Folder to write: signatures.csv and signatures.png (how genes follow each programme);
            attributions.csv with --data (from which genes each programme is read); enrichment.csv with
            --gmt; interactions.csv and interactions.png for a screen with doubles.
        data: Cells (h5ad file), the fitted ones or others of the same genes and perturbations. Without them
            doubles are predicted alone.
        gmt: Gene sets (GMT file) to look for among the genes of programmes.
        cells: Cells drawn of control and of each single and double.
        seed: Seed of every random choice.
        threads: CPU threads; one is fastest for small models.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    _check_folder(out)
    from pyro_causalcell import evaluate as rooms
    from pyro_causalcell import plot
    from pyro_causalcell.data import Screen, read, read_gmt

    gene_sets = None if gmt is None else read_gmt(gmt)
    fitted = _load(run, device)
    _use_threads(threads)
    screen = None if data is None else Screen.from_spec(fitted.screen, read(data))
    signatures = rooms.programme_signatures(fitted, seed=seed)
    standardised = signatures["standardised"].to_pandas()
    found = None if gene_sets is None else rooms.enrichment(standardised, gene_sets, seed=seed)
    attributions = None if screen is None else _attributions(fitted, screen, seed)
    doubles = rooms.doubles_of(fitted.screen)
    kinds = rooms.classify_doubles(fitted, screen, n_cells=cells, seed=seed) if doubles else None
    _write_csv(signatures.to_dataframe().reset_index(), out / "signatures.csv")
    _write_png(plot.signature_heatmap(standardised), out / "signatures.png")
    print(f"signatures: {len(standardised)} programmes x {standardised.shape[1]} genes")
    if attributions is not None:
        _write_csv(attributions, out / "attributions.csv")
        print("attributions: from which genes the encoder reads each programme")
    if found is not None:
        _write_csv(found, out / "enrichment.csv")
        tested, below = found["gene_set"].nunique(), int((found["fdr"] < LOW_FDR).sum())
        of = f"{tested} of {len(gene_sets or ())} gene sets"
        print(f"enrichment: {of} have enough genes of the screen, {below} finds with FDR below {LOW_FDR}")
    if kinds is None:
        print("interactions: left out, the screen has no doubles")
    else:
        _write_csv(kinds, out / "interactions.csv")
        _print_kinds(kinds)
        if (kinds["kind"] != "unknown").any():
            _write_png(plot.interaction_map(kinds), out / "interactions.png")
    print(f"interpretation: {out}")


def compare(
    data: Path,
    perturbation: str,
    out: Path,
    *,
    control: list[str] | str | None = None,
    no_controls: bool = False,
    layer: str | None = None,
    separator: str = "+",
    time: str | None = None,
    library: str | None = None,
    gene_symbols: str | None = None,
    allow_empty: bool = False,
    run: list[str] | str | None = None,
    residuals: bool = False,
    predictions: list[str] | str | None = None,
    units: Literal["counts", "lognorm"] | None = None,
    split: Literal["held-out-perturbations", "held-out-combinations", "random"] | None = None,
    folds: PositiveInt = 5,
    seeds: PositiveInt = 1,
    min_cells: PositiveInt = 20,
    cells: NonNegativeInt = 0,
    reference: str = "perturbed mean",
    seed: NonNegativeInt = 0,
    device: str = "auto",
) -> None:
    """Score fits and other programs' predictions beside the baselines that must be beaten.

    Args:
        data: The screen (h5ad file): cells x genes.
        perturbation: Column of obs that says how each cell was perturbed, such as "A" or "A+B".
        out: Folder to write: tables (CSV), a page (comparison.md) and two figures.
        control: How control cells are called in that column; repeat it for several spellings.
        no_controls: The screen has no control cells.
        layer: Layer with the counts (or normalised values); X if not given.
        separator: What joins the targets of a combination.
        time: Column of obs with the time of each cell, for the time-matched mean.
        library: Column of obs with total counts; the sum over these genes if not given.
        gene_symbols: Column of var with gene names; the index if not given.
        allow_empty: Accept cells and genes without any count.
        run: Run folder of a fit of these cells; repeat it for several that share a split.
        residuals: Score each run a second time, with what it leaves of the measured means of its training
            cells.
        predictions: File with predictions of another program (h5ad, Parquet or CSV); repeat it for several.
        units: Units of these files, where they do not say: "counts", or "lognorm" for log(1 + counts per
            10,000).
        split: What is held out; with a run, the cells that it kept for its test.
        folds: Folds; each target or combination is held out once.
        seeds: How often the held-out cells are halved anew.
        min_cells: Held-out cells that a condition needs to be scored.
        cells: Cells of a condition, at most, for metrics that need cells; 0 leaves these metrics out.
        reference: Baseline of the differences and of the calibrated scores.
        seed: Seed of everything random.
        device: "auto" takes the GPU if there is one; or "cpu", "cuda".
    """
    options = locals()
    _check_folder(out)
    _control(control, no_controls)
    runs = [Path(name) for name in _listed(run)]
    if runs and split is not None:
        raise CausalCellError("a run is compared on the cells that it kept for its test; leave out --split")
    from pyro_causalcell import baselines
    from pyro_causalcell.report import write_comparison

    fits = {path.name: _load(path, device) for path in runs}
    screen = _screen(options)
    methods: list[baselines.Predictor] = [
        baselines.ModelPredictor(fitted, name, seed=seed) for name, fitted in fits.items()
    ]
    if fits:
        splits = [_shared_split(fits, screen)]
        if residuals:
            methods += [baselines.WithResiduals(run, screen, splits[0].train) for run in methods]
    else:
        splits = baselines.make_folds(screen, split or "held-out-perturbations", folds, seed)
    methods += [baselines.PredictionsFile(path, screen, units=units) for path in _listed(predictions)]
    compared = baselines.compare(
        screen, methods, splits, seeds=range(seed, seed + seeds), min_cells=min_cells, n_cells=cells
    )
    page = write_comparison(compared, out, reference)
    _print_comparison(compared, reference)
    print(f"comparison: {page}")


def study(
    name: str,
    *,
    out: Path | None = None,
    data: Path | None = None,
    methods: list[str] | str | None = None,
    seeds: PositiveInt | None = None,
    full: bool = False,
    quick: bool = False,
    workers: PositiveInt = 1,
    executor: Literal["processes", "ray"] = "processes",
    quiet: bool = False,
) -> None:
    """Run a study: a paper's tables, method by method, beside the paper's own numbers.

    Args:
        name: The study: sparse-shift, interventional, latent-scm, norman, simulated-screen, unseen-singles,
            joining, temporal-scm, semrau, hipsc, ipsc2 or causal3dident.
        out: Folder to write: table.csv, a page of tables, figures; a folder named as the study if not
            given. A study that was stopped goes on from there.
        data: Norman 2019, for the study of that name: an h5ad file of scPerturb or CPA, or the folder with
            GEO's files; the subset in the package if not given. For interventional, the same or Replogle
            2022. For hipsc and ipsc2, an h5ad file of counts with the obs columns target and time, and clone
            for ipsc2; simulated screens if not given.
        methods: Only these methods; repeat it for several. The baselines are always there.
        seeds: Seeds of every fit.
        full: The size of Norman 2019, for simulated-screen; 40,000 films, on a GPU, for causal3dident.
        quick: A small size that shows that all works.
        workers: Fits to run side by side, one for each core.
        executor: What runs them: "processes" of this machine, or "ray", on one machine or several.
        quiet: No progress bar.
    """
    from pyro_causalcell.studies import run_study

    place = Path(name) if out is None else out
    given = {"data": data, "methods": _listed(methods) or None, "seeds": seeds, "full": full or None}
    chosen = {setting: value for setting, value in given.items() if value is not None}
    run_study(name, place, quick=quick, workers=workers, executor=executor, progress=not quiet, **chosen)
    print(f"study: {place}")


def demo(
    out: Path = Path("demo"),
    *,
    epochs: PositiveInt = DEMO_EPOCHS,
    seed: NonNegativeInt = 0,
    quiet: bool = False,
) -> None:
    """Fit a real CRISPR screen (Papalexi 2021: 25 knock-outs in THP-1 cells) and write its report.

    Args:
        out: Folder to write: the run, graph.csv and report.html.
        epochs: Epochs to train.
        seed: Seed of everything random.
        quiet: No progress bar.
    """
    from pyro_causalcell import inference
    from pyro_causalcell.data import Screen
    from pyro_causalcell.datasets import papalexi2021
    from pyro_causalcell.predict import graph as edges_of
    from pyro_causalcell.report import write_report
    from pyro_causalcell.report.summary import summarise_graph

    run, table, page = out / "run", out / "graph.csv", out / "report.html"
    _check_out(table)
    print(
        "Papalexi 2021: 20,729 THP-1 cells, 25 genes knocked out. Training takes a minute or two.", flush=True
    )
    screen = Screen(papalexi2021(), "target", "non-targeting", batch="bio_rep")
    trained = inference.fit(
        "sparse-shift",
        None,
        screen,
        n_latents=DEMO_LATENTS,
        epochs=epochs,
        seed=seed,
        out=run,
        progress=not quiet,
    )
    edges = edges_of(trained)
    _write_csv(edges, table)
    print("Writing the report.", flush=True)
    _use_threads(1)
    write_report(trained, screen, page, seed=seed)
    print("\n".join(f"- {line}" for line in summarise_graph(edges)[:3]))
    print(f"run: {run}\ngraph: {table}\nreport (open it in a browser): {page}")


# ---------------------------------------------------------------------- parts of commands


def _claim_run(out: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to write over a run, or among files of something else."""
    if resume and overwrite:
        raise CausalCellError("--resume and --overwrite exclude each other; pass one of them")
    if out.exists() and not out.is_dir():
        raise CausalCellError(f"expected a folder as --out, found the file {out}; choose another name")
    kept = [p.name for p in out.iterdir() if not p.name.startswith(".")] if out.exists() else []
    finished, begun = "fit.json" in kept, "checkpoint.pt" in kept
    if not (finished or begun):
        if kept:
            raise CausalCellError(f"{out} is no run folder and holds other files; choose a new folder")
    elif resume and not begun:
        raise CheckpointError(
            f"{out} holds a fit but no checkpoint to go on from; pass --overwrite to train again"
        )
    elif not (resume or overwrite):
        raise CausalCellError(
            f"{out} already holds a run; go on with it (--resume), replace it (--overwrite), or choose "
            "another --out"
        )


def _chosen_settings(settings: Mapping[str, Any] | None, **named: Any) -> dict[str, Any]:
    """Constructor settings that the user gave; models without an argument are not asked for it."""
    given = {name: value for name, value in named.items() if value is not None}
    twice = sorted(given.keys() & (settings or {}).keys())
    if twice:
        raise CausalCellError(f"{twice[0]} is given twice, by its own option and in --settings; give it once")
    taken = sorted(TRAINING_SETTINGS & (settings or {}).keys())
    if taken:
        raise CausalCellError(f"{taken[0]} is a training setting; pass it as --{taken[0].replace('_', '-')}")
    return {**(settings or {}), **given}


def _control(control: list[str] | str | None, no_controls: bool) -> list[str] | None:
    """Spellings of control; None for a screen that has none, which the user must say."""
    names = _listed(control)
    if bool(names) == no_controls:
        found = "both" if names else "neither"
        raise CausalCellError(
            "expected either --control NAME (how control cells are called) or --no-controls (the screen has "
            f"none), found {found}"
        )
    return names or None


def _screen(options: Mapping[str, Any], min_cells: int = 1, **described: Any) -> "Screen":
    """The screen that the options of a command describe."""
    from pyro_causalcell.data import Screen, read

    settings = {name: options[name] for name in SCREEN_SETTINGS if name in options}
    settings["batch"] = _listed(options.get("batch"))
    adata = read(options["data"], options.get("backed", False))
    control = _control(options["control"], options["no_controls"])
    return Screen(adata, options["perturbation"], control, min_cells=min_cells, **settings, **described)


def _described_screen(options: Mapping[str, Any]) -> "tuple[Screen, Split]":
    """The screen to fit with embeddings of its targets, where there are any, and its split."""
    from pyro_causalcell.baselines import pca_embedding, training_means
    from pyro_causalcell.data import read_embeddings

    asked, unseen, min_cells = options["embeddings"], _listed(options["unseen"]), options["min_cells"]
    table = None if asked in (None, "pca") else read_embeddings(asked)
    by_pca = asked == "pca"
    screen = _screen(options, min_cells, embeddings=table, unseen=None if by_pca else unseen)
    chosen = (options["validation"], options["test"], _listed(options["hold_out"]), options["seed"])
    split = _split(screen, *chosen)
    if by_pca:  # of training cells alone, so the split comes first
        table = pca_embedding(training_means(screen, split.train), further=unseen)
        screen = _screen(options, min_cells, embeddings=table, unseen=unseen)
    return screen, split


def _asked_times(fitted: "Fit", texts: Sequence[str]) -> list[float] | None:
    """Times as numbers, from the fit's first snapshot on; None if none were given."""
    if not texts:
        return None
    if "time" not in getattr(fitted.model, "needs", set()):
        raise DataError("this model does not follow cells over time; leave out --time")
    known, column = fitted.dims.times, fitted.screen.time
    try:
        times = [float(text) for text in texts]
    except ValueError:
        times = []
    if not times or not all(known[0] <= time < float("inf") for time in times):
        raise DataError(
            f"expected numbers from {known[0]:g} on for --time, found {', '.join(texts)}; the snapshots of "
            f"this fit (column {column}) are {_numbers(known)}"
        )
    return times


def _many(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _listed(names: list[str] | str | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or [])


def _split(screen: "Screen", validation: float, test: float, hold_out: list[str], seed: int) -> "Split":
    """Random cells, or held-out perturbations or combinations."""
    from pyro_causalcell.data import held_out_combinations, held_out_perturbations, random_cells

    if not hold_out:
        return random_cells(screen, validation=validation, test=test, seed=seed)
    if test:
        raise CausalCellError("--hold-out chooses the test cells; leave out --test")
    combined = [len(screen.describe().split(name)) > 1 for name in hold_out]
    if all(combined):
        return held_out_combinations(screen, hold_out, seed=seed, validation=validation)
    if any(combined):
        raise CausalCellError(
            f"expected only single perturbations or only combinations in --hold-out, found {hold_out}"
        )
    return held_out_perturbations(screen, hold_out, seed=seed, validation=validation)


def _load(run: Path, device: str) -> "Fit":
    from pyro_causalcell.inference import Fit
    from pyro_causalcell.inference.training import pick_device

    fitted = Fit.load(run, device=pick_device(device))
    if fitted.interruption:
        _say(fitted.interruption)
    return fitted


def _check_particles(particles: int) -> None:
    if particles < MIN_PARTICLES:
        raise CausalCellError(
            f"expected at least {MIN_PARTICLES} particles, found {particles}: Pareto k looks at the "
            "largest fifth of them; 1000 is a good start"
        )


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _basal_cells(fitted: "Fit", path: Path) -> "Screen":
    """The control cells of a file."""
    from pyro_causalcell.data import Screen, read

    adata = read(path)
    control_n = Screen.from_spec(fitted.screen, adata, unknown="mark").condition_n == 0
    if not control_n.any():
        raise DataError(
            f"no control cells in {path}: no value of obs[{fitted.screen.perturbation!r}] is one of "
            f"{fitted.screen.control or ['control']}; leave out --basal to draw cells anew"
        )
    return Screen.from_spec(fitted.screen, adata[control_n].copy())


def _add_residuals(
    result: "ad.AnnData", fitted: "Fit", basal: "Screen | None", path: Path, seed: int
) -> None:
    """Move predicted cells by what the fit leaves of the means of measured cells."""
    import numpy as np

    from pyro_causalcell.baselines import ModelPredictor, WithResiduals, log_expression
    from pyro_causalcell.data import Screen, read

    screen = Screen.from_spec(fitted.screen, read(path), unknown="mark")
    rows = fitted.split.train if _is_fitted_file(fitted, screen) else np.flatnonzero(screen.condition_n >= 0)
    model = ModelPredictor(fitted, seed=seed, basal=basal)
    corrected = WithResiduals(model, screen, rows)
    x_ng = log_expression(fitted, result)
    for name in result.obs["condition"].cat.categories:
        of_n = (result.obs["condition"] == name).to_numpy()
        x_ng[of_n] = corrected.moved(x_ng[of_n], model.predict([name])[0], name)
    result.X = x_ng.astype(np.float32)
    if fitted.screen.is_counts:
        result.uns["causalcell"]["units"] = "lognorm"
    result.uns["causalcell"]["residuals"] = True


def _evaluated_rows(
    fitted: "Fit", screen: "Screen", cells: Literal["validation", "test", "all"] | None
) -> "tuple[np.ndarray, str]":
    """Which cells, and what they are in words."""
    import numpy as np

    split, everything = fitted.split, np.arange(screen.n_cells)
    if not _is_fitted_file(fitted, screen):
        if cells in ("validation", "test"):
            raise DataError(
                f"--cells {cells} needs the fitted file, and these are other cells (their number, "
                "perturbations or totals differ); leave out --cells to evaluate all of them"
            )
        return everything, "all cells of a file that was not fitted"
    if cells == "all":
        return everything, "all cells, with those trained on"
    rows = {"test": split.test, "validation": split.validation}
    names = [cells] if cells else ["test", "validation"]
    for name in names:
        if len(rows[name]):
            return rows[name], f"{name} cells, not trained on"
    raise DataError(f"the fit kept no {' or '.join(names)} cells; pass --cells all to evaluate all")


def _is_fitted_file(fitted: "Fit", screen: "Screen") -> bool:
    """Whether these are the fitted cells in their order, told by conditions, totals and batches."""
    from pyro_causalcell.inference.fitted import CellSummary

    split = fitted.split
    same_size = screen.n_cells == len(split.train) + len(split.validation) + len(split.test)
    return (
        same_size
        and screen.describe().condition_cells == fitted.screen.condition_cells
        and CellSummary.of(screen, split.train) == fitted.cells
    )


def _shared_split(fits: "Mapping[str, Fit]", screen: "Screen") -> "Split":
    """The split of all the runs, checked against the cells."""
    import numpy as np

    from pyro_causalcell.data import Screen

    (first, fitted), *others = fits.items()
    for name, other in fits.items():
        if not _is_fitted_file(other, Screen.from_spec(other.screen, screen.adata)):
            raise DataError(
                f"run {name} was fitted to other cells (their number, perturbations or totals differ); give "
                "the fitted file"
            )
        for setting in ("layer", "library", "gene_symbols", "perturbation", "separator"):
            own, given = getattr(other.screen, setting), getattr(screen.describe(), setting)
            if own != given:
                raise DataError(f"run {name} was fitted with {setting}={own}, found {setting}={given}")
    for name, other in others:
        if not np.array_equal(other.split.test, fitted.split.test):
            raise DataError(
                f"runs {first} and {name} kept other cells for their tests; fit them with the same seed and "
                "the same test or held-out cells, or compare them one at a time"
            )
    return fitted.split


def _print_comparison(compared: "Comparison", reference: str) -> None:
    """The sizes, what was left out, and RMSE and calibrated RMSE of each method."""
    table = compared.table
    print(f"{table['condition'].nunique()} held-out conditions, {len(compared.splits)} folds")
    if len(compared.left_out):
        print(f"left out, too few cells: {', '.join(sorted(set(compared.left_out['condition'])))}")
    rmse = compared.summary().query("metric == 'rmse'").set_index("method")["mean"]
    score = compared.calibrated(reference).query("metric == 'rmse'").set_index("method")["score"]
    for name in compared.methods:
        place = f", calibrated {score[name]:.2f}" if name in score else ""
        print(f"{name}: RMSE {rmse[name]:.4f}{place}")


def _print_fit(fitted: "Fit") -> None:
    history = fitted.history
    trained = f"{len(history)} epochs, {history['seconds'].sum():,.0f} s"
    cells = f"{len(fitted.split.train):,} cells x {fitted.dims.n_genes:,} genes"
    print(f"{type(fitted.model).__name__} trained on {cells}: {trained}")
    if history["validation_loss"].notna().any():
        best = history["validation_loss"].where(history["stage"] == "training").min()
        print(f"best validation loss: {best:,.2f} nats per cell")
    print(f"run: {fitted.path}")


def _print_likelihood(table: "xr.Dataset") -> None:
    """Five lines: cells, mean, Pareto k, effective particles, advice."""
    nll_n, k_n = table["nll"].values, table["pareto_k"].values
    bad = float((k_n > GOOD_K).mean())
    error = f"{nll_n.std(ddof=1) / len(nll_n) ** 0.5:,.2f}" if len(nll_n) > 1 else "unknown"
    particles = table.attrs["n_particles"]
    print(f"cells: {len(nll_n):,} {table.attrs['cells']}")
    print(f"mean NLL: {nll_n.mean():,.2f} nats per cell, standard error {error}")
    print(f"Pareto k above {GOOD_K}: {bad:.1%} of cells")
    print(f"effective particles: median {float(table['ess'].median()):,.1f} of {particles}")
    if bad:
        print(
            f"advice: do not rank models by these numbers while k is above {GOOD_K}; use more --particles, "
            "or compare on the cells with low k in both"
        )
    else:
        print("advice: these numbers can be compared between models on the same cells")


def _print_checks(table: "pd.DataFrame") -> None:
    """How many statistics lie outside the replicates, and which most."""
    outside = (table["observed"] < table["low"]) | (table["observed"] > table["high"])
    print(f"outside the 90 % interval of the replicates: {int(outside.sum())} of {len(table)} statistics")
    surprise = (table["p_value"] - 0.5).abs()[outside]
    for _, row in table.loc[surprise.nlargest(3).index].iterrows():
        gene = f" of {row['gene']}" if "gene" in row and row["gene"] == row["gene"] else ""
        side = "above" if row["observed"] > row["high"] else "below"
        print(
            f"- {row['statistic'].replace('_', ' ')}{gene}, {row.iloc[0]}: {row['observed']:.3g}, {side} "
            f"{row['low']:.3g} to {row['high']:.3g}"
        )


def _if_any(table: "Callable[[Fit], pd.DataFrame]", fitted: "Fit") -> "pd.DataFrame | None":
    """A table of a fit; None for a model that has none of what it tells."""
    try:
        return table(fitted)
    except PredictionError:
        return None


def _print_movements(paths: "xr.Dataset") -> None:
    """When and where programmes are furthest from control, or from where they start."""
    from pyro_causalcell.data.spec import CONTROL
    from pyro_causalcell.evaluate import largest_movements

    first = _numbers([float(paths["time"][0])])
    origin = "control" if CONTROL in paths["condition"].values else f"time {first}"
    for _, row in largest_movements(paths).head(MOVEMENTS).iterrows():
        print(
            f"- {row['condition']}, {row['programme']}: {row['change']:+.2f} from {origin} at time "
            f"{row['time']:g} (mean {row['mean']:.2f}, 90 % interval {row['low']:.2f} to {row['high']:.2f})"
        )


def _attributions(fitted: "Fit", screen: "Screen", seed: int) -> "pd.DataFrame | None":
    """One row a programme and gene; None, with a word, where captum is not installed."""
    import importlib.util

    if importlib.util.find_spec("captum") is None:
        print("attributions: left out, they need captum: pip install 'pyro-causalcell[interpret]'")
        return None
    from pyro_causalcell.evaluate import encoder_attributions

    table = encoder_attributions(fitted, screen, seed=seed)
    return table[["attribution", "magnitude"]].to_dataframe().reset_index()


def _print_kinds(table: "pd.DataFrame") -> None:
    """How many doubles of each kind are measured and predicted."""
    for source, rows in table.groupby("source", sort=False):
        counts = rows["kind"].value_counts()
        print(f"{source}: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")


def _check_out(out: Path, *inputs: Path) -> None:
    """Tell before the work what would stop its result from being written."""
    if out.is_dir():
        raise CausalCellError(f"expected a file as --out, found the folder {out}; name a file in it")
    if any(path.exists() and out.exists() and path.samefile(out) for path in inputs):
        raise CausalCellError(f"--out {out} is the file that is read; choose another name")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error
    if not os.access(out.parent, os.W_OK):
        raise CausalCellError(f"{out.parent} cannot be written to; choose another --out")


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CausalCellError(f"expected a folder as --out, found the file {out}; choose another name")
    _check_out(out / "comparison.md")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A place to write to, which becomes ``path`` when it is complete."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as error:  # HDF5 tells of a full disk by either
        raise _unwritable(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def _unwritable(path: Path, error: Exception) -> CausalCellError:
    return CausalCellError(
        f"{path} could not be written: {error}. Free space or choose another --out; an older file is kept"
    )


def _write_h5ad(adata: "ad.AnnData", out: Path) -> None:
    with _whole(out) as part:
        adata.write_h5ad(part)


def _write_csv(table: "pd.DataFrame", out: Path) -> None:
    with _whole(out) as part:
        table.to_csv(part, index=False)


def _write_png(figure: "Figure", out: Path) -> None:
    with _whole(out) as part:
        figure.savefig(part, format="png", dpi=150)


# ---------------------------------------------------------------------- from signatures to options


class _Command(NamedTuple):
    """How a function is shown: its arguments by position, and groups of options with what they take."""

    run: Callable[..., None]
    positional: tuple[str, ...]
    groups: Mapping[str, str]

    @property
    def arguments(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.run).parameters

    def shown(self) -> dict[str, dict[str, str]]:
        """Groups of arguments, each with the word that stands for its value."""
        groups = {"input": {name: name.upper() for name in self.positional}} if self.positional else {}
        for title, options in self.groups.items():
            pairs = (option.strip().partition(" ") for option in options.split(","))
            groups[title] = {name: takes for name, _, takes in pairs}
        return groups

    def flags(self) -> set[str]:
        """Options that take no value."""
        return {name for name, argument in self.arguments.items() if argument.annotation is bool}

    def repeated(self) -> set[str]:
        """Options that may be given several times."""
        return {n for n, a in self.arguments.items() if list[str] in typing.get_args(a.annotation)}


_TRAINING = (
    "epochs N, max_epochs N, refine N, patience N, warm_start N, batch_size N, lr X, lr_drops N, adam_eps X, "
    "weight_decay X, clip X, weights ..., warmup ..., particles N, compile true|false, "
    "matmul_precision highest|high|medium, anchors batch|random|twin, memory_budget_gb X, seed N, "
    "device auto|cpu|cuda, threads N"
)

SCREEN_SETTINGS = (
    "layer",
    "time",
    "dose",
    "library",
    "gene_symbols",
    "twin",
    "track",
    "separator",
    "allow_empty",
)

TRAINING_SETTINGS = {option.split()[0] for option in _TRAINING.split(", ")}

COMMANDS = {
    "simulate": _Command(
        simulate,
        (),
        {
            "result": "out FILE.h5ad",
            "what to simulate": "process sparse-shift|latent-scm|temporal-scm|screen, seed N, "
            "decoder_seed N, n_genes N, n_control_cells N, n_train N, effect X, library_size X, "
            "library_log_sd X, inverse_dispersion X",
            "process sparse-shift": "preset released|paper|clean, n_latents N, n_interventions N, "
            "cells_per_intervention N, sparsity X, n_targeted_latents N",
            "processes latent-scm and temporal-scm": "n_responsive N, n_invariant N, n_perturbations N, "
            "n_combinations N, likelihood none|gaussian|nb|poisson, noise_sd X, decoder_layers N",
            "process latent-scm": "n_test N, cells_per_combination N, changes sparse|dense",
            "process temporal-scm": "times [N...], cells_per_snapshot N, missing FRACTION, "
            "graph full|triangular, dynamics linear|nonlinear, cut_share FRACTION",
            "process screen": "n_targets N, n_doubles N, cells_per_condition N, n_background N, "
            "controls FILE.h5ad, layer LAYER, library COLUMN, n_embedding N, embedding_noise X, "
            "truth_draws N",
        },
    ),
    "fit": _Command(
        fit,
        ("data",),
        {
            "your data": "perturbation COLUMN, control NAME, no_controls, layer LAYER, batch COLUMN, "
            "separator TEXT, time COLUMN, dose COLUMN, library COLUMN, gene_symbols COLUMN, twin LAYER, "
            "track COLUMN, "
            "embeddings FILE.csv|pca, unseen NAME, min_cells N, allow_empty, backed",
            "cells kept out of training": "validation FRACTION, test FRACTION, hold_out NAME",
            "model": "model NAME|FILE.py:Class, guide NAME|FILE.py:Class, latents K, "
            "invariant L, responsive V, likelihood nb|zinb|poisson|gaussian, "
            "gates posterior|open|closed|sampled, settings ...",
            "training": _TRAINING,
            "result": "out RUN, resume, overwrite, quiet",
        },
    ),
    "audit": _Command(
        audit,
        ("data",),
        {
            "your data": "perturbation COLUMN, control NAME, no_controls, layer LAYER, batch COLUMN, "
            "separator TEXT, time COLUMN, dose COLUMN, library COLUMN, gene_symbols COLUMN, allow_empty, "
            "backed",
            "what to audit": "latents K, seed N",
            "result": "out FILE.csv",
        },
    ),
    "latents": _Command(
        latents, ("run", "data"), {"result": "out FILE.h5ad", "how": "backed, device auto|cpu|cuda"}
    ),
    "graph": _Command(graph, ("run",), {"result": "out FILE.csv"}),
    "predict": _Command(
        predict,
        ("run",),
        {
            "what to predict": "perturb NAME, cells N, time T, basal FILE.h5ad, "
            "measured FILE.h5ad, units counts|lognorm, library X",
            "result": "out FILE.h5ad",
            "how": "seed N, device auto|cpu|cuda",
        },
    ),
    "trajectories": _Command(
        trajectories,
        ("run",),
        {
            "what to follow": "perturb NAME, time T",
            "result": "out FILE.nc",
            "how": "samples N, cells N, seed N, device auto|cpu|cuda",
        },
    ),
    "evaluate": _Command(
        evaluate,
        ("run", "data"),
        {
            "what to measure": "particles N, cells validation|test|all",
            "result": "out FILE.nc, quiet",
            "how": "memory_budget_gb X, seed N, threads N, backed, device auto|cpu|cuda",
        },
    ),
    "check": _Command(
        check,
        ("run", "data"),
        {
            "what to compare": "statistic NAME, by COLUMN, prior, cells validation|test|all, samples N",
            "result": "out FOLDER",
            "how": "seed N, threads N, backed, device auto|cpu|cuda",
        },
    ),
    "sbc": _Command(
        sbc,
        ("model",),
        {
            "model": "guide NAME|FILE.py:Class, latents K, likelihood nb|zinb|poisson|gaussian, "
            "gates posterior|open|closed|sampled, settings ...",
            "simulated screens": "targets N, genes N, cells N, library X",
            "how": "replicates N, draws N, epochs N, batch_size N, lr X, quick, workers N, seed N",
            "result": "out FOLDER, quiet",
        },
    ),
    "report": _Command(
        report,
        ("run", "data"),
        {
            "result": "out FILE.html",
            "evidence": "sbc FOLDER, gmt FILE.gmt, particles N",
            "how": "seed N, threads N, device auto|cpu|cuda",
        },
    ),
    "interpret": _Command(
        interpret,
        ("run",),
        {
            "result": "out FOLDER",
            "what to add": "data FILE.h5ad, gmt FILE.gmt",
            "how": "cells N, seed N, threads N, device auto|cpu|cuda",
        },
    ),
    "compare": _Command(
        compare,
        ("data",),
        {
            "your data": "perturbation COLUMN, control NAME, no_controls, layer LAYER, separator TEXT, "
            "time COLUMN, library COLUMN, gene_symbols COLUMN, allow_empty",
            "methods": "run RUN, residuals, predictions FILE, units counts|lognorm, reference METHOD",
            "held-out cells": "split held-out-perturbations|held-out-combinations|random, folds N, seeds N, "
            "min_cells N, cells N",
            "result": "out FOLDER",
            "how": "seed N, device auto|cpu|cuda",
        },
    ),
    "study": _Command(
        study,
        ("name",),
        {
            "result": "out FOLDER, quiet",
            "what": "data FILE.h5ad, methods NAME, seeds N, full, quick",
            "how": "workers N, executor processes|ray",
        },
    ),
    "demo": _Command(demo, (), {"result": "out FOLDER", "how": "epochs N, seed N, quiet"}),
}


class _Help(DefaultHelpFormatter):
    """Help without types: option, what it takes, one sentence, default."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if isinstance(action, argparse._SubParsersAction):
            return "one of"
        if not action.option_strings:
            return str(super()._format_action_invocation(action))
        takes = action.metavar if isinstance(action.metavar, str) else ""
        names = [name for name in action.option_strings if not name.endswith("+")]
        return f"{', '.join(_dashed(name) for name in names)} {takes}".rstrip()

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        if "--print_config" in action.option_strings:
            return "Print all options with their values, as a YAML file for --config, and exit."
        if action.required and action.option_strings:
            return f"{said} (required)"
        unset = action.default is None or action.default is False or action.default == argparse.SUPPRESS
        return said if unset or not action.option_strings else f"{said} (default: {action.default})"


def _dashed(option: str) -> str:
    return option.replace("_", "-")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog=PROGRAM,
        description="What does a perturbation do to single cells? Fit a model to a screen, read its graph, "
        "predict what was not measured.",
        exit_on_error=False,
        version=__version__,
        formatter_class=_Help,
    )
    commands = parser.add_subcommands(required=True, metavar="COMMAND", title="commands", description=None)
    for name, command in COMMANDS.items():
        first = (inspect.getdoc(command.run) or "").split("\n", 1)[0]
        commands.add_subcommand(name, _command_parser(name, command, first), help=first)
    return parser


def _command_parser(name: str, command: _Command, description: str) -> ArgumentParser:
    groups = command.shown()
    takes = {option: value for group in groups.values() for option, value in group.items()}
    required = [n for n, a in command.arguments.items() if a.default is inspect.Parameter.empty]
    words = [n.upper() if n in command.positional else f"--{_dashed(n)} {takes[n]}" for n in required]
    if "no_controls" in takes:
        words.insert(required.index("perturbation") + 1, "(--control NAME | --no-controls)")
    parser = ArgumentParser(
        usage=" ".join([PROGRAM, name, *words, "[options]"]),
        description=description,
        exit_on_error=False,
        formatter_class=_Help,
    )
    parser.add_argument(
        "--config", action="config", metavar="FILE.yaml", help="Read options from a YAML file."
    )
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for option in options:  # one at a time, for the order written above
            others: set[str | int] = {other for other in command.arguments if other != option}
            group.add_function_arguments(
                command.run, as_group=False, as_positional=option in command.positional, skip=others
            )
            group._group_actions[-1].metavar = takes[option]
    return parser


def _tidy(argv: Sequence[str]) -> list[str]:
    """Options as jsonargparse wants them: underscores, flags with a value, repeated options as one list."""
    name = next((word for word in argv if word in COMMANDS), None)
    if name is None:
        return list(argv)
    flags, repeated = COMMANDS[name].flags(), COMMANDS[name].repeated()
    lists: dict[str, list[str]] = {}
    words, tidy = iter(argv), []
    for word in words:
        option, equals, value = word.partition("=")
        key = option[2:].replace("-", "_") if option.startswith("--") else ""
        if key in flags and not equals:
            tidy.append(f"--{key}=true")
        elif key in repeated:
            given = value if equals else next(words, None)
            if given is None:
                tidy.append(f"--{key}")  # jsonargparse tells that the value is missing
            else:
                lists.setdefault(key, []).extend(_items(given))
        else:
            tidy.append(f"--{key}{equals}{value}" if key else word)
    return tidy + [f"--{key}={json.dumps(values)}" for key, values in lists.items()]


def _items(text: str) -> list[str]:
    """One name, or a list of names as in YAML: ``[A, A+B]``."""
    return [item.strip(" '\"") for item in text[1:-1].split(",")] if text[:1] + text[-1:] == "[]" else [text]


# ---------------------------------------------------------------------- running


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Its words; those of the process if None.

    Returns:
        Exit code: 0, 2 after a user's mistake (one line on stderr says which), 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    name = next((word for word in argv if word in COMMANDS), "")
    try:
        with warnings.catch_warnings():
            if not sys.warnoptions:
                warnings.simplefilter("ignore")  # what a user must know, the commands say themselves
            _run(argv)
    except argparse.ArgumentError as error:
        return _say(_plain_mistake(str(error), name))
    except CausalCellError as error:
        return _say(_as_options(str(error), name))
    except KeyboardInterrupt:
        _say(_how_to_go_on(argv, name))
        return 130
    return 0


def _run(argv: Sequence[str]) -> None:
    chosen = _parser().parse_args(_tidy(argv))
    arguments = vars(chosen[chosen.subcommand])
    arguments.pop("config")
    COMMANDS[chosen.subcommand].run(**{name: _built_in(value) for name, value in arguments.items()})


def _built_in(value: Any) -> Any:
    """A value without jsonargparse's number types, which a checkpoint could not be read back with."""
    if isinstance(value, dict):
        return {key: _built_in(item) for key, item in value.items()}
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def _say(message: str) -> int:
    print(f"{PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _how_to_go_on(argv: Sequence[str], name: str) -> str:
    """What is left after Ctrl-C."""
    if name == "fit":
        chosen = _parser().parse_args(_tidy(argv))
        if (chosen.fit.out / "checkpoint.pt").exists():
            again = [word for word in argv if word not in ("--overwrite", "--resume")]
            return (
                f"stopped; {chosen.fit.out} holds the last whole epoch. Go on with: "
                f"{PROGRAM} {shlex.join(again)} --resume"
            )
        return "stopped before the first epoch was over; nothing was kept"
    return (
        "stopped; nothing was written" if name != "study" else "stopped; the same command goes on from here"
    )


def _as_options(message: str, name: str) -> str:
    """A message of the library in the words of the command line: ``layer='counts'`` is ``--layer counts``."""
    if name not in COMMANDS:
        return message
    for option in COMMANDS[name].arguments:
        written = _dashed(option)
        message = re.sub(rf"\b{option}=True\b", f"--{written}", message)
        message = re.sub(rf"\b{option}=None\b", f"no --{written}", message)
        message = re.sub(rf"\b{option}=(['\"])(.*?)\1", rf"--{written} \2", message)
        message = re.sub(rf"\b{option}=(-?[\w.]*\w)", rf"--{written} \1", message)
        message = re.sub(rf"\b{option}=", f"--{written}", message)
    return message


def _plain_mistake(message: str, name: str) -> str:
    """What jsonargparse says about arguments, in plain words."""
    usage = f"see {PROGRAM} {name} --help" if name else f"see {PROGRAM} --help"
    if match := re.match(r"the following arguments are required: (.*)", message):
        command = COMMANDS[name]
        missing = [word.rpartition(".")[2] for word in match[1].split(", ")]
        shown = (n.upper() if n in command.positional else f"--{_dashed(n)}" for n in missing)
        return f"missing {', '.join(shown)}; {usage}"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        return f"{_unknown(match[1], name)}; {usage}"
    if match := re.search(r"invalid choice: '(.*?)'", message):
        near = difflib.get_close_matches(match[1], COMMANDS, 1)
        hint = f"did you mean {near[0]}?" if near else f"commands are {', '.join(COMMANDS)}"
        return f"unknown command {match[1]!r}; {hint}"
    if "subcommand" in message and "not provided" in message:
        return f"expected a command: {', '.join(COMMANDS)}; {usage}"
    match = re.search(r'Parser key "(\w+)"', message)
    if match and name and match[1] in COMMANDS[name].arguments:
        values = ["".join(found) for found in _FOUND.findall(message)]
        takes = _takes(COMMANDS[name].arguments[match[1]].annotation)
        found = _value(values[-1]) if values else "nothing"
        return f"expected {takes} for --{_dashed(match[1])}, found {found}; {usage}"
    return f"{message}; {usage}"


def _unknown(word: str, name: str) -> str:
    if not word.startswith("-"):
        return f"unexpected argument {word!r}"
    option, command = word.partition("=")[0], COMMANDS.get(name)
    arguments, positional = (command.arguments, command.positional) if command else ((), ())
    if (given := option.lstrip("-").replace("-", "_")) in positional:
        return f"{given.upper()} is given without {option}, by its place"
    near = difflib.get_close_matches(
        _dashed(option), [f"--{_dashed(n)}" for n in arguments if n not in positional], 1
    )
    return f"unknown option {_dashed(word)}{f', did you mean {near[0]}?' if near else ''}"


_FOUND = re.compile(
    r"(?:Given|Got) value: (.*)|: (\S+) does not conform|base 10: '(.*)'|string to float: '(.*)'"
)
"""Where jsonargparse says which value it found."""


def _value(text: str) -> str:
    """A value as the user wrote it; jsonargparse shows ``--a.b c`` as NestedArg(key='b', val='c')."""
    nested = re.match(r"NestedArg\(key='(.*)', val='(.*)'\)", text)
    return repr(nested[2] if nested else text)


def _takes(annotation: Any) -> str:
    """A type, in words."""
    if typing.get_origin(annotation) is Literal:
        return f"one of {', '.join(typing.get_args(annotation))}"
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return _takes(next(a for a in typing.get_args(annotation) if a is not types.NoneType))
    origin = typing.get_origin(annotation) or annotation
    words = {
        PositiveInt: "a whole number above 0",
        NonNegativeInt: "a whole number, 0 or more",
        PositiveFloat: "a number above 0",
        NonNegativeFloat: "a number, 0 or more",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "names with values",
    }
    return words.get(origin, "text")
