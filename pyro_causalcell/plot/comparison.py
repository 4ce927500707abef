"""Methods beside each other: baselines, and the tables of a study."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLUE, GREY, OKABE_ITO, VERMILLION, axes_grid, new_figure, style

__all__ = ["compare_methods", "study_table"]

_METRICS = {
    "rmse": "RMSE (log1p CP10k)\nlower is better",
    "pearson_control": "Pearson of effects\nagainst control, higher is better",
    "pearson_perturbed": "Pearson of effects\nagainst perturbed mean, higher is better",
}


def compare_methods(scores: pd.DataFrame, highlight: str | None = None, seed: int = 0) -> Figure:
    """One panel a metric: a dot for every condition, the mean, and its 95 % bootstrap interval.

    Args:
        scores: Columns method, condition, metric, value (``baselines.compare_means``).
        highlight: Method drawn in the accent colour.
        seed: Of the bootstrap over conditions.

    Raises:
        DataError: A column is missing.
    """
    missing = {"method", "condition", "metric", "value"} - set(scores)
    if missing:
        raise DataError(f"scores lack the columns {sorted(missing)}; they have {list(scores)}.")
    methods = list(dict.fromkeys(scores["method"]))
    metrics = list(dict.fromkeys(scores["metric"]))
    rng = np.random.default_rng(seed)
    with style():
        figure = new_figure(2.9 * len(metrics) + 1.2, 0.34 * len(methods) + 1.2)
        axes = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
        for ax, metric in zip(axes, metrics, strict=True):
            one = scores[scores["metric"] == metric]
            for y, method in enumerate(methods):
                value_c = one.loc[one["method"] == method, "value"].dropna().to_numpy(dtype=float)
                _dots(ax, y, value_c, VERMILLION if method == highlight else BLUE, rng)
            ax.set(xlabel=_METRICS.get(metric, metric), ylim=(len(methods) - 0.5, -0.5))
            ax.locator_params(axis="x", nbins=5)
            ax.grid(axis="x")
        axes[0].set_yticks(range(len(methods)), methods)
        for ax in axes:
            ax.tick_params(axis="y", length=0)
    return figure


def _dots(ax: Axes, y: int, value_c: NDArray[np.float64], colour: str, rng: np.random.Generator) -> None:
    if len(value_c) == 0:
        ax.text(
            0.5, y, "not defined", transform=ax.get_yaxis_transform(), ha="center", va="center", color=GREY
        )
        return
    jitter = rng.uniform(-0.22, 0.22, len(value_c))
    ax.scatter(value_c, y + jitter, s=9, color=colour, alpha=0.3, linewidths=0)
    means = rng.choice(value_c, (1000, len(value_c))).mean(1)
    ax.hlines(y, *np.quantile(means, [0.025, 0.975]), color=colour, linewidth=2.4)
    ax.plot(value_c.mean(), y, "o", color=colour, markersize=6.5, markeredgecolor="white")


def study_table(table: pd.DataFrame, oracle: str = "oracle") -> Figure:
    """A study's table as dots: ours with its spread over seeds, the paper's number, the oracle's line.

    Args:
        table: Columns setting, method, metric, mean, sd, paper (NaN where the paper has none). One row a
            setting, method and metric.
        oracle: Rows of this method become a line: what the true model scores.

    Raises:
        DataError: A column is missing.
    """
    missing = {"setting", "method", "metric", "mean", "sd", "paper"} - set(table)
    if missing:
        raise DataError(f"table lacks the columns {sorted(missing)}; it has {list(table)}.")
    ours = table[table["method"] != oracle]
    settings, methods, metrics = (list(dict.fromkeys(ours[c])) for c in ("setting", "method", "metric"))
    place = {method: y for y, method in enumerate(methods)}
    with style():
        height = len(settings) * (0.24 * len(methods) + 0.5) + 0.9
        figure = new_figure(2.5 * len(metrics) + 1.6, height)
        panels = iter(axes_grid(figure, len(settings) * len(metrics), len(metrics)))
        for setting in settings:
            for j, metric in enumerate(metrics):
                ax = next(panels)
                here = table[(table["setting"] == setting) & (table["metric"] == metric)]
                _study_panel(ax, here, place, oracle)
                ax.set_yticks(range(len(methods)), methods if j == 0 else [""] * len(methods))
                ax.set_ylim(len(methods) - 0.5, -0.5)
                if j == 0:
                    ax.set_title(str(setting))
                if setting == settings[-1]:
                    ax.set_xlabel(str(metric))
        figure.legend(handles=_study_legend(), loc="outside upper left", ncols=3)
    return figure


def _study_panel(ax: Axes, here: pd.DataFrame, place: dict[str, int], oracle: str) -> None:
    best = here.loc[here["method"] == oracle, "mean"].dropna()
    if len(best):
        ax.axvline(float(best.iloc[0]), color=GREY, linestyle="--", linewidth=1.0)
    rows = here[here["method"] != oracle]
    y = rows["method"].map(place).to_numpy(dtype=float)
    ax.errorbar(rows["mean"], y, xerr=rows["sd"].fillna(0.0), fmt="o", color=BLUE, markersize=5.5, capsize=2)
    ax.plot(
        rows["paper"],
        y,
        "D",
        markerfacecolor="none",
        markeredgecolor=OKABE_ITO[1],
        markersize=6,
        linestyle="none",
    )
    ax.tick_params(axis="y", length=0)
    ax.locator_params(axis="x", nbins=4)
    ax.grid(axis="x")


def _study_legend() -> list[Line2D]:
    diamond = {"marker": "D", "linestyle": "none", "markerfacecolor": "none"}
    return [
        Line2D(
            [], [], marker="o", linestyle="none", color=BLUE, label="this package (mean ± s.d. over seeds)"
        ),
        Line2D([], [], markeredgecolor=OKABE_ITO[1], label="paper", **diamond),  # type: ignore[arg-type]
        Line2D([], [], color=GREY, linestyle="--", label="true model (oracle)"),
    ]
