"""One self-contained page per run."""

import datetime
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

import pyro_causalcell
from pyro_causalcell.batch import Dims
from pyro_causalcell.data import Screen, read_gmt
from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import DataError
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.fitted import atomic_write
from pyro_causalcell.report import html
from pyro_causalcell.report import sections as parts
from pyro_causalcell.report.evidence import ALL_CELLS, INTERVAL, Blocks, Evidence, control_rows, gather
from pyro_causalcell.report.over_time import (
    OverTime,
    effects_over_time_section,
    lagged_section,
    trajectories_section,
)
from pyro_causalcell.report.ranks import Ranks, read_ranks, sbc_command
from pyro_causalcell.report.summary import (
    caveats,
    join,
    shared_programmes,
    summarise_calibration,
    summarise_graph,
    summarise_scores,
)

__all__ = ["render", "write_report"]


def write_report(
    fit: Fit,
    data: ad.AnnData | Screen,
    path: str | Path,
    *,
    sbc: str | Path | None = None,
    gmt: str | Path | None = None,
    n_particles: int = 200,
    seed: int = 0,
) -> Path:
    """Write a page about a fit that opens from disk in any browser, without a network.

    The page has: what was found in sentences; the graph of perturbations and programmes; genes of programmes,
    and gene sets they hold; effects with intervals; kinds of the doubles, if there are any; held-out means
    beside all baselines, with scores between a floor and a ceiling; predictive checks by statistic and
    condition; calibration of intervals per class of genes; the audit of the design; simulation-based
    calibration if it was run; likelihood; training. Of a model that follows cells over time it also has the
    lagged graph, courses of programmes, and effects at each time. Each part says what its numbers mean and
    when to distrust them. Its tables sort, and filter by perturbation, with a script in the page; without
    scripts everything is shown.

    Args:
        fit: The fit.
        data: The cells it was fitted on, all of them: the screen, or the AnnData.
        path: The HTML file; an older file stays until the new one is whole.
        sbc: Folder that ``pyro-causalcell sbc`` wrote for the same pair; without it the page says how to make
            one.
        gmt: GMT file with gene sets to look for among the genes of programmes.
        n_particles: Draws per cell of the importance-weighted likelihood.
        seed: Of every random choice; the same seed gives the same numbers.

    Returns:
        The path.

    Raises:
        DataError: ``data`` are not the fitted cells, the folder ``sbc`` lacks a file or is of another model,
            ``gmt`` holds no gene sets of these genes, or the file cannot be written.
        CausalCellError: Gene sets were given, and gseapy is not installed.
    """
    screen = data if isinstance(data, Screen) else Screen.from_spec(fit.screen, data)
    path = Path(path)
    ranks = None if sbc is None else read_ranks(sbc, fit)
    gene_sets = None if gmt is None else read_gmt(gmt)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # before the work, so that a bad place is said at once
        evidence = gather(fit, screen, n_particles, seed, gene_sets)
        atomic_write(path, render(fit, screen, evidence, ranks))
    except OSError as error:
        raise DataError(f"the report cannot be written to {path}: {error}; choose another place.") from error
    return path


def render(fit: Fit, screen: Screen, evidence: Evidence, ranks: Ranks | None = None) -> str:
    """The page, from what was computed."""
    unit = "counts" if screen.is_counts else "log-normalised"
    graph, seen = evidence.graph, _all_seen(fit, screen, evidence)
    controls = len(control_rows(fit, screen)) > 0
    together, over = _of_all_cells(evidence), evidence.over_time
    sections = {
        "Summary": parts.summary_section(
            summarise_graph(graph, evidence.effects),
            _trust(evidence, seen),
            caveats(
                screen.n_genes,
                panel_totals=screen.is_counts and fit.screen.library is None,
                controls=controls,
            ),
            _sizes(fit, graph),
        ),
        "What was fitted": parts.settings_section(
            _describe(fit, evidence.signatures.sizes["programme"]), _flat(_settings(fit))
        ),
        "Perturbations and programmes": parts.graph_section(graph, over_time=over is not None),
        **({} if over is None else _over_time(over, graph, screen.is_counts)),
        "Genes of programmes": parts.programmes_section(evidence.signatures, graph, evidence.enrichment),
        **({} if evidence.blocks is None else {"Blocks": _blocks(evidence.blocks)}),
        "Effects": parts.effects_section(
            evidence.effects, INTERVAL, controls=controls, when="" if over is None else _last(fit, over)
        ),
        **({} if evidence.doubles is None else {"Doubles": parts.doubles_section(evidence.doubles)}),
        "Baselines": parts.comparison_section(
            evidence.scores, evidence.held_out.words, seen=seen, over_time=over is not None
        ),
        "Predictive checks": parts.checks_section(
            evidence.checks, evidence.check_table, unit, evidence.checked.words, evidence.n_replicates
        ),
        "Calibration": parts.calibration_section(evidence.calibration, together, evidence.calibrated.words),
        "Likelihood": parts.likelihood_section(
            evidence.likelihood, evidence.n_particles, evidence.weighed.words
        ),
        "Design audit": parts.audit_section(evidence.audit),
        "Simulation-based calibration": parts.ranks_section(ranks, sbc_command(fit)),
        "Training": parts.training_section(fit.history),
    }
    title = f"{len(fit.screen.targets)} perturbations, {len(shared_programmes(graph))} programmes"
    subtitle = f"{type(fit.model).__name__} fitted to {screen.n_cells:,} cells and {screen.n_genes:,} genes"
    today = datetime.date.today().isoformat()
    footer = f"pyro_causalcell {pyro_causalcell.__version__}, {today}"
    return html.page(title, subtitle, sections, footer)


def _blocks(blocks: Blocks) -> str:
    return parts.blocks_section(blocks.parts, blocks.conditions.tolist(), blocks.table, blocks.cells.words)


def _over_time(over: OverTime, graph: pd.DataFrame, is_counts: bool) -> dict[str, str]:
    """The sections of a fit that follows cells over time."""
    units = "log1p CP10k" if is_counts else "normalised values"
    return {
        "Lagged graph": lagged_section(over.lagged, graph),
        "Programmes over time": trajectories_section(over),
        "Effects over time": effects_over_time_section(over.effects, over.compared, over.unit, units),
    }


def _last(fit: Fit, over: OverTime) -> str:
    """Where effects are shown, in words."""
    return f"at {over.unit} {fit.dims.times[-1]:g}, the last snapshot"


def _sizes(fit: Fit, graph: pd.DataFrame) -> dict[str, str]:
    best = graph.groupby("perturbation")["probability"].max()
    sure = int((best > 0.9).sum())
    return {
        "cells trained on": f"{len(fit.split.train):,}",
        "genes": f"{len(fit.screen.genes):,}",
        "perturbations": f"{len(fit.screen.targets)}",
        "with an effect (probability above 0.9)": f"{sure}",
        "programmes they move": f"{len(shared_programmes(graph))}",
    }


def _all_seen(fit: Fit, screen: Screen, evidence: Evidence) -> bool:
    trained = {screen.conditions[i] for i in np.unique(screen.condition_n[fit.split.train])}
    return set(evidence.scores["condition"]) <= trained


def _of_all_cells(evidence: Evidence) -> pd.DataFrame:
    return evidence.check_table[evidence.check_table["condition"] == ALL_CELLS]


def _trust(evidence: Evidence, seen: bool) -> list[str]:
    """How well the model predicts, in sentences."""
    sentences = summarise_scores(evidence.scores, seen=seen) if len(evidence.scores) else []
    sentences.append(summarise_calibration(evidence.calibration, _of_all_cells(evidence)))
    bad = 1 - float((evidence.likelihood["pareto_k"].values <= 0.7).mean())
    sentences.append(
        f"The likelihood of a held-out cell is {evidence.likelihood['nll'].values.mean():.1f} nats "
        f"(negative log); the estimate is unreliable for {bad:.0%} of cells."
    )
    return sentences


def _describe(fit: Fit, n_programmes: int) -> list[str]:
    """What was fitted, in words."""
    spec, split = fit.screen, fit.split
    story = (inspect.getdoc(type(fit.model)) or "").split("\n", 1)[0]
    last = fit.history.index[-1] + 1 if len(fit.history) else 0
    data = f"layer {spec.layer!r}" if spec.layer else "X"
    named = join([repr(name) for name in spec.control or [CONTROL]])
    control = f"with {named} as control" if spec.condition_cells[CONTROL] else "without control cells"
    covariates = f" The decoder sees {join(spec.batch)}." if spec.batch else ""
    sentences = [
        f"Model {type(fit.model).__name__} with {n_programmes} programmes, guide {type(fit.guide).__name__}. "
        f"{story}",
        f"Perturbations were read from obs[{spec.perturbation!r}], {control}; values from {data} "
        f"({'counts' if spec.is_counts else 'normalised values'}).{covariates}",
        f"{len(split.train):,} cells trained the model, {len(split.validation):,} chose when to stop and "
        f"{len(split.test):,} were kept for testing (split {split.name!r}). Training ran {last} epochs; the "
        f"weights with the lowest validation loss were kept. Seed {fit.seed}.",
    ]
    return sentences if fit.finished else [*sentences, f"Note: {fit.interruption}."]


def _settings(fit: Fit) -> dict[str, Any]:
    """Every setting, those left at their defaults too; sizes are said elsewhere."""
    settings = dict(fit.settings)
    for kind, module in (("model", fit.model), ("guide", fit.guide)):
        chosen = settings[kind]["settings"]
        if chosen is None:
            settings[kind] = f"{type(module).__name__}, built by the user"
            continue
        arguments = inspect.signature(type(module)).parameters.values()
        defaults = {a.name: a.default for a in arguments if a.default is not a.empty}
        shown = {name: value for name, value in {**defaults, **chosen}.items() if name not in Dims._fields}
        settings[kind] = {"source": settings[kind]["source"], **shown}
    return settings


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Nested settings with dotted names."""
    flat: dict[str, object] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
