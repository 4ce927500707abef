"""Scores of predicted condition means, one function per metric."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import pearsonr

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

__all__ = ["average_conditions", "compare_means", "other_genes", "pearson_of_effects", "rmse"]


def other_genes(screen: Screen, conditions: Sequence[str]) -> NDArray[np.bool_]:
    """Which genes to score, shape (c, g): all but the perturbed genes themselves, whose change is no news."""
    u_cp = screen.design(conditions)
    is_target_pg = np.array(screen.targets)[:, None] == np.array(screen.genes)[None, :]
    return ~((u_cp != 0) @ is_target_pg)


def rmse(
    true_cg: NDArray[np.floating], predicted_cg: NDArray[np.floating], scored_cg: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Root mean squared error of each condition over its scored genes, shape (c,)."""
    squared_cg = np.where(scored_cg, (predicted_cg - true_cg) ** 2, 0.0)
    return np.sqrt(squared_cg.sum(1) / scored_cg.sum(1))


def pearson_of_effects(
    true_cg: NDArray[np.floating],
    predicted_cg: NDArray[np.floating],
    reference_g: NDArray[np.floating],
    scored_cg: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Correlation of predicted and true differences from a reference, shape (c,).

    With the control mean as reference, predicting what all perturbations share already scores well; with
    the perturbed mean, only what sets a condition apart counts (Systema). NaN where an effect is constant:
    a method that predicts the reference itself has no effect to correlate.
    """
    scores = []
    for true_g, predicted_g, scored_g in zip(true_cg, predicted_cg, scored_cg, strict=True):
        true_effect, effect = (true_g - reference_g)[scored_g], (predicted_g - reference_g)[scored_g]
        constant = np.ptp(true_effect) < 1e-9 or np.ptp(effect) < 1e-9
        scores.append(np.nan if constant else pearsonr(true_effect, effect).statistic)
    return np.array(scores)


def compare_means(
    true_cg: NDArray[np.floating],
    predicted: Mapping[str, NDArray[np.floating]],
    control_g: NDArray[np.floating] | None,
    perturbed_g: NDArray[np.floating],
    conditions: Sequence[str],
    scored_cg: NDArray[np.bool_] | None = None,
) -> pd.DataFrame:
    """Score predicted means of every method on every condition.

    Args:
        true_cg: Mean expression of held-out cells, log1p CP10k.
        predicted: Prediction of each method, in the same shape and unit.
        control_g: Mean of the training control cells; None without them leaves out ``pearson_control``.
        perturbed_g: Mean of the training perturbed cells.
        conditions: Names of the c conditions.
        scored_cg: Genes to score (see ``other_genes``); all by default.

    Returns:
        A tidy table with columns method, condition, metric, value. Metrics: ``rmse`` (log1p CP10k, lower is
        better), ``pearson_control`` and ``pearson_perturbed`` (higher is better).

    Raises:
        DataError: Shapes differ.
    """
    shape = (len(conditions), len(perturbed_g))
    references = {"pearson_control": control_g, "pearson_perturbed": perturbed_g}
    scored_cg = np.ones(shape, dtype=bool) if scored_cg is None else scored_cg
    for name, array in {"true_cg": true_cg, "scored_cg": scored_cg, **predicted}.items():
        if array.shape != shape:
            raise DataError(f"{name} has shape {array.shape}; expected (conditions, genes) = {shape}.")
    tables = []
    for method, predicted_cg in predicted.items():
        scores = {"rmse": rmse(true_cg, predicted_cg, scored_cg)}
        scores |= {
            metric: pearson_of_effects(true_cg, predicted_cg, reference_g, scored_cg)
            for metric, reference_g in references.items()
            if reference_g is not None
        }
        for metric, value_c in scores.items():
            columns = {"method": method, "condition": list(conditions), "metric": metric, "value": value_c}
            tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def average_conditions(table: pd.DataFrame) -> pd.DataFrame:
    """Average the table of ``compare_means`` over conditions.

    Returns:
        Columns method, metric, mean, sd, n_conditions, in the order methods and metrics came in. Conditions
        whose score is undefined are not counted.
    """
    grouped = table.groupby(["method", "metric"], sort=False)["value"]
    named = grouped.agg(mean="mean", sd="std", n_conditions="count")
    return named.reset_index()
