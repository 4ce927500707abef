"""Is a fit as sure as it should be? PIT histograms, risk–coverage, ranks of simulation-based calibration."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLACK, BLUE, GREEN, GREY, VERMILLION, axes_grid, new_figure, style

__all__ = ["coverage", "pit", "predictive_statistics", "risk_coverage", "sbc_ranks"]

MOST_ROWS = 40
"""Groups that are drawn as rows; more are drawn as points, observed against replicated."""


def pit(table: pd.DataFrame) -> Figure:
    """Histogram of randomised PITs for each class of genes; flat is right.

    A hump in the middle means that predictions are too wide, high ends that they are too narrow, a slope
    that they lie to one side.

    Args:
        table: ``Calibration.pit``: gene_class, low, high, density.

    Raises:
        DataError: A column is missing.
    """
    _need(table, "gene_class", "low", "high", "density")
    names = list(dict.fromkeys(table["gene_class"]))
    highest = max(1.5, 1.08 * float(table["density"].max()))
    with style():
        figure = new_figure(2.1 * min(len(names), 5) + 0.6, 2.4 * -(-len(names) // 5))
        panels = axes_grid(figure, len(names), min(len(names), 5))
        for i, (ax, name) in enumerate(zip(panels, names, strict=True)):
            rows = table[table["gene_class"] == name]
            edges = [*rows["low"], rows["high"].iloc[-1]]
            ax.stairs(rows["density"], edges, fill=True, color=BLUE, alpha=0.75)
            ax.axhline(1.0, color=BLACK, linewidth=0.9, linestyle="--")
            ax.set(xlim=(0, 1), ylim=(0, highest), title=name if name == "all" else f"{name} genes")
            ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            if i % 5:
                ax.tick_params(labelleft=False)
            else:
                ax.set_ylabel("density of values")
        figure.supxlabel("place of the observed value among its draws", fontsize=9)
    return figure


def coverage(table: pd.DataFrame, low: float = 0.87, high: float = 0.93) -> Figure:
    """How far the coverage of predictive intervals is off, for each class of genes and each interval.

    Args:
        table: ``Calibration.classes``: gene_class, coverage_50, coverage_80, ...
        low: Least coverage at which 90 % intervals count as right.
        high: Largest one.

    Raises:
        DataError: A column is missing.
    """
    _need(table, "gene_class")
    levels = [int(c.removeprefix("coverage_")) for c in table if str(c).startswith("coverage_")]
    if not levels:
        raise DataError(f"expected columns coverage_50, coverage_90, ..., found {list(table)}. Pass .classes")
    place = np.arange(len(table))[::-1]
    with style():
        figure = new_figure(1.9 * len(levels) + 1.2, 0.3 * len(table) + 1.2)
        panels = figure.subplots(1, len(levels), sharey=True, squeeze=False)[0]
        for ax, level in zip(panels, levels, strict=True):
            share = table[f"coverage_{level}"].to_numpy()
            off = 100 * share - level
            if level == 90:
                ax.axvspan(100 * low - 90, 100 * high - 90, color=GREEN, alpha=0.15, linewidth=0)
            ax.axvline(0, color=BLACK, linewidth=0.9, linestyle="--")
            ax.hlines(place, 0, off, color=GREY, linewidth=1.2)
            ax.scatter(off, place, s=26, color=BLUE, zorder=3)
            widest = max(4.0, 1.15 * float(np.abs(off).max()))
            ax.set(xlim=(-widest, widest), ylim=(-0.6, len(table) - 0.4), title=f"{level} % intervals")
            ax.grid(axis="x")
        panels[0].set_yticks(place, table["gene_class"])
        figure.supxlabel("coverage minus what was promised (percentage points)", fontsize=9)
    return figure


def risk_coverage(curve: pd.DataFrame, unit: str = "predictive sd") -> Figure:
    """Mean error of the predictions that are kept when the most uncertain are left out first.

    Args:
        curve: ``Calibration.risk``: coverage, risk, best, random.
        unit: Of the error.

    Raises:
        DataError: A column is missing.
    """
    _need(curve, "coverage", "risk", "best", "random")
    with style():
        figure = new_figure(4.6, 3.4)
        ax = figure.subplots()
        ax.plot(curve["coverage"], curve["random"], color=GREY, linestyle="--", label="at random")
        ax.plot(curve["coverage"], curve["best"], color=GREEN, label="by the error itself")
        ax.plot(curve["coverage"], curve["risk"], color=BLUE, label="by the model's uncertainty")
        ax.set(xlabel="share of conditions kept", ylabel=f"mean error ({unit})", title="Risk and coverage")
        ax.set_xlim(0, 1.02)
        ax.set_ylim(0, None)
        ax.xaxis.set_major_formatter(PercentFormatter(1.0))
        ax.grid()
        ax.legend(loc="lower right", title="least certain left out")
    return figure


def sbc_ranks(ranks: pd.DataFrame, band: pd.DataFrame, table: pd.DataFrame, most: int = 24) -> Figure:
    """ECDF of the ranks of each quantity minus that of uniform ranks, and the band where it should stay.

    Args:
        ranks: ``SBC.ranks``.
        band: What ``ecdf_band`` gave for this many replicates and draws: place, low, high.
        table: ``SBC.table``: quantity, ecdf_p, rejected.
        most: Panels; the quantities with the smallest ``ecdf_p`` are drawn.

    Raises:
        DataError: A column is missing, or ranks and table are of other quantities.
    """
    _need(band, "place", "low", "high")
    _need(table, "quantity", "ecdf_p", "rejected")
    missing = sorted(set(table["quantity"]) - set(ranks))
    if missing:
        raise DataError(f"expected ranks of every quantity of the table, found none of {missing[:5]}")
    shown = table.nsmallest(min(most, len(table)), "ecdf_p").sort_index()
    place_j = band["place"].to_numpy()
    with style():
        n_columns = min(6, len(shown))
        figure = new_figure(max(1.9 * n_columns + 0.6, 4.0), 1.75 * -(-len(shown) // n_columns) + 0.5)
        panels = axes_grid(figure, len(shown), n_columns)
        below = {q: _ecdf(ranks[q].to_numpy(), len(place_j)) - place_j for q in shown["quantity"]}
        widest = max(
            np.abs(d).max() for d in (*below.values(), band["high"] - place_j, place_j - band["low"])
        )
        for i, (ax, row) in enumerate(zip(panels, shown.itertuples(), strict=True)):
            ax.fill_between(
                place_j, band["low"] - place_j, band["high"] - place_j, color=GREY, alpha=0.25, linewidth=0
            )
            ax.axhline(0, color=BLACK, linewidth=0.7, linestyle="--")
            ax.plot(place_j, below[row.quantity], color=VERMILLION if row.rejected else BLUE, linewidth=1.3)
            ax.set(xlim=(0, 1), ylim=(-1.08 * widest, 1.08 * widest))
            ax.set_title(row.quantity, fontsize=8)
            ax.set_xticks([0, 0.5, 1], ["0", "½", "1"])
            if i % n_columns:
                ax.tick_params(labelleft=False)
        figure.supxlabel("place of the truth among posterior draws", fontsize=9)
        figure.supylabel("share below minus uniform", fontsize=9)
    return figure


def _ecdf(rank_n: np.ndarray, n_draws: int) -> np.ndarray:
    """Share of ranks below 1, 2, ... n_draws."""
    counts = np.bincount(rank_n, minlength=n_draws + 1)
    share: np.ndarray = counts.cumsum()[:-1] / counts.sum()
    return share


def predictive_statistics(table: pd.DataFrame) -> Figure:
    """Observed statistics beside those of replicated data sets, one panel for each statistic.

    Groups are rows, with the interval of the replicates; where there are too many (genes in conditions),
    each is a point, observed against replicated. What lies outside its interval is red.

    Args:
        table: ``PredictiveChecks.table()`` or what ``check`` returns.

    Raises:
        DataError: A column is missing.
    """
    _need(table, "statistic", "observed", "replicate_mean", "low", "high")
    table = table[table["observed"].notna() & table["replicate_mean"].notna()]
    by = str(table.columns[0])
    names = list(dict.fromkeys(table["statistic"]))
    most = max((table["statistic"] == name).sum() for name in names)
    rows = most if most <= MOST_ROWS else 12
    with style():
        n_columns = min(3, len(names))
        n_lines = -(-len(names) // n_columns)
        figure = new_figure(3.4 * n_columns + 1.0, n_lines * (0.17 * rows + 1.1), gap=0.06)
        for i, (ax, name) in enumerate(zip(axes_grid(figure, len(names), n_columns), names, strict=True)):
            block = table[table["statistic"] == name]
            if len(block) <= MOST_ROWS:
                _group_rows(ax, block, by, labelled=i % n_columns == 0)
            else:
                _group_points(ax, block)
            ax.set_title(name.replace("_", " "))
            ax.grid()
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return figure


def _group_rows(ax: Axes, block: pd.DataFrame, by: str, *, labelled: bool) -> None:
    place = np.arange(len(block))[::-1]
    names = block[by].astype(str)
    if "gene" in block and block["gene"].notna().all():
        names = names + ", " + block["gene"].astype(str)
    ax.hlines(place, block["low"], block["high"], color=GREY, alpha=0.6, linewidth=4, label="replicates")
    outside = _outside(block)
    looks = ((~outside, BLUE, "observed, inside"), (outside, VERMILLION, "observed, outside"))
    for chosen, colour, label in looks:
        ax.scatter(block["observed"][chosen], place[chosen], s=18, color=colour, label=label, zorder=3)
    ax.set_ylim(-0.7, len(block) - 0.3)
    ax.set_yticks(place, names if labelled else [""] * len(block), fontsize=7)
    ax.tick_params(axis="y", length=0)


def _group_points(ax: Axes, block: pd.DataFrame) -> None:
    ends = [float(np.nanmin(block[["low", "observed"]])), float(np.nanmax(block[["high", "observed"]]))]
    ax.plot(ends, ends, color=BLACK, linewidth=0.9, linestyle="--", label="equal")
    outside = _outside(block)
    looks = ((~outside, BLUE, "inside the replicates' interval"), (outside, VERMILLION, "outside"))
    for chosen, colour, label in looks:
        part = block[chosen]
        ax.scatter(
            part["observed"], part["replicate_mean"], s=9, alpha=0.6, color=colour, linewidths=0, label=label,
            rasterized=True,
        )  # fmt: skip
    if ends[0] >= 0:  # most genes are rare, and some are never seen
        for scale in (ax.set_xscale, ax.set_yscale):
            scale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
        ax.set(xlim=(0, None), ylim=(0, None))
    ax.set(xlabel="observed", ylabel="mean of the replicates")


def _outside(block: pd.DataFrame) -> np.ndarray:
    inside: np.ndarray = block["observed"].between(block["low"], block["high"]).to_numpy()
    return ~inside


def _need(table: pd.DataFrame, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(f"table lacks the columns {missing}; it has {list(table)}.")
