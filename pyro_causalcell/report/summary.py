"""What the numbers say, in sentences a biologist can read aloud. Everything here is made from tables."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

__all__ = ["caveats", "join", "plain", "shared_programmes", "summarise_graph", "summarise_scores"]

_SURE = 0.9
_LIKELY = 0.5


def plain(programme: str) -> str:
    """``programme_3`` as it is spoken: programme 3."""
    return programme.replace("_", " ")


def join(names: Sequence[str], most: int = 8) -> str:
    """Names as in a sentence: ``a, b and c``, cut after ``most``."""
    names = list(names)
    if len(names) > most:
        names = [*names[:most], f"{len(names) - most} more"]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def shared_programmes(graph: pd.DataFrame, threshold: float = _SURE) -> dict[str, list[str]]:
    """The perturbations of each programme that has any, the busiest programme first.

    Args:
        graph: Columns perturbation, programme, probability, effect.
        threshold: Edges above this probability count.
    """
    edges = graph[graph["probability"] > threshold]
    groups = {str(name): list(rows["perturbation"]) for name, rows in edges.groupby("programme", sort=False)}
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def summarise_graph(graph: pd.DataFrame, loadings: pd.DataFrame | None = None, n_genes: int = 4) -> list[str]:
    """One sentence for each programme that perturbations move, then the rest in brief.

    Args:
        graph: Columns perturbation, programme, probability, effect.
        loadings: Programme by gene, signed; adds the genes that rise and fall.
        n_genes: Genes named in each direction.
    """
    if graph.empty:
        return ["In this model perturbations move no programme."]
    if (graph["probability"] == 1).all():
        return ["In this model every perturbation moves every programme; the graph below says how far."]
    groups = shared_programmes(graph)
    sentences = [_programme_sentence(graph, name, members, loadings, n_genes) for name, members in groups.items()]
    best = graph.groupby("perturbation", sort=False)["probability"].max()
    unsure = graph[graph["probability"].between(_LIKELY, _SURE, inclusive="right")]
    if len(unsure):
        pairs = [f"{row.perturbation} on {plain(str(row.programme))} ({row.probability:.0%})" for row in unsure.itertuples()]
        sentences.append(f"Likely but not sure: {join(pairs)}.")
    silent = list(best.index[best <= _LIKELY])
    if silent:
        verb = "shows" if len(silent) == 1 else "show"
        sentences.append(
            f"{join(silent)} {verb} no effect that these cells can tell from control. That is no proof of none: "
            "a weak knock-down or few cells look the same."
        )
    return sentences


def _programme_sentence(
    graph: pd.DataFrame, programme: str, members: list[str], loadings: pd.DataFrame | None, n_genes: int
) -> str:
    edges = graph[graph["programme"] == programme].set_index("perturbation")
    sign = np.sign(edges.loc[members, "effect"])
    side = 1.0 if (sign > 0).sum() * 2 >= len(sign) else -1.0
    main = [name for name in members if sign[name] == side]
    against = [name for name in members if sign[name] != side]
    text = f"{join(members)} {'share' if len(members) > 1 else 'moves'} {plain(programme)}"
    if against:
        text += f" ({join(against)} the opposite way)"
    if loadings is None:
        return f"{text}."
    change = side * loadings.loc[programme]
    falling, rising = change[change < 0].nsmallest(n_genes), change[change > 0].nlargest(n_genes)
    parts = {"lowers": falling, "raises": rising}
    strongest_first = sorted(parts.items(), key=lambda part: -part[1].abs().max() if len(part[1]) else np.inf)
    said = [f"{verb} {join([str(g) for g in genes.index])}" for verb, genes in strongest_first if len(genes)]
    who = "it" if len(members) == 1 else " or ".join(main) if against else "any of them"
    return f"{text}: perturbing {who} {' and '.join(said)}."


def summarise_scores(scores: pd.DataFrame, model: str = "model") -> list[str]:
    """Whether the model beats the baselines on held-out cells, counted over conditions.

    Args:
        scores: Columns method, condition, metric, value (``baselines.compare_means``).
        model: Name of the model among the methods.
    """
    rmse = scores[scores["metric"] == "rmse"].pivot(index="condition", columns="method", values="value")
    others = [name for name in ("control mean", "perturbed mean", "additive") if name in rmse]
    counted = [f"than the {name} in {int((rmse[model] < rmse[name]).sum())}" for name in others]
    best = rmse[others].mean().idxmin()
    sentence = (
        f"Predicted mean expression has an average error of {rmse[model].mean():.3f} (RMSE, log1p CP10k) on "
        f"held-out cells; the best baseline, {best}, has {rmse[best].mean():.3f}."
    )
    return [sentence, f"Of {len(rmse)} conditions, the model is closer to the held-out cells {join(counted)}."]


def caveats(n_genes: int, panel_totals: bool) -> list[str]:
    """What the reader must know before quoting a number of the page.

    Args:
        n_genes: Genes of the screen.
        panel_totals: Whether totals were summed over these genes only.
    """
    texts = [
        "A probability is how strongly the model believes, after seeing these cells, that the perturbation "
        "shifts the programme. It rests on the model's assumptions. It is not a p-value, and not how often a "
        "repeated experiment would agree.",
        "Programmes are not measured. Their numbering and their sign are arbitrary, and perturbations that always "
        "act alike cannot be told apart. Fit again with another seed before building on a programme.",
        "The effect of a perturbation on genes is read through the model. Check a gene that matters in the "
        "raw data.",
    ]
    if panel_totals:
        texts.append(
            f"Totals are summed over the {n_genes} genes of this screen. For a gene panel that is not the full "
            "library: when some genes rise, the share of the others falls."
        )
    return texts
