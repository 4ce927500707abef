"""Methods beside each other: baselines, and the tables of a study."""

import textwrap
from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from pyro_causalcell.baselines.compare import CEILING, FLOOR, MEASURES
from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import (
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    OKABE_ITO,
    VERMILLION,
    axes_grid,
    new_figure,
    style,
)

__all__ = ["calibrated_scores", "compare_methods", "study_table"]

_COLUMNS = 4
_FEW = 200
"""Scores of a panel, conditions times methods, below which the axis shows all."""


def compare_methods(
    scores: pd.DataFrame,
    highlight: Sequence[str] = (),
    seed: int = 0,
    floor: str = FLOOR,
    ceiling: str = CEILING,
) -> Figure:
    """One panel a metric: a dot for every condition, the mean, and its 95 % bootstrap interval.

    Where at most one in a hundred scores lies further out than the width of the others, the axis ends before.

    Args:
        scores: Columns method, condition, metric, value (``Comparison.table``, or what
            ``baselines.score_predictors`` returns). Several scores of a condition are averaged.
        highlight: Methods drawn in the accent colour.
        seed: Of the bootstrap over conditions.
        floor: Method whose mean is drawn as a grey line through the panel, if it was scored.
        ceiling: Method whose mean is drawn as a green line, if it was scored.

    Raises:
        DataError: A column is missing.
    """
    missing = {"method", "condition", "metric", "value"} - set(scores)
    if missing:
        raise DataError(f"scores lack the columns {sorted(missing)}; they have {list(scores)}.")
    methods = list(dict.fromkeys(scores["method"]))
    metrics = list(dict.fromkeys(scores["metric"]))
    value = scores.groupby(["metric", "method", "condition"], sort=False, as_index=False)["value"].mean()
    value_of = {key: rows["value"].to_numpy(dtype=float) for key, rows in value.groupby(["metric", "method"])}
    n_columns = min(len(metrics), _COLUMNS)
    n_rows = -(-len(metrics) // n_columns)
    looks: list[tuple[str, str, Literal["-", "--"]]] = [(floor, GREY, "--"), (ceiling, GREEN, "-")]
    lines = [look for look in looks if look[0] in methods]
    rng = np.random.default_rng(seed)
    with style():
        figure = new_figure(2.4 * n_columns + 1.8, n_rows * (0.25 * len(methods) + 0.85) + 0.4)
        for j, (ax, metric) in enumerate(
            zip(axes_grid(figure, len(metrics), n_columns), metrics, strict=True)
        ):
            for name, colour, dashes in lines:
                level_c = value_of.get((metric, name), np.empty(0))
                if not np.isnan(level_c).all():
                    level = np.nanmean(level_c)
                    ax.axvline(level, color=colour, linestyle=dashes, linewidth=1.2, zorder=0)
            for y, method in enumerate(methods):
                value_c = value_of.get((metric, method), np.empty(0))
                _dots(ax, y, value_c[~np.isnan(value_c)], VERMILLION if method in highlight else BLUE, rng)
            ax.set(xlabel=_heading(metric), ylim=(len(methods) - 0.5, -0.5))
            _cut(ax, [value_of.get((metric, method), np.empty(0)) for method in methods])
            ax.set_yticks(range(len(methods)), methods if j % n_columns == 0 else [""] * len(methods))
            ax.locator_params(axis="x", nbins=4)
            ax.grid(axis="x")
            ax.tick_params(axis="y", length=0)
        handles = [Line2D([], [], color=c, linestyle=d, linewidth=1.2, label=name) for name, c, d in lines]
        if handles:
            figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def _heading(metric: str) -> str:
    """Heading of a metric and its direction, in lines that fit under a panel."""
    if metric not in MEASURES:
        return metric
    direction = "higher is better" if MEASURES[metric].higher_is_better else "lower is better"
    return "\n".join([*textwrap.wrap(MEASURES[metric].heading, 30), direction])


def calibrated_scores(table: pd.DataFrame) -> Figure:
    """Where methods lie between a baseline (0) and the technical duplicate (1), metric by metric.

    Numbers are never clipped; colours are, at -1 and 1. A metric on which the duplicate does not beat the
    baseline is left grey: it cannot tell methods apart on these cells.

    Args:
        table: What ``Comparison.calibrated`` returns.

    Raises:
        DataError: A column is missing.
    """
    missing = {"method", "metric", "score", "resolved"} - set(table)
    if missing:
        raise DataError(f"table lacks the columns {sorted(missing)}; it has {list(table)}.")
    methods, metrics = (list(dict.fromkeys(table[name])) for name in ("method", "metric"))
    score_mk = table.pivot(index="metric", columns="method", values="score").loc[metrics, methods].to_numpy()
    resolved_m = table.groupby("metric", sort=False)["resolved"].first().loc[metrics].to_numpy(dtype=bool)
    with style():
        figure = new_figure(max(0.62 * len(methods) + 3.4, 5.0), 0.24 * len(metrics) + 1.9)
        ax = figure.subplots()
        shown_mk = np.where(resolved_m[:, None], score_mk, np.nan)
        ax.imshow(shown_mk, cmap=DIVERGING.reversed(), vmin=-1, vmax=1, aspect="auto")
        ax.set_facecolor("#E6E8EB")
        for (m, k), score in np.ndenumerate(score_mk):
            text = "n/a" if np.isnan(score) else f"{round(score, 2) + 0.0:.2f}"
            strong = resolved_m[m] and abs(score) > 0.5
            ax.text(k, m, text, ha="center", va="center", fontsize=7, color="white" if strong else "#2A2E34")
        ax.set_yticks(range(len(metrics)), [MEASURES[m].heading if m in MEASURES else m for m in metrics])
        ax.set_xticks(range(len(methods)), methods, rotation=40, ha="left", rotation_mode="anchor")
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        figure.supxlabel(
            "0: the baseline, 1: the technical duplicate\n"
            "grey: not defined, or the duplicate does not beat the baseline",
            fontsize=9,
        )
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


def _cut(ax: Axes, values_mc: Sequence[NDArray[np.float64]]) -> None:
    """End the axis where few conditions lie far beyond all others; arrows at its end stand for them."""
    value = np.concatenate(values_mc)
    value = value[np.isfinite(value)]
    if len(value) < _FEW:
        return
    low, high = np.quantile(value, [0.005, 0.995])
    left, right = max(value.min(), 2 * low - high), min(value.max(), 2 * high - low)
    if left == value.min() and right == value.max():
        return
    edge = 0.05 * (right - left)
    ax.set_xlim(left - edge, right + edge)
    for end, marker, beyond in ((left - edge, "<", np.less), (right + edge, ">", np.greater)):
        rows = [y for y, value_c in enumerate(values_mc) if beyond(value_c, end).any()]
        arrows = ax.scatter([end] * len(rows), rows, s=20, marker=marker, color=GREY, clip_on=False)
        arrows.set_in_layout(False)
    ax.set_xlabel(f"{ax.get_xlabel()}\n(arrows: beyond the axis)")


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
    metrics = list(dict.fromkeys(ours["metric"]))
    methods = {
        setting: list(dict.fromkeys(rows["method"])) for setting, rows in ours.groupby("setting", sort=False)
    }
    heights = [0.24 * len(names) + 0.5 for names in methods.values()]
    with style():
        figure = new_figure(2.5 * len(metrics) + 1.6, sum(heights) + 0.9)
        panels = figure.subplots(len(methods), len(metrics), squeeze=False, height_ratios=heights)
        for row, (setting, names) in zip(panels, methods.items(), strict=True):
            place = {method: y for y, method in enumerate(names)}
            for j, (ax, metric) in enumerate(zip(row, metrics, strict=True)):
                here = table[(table["setting"] == setting) & (table["metric"] == metric)]
                _study_panel(ax, here, place, oracle)
                ax.set_yticks(range(len(names)), names if j == 0 else [""] * len(names))
                ax.set_ylim(len(names) - 0.5, -0.5)
            row[0].set_title(str(setting))
        for ax, metric in zip(panels[-1], metrics, strict=True):
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
