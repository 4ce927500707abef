"""Moments of observed cells beside those of cells that the model draws in their place."""

from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Moments"]


class Moments:
    """Sums of what ``plot.predictive_checks`` draws, taken while replicates pass by.

    Args:
        observed_ng: Observed values.
        condition_n: Condition of each cell.
    """

    def __init__(self, observed_ng: NDArray[np.floating], condition_n: NDArray[np.int64]):
        self.group_n = np.unique(condition_n, return_inverse=True)[1]
        self.observed = self._of(observed_ng)
        self.sums = {name: np.zeros_like(value) for name, value in self.observed.items()}
        self.observed_total_n = observed_ng.sum(1, dtype=np.float64)
        self.predicted_total_n = np.zeros(0)
        self.seen = 0

    def watch(self, replicates: Iterable[NDArray[np.floating]]) -> Iterator[NDArray[np.floating]]:
        """The same replicates, each n, g, after their moments were added."""
        for x_ng in replicates:
            for name, value in self._of(x_ng).items():
                self.sums[name] += value
            if not self.seen:
                self.predicted_total_n = x_ng.sum(1, dtype=np.float64)
            self.seen += 1
            yield x_ng

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The array arguments of ``plot.predictive_checks``; totals are those of the first replicate."""
        arrays = {"observed_total_n": self.observed_total_n, "predicted_total_n": self.predicted_total_n}
        arrays |= {f"observed_{name}": value for name, value in self.observed.items()}
        return arrays | {f"predicted_{name}": value / self.seen for name, value in self.sums.items()}

    def _of(self, x_ng: NDArray[np.floating]) -> dict[str, NDArray[np.float64]]:
        groups = (x_ng[self.group_n == c] for c in range(self.group_n.max() + 1))
        return {
            "zero_g": (x_ng == 0).mean(0),
            "mean_g": x_ng.mean(0, dtype=np.float64),
            "variance_g": x_ng.var(0, dtype=np.float64),
            "mean_cg": np.stack([mine_ng.mean(0, dtype=np.float64) for mine_ng in groups]),
        }
