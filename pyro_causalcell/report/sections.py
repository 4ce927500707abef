"""The parts of the page, each a function of computed data that returns HTML."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr

from pyro_causalcell import plot
from pyro_causalcell.baselines import average_conditions
from pyro_causalcell.report import html
from pyro_causalcell.report.summary import join, plain, shared_programmes

__all__ = [
    "calibration_section",
    "checks_section",
    "comparison_section",
    "effects_section",
    "graph_section",
    "likelihood_section",
    "programmes_section",
    "settings_section",
    "summary_section",
    "training_section",
]

_SHOWN = 60  # perturbations drawn before those without an edge are left to the table


def summary_section(
    sentences: Sequence[str], evidence: Sequence[str], caveats: Sequence[str], sizes: Mapping[str, str]
) -> str:
    """What was found, how far to trust it, and what to keep in mind.

    Args:
        sentences: Findings, one a programme.
        evidence: How well the model predicts.
        caveats: What a reader must know before quoting a number.
        sizes: Big numbers: label to value.
    """
    found = html.items(sentences) if sentences else html.paragraph("No perturbation has an open edge.")
    return (
        html.tiles(sizes)
        + found
        + "<h3>How far to trust it</h3>"
        + html.items(evidence)
        + "<h3>Before quoting a number</h3>"
        + html.items(caveats)
    )


def settings_section(sentences: Sequence[str], settings: Mapping[str, object]) -> str:
    """What was fitted, in words, and every setting in a table.

    Args:
        sentences: Description.
        settings: Name to value.
    """
    frame = pd.DataFrame({"setting": list(settings), "value": [str(v) for v in settings.values()]})
    body = "".join(html.paragraph(sentence) for sentence in sentences)
    return body + html.details("All settings", html.table(frame))


def training_section(history: pd.DataFrame) -> str:
    """Training curves of ``Fit.history``."""
    caption = (
        "Loss per epoch on training and validation cells, and the size of each term. The loss is the "
        "negative ELBO: lower is better. The first epochs may lie above the frame."
    )
    return html.figure(plot.training_curve(history), caption)


def graph_section(graph: pd.DataFrame) -> str:
    """Perturbations by programmes as a figure and as a table.

    Args:
        graph: Columns perturbation, programme, probability, effect, effect_sd.
    """
    if graph.empty:
        return html.paragraph("Perturbations move no programme in this model.")
    best = graph.groupby("perturbation", sort=False)["probability"].max()
    hidden = list(best.index[best <= 0.5]) if len(best) > _SHOWN else []
    drawn = graph[~graph["perturbation"].isin(hidden)]
    caption = (
        "Area: probability that the perturbation shifts the programme. Colour: by how much, in standard "
        "deviations of the programme in the control state. Edges more likely than not are ringed. "
        "The sign of a programme is arbitrary; equal colours in one column mean equal direction."
    )
    if hidden:
        caption += f" {len(hidden)} perturbations without a likely edge are in the table only."
    if drawn.empty:
        picture = html.paragraph("No perturbation has an edge more likely than not.")
    else:
        picture = html.figure(plot.graph_heatmap(drawn), caption)
    rows = graph.sort_values("probability", ascending=False, kind="stable")
    rows = rows.rename(columns={"effect_sd": "effect s.d."})
    formats = {"probability": "{:.3f}".format, "effect": "{:+.2f}".format, "effect s.d.": "{:.2f}".format}
    return picture + "<h3>All edges</h3>" + html.table(rows, formats)


def programmes_section(loadings: pd.DataFrame, graph: pd.DataFrame) -> str:
    """Top genes of the programmes that perturbations move, and of the others on a click.

    Args:
        loadings: Programme by gene, signed, in standard deviations of the gene.
        graph: Columns perturbation, programme, probability, effect.
    """
    used = list(shared_programmes(graph, 0.5))
    idle = [name for name in loadings.index if name not in used]
    body = html.paragraph(
        "Genes whose change stands out most when one programme rises by one unit (a standard deviation in "
        "the control state), all others held. Orange rises, blue falls; turn every sign of a panel and the "
        "programme is the same."
    )
    if used:
        members = [f"{plain(name)}: {join(hit)}" for name, hit in shared_programmes(graph, 0.5).items()]
        caption = f"Moved by at least one perturbation. {'; '.join(members)}."
        body += html.figure(plot.top_genes(loadings, used), caption)
    if idle:
        caption = (
            "Programmes that no perturbation is likely to move: variation among all cells, or, where all "
            "bars are near zero, programmes that the model does not use."
        )
        body += html.details(
            f"{len(idle)} programmes that no perturbation moves",
            html.figure(plot.top_genes(loadings, idle), caption),
        )
    return body


def effects_section(effects: xr.Dataset | None, interval: float, *, controls: bool = True) -> str:
    """Genes each perturbation changes most, with intervals.

    Args:
        effects: What ``predict.effects`` returns, for the conditions to show; None if there are none.
        interval: Probability of the intervals.
        controls: Whether control cells were trained on.
    """
    against = "control" if controls else "the model's control state"
    unmeasured = "" if controls else " (no perturbation), which was not measured here"
    body = html.paragraph(
        f"Change of expected expression against {against}{unmeasured}, for the perturbations with a likely "
        f"edge. Lines are {interval:.0%} intervals of the posterior: they cover what the model is unsure of, "
        "not cell-to-cell spread and not errors of the model itself. Genes are ranked by the end of the "
        "interval nearer to zero."
    )
    if effects is None:
        return body + html.paragraph("There are none.")
    conditions = [str(c) for c in effects["condition"].values]
    figures = [html.figure(plot.effect_intervals(effects, c), f"{c} against {against}") for c in conditions]
    first, rest = figures[:9], figures[9:]
    more = html.details(f"{len(rest)} more perturbations", html.figure_row(rest)) if rest else ""
    return body + html.figure_row(first) + more


def checks_section(checks: Mapping[str, np.ndarray], table: pd.DataFrame, unit: str, cells: str) -> str:
    """Predictive checks: cells drawn from the model beside observed cells.

    Args:
        checks: The array arguments of ``plot.predictive_checks``.
        table: What ``evaluate.check`` returns.
        unit: Of the data.
        cells: Which cells were compared, in words.
    """
    caption = (
        f"Cells drawn from the fitted model beside {cells}. Points on the dashed line, and histograms that "
        "cover each other, mean that the model makes cells like the real ones."
    )
    surprise = (table["p_value"] - 0.5).abs()
    rows = table.assign(statistic=table["statistic"].str.replace("_", " "))
    rows = rows.iloc[surprise.argsort(kind="stable")[::-1]].rename(
        columns=lambda name: name.replace("_", " ")
    )
    text = (
        "The same by condition, most surprising first. The p-value is the share of replicated data sets "
        "above the observed value: near 0 or 1 the model gets that statistic wrong there."
    )
    return html.figure(plot.predictive_checks(**checks, unit=unit), caption) + html.details(
        "Check by condition", html.paragraph(text) + html.table(rows)
    )


def calibration_section(coverage: pd.DataFrame, cells: str) -> str:
    """How often predictive intervals hold the observed values.

    Args:
        coverage: Columns values, nominal, observed.
        cells: Which cells were compared, in words.
    """
    curves = {
        str(name): (rows["nominal"].to_numpy(), rows["observed"].to_numpy())
        for name, rows in coverage.groupby("values", sort=False)
    }
    caption = (
        f"Share of observed values of {cells} that lie inside the model's predictive intervals. On the "
        "diagonal an interval holds what it promises; below it, the model is too sure of itself. Means of "
        "a gene over the cells of a condition are the harder test: they show whether effects are right."
    )
    percent = "{:.1%}".format
    wide = coverage.pivot(index="nominal", columns="values", values="observed")[list(curves)].reset_index()
    numbers = html.table(wide, {str(column): percent for column in wide})
    return html.figure_row([html.figure(plot.reliability(curves), caption), numbers])


def likelihood_section(likelihood: xr.Dataset, n_particles: int, cells: str) -> str:
    """Importance-weighted negative log-likelihood, and whether it can be trusted.

    Args:
        likelihood: What ``evaluate.iw_nll`` returns: nll, pareto_k, ess and mc_se of each cell.
        n_particles: Draws per cell.
        cells: Which cells were scored, in words.
    """
    nll, k = likelihood["nll"].values, np.nan_to_num(likelihood["pareto_k"].values, nan=np.inf)
    se = float(nll.std(ddof=1) / np.sqrt(len(nll)))
    bad = float((k > 0.7).mean())  # not finite: too few draws to say, so not reliable
    sizes = {
        "nats per cell (mean)": f"{nll.mean():.1f}",
        "standard error over cells": f"{se:.1f}",
        "Monte Carlo error of a cell": f"{float(np.median(likelihood['mc_se'].values)):.2f}",
        "effective draws of a cell": f"{float(np.median(likelihood['ess'].values)):.0f} of {n_particles}",
        "cells with Pareto k above 0.7": f"{bad:.1%}",
    }
    verdict = (
        "The estimate is reliable for almost all cells."
        if bad < 0.05
        else "For the cells above the line the estimate is too high by an unknown amount. Do not compare "
        "models by it; raise the number of draws, or improve the guide."
    )
    caption = f"Pareto k of the importance weights of {cells}."
    text = (
        "How improbable the model finds an unseen cell: lower is better, and only comparable on the same "
        f"cells and genes. Estimated with {n_particles} draws per cell. Medians are shown for the errors "
        "and draws."
    )
    note = html.paragraph(verdict, "" if bad < 0.05 else "warn")
    return html.paragraph(text) + html.tiles(sizes) + note + html.figure(plot.pareto_k(k), caption)


def comparison_section(scores: pd.DataFrame, cells: str, *, seen: bool, model: str = "model") -> str:
    """The model beside the baselines and the technical duplicate.

    Args:
        scores: Columns method, condition, metric, value (``baselines.score_predictors``).
        cells: Which cells were predicted, in words.
        seen: Whether other cells of every one of these conditions were trained on.
        model: Name of the model among the methods.
    """
    if scores.empty:
        return html.paragraph(f"No perturbed condition has enough of the {cells} to compare means.")
    controls = "control mean" in set(scores["method"])
    own = "matching mean and additive" if controls else "matching mean"
    text = (
        f"Mean expression of {cells}, predicted from the training cells. "
        f"{'Control mean says that nothing changes; perturbed' if controls else 'Perturbed'} mean says that "
        f"all perturbations do the same; {own} {'use' if controls else 'uses'} the training cells of the "
        "same perturbation (for a combination, of its parts). The technical "
        "duplicate is the other half of the held-out cells: what repeating the experiment would score. It "
        "carries the noise of few cells, so methods that pool many can do better; the interpolated duplicate "
        "takes the perturbed mean where a gene's response is not sure. Ridge and elastic net are linear "
        "regressions on the targets. The perturbed genes themselves are not scored."
    )
    if seen:
        text += (
            f" Other cells of every condition here were trained on. So for single perturbations {own} "
            f"{'are' if controls else 'is'} as good as means can be, and a model shows its worth by coming "
            "close; to see it predict the unseen, hold out perturbations or combinations."
        )
    if not controls:
        text += (
            " The control mean, the additive baseline and the correlation of effects against control are "
            "left out, because they need control cells and none were trained on."
        )
    caption = "A dot is a condition; the large dot is the mean, the bar its 95 % bootstrap interval."
    average = average_conditions(scores)
    wide = average.pivot(index="method", columns="metric", values="mean")
    wide = wide.loc[
        list(dict.fromkeys(average["method"])), list(dict.fromkeys(average["metric"]))
    ].reset_index()
    wide.columns = [str(c).replace("_", " ") for c in wide.columns]
    formats = {str(c): "{:.4f}".format if c == "rmse" else "{:.3f}".format for c in wide.columns}
    return (
        html.paragraph(text)
        + html.figure(plot.compare_methods(scores, [model]), caption)
        + html.table(wide, formats)
    )
