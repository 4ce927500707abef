"""Cells in each block of programmes: does the invariant one mix perturbations?"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from sklearn.manifold import TSNE
from sklearn.preprocessing import StandardScaler

from pyro_causalcell.data.spec import CONTROL
from pyro_causalcell.errors import DataError
from pyro_causalcell.plot.style import BLACK, OKABE_ITO, OTHERS, furthest, new_figure, style

__all__ = ["block_maps"]

_MARKERS = ("o", "s", "D", "^", "P", "X")


def block_maps(
    blocks: Mapping[str, ArrayLike], conditions: Sequence[str], *, n_named: int = 6, seed: int = 0
) -> Figure:
    """A t-SNE map of the same cells for each block of programmes, coloured by perturbation.

    The perturbations whose mean lies furthest from control's in the last block have colours; others are grey.
    A map shows neighbours, not distances: read the numbers of ``evaluate.mixing`` with it.

    Args:
        blocks: Name -> programmes of the cells [n, k], the responsive block last.
        conditions: Condition of each cell; at least 10 cells.
        n_named: Perturbations in colour, 6 at most.
        seed: Of the maps and of the order in which cells are drawn.

    Raises:
        DataError: There are fewer than 10 cells, or numbers of cells differ.

    Source: van der Maaten and Hinton, JMLR 2008 (t-SNE), as in scikit-learn.
    """
    names = np.asarray(conditions, dtype=str)
    values = {block: np.asarray(z_nk, dtype=np.float64) for block, z_nk in blocks.items()}
    sizes = {block: len(z_nk) for block, z_nk in values.items()}
    if len(names) < 10 or set(sizes.values()) != {len(names)}:
        raise DataError(f"expected 10 cells or more with a condition each, found {len(names)} and {sizes}.")
    named = furthest(values[list(values)[-1]], names, min(n_named, len(_MARKERS)))
    order = np.random.default_rng(seed).permutation(len(names))
    with style():
        figure = new_figure(3.9 * len(values), 4.1)
        for ax, (block, z_nk) in zip(
            figure.subplots(1, len(values), squeeze=False)[0], values.items(), strict=True
        ):
            perplexity = min(30.0, (len(names) - 1) / 3)
            map_n2 = TSNE(perplexity=perplexity, random_state=seed).fit_transform(
                StandardScaler().fit_transform(z_nk)
            )
            grey = order[~np.isin(names[order], [*named, CONTROL])]
            ax.scatter(*map_n2[grey].T, s=5, c=OTHERS, linewidths=0, rasterized=True)
            control = order[names[order] == CONTROL]
            ax.scatter(*map_n2[control].T, s=6, c=BLACK, alpha=0.5, linewidths=0, rasterized=True)
            for name, colour, marker in zip(named, OKABE_ITO, _MARKERS, strict=False):
                cells = order[names[order] == name]
                ax.scatter(*map_n2[cells].T, s=13, c=colour, marker=marker, linewidths=0, rasterized=True)
            ax.set(title=block, xticks=[], yticks=[], xlabel="t-SNE 1", ylabel="t-SNE 2")
        looks = [*zip(named, OKABE_ITO, _MARKERS, strict=False)]
        looks += [(CONTROL, BLACK, "o")] if CONTROL in names else []
        looks += [("other perturbations", OTHERS, "o")] if len(set(names) - {*named, CONTROL}) else []
        handles = [
            Line2D([], [], color=colour, marker=marker, linestyle="none", label=label)
            for label, colour, marker in looks
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure
