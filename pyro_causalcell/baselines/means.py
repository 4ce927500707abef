"""Mean expression per condition, in the one unit every comparison uses: log1p of counts per 10,000."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_causalcell.data import Screen, ScreenSpec
from pyro_causalcell.errors import DataError

__all__ = ["TrainingMeans", "condition_means", "log_cp10k", "technical_duplicate", "training_means"]

_ROWS = 4096  # cells held dense at a time


def log_cp10k(x_ng: NDArray[np.floating], library_n: NDArray[np.floating]) -> NDArray[np.float64]:
    """log1p of counts per 10,000. A cell whose library is zero stays zero.

    Args:
        x_ng: Counts.
        library_n: Total counts of each cell.
    """
    library_n1 = np.asarray(library_n, dtype=np.float64)[:, None]
    return np.log1p(1e4 * x_ng / np.where(library_n1 > 0, library_n1, 1.0))


def _expression(screen: Screen, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    x_ng = screen.x(rows)
    return log_cp10k(x_ng, screen.library_n[rows]) if screen.is_counts else x_ng.astype(np.float64)


def _group_means(
    screen: Screen, rows: NDArray[np.int64], group_n: NDArray[np.int64], n_groups: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Mean expression and number of cells of each group of ``rows``; the mean of an empty group is NaN."""
    sum_cg = np.zeros((n_groups, screen.n_genes))
    for start in range(0, len(rows), _ROWS):
        chunk, group = rows[start : start + _ROWS], group_n[start : start + _ROWS]
        member_cn = sp.csr_array(
            (np.ones(len(chunk)), (group, np.arange(len(chunk)))), (n_groups, len(chunk))
        )
        sum_cg += member_cn @ _expression(screen, chunk)
    cells_c = np.bincount(group_n, minlength=n_groups)
    mean_cg = np.full_like(sum_cg, np.nan)
    np.divide(sum_cg, cells_c[:, None], out=mean_cg, where=cells_c[:, None] > 0)
    return mean_cg, cells_c


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
    index = _indices(screen, conditions)
    rows = np.asarray(rows, dtype=np.int64)
    asked = rows[np.isin(screen.condition_n[rows], index)]
    mean_cg, cells_c = _group_means(screen, asked, screen.condition_n[asked], len(screen.conditions))
    empty = [name for name, i in zip(conditions, index, strict=True) if cells_c[i] == 0]
    if empty:
        raise DataError(f"no cells of {empty} among the {len(rows)} rows; leave these conditions out.")
    return mean_cg[index]


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
        spec: Settings of the screen: splits a condition into its targets.
        control_g: Mean of the control cells; None without them.
        perturbed_g: Mean of all perturbed cells.
        singles: Mean of the cells of each target perturbed alone.
    """

    spec: ScreenSpec
    control_g: NDArray[np.float64] | None
    perturbed_g: NDArray[np.float64]
    singles: dict[str, NDArray[np.float64]]


def training_means(screen: Screen, rows: NDArray[np.int64]) -> TrainingMeans:
    """Reduce the training cells to the means that the baselines are made of.

    Raises:
        DataError: ``rows`` hold no perturbed cell.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if (screen.condition_n[rows] < 0).any():
        raise DataError("some training rows have an unknown condition (-1); pass rows of the fitted screen.")
    mean_cg, cells_c = _group_means(screen, rows, screen.condition_n[rows], len(screen.conditions))
    if cells_c[1:].sum() == 0:
        raise DataError(
            f"baselines need perturbed cells; the {len(rows)} rows hold {cells_c[0]} control cells and no "
            "others. Pass the training rows of a split that keeps perturbed cells."
        )
    seen = [i for i in range(1, len(cells_c)) if cells_c[i] > 0]
    single = [i for i in seen if screen.conditions[i] in screen.targets]
    return TrainingMeans(
        spec=screen.describe(),
        control_g=mean_cg[0] if cells_c[0] else None,
        perturbed_g=np.average(mean_cg[seen], axis=0, weights=cells_c[seen]),
        singles={screen.conditions[i]: mean_cg[i] for i in single},
    )


def technical_duplicate(
    screen: Screen, rows: NDArray[np.int64], conditions: Sequence[str], seed: int = 0
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Half of the held-out cells predicts the other half: what repeating the experiment would score.

    Score every method against the first half returned here, so that all share one truth. The duplicate
    carries the sampling noise of its own cells; a method that pools many training cells can have less.

    Args:
        screen: The screen.
        rows: Held-out cells.
        conditions: Conditions with at least two cells among ``rows``.
        seed: Of the random halves.

    Returns:
        The truth and the duplicate, each of shape (c, g).

    Raises:
        DataError: A condition has fewer than two cells among ``rows``.
    """
    rows = np.random.default_rng(seed).permutation(np.asarray(rows, dtype=np.int64))
    index = _indices(screen, conditions)
    halves: tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]] = ([], [])
    for name, i in zip(conditions, index, strict=True):
        cells = rows[screen.condition_n[rows] == i]
        if len(cells) < 2:
            raise DataError(f"{name!r} has {len(cells)} held-out cells and halves need 2; leave it out.")
        halves[0].append(cells[: len(cells) // 2])
        halves[1].append(cells[len(cells) // 2 :])
    truth, duplicate = (condition_means(screen, np.concatenate(half), conditions) for half in halves)
    return truth, duplicate
