"""What repeating the experiment would score: other cells of the same conditions as predictors."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control, ttest_ind_from_stats

from pyro_causalcell.baselines.means import condition_means, condition_moments, draw_cells
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

__all__ = ["InterpolatedDuplicate", "TechnicalDuplicate"]


class TechnicalDuplicate:
    """Other cells of the same condition: the second half of the held-out cells predicts the first.

    It carries the sampling noise of its own cells; a method that pools many training cells can have less.

    Args:
        screen: The screen.
        rows: Cells that predict; none of the cells that are scored.
    """

    name = "technical duplicate"

    def __init__(self, screen: Screen, rows: NDArray[np.int64]):
        self.screen, self.rows = screen, np.asarray(rows, dtype=np.int64)

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean of the cells of each condition, shape (c, g), in log1p CP10k.

        Raises:
            DataError: A condition has no cell.
        """
        return condition_means(self.screen, self.rows, conditions)

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """At most ``n_cells`` of the cells of each condition."""
        index = [self.screen.conditions.index(self.screen.canonical(name)) for name in conditions]
        return [
            draw_cells(self.screen, self.rows[self.screen.condition_n[self.rows] == i], n_cells, seed)
            for i in index
        ]


class InterpolatedDuplicate:
    """The duplicate where a gene's response is sure, the perturbed mean where it is noise.

    Gene by gene, alpha · duplicate + (1 - alpha) · perturbed mean. alpha is 1 - p: p of Welch's t-test
    between the duplicate's cells and the perturbed training cells, Benjamini-Hochberg adjusted over genes.
    So it is a duplicate with less noise, and the better ceiling where conditions have few cells. A gene
    without any variance has p = 1.

    Args:
        screen: The screen.
        train: Training cells.
        rows: Cells of the duplicate; none of the cells that are scored.

    Raises:
        DataError: ``train`` holds fewer than two perturbed cells.

    Source: "Deep learning-based genetic perturbation models do outperform uninformative baselines on
    well-calibrated metrics", bioRxiv 2025.10.20.683304.
    """

    name = "interpolated duplicate"

    def __init__(self, screen: Screen, train: NDArray[np.int64], rows: NDArray[np.int64]):
        self.screen, self.rows = screen, np.asarray(rows, dtype=np.int64)
        perturbed = train[screen.condition_n[train] > 0]
        if len(perturbed) < 2:
            raise DataError(
                f"the {self.name} needs perturbed training cells for its test, found {len(perturbed)}."
            )
        names = [screen.conditions[i] for i in np.unique(screen.condition_n[perturbed])]
        found = condition_moments(screen, perturbed, names)
        self.mean_g, self.variance_g = _pooled(found.mean_cg, found.variance_cg, found.cells_c)
        self.n_perturbed = len(perturbed)

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k.

        Raises:
            DataError: A condition has fewer than two cells.
        """
        found = condition_moments(self.screen, self.rows, conditions)
        few = [name for name, n in zip(conditions, found.cells_c, strict=True) if n < 2]
        if few:
            raise DataError(f"the {self.name} needs two cells of each condition; leave out {few}.")
        with np.errstate(divide="ignore", invalid="ignore"):
            p_cg = ttest_ind_from_stats(
                found.mean_cg,
                np.sqrt(found.variance_cg),
                found.cells_c[:, None],
                self.mean_g,
                np.sqrt(self.variance_g),
                self.n_perturbed,
                equal_var=False,
            ).pvalue
        alpha_cg = 1 - false_discovery_control(np.nan_to_num(p_cg, nan=1.0), axis=1)
        return np.asarray(alpha_cg * found.mean_cg + (1 - alpha_cg) * self.mean_g)


def _pooled(
    mean_cg: NDArray[np.float64], variance_cg: NDArray[np.float64], cells_c: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and variance of all cells of some groups together."""
    n = cells_c.sum()
    mean_g = np.average(mean_cg, axis=0, weights=cells_c)
    within_g = (np.nan_to_num(variance_cg) * (cells_c - 1)[:, None]).sum(0)
    between_g = (cells_c[:, None] * (mean_cg - mean_g) ** 2).sum(0)
    return mean_g, (within_g + between_g) / (n - 1)
