"""Does the model produce data like the data? Predictive checks, calibration, importance weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from numpy.typing import ArrayLike, NDArray

from pyro_causalcell.plot.style import BLACK, BLUE, GREEN, GREY, ORANGE, VERMILLION, new_figure, style

__all__ = ["pareto_k", "predictive_checks", "reliability"]


def predictive_checks(
    observed_total_n: ArrayLike,
    predicted_total_n: ArrayLike,
    observed_zero_g: ArrayLike,
    predicted_zero_g: ArrayLike,
    observed_mean_g: ArrayLike,
    predicted_mean_g: ArrayLike,
    observed_variance_g: ArrayLike,
    predicted_variance_g: ArrayLike,
    observed_mean_cg: ArrayLike,
    predicted_mean_cg: ArrayLike,
    unit: str = "counts",
) -> Figure:
    """Four panels that set observed beside predicted cells.

    Args:
        observed_total_n: Total of each observed cell.
        predicted_total_n: Total of each predicted cell; the number of cells may differ.
        observed_zero_g: Share of cells in which each gene is zero.
        predicted_zero_g: The same of predicted cells.
        observed_mean_g: Mean of each gene.
        predicted_mean_g: The same of predicted cells.
        observed_variance_g: Variance of each gene.
        predicted_variance_g: The same of predicted cells.
        observed_mean_cg: Mean of each gene in each condition.
        predicted_mean_cg: The same of predicted cells.
        unit: Of the data, for the labels.
    """
    log = unit == "counts"
    with style():
        figure = new_figure(9.0, 7.0)
        axes = figure.subplots(2, 2)
        _totals(axes[0, 0], np.asarray(observed_total_n), np.asarray(predicted_total_n), unit, log)
        zeros = np.asarray(observed_zero_g), np.asarray(predicted_zero_g)
        _against(axes[0, 1], *zeros, BLUE, "Zeros per gene", "share of cells with zero", log=False)
        means = np.asarray(observed_mean_g), np.asarray(predicted_mean_g)
        variances = np.asarray(observed_variance_g), np.asarray(predicted_variance_g)
        _mean_variance(axes[1, 0], means, variances, unit, log)
        per_condition = np.ravel(observed_mean_cg), np.ravel(predicted_mean_cg)
        _against(axes[1, 1], *per_condition, GREEN, "Mean per gene and condition", f"mean ({unit})", log=log)
    return figure


def _totals(ax: Axes, observed_n: NDArray[Any], predicted_n: NDArray[Any], unit: str, log: bool) -> None:
    pooled = np.concatenate([observed_n, predicted_n])
    pooled = pooled[pooled > 0] if log else pooled
    edge = np.geomspace if log else np.linspace
    bins = list(edge(pooled.min(), pooled.max() * (1 + 1e-6) + 1e-9, 31))
    ax.hist(observed_n, bins=bins, density=True, color=GREY, alpha=0.45, label="observed")
    ax.hist(
        predicted_n,
        bins=bins,
        density=True,
        histtype="step",
        color=VERMILLION,
        linewidth=1.6,
        label="predicted",
    )
    if log:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=f"total per cell ({unit})", ylabel="density of cells", title="Total per cell")
    ax.legend()


def _against(
    ax: Axes,
    observed: NDArray[Any],
    predicted: NDArray[Any],
    colour: str,
    title: str,
    label: str,
    *,
    log: bool,
) -> None:
    if log:
        positive = (observed > 0) & (predicted > 0)
        observed, predicted = observed[positive], predicted[positive]
        ax.set(xscale="log", yscale="log")
    ends = [min(observed.min(), predicted.min()), max(observed.max(), predicted.max())]
    ax.plot(ends, ends, color=BLACK, linewidth=0.9, linestyle="--", label="equal")
    alpha = 0.35 if len(observed) > 500 else 0.7
    ax.scatter(observed, predicted, s=9, color=colour, alpha=alpha, linewidths=0, rasterized=True)
    ax.set(xlabel=f"observed {label}", ylabel=f"predicted {label}", title=title)
    ax.grid()
    ax.legend(loc="lower right")


def _mean_variance(
    ax: Axes,
    means: tuple[NDArray[Any], NDArray[Any]],
    variances: tuple[NDArray[Any], NDArray[Any]],
    unit: str,
    log: bool,
) -> None:
    looks = (("observed", GREY, "o"), ("predicted", ORANGE, "D"))
    for mean_g, variance_g, (label, colour, marker) in zip(means, variances, looks, strict=True):
        ax.scatter(
            mean_g,
            variance_g,
            s=11,
            color=colour,
            marker=marker,
            alpha=0.55,
            linewidths=0,
            label=label,
            rasterized=True,
        )
    if log:
        ax.set(xscale="log", yscale="log")
    ax.set(
        xlabel=f"mean of the gene ({unit})", ylabel=f"variance ({unit}²)", title="Mean and variance per gene"
    )
    ax.grid()
    ax.legend(loc="upper left")


def reliability(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]],
    xlabel: str = "nominal coverage of the interval",
    ylabel: str = "share of observations inside",
    title: str = "Calibration",
) -> Figure:
    """What was promised against what came true; the diagonal is perfect.

    Args:
        curves: For each name, the promised probabilities and the shares that came true.
        xlabel: What was promised.
        ylabel: What came true.
        title: Of the figure.
    """
    with style():
        figure = new_figure(4.4, 4.2)
        ax = figure.subplots()
        ax.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle="--", label="perfect")
        for i, (name, (promised, true)) in enumerate(curves.items()):
            marker, size = "osD^v"[i % 5], max(8.0 - 1.8 * i, 3.0)  # curves that coincide stay visible
            ax.plot(
                promised, true, marker=marker, markersize=size, linewidth=max(3.0 - 0.9 * i, 1.0), label=name
            )
        ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel=xlabel, ylabel=ylabel, title=title, aspect="equal")
        ax.grid()
        ax.legend(loc="upper left")
    return figure


def pareto_k(k_n: ArrayLike, threshold: float = 0.7, widest: float = 1.5) -> Figure:
    """Histogram of the Pareto k of each cell's importance weights.

    Args:
        k_n: Pareto k of each cell; one that is not finite counts as large.
        threshold: Above this the estimate for that cell is not reliable.
        widest: Larger values are drawn here.
    """
    k = np.nan_to_num(np.asarray(k_n, dtype=float), nan=np.inf, posinf=np.inf)
    drawn = np.clip(k, threshold - 1.5, widest)
    width = 0.05
    n_left = np.ceil((threshold - min(drawn.min(), 0.0)) / width)
    n_right = np.ceil((max(drawn.max(), threshold + 0.1) - threshold) / width) + 1
    bins = list(threshold + width * np.arange(-n_left, n_right + 1))
    with style():
        figure = new_figure(4.6, 3.2)
        ax = figure.subplots()
        good = drawn <= threshold
        ax.hist(drawn[good], bins=bins, color=BLUE)
        ax.hist(drawn[~good], bins=bins, color=VERMILLION)
        ax.axvline(threshold, color=BLACK, linewidth=1.0, linestyle="--")
        label = "Pareto k of a cell" + (f" (larger drawn at {widest:g})" if (k > widest).any() else "")
        share = float((~good).mean())
        ax.set(xlabel=label, ylabel="cells", title=f"{share:.1%} of {len(k)} cells above {threshold:g}")
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
    return figure
