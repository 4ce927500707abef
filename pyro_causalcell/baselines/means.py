"""Mean expression per condition, in the one unit every comparison uses: log1p of counts per 10,000."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_causalcell.data import Screen, ScreenSpec
from pyro_causalcell.errors import DataError

__all__ = [
    "Moments",
    "TrainingMeans",
    "condition_means",
    "condition_moments",
    "draw_cells",
    "expression",
    "group_moments",
    "halves",
    "log_cp10k",
    "moments",
    "resampled_residuals",
    "training_means",
]

_ROWS = 4096  # cells held dense at a time


def log_cp10k(x_ng: NDArray[np.floating], library_n: NDArray[np.floating]) -> NDArray[np.float64]:
    """log1p of counts per 10,000. A cell whose library is zero stays zero.

    Args:
        x_ng: Counts.
        library_n: Total counts of each cell.
    """
    library_n1 = np.asarray(library_n, dtype=np.float64)[:, None]
    return np.log1p(1e4 * x_ng / np.where(library_n1 > 0, library_n1, 1.0))


def expression(screen: Screen, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Expression of some cells, [n, g]: counts as log1p CP10k, normalised data as they are."""
    x_ng = screen.x(rows)
    return log_cp10k(x_ng, screen.library_n[rows]) if screen.is_counts else x_ng.astype(np.float64)


def draw_cells(screen: Screen, rows: NDArray[np.int64], n_cells: int, seed: int) -> NDArray[np.float64]:
    """Expression of at most ``n_cells`` of these cells, drawn without replacement, [n, g]."""
    few = np.random.default_rng(seed).permutation(np.asarray(rows, dtype=np.int64))[:n_cells]
    return expression(screen, few)


def resampled_residuals(
    screen: Screen, rows: NDArray[np.int64], mean_g: NDArray[np.float64], n_cells: int, seed: int
) -> NDArray[np.float64]:
    """What sets cells off their mean, ``n_cells`` times drawn with replacement, [n, g].

    All residuals once have a mean of exactly zero, as no sample of cells has. A distance that takes them for
    a sample comes out too small, by about √2 σ / 2n for the right distribution, σ² the summed variance of
    genes; drawn with replacement they are a sample of what they are, n points.

    Args:
        screen: The screen.
        rows: The cells.
        mean_g: Their mean.
        n_cells: Draws.
        seed: Of the draws.
    """
    drawn = np.random.default_rng(seed).choice(np.asarray(rows, dtype=np.int64), n_cells)
    return expression(screen, drawn) - mean_g


class Moments(NamedTuple):
    """Mean and variance of each gene in groups of cells.

    Attributes:
        mean_cg: NaN for an empty group.
        variance_cg: Unbiased; NaN for a group of fewer than two cells.
        cells_c: Cells of each group.
    """

    mean_cg: NDArray[np.float64]
    variance_cg: NDArray[np.float64]
    cells_c: NDArray[np.int64]


def moments(screen: Screen, rows: NDArray[np.int64]) -> Moments:
    """Moments of the cells of each of ``screen.conditions`` among ``rows``, in one pass over them."""
    rows = np.asarray(rows, dtype=np.int64)
    return group_moments(screen, rows, screen.condition_n[rows], len(screen.conditions))


def group_moments(
    screen: Screen, rows: NDArray[np.int64], group_n: NDArray[np.int64], n_groups: int
) -> Moments:
    """Moments of groups of cells, c of them, in one pass.

    Args:
        screen: The screen.
        rows: Cells.
        group_n: Group of each of these cells, from 0.
        n_groups: Number of groups.
    """
    sum_cg = np.zeros((n_groups, screen.n_genes))
    squares_cg = np.zeros_like(sum_cg)
    for start in range(0, len(rows), _ROWS):
        chunk, group = rows[start : start + _ROWS], group_n[start : start + _ROWS]
        member_cn = sp.csr_array(
            (np.ones(len(chunk)), (group, np.arange(len(chunk)))), (n_groups, len(chunk))
        )
        x_ng = expression(screen, chunk)
        sum_cg += member_cn @ x_ng
        squares_cg += member_cn @ x_ng**2
    cells_c = np.bincount(group_n, minlength=n_groups)
    n_c1 = cells_c[:, None]
    mean_cg, variance_cg = np.full_like(sum_cg, np.nan), np.full_like(sum_cg, np.nan)
    np.divide(sum_cg, n_c1, out=mean_cg, where=n_c1 > 0)
    spread_cg = np.maximum(squares_cg - n_c1 * np.nan_to_num(mean_cg) ** 2, 0.0)
    np.divide(spread_cg, n_c1 - 1, out=variance_cg, where=n_c1 > 1)
    return Moments(mean_cg, variance_cg, cells_c)


def condition_means(
    screen: Screen, rows: NDArray[np.int64], conditions: Sequence[str]
) -> NDArray[np.float64]:
    """Mean expression of the cells of each condition.

    Args:
        screen: Counts are normalised per cell to log1p CP10k first; normalised data are used as they are.
        rows: Cells to use.
        conditions: Names, in the order of the result.

    Returns:
        Shape (c, g).

    Raises:
        DataError: A condition has no cell among ``rows``.
    """
    return condition_moments(screen, rows, conditions).mean_cg


def condition_moments(screen: Screen, rows: NDArray[np.int64], conditions: Sequence[str]) -> Moments:
    """As ``condition_means``, with variances and numbers of cells."""
    index = _indices(screen, conditions)
    rows = np.asarray(rows, dtype=np.int64)
    asked = rows[np.isin(screen.condition_n[rows], index)]
    found = moments(screen, asked)
    empty = [name for name, i in zip(conditions, index, strict=True) if found.cells_c[i] == 0]
    if empty:
        raise DataError(f"no cells of {empty} among the {len(rows)} rows; leave these conditions out.")
    return Moments(found.mean_cg[index], found.variance_cg[index], found.cells_c[index])


def _indices(screen: Screen, conditions: Sequence[str]) -> list[int]:
    names = [screen.canonical(name) for name in conditions]
    absent = [name for name in names if name not in screen.conditions]
    if absent:
        raise DataError(f"the screen has no cells of {absent}; choose among screen.conditions.")
    return [screen.conditions.index(name) for name in names]


@dataclass(frozen=True)
class TrainingMeans:
    """What the training cells say, reduced to means in log1p CP10k.

    Attributes:
        screen: The screen.
        rows: The training cells.
        control_g: Mean of the control cells; None without them.
        perturbed_g: Mean of all perturbed cells.
        seen: Mean of the cells of each perturbed condition.
        cells: Their number.
    """

    screen: Screen
    rows: NDArray[np.int64]
    control_g: NDArray[np.float64] | None
    perturbed_g: NDArray[np.float64]
    seen: dict[str, NDArray[np.float64]]
    cells: dict[str, int]

    @property
    def spec(self) -> ScreenSpec:
        """Settings of the screen: splits a condition into its targets."""
        return self.screen.describe()

    @property
    def singles(self) -> dict[str, NDArray[np.float64]]:
        """Mean of the cells of each target perturbed alone."""
        return {name: mean_g for name, mean_g in self.seen.items() if name in self.screen.targets}


def training_means(screen: Screen, rows: NDArray[np.int64]) -> TrainingMeans:
    """Reduce the training cells to the means that the baselines are made of.

    Raises:
        DataError: ``rows`` hold no perturbed cell.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if (screen.condition_n[rows] < 0).any():
        raise DataError("some training rows have an unknown condition (-1); pass rows of the fitted screen.")
    mean_cg, _, cells_c = moments(screen, rows)
    if cells_c[1:].sum() == 0:
        raise DataError(
            f"baselines need perturbed cells; the {len(rows)} rows hold {cells_c[0]} control cells and no "
            "others. Pass the training rows of a split that keeps perturbed cells."
        )
    seen = [i for i in range(1, len(cells_c)) if cells_c[i] > 0]
    return TrainingMeans(
        screen=screen,
        rows=rows,
        control_g=mean_cg[0] if cells_c[0] else None,
        perturbed_g=np.average(mean_cg[seen], axis=0, weights=cells_c[seen]),
        seen={screen.conditions[i]: mean_cg[i] for i in seen},
        cells={screen.conditions[i]: int(cells_c[i]) for i in seen},
    )


def halves(
    screen: Screen, rows: NDArray[np.int64], conditions: Sequence[str], seed: int = 0
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split the cells of each condition in two at random: one half to score on, one to predict it.

    Args:
        screen: The screen.
        rows: Held-out cells.
        conditions: Conditions with at least two cells among ``rows``.
        seed: Of the random halves.

    Returns:
        Rows of the first and of the second half; the second has the odd cell.

    Raises:
        DataError: A condition has fewer than two cells among ``rows``.
    """
    rows = np.random.default_rng(seed).permutation(np.asarray(rows, dtype=np.int64))
    first, second = [], []
    for name, i in zip(conditions, _indices(screen, conditions), strict=True):
        cells = rows[screen.condition_n[rows] == i]
        if len(cells) < 2:
            raise DataError(f"{name!r} has {len(cells)} held-out cells and halves need 2; leave it out.")
        first.append(cells[: len(cells) // 2])
        second.append(cells[len(cells) // 2 :])
    return np.concatenate(first), np.concatenate(second)
