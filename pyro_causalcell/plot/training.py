"""How training went."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLUE, GREY, VERMILLION, new_figure, style

__all__ = ["training_curve"]

_SMALLEST = 1e-4  # nats per cell: smaller terms are not drawn


def training_curve(history: pd.DataFrame) -> Figure:
    """Loss per epoch, and each term of it.

    Args:
        history: ``Fit.history``: index epoch; columns ``train_loss``, ``validation_loss`` (both optional, one
            needed) and ``term_<site>``, all in nats per cell; ``stage``, where present, is marked.

    Raises:
        DataError: No loss column.
    """
    losses = [c for c in ("train_loss", "validation_loss") if c in history and history[c].notna().any()]
    if not losses:
        raise DataError(f"history needs train_loss or validation_loss; its columns are {list(history)}.")
    terms = [c for c in history if str(c).startswith("term_") and history[c].abs().max() > _SMALLEST]
    with style():
        figure = new_figure(9.0 if terms else 5.0, 3.2)
        axes = figure.subplots(1, 2 if terms else 1, squeeze=False)[0]
        _losses(axes[0], history, losses)
        if terms:
            _terms(axes[1], history, terms)
    return figure


def _losses(ax: Axes, history: pd.DataFrame, losses: list[str]) -> None:
    colour = {"train_loss": GREY, "validation_loss": BLUE}
    label = {"train_loss": "training", "validation_loss": "validation"}
    for column in losses:
        ax.plot(history.index, history[column], color=colour[column], label=label[column])
    last = (
        history["stage"] == history["stage"].iloc[-1] if "stage" in history else history[losses[-1]].notna()
    )
    best = history.loc[last, losses[-1]].idxmin()
    ax.plot(best, history[losses[-1]].loc[best], "o", color=VERMILLION, label=f"lowest: epoch {best}")
    if "stage" in history:
        for start in history.index[history["stage"] != history["stage"].shift()][1:]:
            ax.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
            ax.annotate(
                str(history["stage"].loc[start]),
                (start, 1),
                (3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                rotation=90,
                va="top",
                fontsize=7,
                color=GREY,
            )
    _skip_start(ax, history[losses])
    ax.set(xlabel="epoch", ylabel="loss (nats per cell)", title="Loss")
    ax.grid(axis="y")
    ax.legend()


def _skip_start(ax: Axes, losses: pd.DataFrame) -> None:
    """Let the first epochs leave the frame: their drop would flatten everything that follows."""
    later = losses.iloc[max(2, len(losses) // 20) :].to_numpy(dtype=float)
    if np.isfinite(later).any():
        low, high = np.nanmin(later), np.nanmax(later)
        margin = 0.06 * (high - low) or 1.0
        ax.set_ylim(low - margin, high + margin)


def _terms(ax: Axes, history: pd.DataFrame, terms: list[str]) -> None:
    for column in terms:
        size = history[column].abs()
        ax.plot(history.index, size.where(size > _SMALLEST), label=str(column).removeprefix("term_"))
    ax.set_yscale("log")
    ax.set(xlabel="epoch", ylabel="size (nats per cell, log scale)", title="Terms of the loss")
    ax.grid(axis="y")
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), title="site")
