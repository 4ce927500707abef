"""How well the response to a perturbation is predicted: one function per metric, one value per condition.

Means are in log1p CP10k, shape [c, g]; an effect is a mean minus a reference. ``scored_cg`` says which genes
count (:func:`other_genes`). :func:`response_scores` computes all metrics that a :class:`Truth` allows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from scipy.stats import false_discovery_control, mannwhitneyu, rankdata, ttest_ind_from_stats
from sklearn.metrics import average_precision_score, roc_auc_score

from pyro_causalcell.data import Screen, ScreenSpec
from pyro_causalcell.errors import DataError

__all__ = [
    "DE_METRICS",
    "METRICS",
    "Metric",
    "Truth",
    "additive_means",
    "auprc",
    "auprc_over_prevalence",
    "auroc",
    "centroid_accuracy",
    "de_labels_top_k",
    "de_labels_train",
    "differential_expression",
    "direction_match",
    "effect_weights",
    "interaction_auroc",
    "interaction_pearson",
    "interaction_residual",
    "l2",
    "mae",
    "other_genes",
    "overlap_at_n",
    "pearson_of_effects",
    "perturbation_discrimination",
    "precision_at_k",
    "r2_by_regression",
    "r2_of_effects",
    "r2_of_means",
    "response_scores",
    "rmse",
    "rmse_cell_vs_mean",
    "spearman_of_effects",
    "strong_interactions",
    "t_against_rest",
    "top_expressed",
    "weighted_mse",
    "weighted_r2_of_effects",
]

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
Array = NDArray[np.floating[Any]]

_NOTHING = 1e-9  # log1p CP10k: a spread below this is rounding, not an effect


class Metric(NamedTuple):
    """What a reader of a metric needs to know.

    Attributes:
        heading: Heading of a column or a panel.
        higher_is_better: Direction.
        perfect: Score of a perfect prediction; None where it differs from condition to condition.
    """

    heading: str
    higher_is_better: bool
    perfect: float | None


DE_METRICS: dict[str, Metric] = {
    "overlap": Metric("overlap at N", True, 1.0),
    "precision": Metric("precision at k", True, 1.0),
    "direction": Metric("direction match", True, 1.0),
    "auroc": Metric("AUROC", True, 1.0),
    "auprc": Metric("AUPRC", True, 1.0),
    "auprc_lift": Metric("AUPRC over prevalence", True, None),
    "spearman": Metric("Spearman of effects", True, 1.0),
}
"""Scores of finding the changed genes, once for every source of labels in METRICS.

For the top k genes of the test cells the overlap at N is the precision at k, and is left out."""

METRICS: dict[str, Metric] = {
    "l2": Metric("L2 (log1p CP10k)", False, 0.0),
    "l2_top": Metric("L2, top expressed genes (log1p CP10k)", False, 0.0),
    "rmse": Metric("RMSE (log1p CP10k)", False, 0.0),
    "rmse_top": Metric("RMSE, top expressed genes (log1p CP10k)", False, 0.0),
    "rmse_cell_vs_mean": Metric("RMSE of single cells around the prediction (log1p CP10k)", False, None),
    "mae": Metric("MAE (log1p CP10k)", False, 0.0),
    "mae_top": Metric("MAE, top expressed genes (log1p CP10k)", False, 0.0),
    "pearson_control": Metric("Pearson of effects against control", True, 1.0),
    "pearson_perturbed": Metric("Pearson of effects against perturbed mean", True, 1.0),
    "r2_means": Metric("R² of means", True, 1.0),
    "r2_regression": Metric("R² of means by regression", True, 1.0),
    "r2_effects": Metric("R² of effects", True, 1.0),
    "weighted_mse_train": Metric("weighted MSE, weights from training cells", False, 0.0),
    "weighted_r2_train": Metric("weighted R² of effects, weights from training cells", True, 1.0),
    "weighted_mse_test": Metric("weighted MSE, weights from test cells", False, 0.0),
    "weighted_r2_test": Metric("weighted R² of effects, weights from test cells", True, 1.0),
    "centroid_accuracy": Metric("centroid accuracy", True, 1.0),
    "discrimination_l1": Metric("perturbation discrimination, L1", True, 1.0),
    "discrimination_l2": Metric("perturbation discrimination, L2", True, 1.0),
    "discrimination_cosine": Metric("perturbation discrimination, cosine", True, 1.0),
    **{f"{n}_train_de": m._replace(heading=f"{m.heading}, training DE genes") for n, m in DE_METRICS.items()},
    **{
        f"{n}_test_top": m._replace(heading=f"{m.heading}, test top genes")
        for n, m in DE_METRICS.items()
        if n != "overlap"
    },
    "interaction_pearson": Metric("Pearson of genetic interactions", True, 1.0),
    "interaction_auroc": Metric("AUROC of strong genetic interactions", True, 1.0),
}
"""Every metric of :func:`response_scores`: heading, direction, score of a perfect prediction."""


# ---------------------------------------------------------------- which genes


def other_genes(screen: Screen | ScreenSpec, conditions: Sequence[str]) -> Mask:
    """Which genes to score, shape (c, g): all but the perturbed genes themselves, whose change is no news."""
    u_cp = screen.design(conditions)
    is_target_pg = np.array(screen.targets)[:, None] == np.array(screen.genes)[None, :]
    return ~((u_cp != 0) @ is_target_pg)


def top_expressed(control_g: Array, n: int = 1000) -> Mask:
    """The n genes with the largest mean in training control cells, shape (g,); all of them if n >= g.

    Source: Ahlmann-Eltze, Huber and Anders, Nature Methods 2025.
    """
    mask_g = np.zeros(len(control_g), dtype=bool)
    mask_g[np.argsort(-control_g, kind="stable")[:n]] = True
    return mask_g


# ---------------------------------------------------------------- errors of means


def l2(true_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """Euclidean distance of prediction and truth over the scored genes, shape (c,); lower is better."""
    return rmse(true_cg, predicted_cg, scored_cg) * np.sqrt(scored_cg.sum(1))


def rmse(true_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """Root mean squared error of each condition over its scored genes, shape (c,); lower is better.

    NaN without a scored gene, as are all errors.
    """
    return np.sqrt(_mean((predicted_cg - true_cg) ** 2, scored_cg))


def rmse_cell_vs_mean(true_cg: Array, variance_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """Root mean squared distance of single measured cells from a predicted mean, shape (c,); lower is better.

    Its square is that of :func:`rmse` plus the mean variance of the cells, which no predicted mean can take
    away: the cells' own mean scores the floor, ``sqrt`` of that variance.

    Args:
        true_cg: Mean of the measured cells.
        variance_cg: Their mean squared distance from it.
        predicted_cg: Predicted means.
        scored_cg: Genes to score.
    """
    return np.sqrt(_mean((predicted_cg - true_cg) ** 2 + variance_cg, scored_cg))


def mae(true_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """Mean absolute error of each condition over its scored genes, shape (c,); lower is better."""
    return _mean(np.abs(predicted_cg - true_cg), scored_cg)


def _mean(value_cg: NDArray[Any], among_cg: Mask) -> Floats:
    """Mean of each row over some of its genes; NaN over none."""
    n_c = among_cg.sum(1)
    return np.asarray(np.where(among_cg, value_cg, 0.0).sum(1) / np.where(n_c > 0, n_c, np.nan))


# ---------------------------------------------------------------- effects


def pearson_of_effects(
    true_cg: Array,
    predicted_cg: Array,
    reference_g: Array,
    scored_cg: Mask,
) -> Floats:
    """Correlation of predicted and true differences from a reference, shape (c,); higher is better.

    With the control mean as reference, predicting what all perturbations share already scores well; with
    the perturbed mean, only what sets a condition apart counts (Systema). NaN where an effect is constant:
    a method that predicts the reference itself has no effect to correlate.

    Source: Viñas Torné et al., Systema, Nature Biotechnology 2025.
    """
    return _correlations(true_cg - reference_g, predicted_cg - reference_g, scored_cg)


def r2_of_means(true_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """Coefficient of determination of the mean profiles themselves, shape (c,); higher is better.

    Genes differ so much in their mean that predicting no change scores close to 1. It can be negative; NaN
    where the true profile is constant.
    """
    return weighted_r2_of_effects(true_cg, predicted_cg, np.zeros(true_cg.shape[1]), _equal(scored_cg))


def r2_by_regression(true_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """R² of the regression line of true on predicted means, shape (c,); higher is better.

    It is the squared correlation: in [0, 1], and blind to a wrong scale, a wrong offset and even a wrong
    sign. NaN where a profile is constant.
    """
    return _correlations(true_cg, predicted_cg, scored_cg) ** 2


def r2_of_effects(
    true_cg: Array,
    predicted_cg: Array,
    reference_g: Array,
    scored_cg: Mask,
) -> Floats:
    """Coefficient of determination of differences from a reference, shape (c,); higher is better.

    It can be negative; NaN where the true effect is constant.
    """
    return weighted_r2_of_effects(true_cg, predicted_cg, reference_g, _equal(scored_cg))


def t_against_rest(mean_cg: Array, variance_cg: Array, cells_c: NDArray[np.integer[Any]]) -> Floats:
    """Welch's t statistic of each condition's cells against the cells of all other conditions, shape (c, g).

    Args:
        mean_cg: Mean of the cells of each condition, log1p CP10k: of training cells, or of test cells. Say in
            the name of a score which. Control may be among the conditions.
        variance_cg: Their unbiased variance; ignored where there is one cell or none.
        cells_c: Their number.

    Returns:
        NaN for a condition with fewer than two cells of its own or of others; 0 for a gene that is constant
        on both sides.
    """
    n_c1 = np.asarray(cells_c, dtype=np.float64)[:, None]
    rest_c1 = n_c1.sum() - n_c1
    mean_cg = np.where(n_c1 > 0, mean_cg, 0.0)
    mean_cg = mean_cg - (n_c1 * mean_cg).sum(0) / n_c1.sum()  # centred: keeps the digits of the squares
    squares_cg = np.where(n_c1 > 1, variance_cg, 0.0) * (n_c1 - 1) + n_c1 * mean_cg**2
    sum_cg, enough_c1 = n_c1 * mean_cg, (n_c1 > 1) & (rest_c1 > 1)
    n_c1, rest_c1 = np.where(enough_c1, n_c1, 2.0), np.where(enough_c1, rest_c1, 2.0)
    error_cg = _squared_error(sum_cg, squares_cg, n_c1)
    error_cg += _squared_error(-sum_cg, squares_cg.sum(0) - squares_cg, rest_c1)  # all sums add up to 0
    difference_cg = sum_cg / n_c1 + sum_cg / rest_c1
    varies_cg = error_cg > _NOTHING**2
    t_cg = np.divide(difference_cg, np.sqrt(error_cg), out=np.zeros_like(error_cg), where=varies_cg)
    return np.where(enough_c1, t_cg, np.nan)


def _squared_error(sum_cg: Floats, squares_cg: Floats, n_c1: Floats) -> Floats:
    """Squared standard error of a mean, from the sum of values and of squares."""
    return np.asarray(np.maximum(squares_cg - sum_cg**2 / n_c1, 0.0) / (n_c1 - 1) / n_c1)


def effect_weights(t_cg: Array, scored_cg: Mask) -> Floats:
    """Gene weights from t statistics: |t| min-max scaled over the scored genes, squared, sum 1.

    Args:
        t_cg: For example of :func:`t_against_rest`.
        scored_cg: Genes to score; the others get weight 0.

    Returns:
        Shape (c, g). NaN for a condition whose t is NaN or the same for all genes.

    Source: bioRxiv 2025.10.20.683304 (weighted metrics).
    """
    size_cg = np.where(scored_cg, np.abs(t_cg), np.nan)
    undefined_c = (np.isnan(size_cg) & scored_cg).any(1) | ~scored_cg.any(1)
    size_cg[undefined_c] = 0.0
    low_c1, high_c1 = np.nanmin(size_cg, 1, keepdims=True), np.nanmax(size_cg, 1, keepdims=True)
    flat_c1 = high_c1 - low_c1 <= 0
    weight_cg = np.nan_to_num((size_cg - low_c1) / np.where(flat_c1, 1.0, high_c1 - low_c1)) ** 2
    return weight_cg / np.where(flat_c1, np.nan, weight_cg.sum(1, keepdims=True))


def weighted_mse(true_cg: Array, predicted_cg: Array, weight_cg: Array) -> Floats:
    """Weighted mean squared error, shape (c,); lower is better. NaN where the weights are NaN.

    Source: bioRxiv 2025.10.20.683304 (weighted metrics).
    """
    return (weight_cg * (predicted_cg - true_cg) ** 2).sum(1) / weight_cg.sum(1)


def weighted_r2_of_effects(
    true_cg: Array,
    predicted_cg: Array,
    reference_g: Array,
    weight_cg: Array,
) -> Floats:
    """Weighted coefficient of determination of differences from a reference, shape (c,); higher is better.

    1 - sum_g w (d - dhat)² / sum_g w (d - dbar)², where dbar is the weighted mean of the true effect d. It
    can be negative; NaN where the weights are NaN or the true effect is constant.

    Source: bioRxiv 2025.10.20.683304 (weighted metrics).
    """
    weight_cg = weight_cg / weight_cg.sum(1, keepdims=True)
    effect_cg = true_cg - reference_g
    centred_cg = effect_cg - (weight_cg * effect_cg).sum(1, keepdims=True)
    spread_c = (weight_cg * centred_cg**2).sum(1)
    error_c = (weight_cg * (predicted_cg - true_cg) ** 2).sum(1)
    return 1 - error_c / np.where(spread_c > _NOTHING**2, spread_c, np.nan)


def _equal(scored_cg: Mask) -> Floats:
    return scored_cg.astype(np.float64)


def _correlations(a_cg: Array, b_cg: Array, scored_cg: Mask, ranks: bool = False) -> Floats:
    """Pearson or rank correlation of each row over its scored genes; NaN where a side is constant."""
    scores = []
    for a_g, b_g, scored_g in zip(a_cg, b_cg, scored_cg, strict=True):
        a, b = a_g[scored_g], b_g[scored_g]
        if len(a) < 2 or np.ptp(a) < _NOTHING or np.ptp(b) < _NOTHING:
            scores.append(np.nan)
        else:
            scores.append(np.corrcoef(*((rankdata(a), rankdata(b)) if ranks else (a, b)))[0, 1])
    return np.array(scores, dtype=np.float64)


# ---------------------------------------------------------------- telling conditions apart


def centroid_accuracy(true_cg: Array, predicted_cg: Array, scored_cg: Mask) -> Floats:
    """Share of other conditions whose true mean is farther from the prediction, shape (c,); higher is better.

    mean over c' != c of 1[ ||yhat_c - y_c|| < ||yhat_c - y_c'|| ], over the genes scored in c. A method that
    predicts one profile for all conditions scores 0.5 on average. Others call it the normalised inverse rank.
    NaN with a single condition.

    Source: Viñas Torné et al., Systema, Nature Biotechnology 2025.
    """
    others = len(true_cg) - 1
    if not others:
        return np.full(1, np.nan)
    return 1 - _closer(true_cg, predicted_cg, true_cg.mean(0), scored_cg, "l2") / others


def perturbation_discrimination(
    true_cg: Array,
    predicted_cg: Array,
    reference_g: Array,
    scored_cg: Mask,
    distance: Literal["l1", "l2", "cosine"],
) -> Floats:
    """How surely a predicted effect points at its own condition among all, shape (c,); higher is better.

    1 - r / c, where r is the number of true effects that are closer to the predicted effect than its own.

    Args:
        true_cg: True means.
        predicted_cg: Predicted means.
        reference_g: Mean of the control cells; L1 and L2 do not depend on it.
        scored_cg: Genes to score; pass those of :func:`other_genes`, or the knocked-down gene gives the
            condition away.
        distance: L1 and L2 reward an inflated scale where effects differ in size; the cosine does not.

    Returns:
        In [1/c, 1]; one profile for all conditions scores (c + 1) / 2c on average. NaN under the cosine where
        there is no true or no predicted effect.

    Source: Virtual Cell Challenge, Roohani et al., Cell 2025; cell-eval ``discrimination_score``.
    """
    return 1 - _closer(true_cg, predicted_cg, reference_g, scored_cg, distance) / len(true_cg)


def _closer(
    true_cg: Array, predicted_cg: Array, reference_g: Array, scored_cg: Mask, distance: str
) -> Floats:
    """How many other true effects are closer to each predicted effect than its own, over its scored genes."""
    true_cg, predicted_cg = true_cg - reference_g, np.where(scored_cg, predicted_cg - reference_g, 0.0)
    if distance == "l1":
        to_cc = cdist(predicted_cg, true_cg, "cityblock")
        for c, scored_g in enumerate(scored_cg):
            to_cc[c] -= np.abs(true_cg[:, ~scored_g]).sum(1)
    else:
        # Sums over the scored genes of each row: its squares, the squares of all true effects, the products.
        own_c1 = (predicted_cg**2).sum(1, keepdims=True)
        true_cc, product_cc = _equal(scored_cg) @ (true_cg**2).T, predicted_cg @ true_cg.T
        if distance == "l2":
            to_cc = own_c1 + true_cc - 2 * product_cc
        else:
            length_cc = np.sqrt(own_c1 * true_cc)
            some = (np.abs(predicted_cg).max(1) > _NOTHING)[:, None] & (length_cc > 0)
            to_cc = -np.divide(product_cc, length_cc, out=np.full_like(length_cc, np.nan), where=some)
    of_own_c1 = np.diag(to_cc)[:, None]
    return np.where(np.isnan(of_own_c1[:, 0]), np.nan, (to_cc < of_own_c1).sum(1))


# ---------------------------------------------------------------- finding the changed genes


def differential_expression(
    cells: Sequence[Array],
    control_ng: Array,
    test: Literal["wilcoxon", "t"] = "wilcoxon",
) -> tuple[Floats, Floats]:
    """Tests every gene of every condition against control.

    Args:
        cells: Cells of each condition [n, g], log1p CP10k.
        control_ng: Control cells, same unit.
        test: Wilcoxon's rank sum test (normal approximation, corrected for ties and continuity) or Welch's.

    Returns:
        Difference of means and Benjamini-Hochberg adjusted p value over the genes of a condition, each
        [c, g]. The difference is NaN and the p value 1 for a condition without cells; a test needs two cells
        on each side, and the p value is 1 for a gene that does not vary.
    """
    difference, adjusted = [], []
    for x_ng in cells:
        p_g = np.ones(x_ng.shape[1])
        if min(len(x_ng), len(control_ng)) > 1:
            varies_g = np.ptp(np.concatenate([x_ng, control_ng]), axis=0) > 0
            p_g[varies_g] = _p_values(x_ng[:, varies_g], control_ng[:, varies_g], test)
        difference.append(x_ng.mean(0) - control_ng.mean(0) if len(x_ng) else np.full(len(p_g), np.nan))
        adjusted.append(false_discovery_control(p_g))
    return np.array(difference), np.array(adjusted)


def _p_values(x_ng: Array, control_ng: Array, test: str) -> Floats:
    if test == "wilcoxon":
        return np.asarray(mannwhitneyu(x_ng, control_ng, method="asymptotic").pvalue)
    statistics = [(z_ng.mean(0), z_ng.std(0, ddof=1), len(z_ng)) for z_ng in (x_ng, control_ng)]
    with np.errstate(divide="ignore", invalid="ignore"):  # constant on both sides: t is infinite
        return np.asarray(ttest_ind_from_stats(*statistics[0], *statistics[1], equal_var=False).pvalue)


def de_labels_train(
    cells: Sequence[Array],
    control_ng: Array,
    test: Literal["wilcoxon", "t"] = "wilcoxon",
    fdr: float = 0.05,
) -> Mask:
    """Which genes a condition changes, by a test on TRAINING cells, shape (c, g).

    Args:
        cells: Training cells of each condition [n, g]. A condition never trained on has none (0 rows): it
            gets no label, and its scores are NaN.
        control_ng: Training control cells.
        test: See :func:`differential_expression`.
        fdr: Largest adjusted p value.
    """
    return differential_expression(cells, control_ng, test)[1] < fdr


def de_labels_top_k(
    true_cg: Array,
    reference_g: Array,
    scored_cg: Mask,
    k: int = 50,
) -> Mask:
    """Which genes change most in the TEST cells: the k scored genes of largest |y - o|, shape (c, g).

    They depend on the cells that are scored, noise included: report them apart from labels of training cells,
    and never choose anything by them.
    """
    size_cg = np.where(scored_cg, np.abs(true_cg - reference_g), -np.inf)
    label_cg = np.zeros(size_cg.shape, dtype=bool)
    np.put_along_axis(label_cg, np.argsort(-size_cg, axis=1, kind="stable")[:, :k], True, axis=1)
    return label_cg & scored_cg


def precision_at_k(label_cg: Mask, score_cg: Array, scored_cg: Mask, k: int = 50) -> Floats:
    """Share of the k scored genes of highest score that are labelled, shape (c,); higher is better.

    Ties are broken at random, in expectation: a constant score gets the prevalence. A gene of score -inf is
    never chosen. k is at most the number of scored genes. NaN without a label.
    """
    return _per_condition(label_cg, score_cg, scored_cg, lambda y, s: _hits(y, s, k) / min(k, len(y)))


def overlap_at_n(label_cg: Mask, score_cg: Array, scored_cg: Mask) -> Floats:
    """Share of the n labelled genes among the n scored genes of highest score, (c,); higher is better.

    Ties are broken at random, in expectation. A gene of score -inf is never chosen: the differential
    expression score of the Virtual Cell Challenge gives it to genes that are not significant among predicted
    cells. NaN where no scored gene, or every one, is labelled.

    Source: cell-eval ``overlap_at_N``.
    """
    return _per_condition(label_cg, score_cg, scored_cg, lambda y, s: _hits(y, s, y.sum()) / y.sum())


def _hits(label_g: Mask, score_g: Floats, k: int) -> float:
    """Expected labels among the k highest scores, ties broken at random."""
    k = min(k, len(score_g))
    cut = np.partition(score_g, -k)[-k]
    above_g, tied_g = score_g > cut, score_g == cut
    drawn = 0.0 if cut == -np.inf else (k - above_g.sum()) * label_g[tied_g].mean()
    return float(label_g[above_g].sum() + drawn)


def direction_match(label_cg: Mask, true_effect_cg: Array, effect_cg: Array) -> Floats:
    """Share of labelled genes that move the predicted way, shape (c,); higher is better.

    A coin scores 0.5, no effect 0. NaN without a label.

    Source: cell-eval ``de_direction_match``.
    """
    return _mean(np.sign(true_effect_cg) == np.sign(effect_cg), label_cg)


def auroc(label_cg: Mask, score_cg: Array, scored_cg: Mask) -> Floats:
    """Area under the ROC curve of finding the labelled genes, shape (c,); 0.5 is chance, higher is better.

    NaN where no scored gene, or every one, is labelled.
    """
    return _per_condition(label_cg, score_cg, scored_cg, roc_auc_score)


def auprc(label_cg: Mask, score_cg: Array, scored_cg: Mask) -> Floats:
    """Average precision of finding the labelled genes, shape (c,); higher is better.

    Chance is the share of labelled genes, which differs between conditions and data sets. NaN where no
    scored gene, or every one, is labelled.
    """
    return _per_condition(label_cg, score_cg, scored_cg, average_precision_score)


def auprc_over_prevalence(label_cg: Mask, score_cg: Array, scored_cg: Mask) -> Floats:
    """:func:`auprc` divided by the share of labelled genes, shape (c,); 1 is chance, higher is better."""
    prevalence_c = (label_cg & scored_cg).sum(1) / scored_cg.sum(1)
    return auprc(label_cg, score_cg, scored_cg) / np.where(prevalence_c > 0, prevalence_c, np.nan)


def spearman_of_effects(label_cg: Mask, true_effect_cg: Array, effect_cg: Array) -> Floats:
    """Rank correlation of log fold changes over the labelled genes, shape (c,); higher is better.

    NaN with fewer than two labels or a constant effect.

    Source: cell-eval ``de_spearman_lfc_sig``.
    """
    return _correlations(true_effect_cg, effect_cg, label_cg, ranks=True)


def _per_condition(label_cg: Mask, score_cg: Array, scored_cg: Mask, score: Any) -> Floats:
    values = []
    for label_g, score_g, scored_g in zip(label_cg, score_cg, scored_cg, strict=True):
        labels = label_g[scored_g]
        values.append(score(labels, score_g[scored_g]) if labels.any() and not labels.all() else np.nan)
    return np.array(values, dtype=np.float64)


# ---------------------------------------------------------------- genetic interactions


def additive_means(
    targets: Sequence[Sequence[str]],
    singles: Mapping[str, Array],
    control_g: Array,
) -> Floats:
    """y_A + y_B - o: what two perturbations would do together if their effects added, shape (c, g).

    Args:
        targets: Targets of each condition (``ScreenSpec.split``).
        singles: Mean of each target perturbed alone, in training cells.
        control_g: Mean of the training control cells.

    Returns:
        NaN for a condition that is not a pair, or of which a single was not measured.
    """
    additive_cg = np.full((len(targets), len(control_g)), np.nan)
    for c, names in enumerate(targets):
        if len(set(names)) == 2 and all(name in singles for name in names):
            additive_cg[c] = singles[names[0]] + singles[names[1]] - control_g
    return additive_cg


def interaction_residual(mean_cg: Array, additive_cg: Array) -> Floats:
    """Genetic interaction y_AB - y_A - y_B + o of every gene, shape (c, g).

    Take the same singles for the truth and the prediction: then the additive prediction has none.

    Args:
        mean_cg: True or predicted means of pairs.
        additive_cg: What :func:`additive_means` returns.
    """
    residual_cg = mean_cg - additive_cg
    return np.where(np.abs(residual_cg) < _NOTHING, 0.0, residual_cg)


def strong_interactions(residual_cg: Array, scored_cg: Mask, share: float = 0.05) -> Mask:
    """The given share of scored genes, over all pairs together, whose true interaction is largest; [c, g]."""
    size_cg = np.abs(residual_cg)
    defined_cg = scored_cg & np.isfinite(size_cg)
    if not defined_cg.any():
        return np.zeros(size_cg.shape, dtype=bool)
    return defined_cg & (np.nan_to_num(size_cg) > np.quantile(size_cg[defined_cg], 1 - share))


def interaction_pearson(
    true_residual_cg: Array,
    residual_cg: Array,
    scored_cg: Mask,
) -> Floats:
    """Correlation of predicted and true interactions of a pair, shape (c,); higher is better.

    NaN for what is not a pair, and for a prediction without interactions, as the additive one.
    """
    return _correlations(true_residual_cg, residual_cg, scored_cg & np.isfinite(true_residual_cg))


def interaction_auroc(strong_cg: Mask, residual_cg: Array, scored_cg: Mask) -> Floats:
    """Area under the ROC curve of calling strong interactions by size, shape (c,); higher is better.

    0.5 is chance and the additive prediction. NaN for what is not a pair, and for a pair without a strong
    interaction (:func:`strong_interactions`).
    """
    return auroc(strong_cg, np.abs(residual_cg), scored_cg & np.isfinite(residual_cg))


# ---------------------------------------------------------------- all of them


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What predictions are scored against. What is left out takes its metrics with it.

    Attributes:
        conditions: Names of the c conditions.
        true_cg: Mean of their held-out cells, log1p CP10k.
        perturbed_g: Mean of the training perturbed cells.
        scored_cg: Genes to score (:func:`other_genes`).
        control_g: Mean of the training control cells.
        variance_cg: Mean squared distance of the held-out cells from ``true_cg``.
        de_train_cg: Changed genes according to training cells (:func:`de_labels_train`).
        weight_train_cg: Gene weights from training cells (:func:`effect_weights`).
        weight_test_cg: Gene weights from test cells.
        additive_cg: Sum of the effects of training singles (:func:`additive_means`).
        k: Of the top k genes of the test cells, and of the precision at k.
        n_top: Of the metrics on the top expressed genes.

    Raises:
        DataError: An array has another shape, the means are not finite, or a condition has no gene to score.
    """

    conditions: Sequence[str]
    true_cg: Floats
    perturbed_g: Floats
    scored_cg: Mask
    control_g: Floats | None = None
    variance_cg: Floats | None = None
    de_train_cg: Mask | None = None
    weight_train_cg: Floats | None = None
    weight_test_cg: Floats | None = None
    additive_cg: Floats | None = None
    k: int = 50
    n_top: int = 1000

    def __post_init__(self) -> None:
        shape = (len(self.conditions), len(self.perturbed_g))
        optional = ("variance_cg", "de_train_cg", "weight_train_cg", "weight_test_cg", "additive_cg")
        for name in ("true_cg", "scored_cg", *optional):
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise DataError(f"{name} has shape {array.shape}; expected (conditions, genes) = {shape}.")
        if self.control_g is not None and self.control_g.shape != self.perturbed_g.shape:
            raise DataError(
                f"control_g has shape {self.control_g.shape}; expected (genes,) = {self.perturbed_g.shape}."
            )
        self.check(self.true_cg, "true_cg")
        bare = [c for c, scored_g in zip(self.conditions, self.scored_cg, strict=True) if not scored_g.any()]
        if bare:
            raise DataError(f"expected a gene to score in every condition, found none in {bare}.")

    def check(self, mean_cg: Array, name: str) -> None:
        """Raises DataError unless these are finite means of the conditions."""
        if mean_cg.shape != self.scored_cg.shape:
            raise DataError(
                f"{name} has shape {mean_cg.shape}; expected (conditions, genes) = {self.scored_cg.shape}."
            )
        found = [
            c for c, mean_g in zip(self.conditions, mean_cg, strict=True) if not np.isfinite(mean_g).all()
        ]
        if found:
            raise DataError(f"expected finite means, found NaN or infinity in {name} for {found[:10]}.")


def response_scores(truth: Truth, predicted_cg: Array, name: str = "predicted_cg") -> dict[str, Floats]:
    """Scores predicted means by every metric that the truth allows.

    Without ``control_g`` the metrics of top expressed genes, of effects against control, of changed genes and
    of interactions, and perturbation discrimination are left out.

    Args:
        truth: What to score against.
        predicted_cg: Predicted means, log1p CP10k.
        name: Of the method, for error messages.

    Returns:
        Metric (a key of METRICS) to one value per condition, NaN where it is undefined.

    Raises:
        DataError: The prediction has another shape or is not finite; the conditions are named.
    """
    truth.check(predicted_cg, name)
    y, p, scored = truth.true_cg, predicted_cg, truth.scored_cg
    scores = {
        "l2": l2(y, p, scored),
        "rmse": rmse(y, p, scored),
        "mae": mae(y, p, scored),
        "pearson_perturbed": pearson_of_effects(y, p, truth.perturbed_g, scored),
        "r2_means": r2_of_means(y, p, scored),
        "r2_regression": r2_by_regression(y, p, scored),
        "centroid_accuracy": centroid_accuracy(y, p, scored),
    }
    if truth.variance_cg is not None:
        scores["rmse_cell_vs_mean"] = rmse_cell_vs_mean(y, truth.variance_cg, p, scored)
    for source, weight_cg in {"train": truth.weight_train_cg, "test": truth.weight_test_cg}.items():
        if weight_cg is not None:
            scores[f"weighted_mse_{source}"] = weighted_mse(y, p, weight_cg)
    if truth.control_g is not None:
        scores |= _scores_against_control(truth, p, truth.control_g)
    return {metric: scores[metric] for metric in METRICS if metric in scores}


def _scores_against_control(truth: Truth, p: Array, o: Floats) -> dict[str, Floats]:
    y, scored = truth.true_cg, truth.scored_cg
    top = scored & top_expressed(o, truth.n_top)
    scores = {
        "l2_top": l2(y, p, top),
        "rmse_top": rmse(y, p, top),
        "mae_top": mae(y, p, top),
        "pearson_control": pearson_of_effects(y, p, o, scored),
        "r2_effects": r2_of_effects(y, p, o, scored),
        "discrimination_l1": perturbation_discrimination(y, p, o, scored, "l1"),
        "discrimination_l2": perturbation_discrimination(y, p, o, scored, "l2"),
        "discrimination_cosine": perturbation_discrimination(y, p, o, scored, "cosine"),
    }
    for source, weight_cg in {"train": truth.weight_train_cg, "test": truth.weight_test_cg}.items():
        if weight_cg is not None:
            scores[f"weighted_r2_{source}"] = weighted_r2_of_effects(y, p, o, weight_cg)
    labels = {"train_de": truth.de_train_cg, "test_top": de_labels_top_k(y, o, scored, truth.k)}
    for source, label_cg in labels.items():
        if label_cg is not None:
            found = _de_scores(label_cg & scored, y - o, p - o, scored, truth.k)
            scores |= {f"{metric}_{source}": value_c for metric, value_c in found.items()}
    if truth.additive_cg is not None:
        true_residual, residual = (interaction_residual(m, truth.additive_cg) for m in (y, p))
        scores["interaction_pearson"] = interaction_pearson(true_residual, residual, scored)
        strong = strong_interactions(true_residual, scored)
        scores["interaction_auroc"] = interaction_auroc(strong, residual, scored)
    return scores


def _de_scores(label: Mask, true_effect: Floats, effect: Floats, scored: Mask, k: int) -> dict[str, Floats]:
    size = np.abs(effect)
    return {
        "overlap": overlap_at_n(label, size, scored),
        "precision": precision_at_k(label, size, scored, k),
        "direction": direction_match(label, true_effect, effect),
        "auroc": auroc(label, size, scored),
        "auprc": auprc(label, size, scored),
        "auprc_lift": auprc_over_prevalence(label, size, scored),
        "spearman": spearman_of_effects(label, true_effect, effect),
    }
