"""Posterior predictive checks: statistics of counts, and where the observed value falls among replicates.

:func:`posterior_predictive_checks` draws the replicates from a fit; the others take plain arrays.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import replicate

__all__ = [
    "check",
    "check_gene_means",
    "gene_means",
    "mean_variance",
    "posterior_predictive_checks",
    "total_counts",
    "zero_fraction",
]

Floats = NDArray[np.float64]


def total_counts(x_ng: NDArray[Any]) -> Floats:
    """Total count of each cell, [n]."""
    total_n: Floats = np.asarray(x_ng).sum(1, dtype=np.float64)
    return total_n


def zero_fraction(x_ng: NDArray[Any]) -> float:
    """Fraction of entries that are zero."""
    return float(np.mean(np.asarray(x_ng) == 0))


def mean_variance(x_ng: NDArray[Any]) -> dict[str, float]:
    """How the variance of genes grows with their mean.

    Args:
        x_ng: counts, [cells, genes].

    Returns:
        ``slope`` of log variance on log mean over genes (1 for Poisson counts), and ``dispersion``, the
        median over genes of (variance - mean) / mean**2 (0 for Poisson counts). Genes that do not vary are
        left out; both are NaN with fewer than two cells or two such genes.
    """
    x_ng = np.asarray(x_ng, dtype=np.float64)
    if len(x_ng) < 2:
        return {"slope": np.nan, "dispersion": np.nan}
    mean_g, variance_g = x_ng.mean(0), x_ng.var(0, ddof=1)
    varies = (mean_g > 0) & (variance_g > 0)
    mean_g, variance_g = mean_g[varies], variance_g[varies]
    log_mean_g = np.log(mean_g) - np.log(mean_g).mean() if mean_g.size else mean_g
    spread = float((log_mean_g**2).sum())
    if mean_g.size < 2 or spread == 0:
        return {"slope": np.nan, "dispersion": np.nan}
    return {
        "slope": float((log_mean_g * np.log(variance_g)).sum() / spread),
        "dispersion": float(np.median((variance_g - mean_g) / mean_g**2)),
    }


def gene_means(x_ng: NDArray[Any], condition_n: NDArray[Any], conditions: NDArray[Any]) -> Floats:
    """Mean count of each gene in each of the conditions, [len(conditions), genes].

    Args:
        x_ng: counts, [cells, genes].
        condition_n: condition number of each cell.
        conditions: condition numbers to report; each needs a cell.
    """
    return np.stack([np.asarray(x_ng)[condition_n == c].mean(0, dtype=np.float64) for c in conditions])


def check(
    observed_ng: NDArray[Any],
    replicated_sng: Iterable[NDArray[Any]],
    condition_n: NDArray[Any],
    condition_names: Sequence[str],
    *,
    interval: float = 0.9,
) -> pd.DataFrame:
    """Compares statistics of the observed counts with those of replicated data sets, condition by condition.

    Statistics: ``total_mean`` and ``total_sd`` (total count of a cell), ``zero_fraction``,
    ``mean_variance_slope`` and ``dispersion`` (see :func:`mean_variance`).

    Args:
        observed_ng: observed counts, [cells, genes].
        replicated_sng: replicated counts of the same cells: an array [replicates, cells, genes], or anything
            that yields one replicate [cells, genes] at a time, so that they need not all be in memory.
        condition_n: condition number of each cell.
        condition_names: name of each condition number. Conditions without cells get no rows.
        interval: mass of the central interval of the replicates.

    Returns:
        One row per condition and statistic: condition, statistic, n_cells, observed, replicate_mean, low,
        high, p_value. The p-value is the fraction of replicates above the observed value, ties counted half:
        values near 0 and near 1 both speak against the model. It is NaN where the statistic is undefined.

    Raises:
        DataError: if shapes do not agree, a condition number has no name, or there is no replicate.

    Source: Gelman, Meng and Stern, Posterior predictive assessment of model fitness, 1996.
    """
    condition_n = _checked_conditions(observed_ng, condition_n, condition_names)
    present = np.unique(condition_n)

    def statistics(x_ng: NDArray[Any]) -> Floats:
        x_ng = np.asarray(x_ng)
        return np.array([list(_summary(x_ng[condition_n == c]).values()) for c in present])

    observed_ct = statistics(observed_ng)
    replicated_sct = _replicates(replicated_sng, np.shape(observed_ng), statistics)
    names = list(_summary(np.asarray(observed_ng)[:1]))
    n_cells = [int((condition_n == c).sum()) for c in present]
    labels = pd.DataFrame(
        [(condition_names[c], name, n) for c, n in zip(present, n_cells, strict=True) for name in names],
        columns=["condition", "statistic", "n_cells"],
    )
    return _table(labels, observed_ct, replicated_sct, interval)


def check_gene_means(
    observed_ng: NDArray[Any],
    replicated_sng: Iterable[NDArray[Any]],
    condition_n: NDArray[Any],
    condition_names: Sequence[str],
    gene_names: Sequence[str],
    *,
    interval: float = 0.9,
) -> pd.DataFrame:
    """Compares the mean count of every gene in every condition with replicated data sets.

    Args:
        observed_ng: observed counts, [cells, genes].
        replicated_sng: replicated counts, as for :func:`check`.
        condition_n: condition number of each cell.
        condition_names: name of each condition number. Conditions without cells get no rows.
        gene_names: name of each gene.
        interval: mass of the central interval of the replicates.

    Returns:
        One row per condition and gene: condition, gene, observed, replicate_mean, low, high, p_value (as for
        :func:`check`).

    Raises:
        DataError: if shapes do not agree, a condition number has no name, or there is no replicate.
    """
    condition_n = _checked_conditions(observed_ng, condition_n, condition_names)
    if len(gene_names) != np.shape(observed_ng)[1]:
        raise DataError(
            f"expected one name per gene, found {len(gene_names)} names for "
            f"{np.shape(observed_ng)[1]} genes. Pass the names of the columns."
        )
    present = np.unique(condition_n)
    observed_cg = gene_means(observed_ng, condition_n, present)
    replicated_scg = _replicates(
        replicated_sng, np.shape(observed_ng), lambda x_ng: gene_means(x_ng, condition_n, present)
    )
    labels = pd.DataFrame(
        {
            "condition": np.repeat(np.asarray(condition_names, dtype=object)[present], len(gene_names)),
            "gene": np.tile(np.asarray(gene_names, dtype=object), len(present)),
        }
    )
    return _table(labels, observed_cg, replicated_scg, interval)


def _summary(x_ng: NDArray[Any]) -> dict[str, float]:
    total_n = total_counts(x_ng)
    shape = mean_variance(x_ng)
    return {
        "total_mean": float(total_n.mean()),
        "total_sd": float(total_n.std()),
        "zero_fraction": zero_fraction(x_ng),
        "mean_variance_slope": shape["slope"],
        "dispersion": shape["dispersion"],
    }


def _checked_conditions(
    observed_ng: NDArray[Any], condition_n: NDArray[Any], condition_names: Sequence[str]
) -> NDArray[np.int64]:
    condition_n = np.asarray(condition_n)
    if np.ndim(observed_ng) != 2 or condition_n.shape != np.shape(observed_ng)[:1] or not condition_n.size:
        raise DataError(
            f"expected counts [cells, genes] and one condition per cell, found shapes "
            f"{np.shape(observed_ng)} and {condition_n.shape}. Pass the same cells in both."
        )
    if condition_n.min() < 0 or condition_n.max() >= len(condition_names):
        raise DataError(
            f"expected condition numbers from 0 to {len(condition_names) - 1}, found {condition_n.min()} to "
            f"{condition_n.max()}. Leave out cells of unknown conditions."
        )
    return condition_n.astype(np.int64)


def _replicates(replicated_sng: Iterable[NDArray[Any]], shape: tuple[int, ...], statistics: Any) -> Floats:
    """Statistics of each replicate, [s, c, statistics]."""
    values = []
    for x_ng in replicated_sng:
        if np.shape(x_ng) != shape:
            raise DataError(
                f"expected replicates of shape {shape}, found {np.shape(x_ng)}. Replicate the same cells."
            )
        values.append(statistics(x_ng))
    if not values:
        raise DataError("expected at least one replicate, found none. Draw replicates from the fit.")
    return np.stack(values)


def _table(
    labels: pd.DataFrame, observed_ct: Floats, replicated_sct: Floats, interval: float
) -> pd.DataFrame:
    """Labels beside the observed value, the replicates' mean and interval, and the p-value."""
    observed = observed_ct.ravel()
    replicated = replicated_sct.reshape(len(replicated_sct), -1)
    above = (replicated > observed).mean(0) + (replicated == observed).mean(0) / 2
    undefined = np.isnan(observed) | np.isnan(replicated).any(0)
    low, high = np.quantile(replicated, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
    return labels.assign(
        observed=observed,
        replicate_mean=replicated.mean(0),
        low=low,
        high=high,
        p_value=np.where(undefined, np.nan, above),
    )


def posterior_predictive_checks(
    fit: Fit, screen: Screen, rows: NDArray[Any] | None = None, *, n_samples: int = 50, seed: int = 0
) -> pd.DataFrame:
    """Compare measured cells with cells that the fit draws for the same conditions, libraries and batches.

    Args:
        fit: the fit.
        screen: the cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: which cells; None takes the validation cells.
        n_samples: replicates, each with its own draw of the global latents.
        seed: seed of the draws.

    Returns:
        What :func:`check` returns: one row per condition and statistic.

    Raises:
        DataError: a condition has too few cells among the rows.
    """
    rows = fit.split.validation if rows is None else np.asarray(rows)
    copies = (replicate(fit, screen, rows, 1, seed + s)[0] for s in range(n_samples))
    return check(screen.x(rows), copies, screen.condition_n[rows], screen.conditions)
