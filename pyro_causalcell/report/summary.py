"""What the numbers say, in sentences a biologist can read aloud. Everything here is made from tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from pyro_causalcell.baselines.compare import CEILINGS
from pyro_causalcell.evaluate import Calibration

__all__ = [
    "caveats",
    "decimals",
    "dispersion_sentence",
    "join",
    "plain",
    "shared_programmes",
    "summarise_calibration",
    "summarise_graph",
    "summarise_scores",
]

_SURE = 0.9
_LIKELY = 0.5
_OF_OTHERS = {
    "cut": ("cut", "{} off from its parents, its own past too"),
    "masks": ("mask", "most of what other perturbations of the same cell do to {}"),
}
"""Columns of the graph that say what a perturbation takes away from others: verb and object."""


def plain(programme: str) -> str:
    """``programme_3`` as it is spoken: programme 3."""
    return programme.replace("_", " ")


def join(names: Sequence[str], most: int = 8) -> str:
    """Names as in a sentence: ``a, b and c``, cut after ``most``; ``none`` if there are none."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most], f"{len(names) - most} more"]
    if len(names) < 2:
        return names[0] if names else "none"
    return f"{', '.join(names[:-1])} and {names[-1]}"


def decimals(value: float) -> str:
    """A number with two decimals, and zero without a sign."""
    return f"{round(value, 2) + 0.0:.2f}"


def shared_programmes(graph: pd.DataFrame, threshold: float = _SURE) -> dict[str, list[str]]:
    """The perturbations of each programme that has any, the busiest programme first.

    Args:
        graph: Columns perturbation, programme, probability, effect.
        threshold: Edges above this probability count.
    """
    edges = graph[graph["probability"] > threshold]
    groups = {str(name): list(rows["perturbation"]) for name, rows in edges.groupby("programme", sort=False)}
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def summarise_graph(graph: pd.DataFrame, effects: xr.Dataset | None = None, n_genes: int = 4) -> list[str]:
    """One sentence for each programme that perturbations move, then the rest in brief.

    Args:
        graph: What ``predict.graph`` returns: perturbation, programme, probability, effect, and cut or masks
            where the model has them.
        effects: What ``predict.effects`` returns; adds the genes that the perturbations of a programme change
            alike.
        n_genes: Genes named in each direction.
    """
    if graph.empty:
        return ["In this model perturbations move no programme."]
    if (graph["probability"] == 1).all():
        return ["In this model every perturbation moves every programme; the graph below says how far."]
    groups = shared_programmes(graph)
    sentences = [
        _programme_sentence(graph, name, members, effects, n_genes) for name, members in groups.items()
    ]
    acting_on_others: set[str] = set()
    for column, (verb, what) in _OF_OTHERS.items():
        likely = graph[graph[column] > _LIKELY] if column in graph else graph[:0]
        acting_on_others |= set(likely["perturbation"])
        for name, rows in likely.groupby("programme", sort=False):
            verbs = f"{verb}s" if len(rows) == 1 else verb
            sentences.append(f"{join(list(rows['perturbation']))} {verbs} {what.format(plain(str(name)))}.")
    best = graph.groupby("perturbation", sort=False)["probability"].max()
    unsure = graph[graph["probability"].between(_LIKELY, _SURE, inclusive="right")]
    if len(unsure):
        pairs = [
            f"{row.perturbation} on {plain(str(row.programme))} ({row.probability:.0%})"
            for row in unsure.itertuples()
        ]
        sentences.append(f"Likely but not sure: {join(pairs)}.")
    silent = [name for name in best.index[best <= _LIKELY] if name not in acting_on_others]
    if silent:
        verb = "shows" if len(silent) == 1 else "show"
        sentences.append(
            f"{join(silent)} {verb} no effect that these cells can tell from control. That is no proof of "
            "none: a weak perturbation or few cells look the same."
        )
    return sentences


def _programme_sentence(
    graph: pd.DataFrame, programme: str, members: list[str], effects: xr.Dataset | None, n_genes: int
) -> str:
    edges = graph[graph["programme"] == programme].set_index("perturbation")
    sign = np.sign(edges.loc[members, "effect"])
    side = np.sign(sign.sum()) or sign.iloc[0]  # the majority's, or else the first one's
    main = [name for name in members if sign[name] == side]
    against = [name for name in members if sign[name] != side]
    text = f"{join(members)} {'share' if len(members) > 1 else 'moves'} {plain(programme)}"
    if against:
        text += f" ({join(against)} the opposite way)"
    said = [] if effects is None else _genes_in_common(effects, main, n_genes)
    if not said:
        return f"{text}."
    everyone = "it" if len(members) == 1 else "any of them"
    part = main[0] if len(main) == 1 else "any of the others"
    return f"{text}: perturbing {part if against else everyone} {' and '.join(said)}."


def _genes_in_common(effects: xr.Dataset, members: list[str], n_genes: int) -> list[str]:
    """What all of the perturbations lower and raise, judged by the ends of the intervals nearest to zero.

    The perturbed genes themselves are left out: that they change is no news.
    """
    known = [name for name in members if name in effects["condition"].values]
    if not known:
        return []
    of_members = effects.sel(condition=known, gene=~np.isin(effects["gene"].values, members))
    genes = pd.Index(of_members["gene"].values)
    sure = {
        "lowers": pd.Series(-of_members["gene_high"].max("condition").values, genes),
        "raises": pd.Series(of_members["gene_low"].min("condition").values, genes),
    }
    top = {verb: by[by > 0].nlargest(n_genes) for verb, by in sure.items()}
    strongest_first = sorted(top.items(), key=lambda item: -item[1].max() if len(item[1]) else 0.0)
    return [f"{verb} {join([str(g) for g in by.index])}" for verb, by in strongest_first if len(by)]


def summarise_scores(scores: pd.DataFrame, *, seen: bool, model: str = "model") -> list[str]:
    """Whether the model beats the baselines on held-out cells, counted over conditions.

    Args:
        scores: Columns method, condition, metric, value (``baselines.score_predictors``).
        seen: Whether other cells of every one of these conditions were trained on.
        model: Name of the model among the methods.
    """
    rmse = scores[scores["metric"] == "rmse"].pivot(index="condition", columns="method", values="value")
    others = [name for name in dict.fromkeys(scores["method"]) if name not in (model, *CEILINGS)]
    counted = [f"than the {name} in {int((rmse[model] < rmse[name]).sum())}" for name in others]
    best = rmse[others].mean().idxmin()
    sentence = (
        f"Predicted mean expression has an average error of {rmse[model].mean():.3f} (RMSE, log1p CP10k) on "
        f"held-out cells; the best baseline, {best}, has {rmse[best].mean():.3f}."
    )
    counts = f"Of {len(rmse)} conditions, the model is closer to the held-out cells {join(counted)}."
    if seen:
        own = [name for name in ("matching mean", "additive") if name in others]
        counts += (
            f" All of them were seen in training: for a single perturbation, {join(own)} "
            f"{'are' if len(own) > 1 else 'is'} then the mean of its own training cells, which is hard to "
            "beat."
        )
    return [sentence, counts]


def summarise_calibration(measured: Calibration, checks: pd.DataFrame) -> str:
    """Whether 90 % intervals hold what they promise, with what the verdict may hide.

    Args:
        measured: What ``evaluate.calibration`` returns.
        checks: Rows of ``evaluate.check`` for all checked cells together.
    """
    every = measured.classes.set_index("gene_class").loc["all"]
    verdict = "calibrated in every class of genes" if not measured.misses else measured.verdict
    return (
        f"90% predictive intervals hold {every['coverage_90']:.1%} of the values ({verdict}); "
        f"{every['genes_inside']:.0%} of the genes are inside 87 to 93% themselves. "
        f"{dispersion_sentence(checks)}"
    ).rstrip()


def dispersion_sentence(checks: pd.DataFrame) -> str:
    """How the dispersion of the real cells compares; empty where none was checked, as for normalised data.

    Args:
        checks: Rows of ``evaluate.check`` for all checked cells together.
    """
    rows = checks[(checks["statistic"] == "dispersion") & checks["p_value"].notna()]
    if rows.empty:
        return ""
    row = rows.iloc[0]
    inside = row["low"] <= row["observed"] <= row["high"]
    verdict = "which agrees" if inside else "which does not agree: the model's cells vary differently"
    real, low, high = (decimals(row[name]) for name in ("observed", "low", "high"))
    return (
        f"The dispersion of the real cells (median over genes) is {real}, 90% of the model's copies have "
        f"{low} to {high}, {verdict}."
    )


def caveats(n_genes: int, panel_totals: bool, controls: bool = True) -> list[str]:
    """What the reader must know before quoting a number of the page.

    Args:
        n_genes: Genes of the screen.
        panel_totals: Whether totals were summed over these genes only.
        controls: Whether control cells were trained on.
    """
    texts = [
        "A probability is how strongly the model believes, after seeing these cells, that the perturbation "
        "shifts the programme. It rests on the model's assumptions. It is not a p-value, and not how often a "
        "repeated experiment would agree.",
        "Programmes are not measured. Their numbering and their sign are arbitrary, and perturbations "
        "that always act alike cannot be told apart. Fit again with another seed before building on a "
        "programme.",
        "The effect of a perturbation on genes is read through the model. Check a gene that matters in the "
        "raw data.",
    ]
    if not controls:
        texts.append(
            "No control cells were trained on. Effects are against the model's control state (no "
            "perturbation), which was not measured here: the model infers it from the perturbed cells."
        )
    if panel_totals:
        texts.append(
            f"Totals are summed over the {n_genes} genes of this screen. For a gene panel that is not the "
            "full library: when some genes rise, the share of the others falls."
        )
    return texts
