"""Do predictive draws say how sure they can be? Coverage, PIT, proper scores, and which errors they foresee.

:func:`calibration` measures a fit; the others take plain arrays: draws s come first, and all other axes are
those of the observed values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.draws import cell_chunks, draw_globals
from pyro_causalcell.inference import Fit

__all__ = [
    "LEVELS",
    "Calibration",
    "aurc",
    "calibration",
    "crps",
    "energy_score",
    "gene_classes",
    "interval_coverage",
    "interval_score",
    "randomised_pit",
    "risk_coverage",
]

Floats = NDArray[np.float64]

LEVELS = (0.5, 0.8, 0.9, 0.95)
"""Intervals whose coverage is measured."""
JUDGED, LOWEST, HIGHEST = 0.9, 0.87, 0.93
"""A fit is calibrated where its 90 % intervals hold 87 to 93 % of the values, in every class of genes."""
MOSTLY_ZERO = 0.9
"""Genes that are zero in more than this share of the training cells are a class of their own."""
N_BINS = 20
CLASSES = ("mostly zero", "low", "middle", "high")


# ---------------------------------------------------------------------- on arrays


def randomised_pit(observed: NDArray[Any], draws: NDArray[Any], rng: np.random.Generator) -> Floats:
    """Place of each observed value among its draws, on [0, 1]: uniform if the model is right.

    (number of draws below + V · (1 + number of draws equal)) / (s + 1), with V uniform. An observed value
    and s draws of the same distribution can change places, ties included, so this is exactly uniform for
    counts too, and for any number of draws. It needs no direction: neither higher nor lower is better.

    Args:
        observed: Values, any shape.
        draws: Draws of each, the same shape with s in front.
        rng: Draws V.

    Returns:
        float64, the shape of ``observed``.

    Raises:
        DataError: The shapes do not agree.

    Source: Smith, J. Forecasting 1985 (randomised PIT); Czado, Gneiting and Held, Biometrics 2009 (counts).
    """
    observed, draws = _checked(observed, draws)
    below, equal = (draws < observed).sum(0), (draws == observed).sum(0)
    place: Floats = (below + rng.random(observed.shape) * (1 + equal)) / (len(draws) + 1)
    return place


def interval_coverage(pit: NDArray[Any], levels: Sequence[float] = LEVELS) -> Floats:
    """Share of values inside the central interval of each mass; best equal to the level.

    Taken from randomised PITs: of a count at the end of an interval, the share that is inside counts.
    A right model therefore covers exactly the level on average, which intervals between whole numbers
    cannot do.

    Args:
        pit: What :func:`randomised_pit` gave, any shape.
        levels: Mass of the intervals.

    Returns:
        float64, one for each level; NaN without values.
    """
    distance = np.abs(np.asarray(pit, dtype=np.float64).ravel() - 0.5)
    return np.array([(distance <= level / 2).mean() if distance.size else np.nan for level in levels])


def crps(observed: NDArray[Any], draws: NDArray[Any]) -> Floats:
    """Continuous ranked probability score of each value, in its units; lower is better.

    mean |X − x| − ½ · mean over pairs |X − X'|, pairs of two different draws: unbiased in the number of
    draws. It can be negative with few draws.

    Args:
        observed: Values, any shape.
        draws: At least two draws of each, s in front.

    Raises:
        DataError: The shapes do not agree, or there are fewer than two draws.

    Source: Gneiting and Raftery, JASA 2007, equation 21; Zamo and Naveau, Mathematical Geosciences 2018.
    """
    observed, draws = _checked(observed, draws, at_least=2)
    n = len(draws)
    ordered = np.sort(draws, axis=0)
    weight_s = (2 * np.arange(1, n + 1) - n - 1) / (n * (n - 1))  # Σ over pairs, in sorted order
    spread = np.tensordot(weight_s, ordered, axes=1)
    score: Floats = np.abs(draws - observed).mean(0, dtype=np.float64) - spread
    return score


def energy_score(observed_ng: NDArray[Any], draws_sng: NDArray[Any]) -> Floats:
    """The CRPS of whole cells, with Euclidean distances over genes, [n]; lower is better.

    Args:
        observed_ng: Values.
        draws_sng: At least two draws of each cell.

    Raises:
        DataError: The shapes do not agree, or there are fewer than two draws.

    Source: Gneiting and Raftery, JASA 2007, equation 22; pairs of different draws only (unbiased).
    """
    observed_ng, draws_sng = _checked(observed_ng, draws_sng, at_least=2)
    n_draws = len(draws_sng)
    centred_nsg = np.swapaxes(draws_sng - observed_ng, 0, 1).astype(np.float64)
    square_ns = (centred_nsg**2).sum(-1)
    gram_nss = centred_nsg @ np.swapaxes(centred_nsg, 1, 2)
    between_nss = np.sqrt(np.maximum(square_ns[:, :, None] + square_ns[:, None] - 2 * gram_nss, 0.0))
    apart = np.arange(n_draws)
    between_nss[:, apart, apart] = 0.0
    score_n: Floats = np.sqrt(square_ns).mean(1) - between_nss.sum((1, 2)) / (2 * n_draws * (n_draws - 1))
    return score_n


def interval_score(observed: NDArray[Any], draws: NDArray[Any], level: float = 0.9) -> Floats:
    """Width of the central interval, and 2 / (1 − level) for each unit that a value lies outside it.

    Lower is better. In the units of the values, one for each.

    Args:
        observed: Values, any shape.
        draws: Draws of each, s in front; the interval's ends are their quantiles.
        level: Mass of the interval.

    Raises:
        DataError: The shapes do not agree, or the level is not between 0 and 1.

    Source: Gneiting and Raftery, JASA 2007, equation 43.
    """
    if not 0 < level < 1:
        raise DataError(f"expected a level between 0 and 1, found {level}; 0.9 is the usual one")
    observed, draws = _checked(observed, draws)
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    outside = np.maximum(low - observed, 0) + np.maximum(observed - high, 0)
    score: Floats = high - low + 2 / (1 - level) * outside
    return score


def risk_coverage(error: NDArray[Any], uncertainty: NDArray[Any]) -> pd.DataFrame:
    """Mean error of the predictions that are kept, when the most uncertain ones are left out first.

    Args:
        error: Error of each prediction, [c].
        uncertainty: What the model said beforehand, [c], in any unit. Ties are kept in their order.

    Returns:
        One row for each number of kept predictions: ``coverage`` (share kept), ``risk`` (mean error of
        those), ``best`` (if the errors themselves were known) and ``random`` (the mean error of all).

    Raises:
        DataError: The lengths differ, there is nothing, or a value is not finite.

    Source: Geifman and El-Yaniv, NeurIPS 2017.
    """
    error, uncertainty = np.asarray(error, dtype=np.float64), np.asarray(uncertainty, dtype=np.float64)
    if error.ndim != 1 or error.shape != uncertainty.shape or not error.size:
        raise DataError(
            f"expected one error and one uncertainty for each prediction, found shapes {error.shape} and "
            f"{uncertainty.shape}. Pass the same predictions in both."
        )
    if not (np.isfinite(error).all() and np.isfinite(uncertainty).all()):
        raise DataError("expected finite errors and uncertainties, found NaN or infinity. Leave those out.")
    kept = np.arange(1, error.size + 1)
    sorted_error = error[np.argsort(uncertainty, kind="stable")]
    return pd.DataFrame(
        {
            "coverage": kept / error.size,
            "risk": np.cumsum(sorted_error) / kept,
            "best": np.cumsum(np.sort(error)) / kept,
            "random": np.full(error.size, error.mean()),
        }
    )


def aurc(curve: pd.DataFrame) -> float:
    """Area under a risk–coverage curve, in units of the error; lower is better.

    Args:
        curve: What :func:`risk_coverage` gave. Between the mean of ``best`` and of ``random``, unless the
            uncertainty misleads.

    Source: Geifman, Uziel and El-Yaniv, ICLR 2019.
    """
    return float(curve["risk"].mean())


def gene_classes(mean_g: NDArray[Any], zero_g: NDArray[Any], *, counts: bool = True) -> NDArray[np.object_]:
    """Class of each gene: ``mostly zero``, or a third of the others by their mean.

    Args:
        mean_g: Mean of each gene in the training cells.
        zero_g: Share of the training cells in which each gene is zero.
        counts: Whether the values are counts. Otherwise no gene is ``mostly zero``.

    Returns:
        ``"mostly zero"`` (zero in more than 90 % of the cells), ``"low"``, ``"middle"`` or ``"high"``, [g].
    """
    mean_g = np.asarray(mean_g, dtype=np.float64)
    rare_g = (np.asarray(zero_g) > MOSTLY_ZERO) & counts
    class_g = np.full(mean_g.shape, CLASSES[0], dtype=object)
    others = np.flatnonzero(~rare_g)
    for name, part in zip(CLASSES[1:], np.array_split(others[np.argsort(mean_g[others])], 3), strict=True):
        class_g[part] = name
    return class_g


def _checked(
    observed: NDArray[Any], draws: NDArray[Any], at_least: int = 1
) -> tuple[NDArray[Any], NDArray[Any]]:
    observed, draws = np.asarray(observed), np.asarray(draws)
    if draws.shape[1:] != observed.shape or len(draws) < at_least or not observed.size:
        raise DataError(
            f"expected at least {at_least} draws of values of shape {observed.shape}, found draws of shape "
            f"{draws.shape}. Put the draws on the first axis, of the same cells and genes."
        )
    return observed, draws


# ---------------------------------------------------------------------- of a fit


@dataclass(frozen=True)
class Calibration:
    """How far the predictive draws of a fit can be trusted on cells.

    Attributes:
        classes: One row per gene class (and ``all``) with ``n_genes``; ``coverage_50``, ... ``coverage_95``;
            ``se_90``, the standard error of the 90 % coverage over cells; ``genes_inside``, the share of
            genes whose own 90 % coverage lies in 87–93 %; mean ``crps`` and ``interval_score`` (of the 90 %
            interval), both in the units of the data.
        pit: Histogram of the randomised PITs of each class: ``gene_class``, ``low``, ``high``, ``density``.
        genes: One row per gene: ``gene``, ``gene_class``, ``mean`` (training cells), ``coverage_90``,
            ``pit_mean``, ``crps``.
        conditions: One row per condition: ``condition``, ``n_cells``, and ``error`` and ``uncertainty`` of
            its mean: root mean squares over genes of |observed − predicted mean| and of the standard
            deviation of replicated means, each in predictive standard deviations of the gene in a cell.
        risk: Risk–coverage curve of the conditions (see :func:`risk_coverage`).
        energy_score: Mean over cells.
        spearman: Rank correlation of error and uncertainty over conditions; NaN with fewer than three.
        aurc: Area under ``risk``.
        n_cells, n_samples: How many cells and draws.
    """

    classes: pd.DataFrame
    pit: pd.DataFrame
    genes: pd.DataFrame
    conditions: pd.DataFrame
    risk: pd.DataFrame
    energy_score: float
    spearman: float
    aurc: float
    n_cells: int
    n_samples: int

    @property
    def misses(self) -> dict[str, str]:
        """Gene classes whose 90 % intervals hold too few or too many values, and in which direction."""
        found = {}
        judged = self.classes[self.classes["gene_class"] != "all"]
        for name, covered in zip(judged["gene_class"], judged["coverage_90"], strict=True):
            if covered < LOWEST:
                found[name] = f"{covered:.1%}: too narrow"
            elif covered > HIGHEST:
                found[name] = f"{covered:.1%}: too wide"
        return found

    @property
    def verdict(self) -> str:
        """``calibrated``, or which classes of genes are not and in what direction."""
        if not self.misses:
            return "calibrated"
        said = "; ".join(f"{name} genes {what}" for name, what in self.misses.items())
        return f"miscalibrated: 90 % intervals of {said}"


def calibration(
    fit: Fit, screen: Screen, rows: NDArray[Any] | None = None, *, n_samples: int = 100, seed: int = 0
) -> Calibration:
    """Measure the calibration of a fit's predictive draws on cells.

    Each cell is drawn ``n_samples`` times from the posterior predictive of its condition, library and
    batch (new latents, not those of the cell), a few cells at a time: memory does not grow with the cells.
    Gene classes come from training cells alone.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``), training
            cells included.
        rows: Which cells; None takes the test cells, or the validation cells if there are no test cells.
        n_samples: Draws of each cell, each with its own draw of the global latents; at least two.
        seed: Seed of the draws.

    Raises:
        DataError: There are no such cells, or fewer than two draws.
    """
    if n_samples < 2:
        raise DataError(f"expected at least two draws, found n_samples={n_samples}; 100 is a good start")
    rows = _held_out(fit) if rows is None else np.asarray(rows)
    mean_g, zero_g = _gene_moments(screen, fit.split.train)
    class_g = gene_classes(mean_g, zero_g, counts=screen.is_counts)
    sums = _Sums(screen, rows, class_g, n_samples, seed)
    draws = draw_globals(fit, n_samples, seed)
    for part, x_sng in cell_chunks(fit, screen, rows, draws, n_samples, seed):
        sums.add(part, screen.x(rows[part]), x_sng)
    return sums.result(mean_g)


def _held_out(fit: Fit) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = fit.split.test if len(fit.split.test) else fit.split.validation
    if not len(rows):
        raise DataError("expected held-out cells, found none in the fit's split; pass rows=")
    return rows


def _gene_moments(screen: Screen, rows: NDArray[Any], size: int = 4096) -> tuple[Floats, Floats]:
    """Mean of each gene and share of cells where it is zero."""
    total_g, zeros_g = np.zeros(screen.n_genes), np.zeros(screen.n_genes)
    for start in range(0, len(rows), size):
        x_ng = screen.x(rows[start : start + size])
        total_g += x_ng.sum(0, dtype=np.float64)
        zeros_g += (x_ng == 0).sum(0)
    return total_g / len(rows), zeros_g / len(rows)


class _Sums:
    """What is kept of the draws while cells pass by."""

    def __init__(self, screen: Screen, rows: NDArray[Any], class_g: NDArray[Any], n_samples: int, seed: int):
        n_genes, n_levels = screen.n_genes, len(LEVELS)
        self.screen, self.class_g, self.n_samples = screen, class_g, n_samples
        self.rng = np.random.default_rng(seed)
        self.condition_n = screen.condition_n[rows]
        self.present = np.unique(self.condition_n)
        self.group_n = np.searchsorted(self.present, self.condition_n)
        self.names = [name for name in CLASSES if (class_g == name).any()]
        self.inside_lg = np.zeros((n_levels, n_genes))
        self.judged_nc = np.zeros((len(rows), len(self.names) + 1))  # share inside, for standard errors
        self.histogram_gb = np.zeros((n_genes, N_BINS))
        self.pit_g, self.crps_g, self.interval_g, self.variance_g = np.zeros((4, n_genes))
        self.observed_cg = np.zeros((len(self.present), n_genes))
        self.replicated_scg = np.zeros((n_samples, len(self.present), n_genes))
        self.energy = 0.0

    def add(self, part: slice, x_ng: NDArray[Any], x_sng: NDArray[Any]) -> None:
        pit_ng = randomised_pit(x_ng, x_sng, self.rng)
        inside_lng = np.abs(pit_ng - 0.5) <= np.array(LEVELS)[:, None, None] / 2
        self.inside_lg += inside_lng.sum(1)
        judged_ng = inside_lng[LEVELS.index(JUDGED)]
        self.judged_nc[part] = np.stack([judged_ng[:, g].mean(1) for g in self._members()], 1)
        bin_ng = np.minimum((pit_ng * N_BINS).astype(np.int64), N_BINS - 1)
        place_ng = np.arange(pit_ng.shape[1]) * N_BINS + bin_ng
        self.histogram_gb += np.bincount(place_ng.ravel(), minlength=self.histogram_gb.size).reshape(
            self.histogram_gb.shape
        )
        self.pit_g += pit_ng.sum(0)
        self.crps_g += crps(x_ng, x_sng).sum(0)
        self.interval_g += interval_score(x_ng, x_sng, JUDGED).sum(0)
        self.variance_g += x_sng.var(0, dtype=np.float64).sum(0)
        self.energy += float(energy_score(x_ng, x_sng).sum())
        for c in np.unique(self.group_n[part]):
            mine = self.group_n[part] == c
            self.observed_cg[c] += x_ng[mine].sum(0, dtype=np.float64)
            self.replicated_scg[:, c] += x_sng[:, mine].sum(1, dtype=np.float64)

    def _members(self) -> list[NDArray[np.bool_]]:
        """Genes of each class, then all genes."""
        every = np.ones(self.class_g.shape, dtype=bool)
        return [*((self.class_g == name) for name in self.names), every]

    def result(self, mean_g: Floats) -> Calibration:
        n = len(self.condition_n)
        covered_lg = self.inside_lg / n
        judged_g = covered_lg[LEVELS.index(JUDGED)]
        classes, pit = [], []
        edges = np.linspace(0, 1, N_BINS + 1)
        for i, (name, mine) in enumerate(zip([*self.names, "all"], self._members(), strict=True)):
            covered_l = covered_lg[:, mine].mean(1)
            shares = {f"coverage_{100 * v:.0f}": c for v, c in zip(LEVELS, covered_l, strict=True)}
            classes.append(
                {"gene_class": name, "n_genes": int(mine.sum()), **shares}
                | {
                    "se_90": self.judged_nc[:, i].std(ddof=1) / n**0.5 if n > 1 else np.nan,
                    "genes_inside": ((judged_g[mine] >= LOWEST) & (judged_g[mine] <= HIGHEST)).mean(),
                    "crps": self.crps_g[mine].mean() / n,
                    "interval_score": self.interval_g[mine].mean() / n,
                }
            )
            density_b = self.histogram_gb[mine].mean(0) * N_BINS / n
            pit.append(
                pd.DataFrame({"gene_class": name, "low": edges[:-1], "high": edges[1:], "density": density_b})
            )
        conditions = self._conditions()
        risk = risk_coverage(conditions["error"].to_numpy(), conditions["uncertainty"].to_numpy())
        genes = {"gene": self.screen.genes, "gene_class": self.class_g, "mean": mean_g}
        genes |= {"coverage_90": judged_g, "pit_mean": self.pit_g / n, "crps": self.crps_g / n}
        return Calibration(
            classes=pd.DataFrame(classes),
            pit=pd.concat(pit, ignore_index=True),
            genes=pd.DataFrame(genes),
            conditions=conditions,
            risk=risk,
            energy_score=self.energy / n,
            spearman=_spearman(conditions),
            aurc=aurc(risk),
            n_cells=n,
            n_samples=self.n_samples,
        )

    def _conditions(self) -> pd.DataFrame:
        cells_c = np.bincount(self.group_n)[:, None]
        scale_g = np.sqrt(self.variance_g / len(self.condition_n))
        scale_g = np.where(scale_g > 0, scale_g, np.inf)  # a gene that is never drawn says nothing
        mean_scg = self.replicated_scg / cells_c / scale_g
        error_cg = self.observed_cg / cells_c / scale_g - mean_scg.mean(0)
        return pd.DataFrame(
            {
                "condition": [self.screen.conditions[c] if c >= 0 else "unknown" for c in self.present],
                "n_cells": cells_c[:, 0],
                "error": np.sqrt((error_cg**2).mean(1)),
                "uncertainty": np.sqrt(mean_scg.var(0, ddof=1).mean(1)),
            }
        )


def _spearman(conditions: pd.DataFrame) -> float:
    if len(conditions) < 3 or conditions[["error", "uncertainty"]].nunique().min() < 2:
        return float("nan")
    return float(spearmanr(conditions["error"], conditions["uncertainty"]).statistic)
