"""Observed cells beside cells that the model draws for the same conditions, libraries and batches."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell.errors import DataError

__all__ = ["compare_replicates", "coverage"]

_NOMINAL = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def compare_replicates(
    observed_ng: NDArray[np.floating],
    replicated_sng: Iterable[NDArray[np.floating]],
    condition_n: NDArray[np.int64],
    seed: int = 0,
) -> tuple[dict[str, NDArray[np.float64]], NDArray[np.float64]]:
    """Moments of observed and replicated cells, and where each observed value falls among its replicates.

    Replicates are taken one at a time, so only two are ever in memory.

    Args:
        observed_ng: Observed values.
        replicated_sng: Yields replicates of the same cells, each n, g.
        condition_n: Condition of each cell.
        seed: Of the ties: a value equal to some replicates takes a random place among them.

    Returns:
        The array arguments of ``plot.predictive_checks`` (predicted totals are those of the first
        replicate), and the probability integral transform of each value, n, g: uniform on [0, 1] if the
        model is right.

    Raises:
        DataError: There is no replicate.
    """
    rng = np.random.default_rng(seed)
    _, group_n = np.unique(condition_n, return_inverse=True)
    below_ng, tied_ng = np.zeros(observed_ng.shape, np.int32), np.zeros(observed_ng.shape, np.int32)
    sums: dict[str, NDArray[np.float64]] = {}
    total_n, draws = None, 0
    for x_ng in replicated_sng:
        total_n = x_ng.sum(1, dtype=np.float64) if total_n is None else total_n
        below_ng += x_ng < observed_ng
        tied_ng += x_ng == observed_ng
        for name, value in _moments(x_ng, group_n).items():
            sums[name] = sums.get(name, 0.0) + value
        draws += 1
    if total_n is None:
        raise DataError("expected at least one replicate, found none; draw some from the fit.")
    checks = {"observed_total_n": observed_ng.sum(1, dtype=np.float64), "predicted_total_n": total_n}
    checks |= {f"observed_{name}": value for name, value in _moments(observed_ng, group_n).items()}
    checks |= {f"predicted_{name}": value / draws for name, value in sums.items()}
    place_ng = rng.random(observed_ng.shape)
    return checks, (below_ng + place_ng * (tied_ng + 1)) / (draws + 1)


def _moments(x_ng: NDArray[np.floating], group_n: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    return {
        "zero_g": (x_ng == 0).mean(0),
        "mean_g": x_ng.mean(0, dtype=np.float64),
        "variance_g": x_ng.var(0, dtype=np.float64),
        "mean_cg": np.stack([x_ng[group_n == c].mean(0, dtype=np.float64) for c in range(group_n.max() + 1)]),
    }


def coverage(
    pit_ng: NDArray[np.float64],
    groups: Mapping[str, NDArray[np.bool_]],
    nominal: Sequence[float] = _NOMINAL,
) -> pd.DataFrame:
    """How often central predictive intervals hold the observed value.

    Args:
        pit_ng: What ``compare_replicates`` returns.
        groups: Name to a mask over cells; groups without cells are left out.
        nominal: Probabilities of the intervals.

    Returns:
        Columns cells, nominal, observed.
    """
    rows = [
        (name, level, float((np.abs(pit_ng[mask] - 0.5) <= level / 2).mean()))
        for name, mask in groups.items()
        if mask.any()
        for level in nominal
    ]
    return pd.DataFrame(rows, columns=["cells", "nominal", "observed"])
