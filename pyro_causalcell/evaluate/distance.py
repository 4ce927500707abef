"""How far predicted cells are from measured cells, as distributions.

Cells are rows, [n, d], in log1p CP10k or in principal components. Fit the components on training cells alone
and use one set of them for all methods: a distance depends on its space. Lower is better. Give the value of a
technical duplicate of as many cells beside it. The forms of other work, whose value depends on the number of
cells, stand at the end under their own names.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist, pdist
from sklearn.metrics import r2_score

from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.response import Metric

__all__ = [
    "DISTANCES",
    "PAIRED",
    "discrepancy_vae_mmd",
    "discrepancy_vae_scores",
    "distance_scores",
    "e_distance",
    "e_distance_with_diagonal",
    "linear_mmd",
    "median_distance",
    "mmd",
    "sinkhorn_divergence",
]

Floats = NDArray[np.float64]
Value = Callable[[Floats], Floats]  # of squared distances

_ROWS = 512  # rows of the matrix of distances held at a time
_MEDIAN_OF = 1000  # cells that tell the median distance
_BATCH = 32  # cells of the Discrepancy-VAE's scores
_BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)  # in median distances


def e_distance(x_ng: NDArray[Any], y_ng: NDArray[Any]) -> float:
    """Energy distance 2 E|x - y| - E|x - x'| - E|y - y'|; lower is better.

    Means run over pairs of different cells (U-statistic): its expectation is 0 for equal distributions,
    whatever the numbers of cells, and it can come out slightly negative. All cells count: a sample of the
    larger set, as others take, adds noise that is the same in all conditions whose cells are the same.

    Args:
        x_ng: Cells, [n, d].
        y_ng: Cells, [m, d].

    Raises:
        DataError: A set has fewer than two cells, the columns differ, or a value is not finite.

    Source: Székely and Rizzo, Journal of Statistical Planning and Inference 2013; Peidli et al., scPerturb,
    Nature Methods 2024.
    """
    return -_contrast(*_checked(x_ng, y_ng), np.sqrt, diagonal=False)


def median_distance(x_ng: NDArray[Any], seed: int = 0) -> float:
    """Median Euclidean distance between cells, from at most 1,000 of them drawn at random.

    Raises:
        DataError: Half of the pairs or more coincide: there is no scale.
    """
    x_nd = np.asarray(x_ng, dtype=np.float64)
    median = float(np.median(pdist(_drawn(x_nd, _MEDIAN_OF, np.random.default_rng(seed)))))
    if not median > 0:
        raise DataError(f"expected cells that differ, found a median distance of {median}. Pass scale=.")
    return median


def mmd(x_ng: NDArray[Any], y_ng: NDArray[Any], scale: float | None = None) -> float:
    """Squared maximum mean discrepancy, unbiased, for a mean of five Gaussian kernels; lower is better.

    k(x, y) is the mean of exp(-|x - y|² / 2 s²) over s of 1/4, 1/2, 1, 2 and 4 times ``scale``. Means run
    over pairs of different cells (U-statistic), so it can come out slightly negative.

    Args:
        x_ng: Measured cells, [n, d].
        y_ng: Predicted cells, [m, d].
        scale: By default the median distance between the measured cells x: a scale that depended on the
            predicted cells would differ between the methods compared.

    Raises:
        DataError: A set has fewer than two cells, the columns differ, or a value is not finite.

    Source: Gretton et al., Journal of Machine Learning Research 2012, lemma 6.
    """
    x_nd, y_nd = _checked(x_ng, y_ng)
    scale = median_distance(x_nd) if scale is None else scale

    widths = [2 * (bandwidth * scale) ** 2 for bandwidth in _BANDWIDTHS]
    return _contrast(x_nd, y_nd, _gaussians(widths), diagonal=False) / len(widths)


def sinkhorn_divergence(
    x_ng: NDArray[Any],
    y_ng: NDArray[Any],
    scale: float | None = None,
    blur: float = 1.0,
    n_cells: int = 1000,
    seed: int = 0,
) -> float:
    """Debiased entropic transport cost OT(x, y) - OT(x, x) / 2 - OT(y, y) / 2; lower is better.

    OT is the smallest <P, |x - y|²> + e KL(P | product of the marginals), with e = ``blur`` * ``scale``². It
    has the unit of a squared distance. It is positive for two samples of one distribution, the more so the
    fewer the cells and the smaller the blur: compare with a technical duplicate of as many cells. A large
    blur compares means alone.

    Args:
        x_ng: Measured cells, [n, d].
        y_ng: Predicted cells, [m, d].
        scale: By default the median distance between the measured cells x.
        blur: Strength of the entropy in squared scales.
        n_cells: At most so many cells of each set are drawn: time and memory grow with their square.
        seed: Of the draws.

    Raises:
        DataError: A set has fewer than two cells, the columns differ, or a value is not finite.
        ImportError: POT is not installed.

    Source: Feydy et al., AISTATS 2019, equation 3.
    """
    ot = _transport()
    x_nd, y_nd = _checked(x_ng, y_ng)
    scale = median_distance(x_nd) if scale is None else scale
    rng, n = np.random.default_rng(seed), min(len(x_nd), len(y_nd), n_cells)
    x_nd, y_nd = _drawn(x_nd, n, rng), _drawn(y_nd, n, rng)

    def cost(a_nd: Floats, b_nd: Floats) -> float:
        cost_nm = cdist(a_nd, b_nd, "sqeuclidean")
        return float(ot.solve(cost_nm, reg=blur * scale**2, reg_type="KL", tol=1e-6).value)

    return cost(x_nd, y_nd) - (cost(x_nd, x_nd) + cost(y_nd, y_nd)) / 2


DISTANCES: dict[str, Metric] = {
    "e_distance": Metric("E-distance", False, 0.0),
    "mmd": Metric("MMD²", False, 0.0),
    "sinkhorn_divergence": Metric("Sinkhorn divergence", False, 0.0),
}
"""The metrics of :func:`distance_scores`: heading, direction, expected score of equal distributions."""


def distance_scores(
    true_cells: Sequence[NDArray[Any]],
    predicted_cells: Sequence[NDArray[Any]],
    metrics: Sequence[str] = ("e_distance", "mmd"),
    seed: int = 0,
) -> dict[str, Floats]:
    """Distances of predicted from measured cells, condition by condition.

    Args:
        true_cells: Measured cells of each condition, [n, d].
        predicted_cells: Predicted cells of each condition, [m, d], in the same order and space.
        metrics: Keys of DISTANCES.
        seed: Of the draws of ``sinkhorn_divergence``.

    Returns:
        Metric to one value per condition.

    Raises:
        DataError: The numbers of conditions differ, a metric is unknown, or cells cannot be compared.
    """
    if len(true_cells) != len(predicted_cells):
        raise DataError(
            f"expected predicted cells of {len(true_cells)} conditions, found {len(predicted_cells)}."
        )
    known: dict[str, Callable[[NDArray[Any], NDArray[Any]], float]] = {
        "e_distance": e_distance,
        "mmd": mmd,
        "sinkhorn_divergence": lambda x, y: sinkhorn_divergence(x, y, seed=seed),
    }
    unknown = [name for name in metrics if name not in known]
    if unknown:
        raise DataError(f"unknown distances {unknown}; choose among {list(known)}.")
    pairs = list(zip(true_cells, predicted_cells, strict=True))
    return {name: np.array([known[name](x, y) for x, y in pairs]) for name in metrics}


# ---------------------------------------------------------------- forms of other work


def e_distance_with_diagonal(x_ng: NDArray[Any], y_ng: NDArray[Any]) -> float:
    """The energy distance of pertpy and cell-eval: means over all pairs, a cell and itself among them.

    This V-statistic is positive for equal distributions, the more so the fewer the cells.

    Raises:
        DataError: As :func:`e_distance`.
    """
    return -_contrast(*_checked(x_ng, y_ng), np.sqrt, diagonal=True)


def discrepancy_vae_mmd(x_ng: NDArray[Any], y_ng: NDArray[Any], sigma: float = 1000.0) -> float:
    """The MMD of the Discrepancy-VAE: sum of ten kernels exp(-|x - y|² / b), b = ``sigma`` 2^(i - 5).

    A V-statistic, positive for equal distributions. The authors average it over batches of 32 cells, and its
    value depends on that number.

    Raises:
        DataError: As :func:`e_distance`.

    Source: Zhang et al., Identifiability guarantees for causal disentanglement from soft interventions,
    NeurIPS 2023.
    """
    widths = [sigma * 2.0 ** (i - 5) for i in range(10)]
    return _contrast(*_checked(x_ng, y_ng), _gaussians(widths), diagonal=True)


PAIRED: dict[str, Metric] = {
    "rel_rmse_paired": Metric("relative RMSE of paired cells", False, None),
    "r2_paired": Metric("R² of means of 32 cells, not below 0", True, None),
    "mmd_paired": Metric("MMD of 32 cells, Discrepancy-VAE", False, None),
}
"""The metrics of :func:`discrepancy_vae_scores`. Two sets of cells of one distribution do not score 0, or 1:
compare with a technical duplicate."""


def discrepancy_vae_scores(x_ng: NDArray[Any], y_ng: NDArray[Any], seed: int = 0) -> dict[str, float]:
    """The scores of the Discrepancy-VAE's authors: averages over batches of 32 measured and predicted cells.

    Measured cells x and predicted cells y are paired at random, and per batch

    * ``rel_rmse_paired``: the root of mean (y - x)² over mean x²: the noise of single cells is in it twice;
    * ``r2_paired``: R² of the means of the batch, with the predicted one in the place of the truth as the
      authors have it, and 0 where it is negative;
    * ``mmd_paired``: :func:`discrepancy_vae_mmd`.

    Cells that fill no batch are left out; fewer than 32 make one batch.

    Raises:
        DataError: As :func:`e_distance`.

    Source: Zhang et al., NeurIPS 2023, and the code published with it.
    """
    rng = np.random.default_rng(seed)
    x_nd, y_nd = (rng.permutation(cells) for cells in _checked(x_ng, y_ng))
    n = min(len(x_nd), len(y_nd))
    size = min(n, _BATCH)
    found = []
    for start in range(0, n - size + 1, size):
        x, y = x_nd[start : start + size], y_nd[start : start + size]
        found.append(
            (
                float(np.sqrt(((y - x) ** 2).mean() / (x**2).mean())),
                max(float(r2_score(y.mean(0), x.mean(0))), 0.0),
                discrepancy_vae_mmd(x, y),
            )
        )
    return dict(zip(PAIRED, np.mean(found, axis=0).tolist(), strict=True))


def linear_mmd(x_ng: NDArray[Any], y_ng: NDArray[Any]) -> float:
    """The MMD of pertpy's default: a linear kernel, so the squared distance of the two means and no more.

    Raises:
        DataError: As :func:`e_distance`.
    """
    x_nd, y_nd = _checked(x_ng, y_ng)
    return float(((x_nd.mean(0) - y_nd.mean(0)) ** 2).sum())


# ---------------------------------------------------------------- pairs of cells


def _gaussians(widths: Sequence[float]) -> Value:
    """Sum of exp(-squared distance / width) over the widths."""

    def value(squared: Floats) -> Floats:
        total = np.zeros_like(squared)
        for width in widths:
            total += np.exp(-squared / width)
        return total

    return value


def _contrast(x_nd: Floats, y_nd: Floats, value: Value, diagonal: bool) -> float:
    """Mean value of a pair within x, plus within y, minus twice the mean of a pair across.

    ``diagonal``: whether a cell and itself make a pair.
    """
    across = _sum(x_nd, y_nd, value) / (len(x_nd) * len(y_nd))
    return _mean_within(x_nd, value, diagonal) + _mean_within(y_nd, value, diagonal) - 2 * across


def _mean_within(x_nd: Floats, value: Value, diagonal: bool) -> float:
    n, total = len(x_nd), _sum(x_nd, x_nd, value)
    return total / n**2 if diagonal else (total - n * float(value(np.zeros(1))[0])) / (n * (n - 1))


def _sum(x_nd: Floats, y_nd: Floats, value: Value) -> float:
    """Sum over all pairs, a few rows at a time: memory does not grow with the square of the cells."""
    chunks = (x_nd[start : start + _ROWS] for start in range(0, len(x_nd), _ROWS))
    return sum(float(value(cdist(chunk, y_nd, "sqeuclidean")).sum()) for chunk in chunks)


def _drawn(x_nd: Floats, n: int, rng: np.random.Generator) -> Floats:
    return x_nd if len(x_nd) <= n else x_nd[rng.choice(len(x_nd), n, replace=False)]


def _checked(x_ng: NDArray[Any], y_ng: NDArray[Any]) -> tuple[Floats, Floats]:
    x_nd, y_nd = np.asarray(x_ng, dtype=np.float64), np.asarray(y_ng, dtype=np.float64)
    if x_nd.ndim != 2 or y_nd.ndim != 2 or x_nd.shape[1] != y_nd.shape[1] or min(len(x_nd), len(y_nd)) < 2:
        raise DataError(
            f"expected two arrays of at least 2 cells each with the same columns, found shapes {x_nd.shape} "
            f"and {y_nd.shape}."
        )
    if not (np.isfinite(x_nd).all() and np.isfinite(y_nd).all()):
        raise DataError("expected finite cells, found NaN or infinity. Check the prediction.")
    return x_nd, y_nd


def _transport() -> Any:
    try:
        import ot
    except ImportError as error:
        raise ImportError(
            "the Sinkhorn divergence needs POT, the extra transport: pip install 'pyro-causalcell[transport]'"
        ) from error
    return ot
