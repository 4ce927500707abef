"""Predictive checks: statistics of cells, and where the observed value falls among replicates.

:func:`posterior_predictive_checks` and :func:`prior_predictive_checks` draw the replicates from a fit;
:func:`check` takes plain arrays.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.draws import Source, draw_globals, replicates
from pyro_causalcell.evaluate.idata import container
from pyro_causalcell.inference import Fit

__all__ = [
    "STATISTICS",
    "PredictiveChecks",
    "check",
    "mean_variance",
    "posterior_predictive_checks",
    "prior_predictive_checks",
    "total_counts",
    "zero_fraction",
]

Floats = NDArray[np.float64]
Function = Callable[[NDArray[Any]], Any]
Statistic = str | Function
"""A name in :data:`STATISTICS`, or a function of cells [n, g] that returns a number or one for each gene."""


# ---------------------------------------------------------------------- statistics


def total_counts(x_ng: NDArray[Any]) -> Floats:
    """Total of each cell, [n]."""
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
        median over genes of (variance - mean) / mean**2 (0 for Poisson counts). Genes that do not vary, or
        whose mean is not positive, are left out; both are NaN with fewer than two cells or two such genes.
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


def correlation(x_ng: NDArray[Any]) -> float:
    """Root mean square correlation of pairs of genes; NaN with fewer than two cells or two varying genes."""
    x_ng = np.asarray(x_ng, dtype=np.float64)
    centred_ng = x_ng - x_ng.mean(0)
    size_g = np.sqrt((centred_ng**2).sum(0))
    unit_ng = centred_ng[:, size_g > 0] / size_g[size_g > 0]
    n_genes = unit_ng.shape[1]
    if n_genes < 2:
        return float("nan")
    square_gg = (unit_ng.T @ unit_ng) ** 2
    return float(np.sqrt((square_gg.sum() - n_genes) / (n_genes * (n_genes - 1))))


STATISTICS: Mapping[str, Function] = {
    "total_mean": lambda x_ng: total_counts(x_ng).mean(),
    "total_sd": lambda x_ng: total_counts(x_ng).std(),
    "zero_fraction": zero_fraction,
    "mean_variance_slope": lambda x_ng: mean_variance(x_ng)["slope"],
    "dispersion": lambda x_ng: mean_variance(x_ng)["dispersion"],
    "correlation": correlation,
    "maximum": lambda x_ng: np.max(x_ng),
    "gene_mean": lambda x_ng: np.mean(x_ng, 0, dtype=np.float64),
    "gene_sd": lambda x_ng: np.std(x_ng, 0, dtype=np.float64),
    "gene_zero_fraction": lambda x_ng: np.mean(np.asarray(x_ng) == 0, 0),
}
"""Built-in statistics of cells [n, g]: totals of cells (``total_mean``, ``total_sd``), ``zero_fraction`` of
all entries, ``mean_variance_slope`` and ``dispersion`` (see :func:`mean_variance`), ``correlation`` (root
mean square over pairs of genes), ``maximum``; one value for each gene: ``gene_mean``, ``gene_sd``,
``gene_zero_fraction``."""

OF_COUNTS = ("total_mean", "total_sd", "zero_fraction", "mean_variance_slope", "dispersion")
OF_NORMALISED = ("total_mean", "total_sd", "correlation", "maximum")
TAKEN_DIMS = ("chain", "draw", "gene")
"""Dimensions of the results; an obs column of such a name gives a dimension ``obs_<name>``."""


# ---------------------------------------------------------------------- on arrays


def check(
    observed_ng: NDArray[Any],
    replicated_sng: Iterable[NDArray[Any]],
    condition_n: NDArray[Any],
    condition_names: Sequence[str],
    *,
    statistic: Statistic | Sequence[Statistic] = OF_COUNTS,
    gene_names: Sequence[str] | None = None,
    interval: float = 0.9,
) -> pd.DataFrame:
    """Compares statistics of the observed cells with those of replicated data sets, condition by condition.

    Args:
        observed_ng: observed values, [cells, genes].
        replicated_sng: replicated values of the same cells: an array [replicates, cells, genes], or anything
            that yields one replicate [cells, genes] at a time, so that they need not all be in memory.
        condition_n: condition number of each cell.
        condition_names: name of each condition number. Conditions without cells get no rows.
        statistic: one or several of :data:`STATISTICS`, or functions of cells [n, g] that return a number,
            or one for each gene.
        gene_names: name of each gene, for statistics with one value for each; their numbers if left out.
        interval: mass of the central interval of the replicates.

    Returns:
        One row per condition and statistic (and gene): condition, statistic, n_cells, (gene,) observed,
        replicate_mean, low, high, p_value. The p-value is the fraction of replicates above the observed
        value, ties counted half: values near 0 and near 1 both speak against the model. It is NaN where the
        statistic is undefined.

    Raises:
        DataError: if shapes do not agree, a condition number has no name, there is no replicate, or a
            statistic is unknown or returns something else.

    Source: Gelman, Meng and Stern, Posterior predictive assessment of model fitness, 1996.
    """
    compared = _compare(
        observed_ng, replicated_sng, condition_n, condition_names, statistic, gene_names, "condition"
    )
    return compared.table(interval)


@dataclass(frozen=True)
class PredictiveChecks:
    """Statistics of observed cells beside those of replicates.

    Attributes:
        observed: Each statistic over the groups (and genes).
        replicated: The same with ``chain`` and ``draw`` in front: one draw for each replicate.
        source: ``"posterior"`` or ``"prior"``: where the replicates come from.
    """

    observed: xr.Dataset
    replicated: xr.Dataset
    source: Source

    @property
    def by(self) -> str:
        """What the groups are: the name of their dimension."""
        return str(self.observed["n_cells"].dims[0])

    def table(self, interval: float = 0.9) -> pd.DataFrame:
        """One row per group and statistic (and gene), as :func:`check` returns.

        Args:
            interval: Mass of the central interval of the replicates.

        Raises:
            DataError: The interval is not between 0 and 1.
        """
        if not 0 < interval < 1:
            raise DataError(f"expected interval between 0 and 1, found {interval}; 0.9 is the usual one")
        blocks = [self._block(str(name), interval) for name in self.replicated]
        table = pd.concat(blocks, ignore_index=True)
        order = {group: i for i, group in enumerate(self.observed[self.by].values)}
        return table.sort_values(self.by, key=lambda c: c.map(order), kind="stable", ignore_index=True)

    def _block(self, name: str, interval: float) -> pd.DataFrame:
        """Rows of one statistic: observed value, replicates' mean and interval, p-value."""
        observed = self.observed[name]
        replicated_s = self.replicated[name].values[0]
        low, high = np.quantile(replicated_s, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
        above = (replicated_s > observed.values).mean(0) + (replicated_s == observed.values).mean(0) / 2
        undefined = np.isnan(observed.values) | np.isnan(replicated_s).any(0)
        columns = {
            "observed": observed.values,
            "replicate_mean": replicated_s.mean(0),
            "low": low,
            "high": high,
            "p_value": np.where(undefined, np.nan, above),
        }
        labels = pd.DataFrame(index=observed.to_series().index).reset_index()
        labels.insert(1, "statistic", name)
        labels.insert(2, "n_cells", labels[self.by].map(self.observed["n_cells"].to_series()))
        return labels.assign(**{key: np.ravel(value) for key, value in columns.items()})

    def to_inference_data(self) -> Any:
        """The statistics as ArviZ groups: ``observed_data`` and ``posterior_predictive`` (or prior)."""
        observed = self.observed.drop_vars("n_cells")
        return container({f"{self.source}_predictive": self.replicated, "observed_data": observed})


def _compare(
    observed_ng: NDArray[Any],
    replicated_sng: Iterable[NDArray[Any]],
    group_n: NDArray[Any],
    group_names: Sequence[str],
    statistic: Statistic | Sequence[Statistic],
    gene_names: Sequence[str] | None,
    by: str,
    source: Source = "posterior",
) -> PredictiveChecks:
    group_n = _checked_groups(observed_ng, group_n, group_names, by)
    n_genes = np.shape(observed_ng)[1]
    genes = list(range(n_genes)) if gene_names is None else list(gene_names)
    if len(genes) != n_genes:
        raise DataError(
            f"expected one name per gene, found {len(genes)} names for {n_genes} genes. Pass the names of "
            "the columns."
        )
    functions = _functions(statistic)
    present, place_n = np.unique(group_n, return_inverse=True)
    members = [np.flatnonzero(place_n == c) for c in range(len(present))]

    def values(x_ng: NDArray[Any]) -> dict[str, Floats]:
        x_ng = np.asarray(x_ng)
        return {
            name: np.stack([_value(name, function, x_ng[mine]) for mine in members])
            for name, function in functions.items()
        }

    observed = values(observed_ng)
    replicated: dict[str, list[Floats]] = {name: [] for name in functions}
    for x_ng in replicated_sng:
        if np.shape(x_ng) != np.shape(observed_ng):
            raise DataError(
                f"expected replicates of shape {np.shape(observed_ng)}, found {np.shape(x_ng)}. Replicate "
                "the same cells."
            )
        for name, value in values(x_ng).items():
            replicated[name].append(value)
    if not next(iter(replicated.values())):
        raise DataError("expected at least one replicate, found none. Draw replicates from the fit.")
    dims = {name: [by, "gene"][: value.ndim] for name, value in observed.items()}
    coords: dict[str, Any] = {by: [group_names[c] for c in present]}
    if any(len(d) == 2 for d in dims.values()):
        coords["gene"] = genes
    stacked = {name: np.stack(value)[None] for name, value in replicated.items()}
    used = {name: (["chain", "draw", *dims[name]], value) for name, value in stacked.items()}
    n_draws = len(next(iter(replicated.values())))
    sizes = ([by], [len(mine) for mine in members])
    return PredictiveChecks(
        xr.Dataset({n: (dims[n], v) for n, v in observed.items()} | {"n_cells": sizes}, coords),
        xr.Dataset(used, {"chain": [0], "draw": np.arange(n_draws), **coords}),
        source,
    )


def _functions(statistic: Statistic | Sequence[Statistic]) -> dict[str, Function]:
    chosen = [statistic] if isinstance(statistic, str) or callable(statistic) else list(statistic)
    if not chosen:
        raise DataError(f"expected a statistic, found none; known are {', '.join(STATISTICS)}")
    functions: dict[str, Function] = {}
    for one in chosen:
        if isinstance(one, str) and one not in STATISTICS:
            raise DataError(
                f"unknown statistic {one!r}; known are {', '.join(STATISTICS)}, or pass a function of cells"
            )
        name = one if isinstance(one, str) else one.__name__
        if name in functions or name == "n_cells":
            raise DataError(f"expected statistics of different names, found {name!r} twice; rename one")
        functions[name] = STATISTICS[one] if isinstance(one, str) else one
    return functions


def _value(name: str, function: Function, x_ng: NDArray[Any]) -> Floats:
    value = np.asarray(function(x_ng), dtype=np.float64)
    if value.shape not in ((), x_ng.shape[1:]):
        raise DataError(
            f"expected statistic {name!r} to return a number or one for each of {x_ng.shape[1]} genes, found "
            f"shape {value.shape}; reduce over the cells (axis 0)"
        )
    return value


def _checked_groups(
    observed_ng: NDArray[Any], group_n: NDArray[Any], group_names: Sequence[str], by: str
) -> NDArray[np.int64]:
    group_n = np.asarray(group_n)
    if np.ndim(observed_ng) != 2 or group_n.shape != np.shape(observed_ng)[:1] or not group_n.size:
        raise DataError(
            f"expected values [cells, genes] and one {by} per cell, found shapes "
            f"{np.shape(observed_ng)} and {group_n.shape}. Pass the same cells in both."
        )
    if group_n.min() < 0 or group_n.max() >= len(group_names):
        raise DataError(
            f"expected {by} numbers from 0 to {len(group_names) - 1}, found {group_n.min()} to "
            f"{group_n.max()}. Leave out cells of unknown {by}."
        )
    return group_n.astype(np.int64)


# ---------------------------------------------------------------------- of a fit


def posterior_predictive_checks(
    fit: Fit,
    screen: Screen,
    rows: NDArray[Any] | None = None,
    *,
    statistic: Statistic | Sequence[Statistic] | None = None,
    by: str | None = "condition",
    n_samples: int = 50,
    seed: int = 0,
) -> PredictiveChecks:
    """Compare measured cells with cells that the fit draws for the same conditions, libraries and batches.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells; None takes the validation cells.
        statistic: One or several of :data:`STATISTICS`, or functions of cells [n, g] that return a number or
            one for each gene. None takes totals, zeros and dispersion of counts, or totals, correlation and
            maximum of normalised values.
        by: What groups the cells: ``"condition"``, ``"batch"`` or ``"time"`` of the screen, any column of
            obs, or None for all cells together.
        n_samples: Replicates, each with its own draw of the global latents.
        seed: Seed of the draws.

    Returns:
        The statistics; ``.table()`` gives p-values and intervals, ``plot.predictive_statistics`` draws it,
        ``.to_inference_data()`` gives it to ArviZ.

    Raises:
        DataError: No such statistic or column, or the column has missing values.

    Source: Gelman, Meng and Stern, Statistica Sinica 1996.
    """
    return _predictive_checks(fit, screen, rows, statistic, by, n_samples, seed, "posterior")


def prior_predictive_checks(
    fit: Fit,
    screen: Screen,
    rows: NDArray[Any] | None = None,
    *,
    statistic: Statistic | Sequence[Statistic] | None = None,
    by: str | None = "condition",
    n_samples: int = 50,
    seed: int = 0,
) -> PredictiveChecks:
    """The same with the model's prior in place of the posterior of the global latents.

    Does the model allow data like these before it has seen which perturbation does what? What it learned as
    parameters (decoder, dispersions) stays. Penalties (``pyro.factor``) do not enter: priors are drawn as
    they are written.

    Args:
        fit: The fit.
        screen: The cells.
        rows: Which cells; None takes the validation cells.
        statistic: As for :func:`posterior_predictive_checks`.
        by: As there.
        n_samples: Replicates, each with its own prior draw of the global latents.
        seed: Seed of the draws.

    Raises:
        DataError: As there.

    Source: Gabry et al., JRSS A 2019, section 3.
    """
    return _predictive_checks(fit, screen, rows, statistic, by, n_samples, seed, "prior")


def _predictive_checks(
    fit: Fit,
    screen: Screen,
    rows: NDArray[Any] | None,
    statistic: Statistic | Sequence[Statistic] | None,
    by: str | None,
    n_samples: int,
    seed: int,
    source: Source,
) -> PredictiveChecks:
    rows = fit.split.validation if rows is None else np.asarray(rows)
    if statistic is None:
        statistic = OF_COUNTS if screen.is_counts else OF_NORMALISED
    group_n, names = _groups(screen, rows, by)
    draws = draw_globals(fit, n_samples, seed, source)
    copies = replicates(fit, screen, rows, draws, n_samples, seed)
    dim = "group" if by is None else f"obs_{by}" if by in TAKEN_DIMS else by
    return _compare(screen.x(rows), copies, group_n, names, statistic, screen.genes, dim, source)


def _groups(screen: Screen, rows: NDArray[Any], by: str | None) -> tuple[NDArray[np.int64], list[str]]:
    """Number of each cell's group, and the names of the groups."""
    if by is None:
        return np.zeros(len(rows), dtype=np.int64), ["all cells"]
    if by == "condition":
        return screen.condition_n[rows], list(screen.conditions)
    spec = screen.describe()
    columns = {"batch": spec.batch, "time": [spec.time] if spec.time else []}.get(by) or [by]
    obs = screen.adata.obs
    for column in columns:
        if column not in obs:
            raise DataError(
                f"obs[{column!r}] not found; columns are {list(obs.columns)}. Pass by='condition', by=None "
                "or one of them"
            )
        if missing := int(obs[column].iloc[rows].isna().sum()):
            raise DataError(
                f"expected a value in obs[{column!r}] for every cell, found {missing} missing of "
                f"{len(rows)}; fill them, or leave those rows out"
            )
    chosen = obs[columns].iloc[rows]
    group_n = chosen.groupby(columns, observed=True).ngroup().to_numpy(np.int64)
    first = chosen.iloc[np.unique(group_n, return_index=True)[1]]
    return group_n, [", ".join(map(str, row)) for row in first.itertuples(index=False)]
