"""How well estimated latents and graphs recover a known truth."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import pdist
from scipy.stats import beta, rankdata
from sklearn.compose import TransformedTargetRegressor
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LinearRegression
from sklearn.metrics import precision_recall_fscore_support
from sklearn.model_selection import GridSearchCV, KFold, cross_val_predict
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_causalcell.errors import DataError

__all__ = ["Matching", "matching", "recovery", "reliability", "top_two_graph"]

Floats = NDArray[np.float64]
_RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
_FOLDS = 5
_LEAST_CELLS = 30


class Matching(NamedTuple):
    """Pairs of a true and an estimated latent, one to one.

    Attributes:
        true_m: column of the true latents, ascending.
        estimated_m: column of the estimated latents matched to it.
        correlation_m: their correlation, with its sign; 0 where one of them is constant.
    """

    true_m: NDArray[np.int64]
    estimated_m: NDArray[np.int64]
    correlation_m: Floats


def recovery(
    z_true_nk: NDArray[Any],
    z_est_nk: NDArray[Any],
    *,
    graph_true_pk: NDArray[Any] | None = None,
    graph_est_pk: NDArray[Any] | None = None,
    trained_p: NDArray[Any] | None = None,
    fitted_on: tuple[NDArray[Any], NDArray[Any]] | None = None,
    threshold: float = 0.5,
    n_kernel_cells: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """Scores estimated latents, and optionally an estimated graph, against the truth.

    A latent is known only up to its order and sign. Latents are therefore matched one to one so that the sum
    of |correlation| is largest. A latent that does not vary has correlation 0 with everything.

    Args:
        z_true_nk: true latents, [cells, latents].
        z_est_nk: estimated latents of the same cells; their number may differ.
        graph_true_pk: true targets, [interventions, true latents], boolean.
        graph_est_pk: estimated targets, [interventions, estimated latents], boolean or probabilities.
        trained_p: mask or numbers of the interventions that were trained; all of them if None.
        fitted_on: true and estimated latents of other cells, such as the training cells, for regressions that
            are fitted on those and scored on these.
        threshold: probability above which an edge counts as found.
        n_kernel_cells: cells of the random subsamples for the kernel regressions.
        seed: seed of the folds and of the subsample.

    Returns:
        A dict of floats. Always:

        - ``pearson_mcc``, ``spearman_mcc``: mean |correlation| of matched latents. A true latent without a
          partner counts as 0.
        - ``r2_linear``: R2 of a linear regression of the true on the estimated latents, five-fold
          cross-validated, averaged over latents.
        - ``r2_kernel``: the same with kernel ridge regression; RBF kernel of median width, ridge chosen
          within the training folds. Its level depends on ``n_kernel_cells``: compare at equal numbers.
        - ``r2_linear_insample``: the linear R2 on the cells it was fitted to, as the paper's code has it.

        With ``fitted_on``: ``r2_linear_held_out`` and ``r2_kernel_held_out``, the same two regressions fitted
        on those cells and scored on all of these.

        With both graphs:

        - ``graph_precision``, ``graph_recall``, ``graph_f1``: edges of the trained interventions, latents
          matched on |Pearson correlation|. Edges of an estimated latent without a partner are false.
        - ``graph_precision_signed_all``, ``graph_recall_signed_all``, ``graph_f1_signed_all``: the variant of
          the paper's code. It matches on the signed correlation and scores all interventions, trained or not.

    Raises:
        DataError: if shapes or numbers of latents do not agree, a value is not finite, only one graph is
            given, or there are fewer than 30 cells.

    Source: Lopez et al. 2023, section 4.1, and their published code for the variants.
    """
    true_nk, est_nk = checked_latents(z_true_nk, z_est_nk)
    if min(len(true_nk), n_kernel_cells) < _LEAST_CELLS:
        raise DataError(
            f"expected at least {_LEAST_CELLS} cells for cross-validated scores, found {len(true_nk)} with "
            f"n_kernel_cells={n_kernel_cells}. Score more cells."
        )
    pearson = matching(true_nk, est_nk)
    spearman = matching(true_nk, est_nk, method="spearman")
    n_true = true_nk.shape[1]
    folds = KFold(_FOLDS, shuffle=True, random_state=seed)
    linear = LinearRegression()
    few = np.random.default_rng(seed).permutation(len(true_nk))[:n_kernel_cells]
    kernel = _kernel_regression(est_nk[few])
    scores = {
        "pearson_mcc": float(np.abs(pearson.correlation_m).sum() / n_true),
        "spearman_mcc": float(np.abs(spearman.correlation_m).sum() / n_true),
        "r2_linear": r2(true_nk, as_2d(cross_val_predict(linear, est_nk, true_nk, cv=folds))),
        "r2_kernel": r2(true_nk[few], as_2d(cross_val_predict(kernel, est_nk[few], true_nk[few], cv=folds))),
        "r2_linear_insample": r2(true_nk, as_2d(linear.fit(est_nk, true_nk).predict(est_nk))),
    }
    if fitted_on is not None:
        true_mk, est_mk = checked_latents(*fitted_on)
        if (true_mk.shape[1], est_mk.shape[1]) != (n_true, est_nk.shape[1]):
            raise DataError(
                f"expected {n_true} true and {est_nk.shape[1]} estimated latents in fitted_on, found "
                f"{true_mk.shape[1]} and {est_mk.shape[1]}. Pass the same latents of other cells."
            )
        linear.fit(est_mk, true_mk)
        few = np.random.default_rng(seed).permutation(len(true_mk))[:n_kernel_cells]
        kernel = _kernel_regression(est_mk[few]).fit(est_mk[few], true_mk[few])
        scores["r2_linear_held_out"] = r2(true_nk, as_2d(linear.predict(est_nk)))
        scores["r2_kernel_held_out"] = r2(true_nk, as_2d(kernel.predict(est_nk)))
    if graph_true_pk is None and graph_est_pk is None:
        return scores
    truth_pk, found_pk = _checked_graphs(graph_true_pk, graph_est_pk, n_true, est_nk.shape[1], threshold)
    rows = np.arange(len(truth_pk))[slice(None) if trained_p is None else np.asarray(trained_p)]
    signed = matching(true_nk, est_nk, signed=True)
    scores |= _graph_scores(truth_pk[rows], found_pk[rows], pearson, "")
    return scores | _graph_scores(truth_pk, found_pk, signed, "_signed_all")


def matching(
    z_true_nk: NDArray[Any],
    z_est_nk: NDArray[Any],
    *,
    method: Literal["pearson", "spearman"] = "pearson",
    signed: bool = False,
) -> Matching:
    """Matches estimated to true latents by the Hungarian method.

    Args:
        z_true_nk: true latents, [cells, latents].
        z_est_nk: estimated latents of the same cells.
        method: "pearson" or "spearman" correlation.
        signed: match on the correlation itself, not on its size. A latent has no sign, so this is only for
            comparison with code that did so.

    Returns:
        As many pairs as the smaller of the two numbers of latents.

    Raises:
        DataError: if the arrays do not hold the same cells or a value is not finite.
    """
    corr_kk = correlation(*checked_latents(z_true_nk, z_est_nk), method)
    true_m, estimated_m = linear_sum_assignment(corr_kk if signed else np.abs(corr_kk), maximize=True)
    return Matching(true_m, estimated_m, corr_kk[true_m, estimated_m])


def top_two_graph(shift_pk: NDArray[Any]) -> NDArray[np.bool_]:
    """A graph from shifts alone: the two largest |shift| of each intervention.

    The paper's heuristic for models without gates (iVAE).

    Args:
        shift_pk: shifts, [interventions, latents].

    Returns:
        Boolean [interventions, latents].

    Source: Lopez et al. 2023, appendix D.1.
    """
    size_pk = np.abs(np.asarray(shift_pk))
    top = np.argsort(-size_pk, axis=1, kind="stable")[:, :2]
    graph_pk = np.zeros(size_pk.shape, dtype=bool)
    np.put_along_axis(graph_pk, top, True, axis=1)
    return graph_pk


def reliability(
    probability: NDArray[Any], truth: NDArray[Any], bins: int | Sequence[float] = 10, interval: float = 0.9
) -> pd.DataFrame:
    """Compares stated probabilities with how often they came true.

    Args:
        probability: stated probabilities, any shape.
        truth: what was true, boolean, same shape.
        bins: number of equal bins of [0, 1], or their edges. A bin holds its upper edge, not its lower one;
            the first holds both.
        interval: mass of the interval for the fraction (Jeffreys).

    Returns:
        One row per bin: low, high, n, mean_probability, fraction_true, fraction_low, fraction_high. A bin
        without entries has n = 0 and NaN.

    Raises:
        DataError: if shapes differ or a probability lies outside [0, 1].
    """
    p, t = np.asarray(probability, dtype=float).ravel(), np.asarray(truth).ravel().astype(bool)
    if p.shape != t.shape:
        raise DataError(
            f"expected one truth per probability, found {p.size} and {t.size}. Pass equal shapes."
        )
    if not np.all((p >= 0) & (p <= 1)):
        raise DataError(
            f"expected probabilities in [0, 1], found {p.min()} to {p.max()}. Pass probabilities."
        )
    edges = np.linspace(0, 1, bins + 1) if isinstance(bins, int) else np.asarray(bins, dtype=float)
    rows = []
    for i, (low, high) in enumerate(pairwise(edges)):
        inside = ((p >= low) if i == 0 else (p > low)) & (p <= high)
        n, n_true = int(inside.sum()), int(t[inside].sum())
        if n:
            ends = beta(n_true + 0.5, n - n_true + 0.5).interval(interval)
            rows.append((low, high, n, p[inside].mean(), n_true / n, *ends))
        else:
            rows.append((low, high, 0, np.nan, np.nan, np.nan, np.nan))
    names = ["low", "high", "n", "mean_probability", "fraction_true", "fraction_low", "fraction_high"]
    return pd.DataFrame(rows, columns=names)


def checked_latents(z_true_nk: NDArray[Any], z_est_nk: NDArray[Any]) -> tuple[Floats, Floats]:
    """Two arrays of latents of the same cells, as finite float64."""
    true_nk = np.asarray(z_true_nk, dtype=np.float64)
    est_nk = np.asarray(z_est_nk, dtype=np.float64)
    if true_nk.ndim != 2 or est_nk.ndim != 2 or len(true_nk) != len(est_nk):
        raise DataError(
            f"expected two arrays [cells, latents] of the same cells, found shapes {true_nk.shape} and "
            f"{est_nk.shape}. Pass the same rows of both."
        )
    if not (np.isfinite(true_nk).all() and np.isfinite(est_nk).all()):
        raise DataError("expected finite latents, found NaN or infinity. Check that the fit did not diverge.")
    return true_nk, est_nk


def _checked_graphs(
    graph_true_pk: NDArray[Any] | None,
    graph_est_pk: NDArray[Any] | None,
    n_true: int,
    n_est: int,
    threshold: float,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    if graph_true_pk is None or graph_est_pk is None:
        raise DataError("expected both graphs or none, found one. Pass graph_true_pk and graph_est_pk.")
    truth_pk = np.asarray(graph_true_pk).astype(bool)
    found_pk = np.asarray(graph_est_pk, dtype=np.float64) > threshold
    if truth_pk.shape != (len(found_pk), n_true) or found_pk.shape[1:] != (n_est,):
        raise DataError(
            f"expected graphs [interventions, {n_true}] and [interventions, {n_est}], found "
            f"{truth_pk.shape} and {found_pk.shape}. Their columns are those of the latents."
        )
    return truth_pk, found_pk


def unit(z_nk: Floats) -> Floats:
    """Centred columns of length one; a constant column becomes zero."""
    centred = z_nk - z_nk.mean(0)
    length = np.linalg.norm(centred, axis=0)
    constant = length <= 1e-12 * np.linalg.norm(z_nk, axis=0)
    return np.where(constant, 0.0, centred / np.where(constant, 1.0, length))


def correlation(a_nk: Floats, b_nk: Floats, method: str) -> Floats:
    """Correlation of each column of a with each of b; 0 for a constant column."""
    if method == "spearman":
        a_nk, b_nk = rankdata(a_nk, axis=0), rankdata(b_nk, axis=0)
    return unit(a_nk).T @ unit(b_nk)


def as_2d(prediction: Floats) -> Floats:
    """A regression's prediction with one column per latent, also where there is only one."""
    return prediction.reshape(len(prediction), -1)


def r2(true_nk: Floats, predicted_nk: Floats) -> float:
    """Mean over latents of 1 - residual / total sum of squares; 0 for a constant true latent."""
    residual = ((true_nk - predicted_nk) ** 2).sum(0)
    total = ((true_nk - true_nk.mean(0)) ** 2).sum(0)
    constant = total <= 1e-24 * (true_nk**2).sum(0)
    return float(np.where(constant, 0.0, 1 - residual / np.where(constant, 1.0, total)).mean())


def _kernel_regression(est_nk: Floats) -> Pipeline:
    """RBF kernel ridge regression on standardised latents; kernel of the median width of these ones."""
    scaler = StandardScaler()
    median = float(np.median(pdist(scaler.fit_transform(est_nk), "sqeuclidean")))
    kernel_ridge = KernelRidge(kernel="rbf", gamma=1 / median if median > 0 else 1.0)
    search = GridSearchCV(kernel_ridge, {"alpha": _RIDGES}, cv=3)
    return make_pipeline(scaler, TransformedTargetRegressor(search, transformer=StandardScaler()))


def _graph_scores(
    truth_pk: NDArray[np.bool_], found_pk: NDArray[np.bool_], pairs: Matching, suffix: str
) -> dict[str, float]:
    n_interventions, n_true = truth_pk.shape
    extra = np.setdiff1d(np.arange(found_pk.shape[1]), pairs.estimated_m)
    aligned_pk = np.zeros((n_interventions, n_true), dtype=bool)
    aligned_pk[:, pairs.true_m] = found_pk[:, pairs.estimated_m]
    found = np.concatenate([aligned_pk, found_pk[:, extra]], axis=1)
    truth = np.concatenate([truth_pk, np.zeros((n_interventions, extra.size), dtype=bool)], axis=1)
    precision, recall, f1, _ = precision_recall_fscore_support(
        truth.ravel(), found.ravel(), average="binary", zero_division=0.0
    )
    return {
        f"graph_precision{suffix}": float(precision),
        f"graph_recall{suffix}": float(recall),
        f"graph_f1{suffix}": float(f1),
    }
