"""The parts of the page, each a function of computed data that returns HTML."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyro_causalcell import plot
from pyro_causalcell.baselines import Comparison, average_conditions
from pyro_causalcell.baselines.compare import CEILING, FLOOR, MEASURES
from pyro_causalcell.epistasis import SATURATION
from pyro_causalcell.evaluate import Audit, Calibration
from pyro_causalcell.report import html
from pyro_causalcell.report.ranks import Ranks
from pyro_causalcell.report.summary import decimals, dispersion_sentence, join, plain, shared_programmes

__all__ = [
    "audit_section",
    "blocks_section",
    "calibration_section",
    "checks_section",
    "comparison_section",
    "doubles_section",
    "effects_section",
    "graph_section",
    "likelihood_section",
    "programmes_section",
    "ranks_section",
    "settings_section",
    "summary_section",
    "training_section",
]

_SHOWN = 60  # perturbations drawn before those without an edge are left to the table
_LISTED = 10  # genes of a perturbation in the table of effects
_FDR = 0.05  # below which a gene set is named
_DRAWN = ["rmse", "pearson_control", "pearson_perturbed"]  # metrics with a panel of their own
_SYMBOLS = {"ok": "✓ ok", "warning": "! warning", "fails": "✗ fails", "unknown": "? unknown"}


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


def graph_section(graph: pd.DataFrame, *, over_time: bool = False) -> str:
    """Perturbations by programmes as a figure and as a table.

    Args:
        graph: Columns perturbation, programme, probability, effect, effect_sd; cut where perturbations cut
            programmes off their parents.
        over_time: Whether a shift is that of one step.
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
    if over_time:
        caption += (
            " A shift is what the perturbation adds in every step; what it comes to over time is shown below."
        )
    if hidden:
        caption += f" {len(hidden)} perturbations without a likely edge are in the table only."
    if drawn.empty:
        picture = html.paragraph("No perturbation has an edge more likely than not.")
    else:
        picture = html.figure(plot.graph_heatmap(drawn), caption)
    rows = graph.sort_values("probability", ascending=False, kind="stable")
    text = (
        "Every perturbation with every programme. Type a name to see its rows alone; a click at a column's "
        "head sorts. Distrust an effect whose probability is low: it says how far the shift would be if it "
        "were there."
    )
    if "cut" in graph:
        text += " Cut: the probability that the perturbation cuts the programme off from its parents."
    if "masks" in graph:
        text += (
            " Masks: the share that it takes away of what other perturbations of a cell do to the programme."
        )
    if SATURATION in graph.attrs:
        of_two = 2 ** (1 / (1 + graph.attrs[SATURATION]))
        text += f" Two perturbations with equal effects on a programme make {of_two:.2f} times one of them."
    rows = rows.rename(columns={"effect_sd": "effect s.d."})
    formats = {"probability": "{:.3f}".format, "effect": "{:+.2f}".format, "effect s.d.": "{:.2f}".format}
    formats |= dict.fromkeys(("cut", "masks"), "{:.3f}".format)
    label = "Filter by perturbation or programme"
    return picture + "<h3>All edges</h3>" + html.paragraph(text) + html.table(rows, formats, label=label)


def programmes_section(
    signatures: xr.Dataset, graph: pd.DataFrame, enrichment: pd.DataFrame | None = None
) -> str:
    """Top genes of the programmes that perturbations move, and of the others on a click; gene sets they hold.

    Args:
        signatures: What ``evaluate.programme_signatures`` returns.
        graph: Columns perturbation, programme, probability, effect.
        enrichment: What ``evaluate.enrichment`` returns; None without gene sets.
    """
    standardised = signatures["standardised"].to_pandas()
    used = list(shared_programmes(graph, 0.5))
    idle = [name for name in standardised.index if name not in used]
    body = html.paragraph(
        "Genes whose change stands out most when one programme goes from one standard deviation below its "
        "mean in control cells to one above, all others held. Orange rises, blue falls; turn every sign of a "
        "panel and the programme is the same."
    )
    if used:
        members = [f"{plain(name)}: {join(hit)}" for name, hit in shared_programmes(graph, 0.5).items()]
        caption = f"Moved by at least one perturbation. {'; '.join(members)}."
        body += html.figure(plot.top_genes(standardised, used, unit=_CHANGE), caption)
    if idle:
        caption = (
            "Programmes that no perturbation is likely to move: variation among all cells, or, where all "
            "bars are near zero, programmes that the model does not use."
        )
        body += html.details(
            f"{len(idle)} programmes that no perturbation moves",
            html.figure(plot.top_genes(standardised, idle, unit=_CHANGE), caption),
        )
    caption = "The genes that lead each programme, in all programmes: what two share shows in both columns."
    shared = html.figure(plot.signature_heatmap(standardised, unit=_CHANGE), caption)
    rows = html.table(_leading(signatures), {"change": "{:+.3f}".format, _CHANGE_SD: "{:+.2f}".format})
    text = (
        f"The {_LISTED} leading genes of each programme. Change: of the expected expression, in "
        f"{signatures.attrs['change_units']}."
    )
    body += html.details("Genes that programmes share", shared)
    body += html.details("The leading genes in numbers", html.paragraph(text) + rows)
    return body if enrichment is None else body + _enrichment(enrichment, used)


_CHANGE = "change from low to high (s.d. of the gene)"
_CHANGE_SD = "in s.d. of the gene"


def _leading(signatures: xr.Dataset) -> pd.DataFrame:
    """The genes of each programme whose change stands out most."""
    frame = signatures[["change", "standardised"]].to_dataframe().reset_index()
    order = frame["standardised"].abs().sort_values(ascending=False, kind="stable").index
    frame = frame.loc[order].groupby("programme", sort=False).head(_LISTED)
    place = {name: i for i, name in enumerate(signatures["programme"].values)}
    frame = frame.sort_values("programme", key=lambda c: c.map(place), kind="stable")
    return frame[["programme", "gene", "change", "standardised"]].rename(columns={"standardised": _CHANGE_SD})


def _enrichment(table: pd.DataFrame, used: Sequence[str]) -> str:
    """Gene sets at the ends of the programmes' ranked genes."""
    found = table[table["fdr"] < _FDR]
    few = []
    for name, rows in found[found["programme"].isin(used)].groupby("programme", sort=False):
        first = [
            f"{row.gene_set} {'rises' if row.score > 0 else 'falls'}" for row in rows.head(3).itertuples()
        ]
        few.append(f"{plain(name)}: {join(first)}.")
    text = (
        "All genes of the screen were ranked by each programme's change, and each gene set asked whether its "
        "measured genes gather at one end. The score is positive where they rise with the programme. FDR: "
        "the share of false finds among the sets of one programme with a score this large. Only genes of the "
        "screen count, so a small panel finds little."
    )
    said = html.items(few) if few else html.paragraph(f"No set has an FDR below {_FDR} in a moved programme.")
    names = {"gene_set": "gene set", "n_genes": "genes", "p_value": "p-value", "fdr": "FDR"}
    rows = table.rename(columns={**names, "leading_genes": "leading genes"})
    formats = {"score": "{:+.2f}".format, "genes": "{:.0f}".format, "FDR": "{:.3f}".format}
    return f"<h3>Gene sets</h3>{html.paragraph(text)}{said}{html.table(rows, formats)}"


def doubles_section(table: pd.DataFrame) -> str:
    """Kinds of interaction of the doubles, as the cells show them and as the model predicts them.

    Args:
        table: What ``evaluate.classify_doubles`` returns.
    """
    text = (
        "What two perturbations do together, beside the sum of what they do alone. Additive: the sum, "
        "within a fifth. Suppressed: much shorter than the longer of the two. Saturated: both push the "
        "same way and together less than the sum. Dominant: one of the two effects is gone. New programme: "
        "something that no mixture of the two makes. The noise of the means is taken off; the targets' own "
        "genes are left out."
    )
    known = table[table["kind"] != "unknown"]
    caption = (
        "Each double by its distance from the sum and the length of its effect. Below the dashed line the "
        "effects add; above it and left of the dotted line the double is suppressed."
    )
    body = html.paragraph(text) + html.items(_kinds(table))
    if len(known):
        body += html.figure(plot.interaction_map(known), caption)
    read = (
        "Agreement: the share of resamples of the genes with the same kind; below 0.9 do not build on the "
        "kind. A pair of which one target does next to nothing is additive, and that says nothing. A model "
        "that was trained on a double has seen what it predicts here. Unknown: control, a single or the "
        "double itself was not measured."
    )
    formats = {name: "{:.2f}".format for name in table.columns if pd.api.types.is_float_dtype(table[name])}
    columns = {name: name.replace("_", " ") for name in table}
    rows = table.drop(columns=["first", "second"]).rename(columns=columns)
    numbers = html.table(rows, {columns[name]: write for name, write in formats.items()})
    return body + html.paragraph(read, "note") + html.details("All doubles in numbers", numbers)


def blocks_section(
    blocks: Mapping[str, NDArray[np.float64]], conditions: Sequence[str], table: pd.DataFrame, cells: str
) -> str:
    """Whether the invariant block mixes perturbations.

    Args:
        blocks: Name -> programmes of some cells, the responsive block last.
        conditions: Their conditions.
        table: What ``evaluate.mixing`` returns.
        cells: What the cells are, in words.
    """
    text = (
        "The invariant programmes should be the same under every perturbation, the responsive ones should "
        f"not. Measured on {cells}. Classifier: the area under the ROC curve of telling a cell's "
        "perturbation from a block; 0.5 is not at all. Silhouette: 0 or below is mixed. Neighbours: how "
        "often a cell's nearest neighbours carry its own perturbation, as a multiple of chance; 1 is mixed. "
        "A block that says nothing of a cell mixes perfectly, so look at both; and responsive programmes "
        "are told apart the better for being inferred with the perturbation known."
    )
    sentences = [
        f"{row.block.capitalize()} programmes: classifier {row.auc:.2f}, silhouette {row.silhouette:.2f}, "
        f"neighbours {row.neighbours:.1f} times chance."
        for row in table.itertuples()
    ]
    caption = (
        "The same cells by each block (t-SNE, which shows neighbours and not distances). In colour: the "
        "perturbations whose responsive programmes are furthest from control's."
    )
    return (
        html.paragraph(text)
        + html.items(sentences)
        + html.figure(plot.block_maps(blocks, conditions), caption)
    )


def _kinds(table: pd.DataFrame) -> list[str]:
    """How many doubles of each kind each source has, and how often the two agree."""
    sentences = []
    for source, rows in table.groupby("source", sort=False):
        counts = rows["kind"].value_counts()
        sentences.append(f"{source}: {join([f'{n} {kind}' for kind, n in counts.items()])}.".capitalize())
    kinds = table[table["kind"] != "unknown"].pivot(index="double", columns="source", values="kind")
    if {"measured", "predicted"} <= set(kinds):
        both = kinds.dropna()
        same = int((both["measured"] == both["predicted"]).sum())
        sentences.append(f"The model gives the measured kind of {same} of {len(both)} doubles.")
    return sentences


def effects_section(
    effects: xr.Dataset | None, interval: float, *, controls: bool = True, when: str = ""
) -> str:
    """Genes each perturbation changes most, with intervals.

    Args:
        effects: What ``predict.effects`` returns, for the conditions to show; None if there are none.
        interval: Probability of the intervals.
        controls: Whether control cells were trained on.
        when: The time of the effects, in words; empty for models without time.
    """
    against = "control" if controls else "the model's control state"
    unmeasured = "" if controls else " (no perturbation), which was not measured here"
    body = html.paragraph(
        f"Change of expected expression against {against}{unmeasured}{when and f' {when}'}, for the "
        f"perturbations with a likely edge. Lines are {interval:.0%} intervals of the posterior: they cover "
        "what the model is unsure of, not cell-to-cell spread and not errors of the model itself. Genes "
        "are ranked by the end of the interval nearer to zero."
    )
    if effects is None:
        return body + html.paragraph("There are none.")
    conditions = [str(c) for c in effects["condition"].values]
    figures = [
        html.figure(plot.effect_intervals(effects, c), f"{c} against {against}", name=c) for c in conditions
    ]
    first, rest = figures[:9], figures[9:]
    more = html.details(f"{len(rest)} more perturbations", html.figure_row(rest)) if rest else ""
    rows = html.table(_strongest(effects), {name: "{:+.2f}".format for name in _ENDS}, label="")
    unit = effects.attrs.get("gene_units", "log2 fold change")
    text = (
        f"The {_LISTED} genes that each perturbation changes most surely, in {unit}. Where the interval "
        "holds zero, not even the direction is known."
    )
    listed = f"<h3>The same in numbers</h3>{html.paragraph(text)}{rows}"
    return body + html.filtered(html.figure_row(first) + more + listed, "Filter by perturbation or gene")


_ENDS = {"effect": "gene_effect", "lower end": "gene_low", "upper end": "gene_high"}


def _strongest(effects: xr.Dataset) -> pd.DataFrame:
    """The genes of each perturbation whose intervals stay furthest from zero, and then the largest."""
    frame = effects[list(_ENDS.values())].to_dataframe().reset_index()
    low, high = frame["gene_low"], frame["gene_high"]
    frame["sure"] = np.where(low * high > 0, np.minimum(low.abs(), high.abs()), 0.0)
    frame["size"] = frame["gene_effect"].abs()
    frame = frame.sort_values(["sure", "size"], ascending=False, kind="stable")
    frame = frame.groupby("condition", sort=False).head(_LISTED)
    order = {name: i for i, name in enumerate(effects["condition"].values)}
    frame = frame.sort_values("condition", key=lambda c: c.map(order), kind="stable")
    names = {"condition": "perturbation", "gene": "gene", **{old: new for new, old in _ENDS.items()}}
    return frame[list(names)].rename(columns=names)


def checks_section(
    checks: Mapping[str, np.ndarray], table: pd.DataFrame, unit: str, cells: str, n_replicates: int
) -> str:
    """Predictive checks: cells drawn from the model beside observed cells.

    Args:
        checks: The array arguments of ``plot.predictive_checks``.
        table: What ``evaluate.check`` returns, of all cells and of each condition.
        unit: Of the data.
        cells: Which cells were compared, in words.
        n_replicates: Replicated data sets.
    """
    caption = (
        f"Cells drawn from the fitted model beside {cells}. Points on the dashed line, and histograms that "
        "cover each other, mean that the model makes cells like the real ones."
    )
    outside = (table["observed"] < table["low"]) | (table["observed"] > table["high"])
    defined = table["p_value"].notna()
    text = (
        f"Each statistic was computed on the real cells and on {n_replicates} copies of them that the model "
        "drew for the same perturbations, libraries and batches. The p-value is the share of copies above "
        "the real value: near 0 or 1 the model gets that statistic wrong there. Of a perfect model one in "
        f"ten lies outside the 90% interval of the copies; here {int(outside[defined].sum())} of "
        f"{int(defined.sum())} do. With few cells the interval is wide, so to be inside says little; with "
        "thousands even a harmless flaw lies outside, so look at how far."
    )
    drawn = (
        "Dots: real cells of a group; grey bars: 90% of the copies. Dispersion is how much more genes vary "
        "than counting noise; zero fraction is the share of zeros among all values."
        if unit == "counts"
        else "Dots: real cells of a group; grey bars: 90% of the copies."
    )
    surprise = (table["p_value"] - 0.5).abs()
    rows = table.assign(statistic=table["statistic"].str.replace("_", " "))
    rows = rows.loc[surprise.sort_values(ascending=False, kind="stable").index]
    rows.columns = [_CHECK_COLUMNS.get(str(name), str(name)) for name in rows]
    numbers = html.table(
        rows,
        {"cells": "{:.0f}".format, "p-value": "{:.2f}".format},
        label="Filter by perturbation or statistic",
    )
    return (
        html.figure(plot.predictive_checks(**checks, unit=unit), caption)
        + "<h3>By statistic and condition</h3>"
        + html.paragraph(text)
        + html.figure(plot.predictive_statistics(table), drawn)
        + html.details("All p-values, most surprising first", numbers)
    )


_CHECK_COLUMNS = {
    "n_cells": "cells",
    "observed": "real cells",
    "replicate_mean": "mean of copies",
    "low": "90% of copies from",
    "high": "to",
    "p_value": "p-value",
}


def calibration_section(measured: Calibration, checks: pd.DataFrame, cells: str) -> str:
    """Whether predictive intervals hold as many values as they promise, and whether errors are foreseen.

    Args:
        measured: What ``evaluate.calibration`` returns.
        checks: Rows of ``evaluate.check`` for all checked cells together.
        cells: Which cells were measured, in words.
    """
    text = (
        f"A 90% interval should hold 90 of 100 values. Each of {cells} was drawn {measured.n_samples} times "
        "for its perturbation, library and batch, and the real value was looked up among the draws. Genes "
        "are classed by the training cells: zero in more than nine of ten cells, and thirds of the others."
    )
    holds = not measured.misses
    verdict = "Calibrated: 90% intervals hold 87 to 93% of the values in every class of genes."
    if not holds:
        said = join([f"{name} genes hold {what.replace(':', ',')}" for name, what in measured.misses.items()])
        verdict = (
            f"Miscalibrated. 90% intervals of {said}. Do not take the intervals of these genes as they are."
        )
    forgives = (
        "This verdict alone forgives a wrong model, because too narrow intervals of some genes and too wide "
        "ones of others cancel in a class: read it with the share of genes that are inside 87 to 93% "
        f"themselves, and with the dispersion. {dispersion_sentence(checks)}".rstrip()
    )
    classes = measured.classes.drop(columns=["interval_score"]).rename(columns=_CLASS_COLUMNS)
    percent = {name: "{:.1%}".format for name in classes if "interval" in name or "error" in name}
    formats = {**percent, "genes inside": "{:.0%}".format, "genes": "{:.0f}".format}
    numbers = html.table(classes, formats, label="")
    read = (
        "Genes inside: the share of genes whose own 90% interval holds 87 to 93%; with few cells it falls "
        "by chance alone (a gene's coverage is uncertain by "
        f"{100 * (0.09 / measured.n_cells) ** 0.5:.1f} points here). CRPS: mean error of the whole predicted "
        "distribution, in the units of the data; lower is better, and only comparable on the same cells. "
        "Dispersion: where most genes are nearly always zero, it is that of genes seen a few times."
    )
    off = (measured.classes["coverage_90"] - 0.9).abs()
    judged = measured.classes["gene_class"] != "all"
    worst = measured.classes.loc[off[judged].idxmax(), "gene_class"]
    two = measured.pit[measured.pit["gene_class"].isin(["all", worst])]
    pit_caption = (
        "Where real values fall among their draws: all genes, and the class that is furthest off. Flat at 1 "
        "is right; a hump means intervals too wide, high ends too narrow, a slope values too high or low."
    )
    risk_caption = (
        "Does the model know where it errs? Error of the predicted mean of a condition when the least "
        "certain conditions are left out first: the blue line should fall to the left, near the green one. "
        f"{_foreseen(measured)}"
    )
    figures = [
        html.figure(plot.pit(two), pit_caption),
        html.figure(plot.risk_coverage(measured.risk), risk_caption),
    ]
    every = html.figure(plot.pit(measured.pit), "The same for each class of genes.")
    return (
        html.paragraph(text)
        + html.paragraph(verdict, "good" if holds else "warn")
        + html.paragraph(forgives)
        + numbers
        + html.paragraph(read, "note")
        + html.figure_row(figures)
        + html.details("All classes of genes", every)
    )


_CLASS_COLUMNS = {
    "gene_class": "genes that are",
    "n_genes": "genes",
    **{f"coverage_{level}": f"in {level}% intervals" for level in (50, 80, 90, 95)},
    "se_90": "standard error of 90%",
    "genes_inside": "genes inside",
    "crps": "CRPS",
}


def _foreseen(measured: Calibration) -> str:
    n = len(measured.conditions)
    if np.isnan(measured.spearman):
        return f"With {n} conditions no correlation can be told."
    return (
        f"Over {n} conditions, error and uncertainty have a rank correlation of {measured.spearman:.2f}. "
        "Much of it is the number of cells: the mean of few is uncertain, and the model knows that."
    )


def audit_section(audit: Audit | None) -> str:
    """What the design can identify, with the fit's own graph.

    Args:
        audit: What ``evaluate.audit`` returns; None for control cells alone.
    """
    if audit is None:
        return html.paragraph(
            "All training cells are controls. Without perturbations single programmes cannot be told from "
            "mixtures of them, so name none."
        )
    frame = audit.to_frame()
    frame["status"] = frame["status"].map(_SYMBOLS)
    kinds = {"status": {text: status for status, text in _SYMBOLS.items()}}
    kind = frame.pop("kind")
    names = {
        "status": "status",
        "name": "what",
        "found": "found",
        "needed": "needed",
        "mend": "what would help",
    }
    frame = frame[list(names)].rename(columns=names)

    def part(which: str, *columns: str) -> str:
        return html.table(frame.loc[kind == which, ["status", *columns]], kinds=kinds, label="")

    counts = frame.loc[kind == "check", "status"].value_counts()
    said = join([f"{counts[text]} {text}" for text in _SYMBOLS.values() if text in counts])
    text = (
        f"Could these perturbations and cells show the programmes at all? {audit.title}. Result of the "
        f"checks: {said}. A failed check does not make an effect on genes wrong; it says that a single "
        "programme may be a mixture of others, so name such programmes with care."
    )
    legend = [
        f"{_SYMBOLS['ok']}: the design has it.",
        f"{_SYMBOLS['warning']}: in part, or only by an estimate, such as the graph of this very fit.",
        f"{_SYMBOLS['fails']}: the design does not have it; the last column says what would help.",
        f"{_SYMBOLS['unknown']}: these data cannot tell.",
    ]
    promises = (
        "What theory promises for each kind of model, if the assumptions below hold too. Read the line of "
        "the kind that was fitted; a promise is as good as the worst check that it rests on."
    )
    assumed = "No data of this kind can show these. Judge them by what you know of the experiment."
    return (
        html.paragraph(text)
        + html.items(legend)
        + part("check", "what", "found", "needed", "what would help")
        + "<h3>What that identifies</h3>"
        + html.paragraph(promises)
        + part("guarantee", "what", "found")
        + html.details(
            "What must be assumed",
            html.paragraph(assumed) + part("assumption", "what", "needed", "what would help"),
        )
    )


def ranks_section(ranks: Ranks | None, command: str | None) -> str:
    """Simulation-based calibration, or how to make it.

    Args:
        ranks: What was read; None if none was given.
        command: What makes it; None where it cannot be made.
    """
    if ranks is None and command is None:
        return html.paragraph(
            "Its simulated screens have no times, so it says nothing of a model that follows cells over "
            "time. See how far predicted effects over time agree with cells that were not trained on."
        )
    if ranks is None:
        return html.paragraph(
            f"Not run for this page. Make it with '{command}' (minutes to an hour), then write the report "
            "again with --sbc sbc (in Python: sbc='sbc')."
        )
    table = ranks.table
    bad = table[table["rejected"]]
    text = (
        f"Can the method find what the model itself has drawn? In {ranks.n_replicates} small simulated "
        "screens the true latents were ranked among draws of the fitted posterior. If posteriors are right, "
        "every rank is equally likely. The screens are simulated, so this tests the method and not your "
        "data; the settings are those the command was given, which may differ from those of this fit."
    )
    if bad.empty:
        verdict = f"Uniform: none of {len(table)} latent quantities is rejected."
    else:
        said = join([f"{row.quantity} ({row.finding})" for row in bad.itertuples()])
        verdict = (
            f"Rejected: {len(bad)} of {len(table)} latent quantities, {said}. Widen your own doubt there."
        )
    if ranks.n_replicates < 100:
        verdict += f" With {ranks.n_replicates} replicates only large errors show."
    caption = (
        "Ranks of the true values: cumulative share minus what is expected. A line inside the grey band is "
        "fine; a red line leaves it."
    )
    rows = table.drop(columns="rejected").rename(columns=lambda name: str(name).replace("_", " "))
    read = (
        "Position: mean place of the truth among the draws (0.5 is right). Spread: above 1 the posteriors "
        "are too narrow, below 1 too wide. The p-values test the ranks' ECDF, their histogram (χ²) and their "
        "symmetry; the first decides, corrected for the number of quantities."
    )
    return (
        html.paragraph(text)
        + html.paragraph(verdict, "good" if bad.empty else "warn")
        + html.picture(ranks.picture, "png", 900, caption)
        + html.details(
            "Tests of each quantity", html.paragraph(read) + html.table(rows, label="Filter by quantity")
        )
    )


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


def comparison_section(
    scores: pd.DataFrame, cells: str, *, seen: bool, model: str = "model", over_time: bool = False
) -> str:
    """The model beside the baselines and the technical duplicate.

    Args:
        scores: Columns method, condition, metric, value (``baselines.score_predictors``).
        cells: Which cells were predicted, in words.
        seen: Whether other cells of every one of these conditions were trained on.
        model: Name of the model among the methods.
        over_time: Whether the model follows cells over time.
    """
    if scores.empty:
        return html.paragraph(
            f"No perturbed condition has enough of the {cells} to compare means. Keep more cells out of "
            "training (--test 0.3), or whole perturbations (--hold-out)."
        )
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
    if over_time:
        text += (
            " Means here are over all snapshots, and the model's give every snapshot the same weight; the "
            "time-matched mean is that of perturbed cells of the same times. For scores at each time, hold "
            "out perturbations or times and use baselines.compare_times."
        )
    if not controls:
        text += (
            " The control mean, the additive baseline and the correlation of effects against control are "
            "left out, because they need control cells and none were trained on."
        )
    caption = (
        "A dot is a condition; the large dot is the mean, the bar its 95% bootstrap interval. Dashed: the "
        f"floor, {FLOOR}. Green: the ceiling, {CEILING}."
    )
    drawn = scores[scores["metric"].isin(_DRAWN)]
    average = average_conditions(scores)
    wide = average.pivot(index="method", columns="metric", values="mean")
    wide = wide.loc[
        list(dict.fromkeys(average["method"])), list(dict.fromkeys(average["metric"]))
    ].reset_index()
    wide.columns = [_heading(str(c)) for c in wide.columns]
    formats = {name: "{:.3f}".format for name in wide.columns}
    return (
        html.paragraph(text)
        + html.figure(plot.compare_methods(drawn, [model]), caption)
        + _calibrated(scores, model)
        + html.details("Mean scores of all methods", html.table(wide, formats, label=""))
    )


def _heading(metric: str) -> str:
    return MEASURES[metric].heading if metric in MEASURES else metric


def _calibrated(scores: pd.DataFrame, model: str) -> str:
    """Where methods lie between the floor and the ceiling, and the model's own numbers."""
    compared = Comparison(scores.assign(fold=0, seed=0), pd.DataFrame(), own=[model])
    table = compared.calibrated()
    resolved = table[table["resolved"]]
    blind = [_heading(name) for name in dict.fromkeys(table.loc[~table["resolved"], "metric"])]
    text = (
        f"Calibrated scores say what a number is worth: 0 is the floor ({FLOOR}), 1 the ceiling ({CEILING}). "
        "Below 0 is worse than assuming that all perturbations do the same; above 1 is less noisy than a "
        "repeat, which a method that pools many cells can be. Distrust a score whose interval is wide."
    )
    if blind:
        text += (
            f" Left out: {join(blind)}. There the ceiling does not clearly beat the floor, because so few "
            "held-out cells are noisy, or the floor has no score; such a metric tells nothing apart here."
        )
    own = resolved[resolved["method"] == model]
    ends = {"calibrated score": own["score"], "95% from": own["low"], "to": own["high"]}
    rows = pd.DataFrame({"metric": [_heading(name) for name in own["metric"]], **ends})
    shown = ""
    if len(rows):
        shown = (
            html.figure(plot.calibrated_scores(resolved), "Calibrated scores of all methods. Never clipped.")
            + html.paragraph(f"The {model}, with bootstrap intervals over conditions:")
            + html.table(rows, dict.fromkeys(ends, decimals), label="")
        )
    return "<h3>Between floor and ceiling</h3>" + html.paragraph(text) + shown
