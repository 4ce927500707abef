"""Which perturbation moves which programme, and which genes a programme holds."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLUE, DIVERGING, GREY, VERMILLION, axes_grid, new_figure, style

__all__ = ["graph_heatmap", "order_graph", "top_genes"]

_OPEN = 0.5  # an edge more likely than not


def order_graph(graph: pd.DataFrame, threshold: float = _OPEN) -> tuple[list[str], list[str]]:
    """Order in which shared programmes sit together.

    Programmes run from most to least used. Perturbations follow the first programme they hit, then the whole
    pattern, then the size of the effect; those without an open edge come last.

    Args:
        graph: Columns perturbation, programme, probability, effect.
        threshold: An edge above this probability counts as open.

    Returns:
        Perturbations and programmes.
    """
    probability = _matrix(graph, "probability")
    effect = _matrix(graph, "effect").abs() * (probability > threshold)
    use = pd.DataFrame({"open": (probability > threshold).sum(), "total": effect.sum()})
    programmes = list(use.sort_values(["open", "total"], ascending=False, kind="stable").index)
    opened = probability[programmes] > threshold

    def key(name: str) -> tuple[list[bool], float]:
        return [not is_open for is_open in opened.loc[name]], -float(effect.loc[name].max())

    return sorted(probability.index, key=key), programmes


def _matrix(graph: pd.DataFrame, value: str) -> pd.DataFrame:
    missing = {"perturbation", "programme", "probability", "effect"} - set(graph)
    if missing:
        raise DataError(f"graph lacks the columns {sorted(missing)}; it has {list(graph)}.")
    order = {c: list(dict.fromkeys(graph[c])) for c in ("perturbation", "programme")}
    matrix = graph.pivot(index="perturbation", columns="programme", values=value)
    return matrix.loc[order["perturbation"], order["programme"]]


def graph_heatmap(graph: pd.DataFrame, threshold: float = _OPEN) -> Figure:
    """Perturbations by programmes: colour is the effect, area the probability that there is one.

    Args:
        graph: Columns perturbation, programme, probability, effect (in standard deviations of the
            programme among control cells).
        threshold: Edges above this probability are ringed.

    Raises:
        DataError: A column is missing.
    """
    rows, columns = order_graph(graph, threshold)
    probability = _matrix(graph, "probability").loc[rows, columns].to_numpy(dtype=float)
    effect = _matrix(graph, "effect").loc[rows, columns].to_numpy(dtype=float)
    opened = probability > threshold
    limit = float(np.abs(effect[opened]).max()) if opened.any() else 1.0
    cell = 0.24 if len(rows) <= 40 else 0.19
    with style():
        width = max(0.42 * len(columns) + 3.4, 5.2)
        figure = new_figure(width, cell * len(rows) + 1.9)
        ax = figure.subplots()
        y, x = np.mgrid[: len(rows), : len(columns)]
        largest = (72 * cell * 0.86) ** 2
        dots = ax.scatter(
            x.ravel(),
            y.ravel(),
            s=largest * probability.ravel(),
            c=effect.ravel(),
            cmap=DIVERGING,
            norm=Normalize(-limit, limit),
            edgecolors=["#20242A" if is_open else "none" for is_open in opened.ravel()],
            linewidths=[0.8 if is_open else 0.0 for is_open in opened.ravel()],
            zorder=2,
        )
        ax.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(rows) - 0.4, -0.6))
        ax.set_xticks(range(len(columns)), columns, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(rows)), rows, fontsize=8 if cell > 0.2 else 7)
        ax.tick_params(length=0)
        ax.grid()
        closed = int((~opened.any(1)).sum())
        if 0 < closed < len(rows):
            ax.axhline(len(rows) - closed - 0.5, color=GREY, linewidth=0.8, linestyle=":")
        ax.set(xlabel="programme", ylabel="perturbation")
        bar = figure.colorbar(dots, ax=ax, shrink=min(1.0, 2.4 / (cell * len(rows) + 0.1)), anchor=(0, 1.0))
        bar.set_label("effect (s.d. of control cells)")
        bar.outline.set_visible(False)
        _probability_legend(figure, largest, threshold)
    return figure


def _probability_legend(figure: Figure, largest: float, threshold: float) -> None:
    handles = [
        Line2D(
            [],
            [],
            linestyle="none",
            marker="o",
            markersize=float(np.sqrt(largest * p)),
            markerfacecolor="#D9DCE1",
            markeredgecolor="#20242A" if p > threshold else "none",
            label=f"{p:g}",
        )
        for p in (0.1, 0.5, 0.9, 1.0)
    ]
    title = f"probability of an effect (ringed above {threshold:g})"
    figure.legend(handles=handles, loc="outside upper left", ncols=4, title=title, alignment="left")


def top_genes(
    loadings: pd.DataFrame,
    programmes: Sequence[str] | None = None,
    n_genes: int = 12,
    n_columns: int = 4,
    unit: str = "change per unit of the programme (s.d. of the gene)",
) -> Figure:
    """The genes that follow each programme most, one panel a programme.

    Args:
        loadings: Programme (index) by gene (columns), signed.
        programmes: Which to show, in this order; all by default.
        n_genes: Genes per panel.
        n_columns: Panels side by side.
        unit: Label of the axis.

    Raises:
        DataError: A programme is not in ``loadings``, or there is none to show.
    """
    shown = list(loadings.index if programmes is None else programmes)
    unknown = [name for name in shown if name not in loadings.index]
    if unknown or not shown:
        raise DataError(f"programmes {unknown or shown} are not among {list(loadings.index)}.")
    n_columns = min(n_columns, len(shown))
    n_rows = -(-len(shown) // n_columns)
    with style():
        figure = new_figure(2.6 * n_columns, n_rows * (0.17 * n_genes + 0.7) + 0.3, gap=0.08)
        for ax, name in zip(axes_grid(figure, len(shown), n_columns), shown, strict=True):
            row = loadings.loc[name]
            top = row.loc[row.abs().nlargest(n_genes).index].sort_values()
            ax.barh(range(len(top)), top, color=np.where(top > 0, VERMILLION, BLUE), height=0.75)
            ax.set_yticks(range(len(top)), [str(g) for g in top.index])
            ax.axvline(0, color="#4A4F57", linewidth=0.8)
            ax.tick_params(axis="y", length=0)
            ax.grid(axis="x")
            ax.set_title(name)
            ax.locator_params(axis="x", nbins=4)
        figure.supxlabel(unit, fontsize=9)
    return figure
