"""One look for every figure, applied to the figure alone: the global matplotlib settings stay untouched."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import matplotlib
import numpy as np
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray

from pyro_causalcell.data.spec import CONTROL

__all__ = [
    "BLACK",
    "BLUE",
    "DIVERGING",
    "GREEN",
    "GREY",
    "OKABE_ITO",
    "ORANGE",
    "OTHERS",
    "VERMILLION",
    "furthest",
    "new_figure",
    "style",
]

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILLION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GREY = "#8A8F98"
OTHERS = "#B9BDC4"
"""Cells that are not named."""
OKABE_ITO = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
DIVERGING = LinearSegmentedColormap.from_list(
    "blue_vermillion", ["#003B5C", BLUE, "#8CC1E0", "#F4F4F2", "#F3A76C", VERMILLION, "#6E2C00"]
)

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4A4F57",
    "axes.prop_cycle": cycler(color=OKABE_ITO),
    "axes.axisbelow": True,
    "grid.color": "#E6E8EB",
    "grid.linewidth": 0.7,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "lines.linewidth": 1.6,
    "svg.hashsalt": "pyro_causalcell",
}


def style() -> AbstractContextManager[None]:
    """Settings of this package's figures, for the length of a ``with`` block."""
    return matplotlib.rc_context(_STYLE)


def new_figure(width: float, height: float, gap: float = 0.05) -> Figure:
    """An empty figure in inches, with ``gap`` around each panel, that pyplot knows nothing of."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=gap, w_pad=gap))


def furthest(z_nk: NDArray[np.float64], names: NDArray[np.str_], n: int) -> list[str]:
    """The perturbations whose mean is furthest from control's, or from that of all cells without control."""
    is_control = names == CONTROL
    origin = z_nk[is_control].mean(0) if is_control.any() else z_nk.mean(0)
    perturbed = [str(name) for name in np.unique(names) if name != CONTROL]
    return sorted(perturbed, key=lambda name: -np.linalg.norm(z_nk[names == name].mean(0) - origin))[:n]


def axes_grid(figure: Figure, n_panels: int, n_columns: int) -> Sequence[Axes]:
    """``n_panels`` axes in rows of ``n_columns``; unused cells of the last row stay blank."""
    n_rows = -(-n_panels // n_columns)
    axes = list(figure.subplots(n_rows, n_columns, squeeze=False).ravel())
    for ax in axes[n_panels:]:
        ax.remove()
    return axes[:n_panels]
