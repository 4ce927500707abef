"""Observed cells beside cells that the model draws for the same conditions, libraries and batches."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell.errors import DataError

__all__ = ["Compared", "compare_replicates", "coverage"]

_NOMINAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


@dataclass(frozen=True)
class Compared:
    """Observed cells beside replicates of them.

    Attributes:
        checks: The array arguments of ``plot.predictive_checks``; predicted totals are those of the first
            replicate.
        pit_ng: Probability integral transform of each value: uniform on [0, 1] if the model is right.
        pit_cg: The same of the mean of each gene in each condition.
        condition_c: The conditions, as in ``condition_n``.
    """

    checks: dict[str, NDArray[np.float64]]
    pit_ng: NDArray[np.float64]
    pit_cg: NDArray[np.float64]
    condition_c: NDArray[np.int64]


class _Place:
    """Where observed values fall among replicates that pass by one at a time."""

    def __init__(self, observed: NDArray[np.floating]):
        self.observed = observed
        self.below, self.tied = np.zeros(observed.shape, np.int32), np.zeros(observed.shape, np.int32)
        self.seen = 0

    def add(self, replicated: NDArray[np.floating]) -> None:
        """Take in one replicate."""
        self.below += replicated < self.observed
        self.tied += replicated == self.observed
        self.seen += 1

    def transform(self, rng: np.random.Generator) -> NDArray[np.float64]:
        """The probability integral transform; a value equal to replicates takes a random place among them."""
        return (self.below + rng.random(self.below.shape) * (self.tied + 1)) / (self.seen + 1)


def compare_replicates(
    observed_ng: NDArray[np.floating],
    replicated_sng: Iterable[NDArray[np.floating]],
    condition_n: NDArray[np.int64],
    seed: int = 0,
) -> Compared:
    """Compare observed cells with replicates of them, taken one at a time.

    Args:
        observed_ng: Observed values.
        replicated_sng: Yields replicates of the same cells, each n, g.
        condition_n: Condition of each cell.
        seed: Of the random places of ties.

    Raises:
        DataError: There is no replicate.
    """
    condition_c, group_n = np.unique(condition_n, return_inverse=True)
    observed = _moments(observed_ng, group_n)
    values, means = _Place(observed_ng), _Place(observed["mean_cg"])
    sums: dict[str, NDArray[np.float64]] = {}
    for x_ng in replicated_sng:
        moments = _moments(x_ng, group_n)
        values.add(x_ng)
        means.add(moments["mean_cg"])
        sums = {name: sums.get(name, 0.0) + value for name, value in moments.items()}
        if values.seen == 1:
            total_n = x_ng.sum(1, dtype=np.float64)
    if values.seen == 0:
        raise DataError("expected at least one replicate, found none; draw some from the fit.")
    checks = {"observed_total_n": observed_ng.sum(1, dtype=np.float64), "predicted_total_n": total_n}
    checks |= {f"observed_{name}": value for name, value in observed.items()}
    checks |= {f"predicted_{name}": value / values.seen for name, value in sums.items()}
    rng = np.random.default_rng(seed)
    return Compared(checks, values.transform(rng), means.transform(rng), condition_c)


def _moments(x_ng: NDArray[np.floating], group_n: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    return {
        "zero_g": (x_ng == 0).mean(0),
        "mean_g": x_ng.mean(0, dtype=np.float64),
        "variance_g": x_ng.var(0, dtype=np.float64),
        "mean_cg": np.stack([x_ng[group_n == c].mean(0, dtype=np.float64) for c in range(group_n.max() + 1)]),
    }


def coverage(
    transforms: Mapping[str, NDArray[np.float64]], nominal: Sequence[float] = _NOMINAL
) -> pd.DataFrame:
    """How often central predictive intervals hold the observed value.

    Args:
        transforms: Name to probability integral transforms; empty ones are left out.
        nominal: Probabilities of the intervals.

    Returns:
        Columns values, nominal, observed.
    """
    rows = [
        (name, level, float((np.abs(pit - 0.5) <= level / 2).mean()))
        for name, pit in transforms.items()
        if pit.size
        for level in nominal
    ]
    return pd.DataFrame(rows, columns=["values", "nominal", "observed"])
