"""Effects of a perturbation with their intervals."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLUE, VERMILLION, new_figure, style

__all__ = ["effect_intervals"]


def effect_intervals(effects: xr.Dataset, condition: str, n_genes: int = 15) -> Figure:
    """The genes a perturbation changes most, with intervals.

    Genes are ranked by the end of the interval nearer to zero, so a large but uncertain effect does not lead.

    Args:
        effects: What ``predict.effects`` returns: ``gene_effect``, ``gene_low`` and ``gene_high`` over
            (condition, gene); the attribute ``gene_units`` names their unit.
        condition: Which one to show.
        n_genes: Genes to show.

    Raises:
        DataError: ``condition`` is not in ``effects``.
    """
    known = [str(c) for c in effects["condition"].values]
    if condition not in known:
        raise DataError(f"no effects of {condition!r}; there are effects of {known}.")
    one = effects.sel(condition=condition)
    mean_g, low_g, high_g = (
        one[name].values.astype(float) for name in ("gene_effect", "gene_low", "gene_high")
    )
    sure_g = np.where(low_g * high_g > 0, np.minimum(np.abs(low_g), np.abs(high_g)), 0.0)
    best = np.lexsort((np.abs(mean_g), sure_g))[-n_genes:]
    best = best[np.argsort(mean_g[best])]
    genes = one["gene"].values[best]
    colour = np.where(mean_g[best] > 0, VERMILLION, BLUE)
    with style():
        figure = new_figure(3.35, 0.19 * len(best) + 1.0)
        ax = figure.subplots()
        y = np.arange(len(best))
        ax.hlines(y, low_g[best], high_g[best], color=colour, linewidth=2.2, alpha=0.45)
        ax.scatter(mean_g[best], y, c=colour, s=20, zorder=3)
        ax.axvline(0, color="#4A4F57", linewidth=0.8)
        ax.set_yticks(y, [str(g) for g in genes])
        ax.tick_params(axis="y", length=0)
        ax.grid(axis="x")
        unit = effects.attrs.get("gene_units", "log2 fold change")
        ax.set(xlabel=f"{unit} against control", title=condition, ylim=(-0.7, len(best) - 0.3))
    return figure
