"""What programmes hold, and what kinds of interaction doubles show."""

import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from pyro_causalcell.data.interactions import ADDITIVE_BELOW, SUPPRESSED_BELOW
from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import (
    BLACK,
    BLUE,
    DIVERGING,
    GREEN,
    GREY,
    ORANGE,
    VERMILLION,
    axes_grid,
    new_figure,
    style,
)

__all__ = ["interaction_map", "signature_heatmap"]

_LOOKS = {  # told apart by shape as well as by colour
    "additive": (BLUE, "o"),
    "dominant": (VERMILLION, "s"),
    "suppressed": (BLACK, "v"),
    "saturated": (GREEN, "D"),
    "new programme": (ORANGE, "*"),
    "other": (GREY, "X"),
}
_NAMED = 25  # doubles of a panel that are named, before names cover each other


def signature_heatmap(
    signatures: pd.DataFrame,
    programmes: Sequence[str] | None = None,
    n_genes: int = 5,
    unit: str = "change from low to high (s.d. of the gene)",
) -> Figure:
    """The leading genes of every programme, each shown in all programmes.

    Genes stand in the order of the programmes that they lead; a gene that leads several stands once. What
    programmes share shows as colour off the diagonal.

    Args:
        signatures: Programmes (index) by genes (columns), signed.
        programmes: Which to show, in this order; all by default.
        n_genes: Leading genes of each programme.
        unit: Label of the colours.

    Raises:
        DataError: A programme is not in ``signatures``, or there is none to show.
    """
    shown = list(signatures.index if programmes is None else programmes)
    unknown = [name for name in shown if name not in signatures.index]
    if unknown or not shown:
        raise DataError(f"programmes {unknown or shown} are not among {list(signatures.index)}.")
    leading = [signatures.loc[name].abs().nlargest(n_genes).index for name in shown]
    genes = list(dict.fromkeys(gene for of in leading for gene in of))
    value = signatures.loc[shown, genes].to_numpy(dtype=float).T
    limit = float(np.abs(value).max()) or 1.0
    with style():
        figure = new_figure(0.42 * len(shown) + 2.6, 0.17 * len(genes) + 1.3)
        ax = figure.subplots()
        image = ax.imshow(value, cmap=DIVERGING, norm=Normalize(-limit, limit), aspect="auto")
        ax.set_xticks(range(len(shown)), shown, rotation=45, ha="right", rotation_mode="anchor")
        ax.set_yticks(range(len(genes)), [str(gene) for gene in genes], fontsize=7)
        ax.tick_params(length=0)
        bar = figure.colorbar(image, ax=ax, aspect=30)
        bar.set_label(textwrap.fill(unit, 25), fontsize=8)
        bar.outline.set_visible(False)
    return figure


def interaction_map(table: pd.DataFrame) -> Figure:
    """How far each double is from adding, and how long its effect is; one panel for each source.

    Below the dashed line the effects add; left of the dotted line a double that does not add is suppressed.
    Doubles that do not add are named, where they are few. Those of unknown kind have no place here.

    Args:
        table: What ``evaluate.classify_doubles`` returns; without a column ``source``, one panel.

    Raises:
        DataError: A column is missing, or no double has a known kind.
    """
    missing = {"double", "kind", "residual_share", "size_ratio"} - set(table)
    if missing:
        raise DataError(f"the table lacks the columns {sorted(missing)}; it has {list(table)}.")
    known = table[np.isfinite(table["residual_share"]) & np.isfinite(table["size_ratio"])]
    if known.empty:
        raise DataError("no double of the table has a known kind, so there is nothing to draw.")
    sources = sorted(set(known["source"])) if "source" in known else [""]
    reach = 1.08 * max(float(known["size_ratio"].max()), 1.0)
    height = 1.12 * max(float(known["residual_share"].max()), 2 * ADDITIVE_BELOW)
    with style():
        figure = new_figure(3.6 * len(sources) + 0.2, 3.7)
        for ax, source in zip(axes_grid(figure, len(sources), len(sources)), sources, strict=True):
            rows = known[known["source"] == source] if source else known
            ax.axhline(ADDITIVE_BELOW, color=GREY, linestyle="--", linewidth=0.9)
            ax.vlines(SUPPRESSED_BELOW, ADDITIVE_BELOW, height, color=GREY, linestyle=":", linewidth=1.1)
            for kind, (colour, marker) in _LOOKS.items():
                x, y = rows.loc[rows["kind"] == kind, ["size_ratio", "residual_share"]].to_numpy().T
                ax.scatter(x, y, c=colour, marker=marker, s=34, label=kind, zorder=3)
            apart = rows[rows["kind"] != "additive"]  # the others lie on each other
            if len(apart) <= _NAMED:
                for row in apart.itertuples():
                    ax.annotate(
                        str(row.double),
                        (float(row.size_ratio), float(row.residual_share)),
                        xytext=(4, 4),
                        textcoords="offset points",
                        fontsize=6,
                    )
            ax.set(xlim=(0, reach), ylim=(-0.02 * height, height), title=source)
            ax.set_xlabel("length of the double, over the longer single")
        figure.axes[0].set_ylabel("length of the residual, over both singles")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        seen = set(known["kind"])
        kept = [(h, name) for h, name in zip(handles, labels, strict=True) if name in seen]
        figure.legend(*zip(*kept, strict=True), loc="outside upper left", ncols=3)
    return figure
