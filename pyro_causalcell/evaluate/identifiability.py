"""What a trained model settles and what it leaves open: agreement of runs, rank of parameters, alignment.

None of this needs a truth. A model that is identified gives the same latents from every seed, up to what
its theory leaves free; agreement is therefore necessary, not sufficient.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray
from pyro import poutine
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression
from sklearn.metrics import roc_auc_score, silhouette_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import PolynomialFeatures, StandardScaler

from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.evaluate.distance import mmd
from pyro_causalcell.evaluate.recovery import (
    Floats,
    as_2d,
    checked_latents,
    correlation,
    matching,
    r2,
    unit,
)
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import encode
from pyro_causalcell.predict import global_draws, global_means
from pyro_causalcell.predict.cells import seeded

__all__ = [
    "Rank",
    "alignment",
    "latent_blocks",
    "mixing",
    "numerical_rank",
    "perturbation_auc",
    "seed_agreement",
    "shift_rank",
    "udr",
]

Run = Fit | NDArray[Any] | Mapping[str, NDArray[Any]]
"""A trained model, or its latents [cells, latents], or its latents by block."""
ONE_BLOCK = "z"
_CELLS_AT_ONCE = 4096
_FOLDS = 5


class Rank(NamedTuple):
    """How many directions of a matrix stand out of its noise.

    Attributes:
        rank: Singular values above the threshold.
        singular_values: Of the matrix, falling.
        threshold: What noise alone reaches.
    """

    rank: int
    singular_values: Floats
    threshold: float


def seed_agreement(
    runs: Sequence[Run],
    screen: Screen | None = None,
    *,
    rows: NDArray[np.int64] | None = None,
    method: Literal["pearson", "spearman"] = "pearson",
    active_variance: float = 0.01,
) -> xr.Dataset:
    """How far runs agree on the latents of the same cells, without a truth.

    Train the same settings with several seeds. Latents are matched one to one, as against a truth, block
    by block where the model has blocks (one latent site each). Read ``mcc`` where the theory promises single
    programmes, ``r2`` where it promises a block only.

    Args:
        runs: At least two fits, or arrays [cells, latents], or mappings from block to such an array.
        screen: The cells, for fits (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells of the screen; None is all. Cells that no run was trained on are best.
        method: Correlation that is matched.
        active_variance: A latent takes part if its variance over cells exceeds this: latents that a run
            left at the prior have nothing to agree on.

    Returns:
        Variables over ``block``, ``run`` and ``other``, both in [0, 1] or below, higher is better:
        ``mcc``, mean |correlation| of matched latents, where a latent without a partner counts 0; and
        ``r2``, five-fold cross-validated linear R2 of the latents of ``other`` given those of ``run``, which
        no rotation within the block changes. NaN where neither run, or for ``r2`` the other, has an active
        latent. ``n_active`` (block, run) counts active latents.

    Raises:
        DataError: There are fewer than two runs, blocks or cells differ, or fits come without a screen.
    """
    _check_several(runs)
    latents = [latent_blocks(run, screen, rows) for run in runs]
    names = list(latents[0])
    if any(list(blocks) != names for blocks in latents):
        raise DataError(
            f"expected the same blocks in every run, found {sorted({tuple(blocks) for blocks in latents})}. "
            "Compare runs of one model."
        )
    n_runs = len(latents)
    mcc, r2s = (np.full((len(names), n_runs, n_runs), np.nan) for _ in range(2))
    n_active = np.zeros((len(names), n_runs), dtype=np.int64)
    for b, name in enumerate(names):
        first = latents[0][name]
        active = [_active(checked_latents(first, blocks[name])[1], active_variance) for blocks in latents]
        n_active[b] = [z.shape[1] for z in active]
        for i in range(n_runs):
            for j in range(n_runs):
                mcc[b, i, j] = _mcc(active[i], active[j], method)
                r2s[b, i, j] = _block_r2(active[i], active[j])
    cube = ["block", "run", "other"]
    return xr.Dataset(
        {"mcc": (cube, mcc), "r2": (cube, r2s), "n_active": (["block", "run"], n_active)},
        coords={"block": names, "run": np.arange(n_runs), "other": np.arange(n_runs)},
    )


def udr(
    representations: Sequence[NDArray[Any]],
    *,
    method: Literal["spearman", "lasso"] = "spearman",
    active_variance: float = 0.01,
    lasso_alpha: float = 0.1,
) -> Floats:
    """Unsupervised disentanglement ranking: how much trained models agree, one latent to one latent.

    Needs no truth. Train the same settings with several seeds, compare the mean score of each setting.

    Args:
        representations: one array [cells, latents] per trained model, for the same cells in the same order.
        method: similarity of two latents: |Spearman correlation|, or the size of the coefficients of a Lasso
            regression of one standardised representation on the other.
        active_variance: a latent takes part if its variance over cells exceeds this. It stands for the
            KL criterion of the paper, since posterior means alone are at hand.
        lasso_alpha: penalty of the Lasso.

    Returns:
        One score in [0, 1] per model (the Lasso variant can exceed 1 slightly): the median over the other
        models.

    Raises:
        DataError: if there are fewer than two models, or their cells differ in number.

    Source: Duan et al., Unsupervised model selection for variational disentangled representation learning,
    2020, equation 2.
    """
    _check_several(representations)
    active = [_active(checked_latents(representations[0], z)[1], active_variance) for z in representations]
    n_models = len(active)
    agreement = np.full((n_models, n_models), np.nan)
    for i in range(n_models):
        for j in range(n_models):
            if i != j:
                agreement[i, j] = _agreement(_similarity(active[i], active[j], method, lasso_alpha))
    return np.asarray(np.nanmedian(agreement, axis=1))


def numerical_rank(matrix_ab: NDArray[Any], noise_sab: NDArray[Any], *, quantile: float = 0.95) -> Rank:
    """Rank of a matrix that is known up to noise: the singular values that noise alone does not reach.

    Counts too few rather than too many: adding noise of largest singular value t to a matrix of rank r leaves
    no more than r singular values above t.

    Args:
        matrix_ab: Estimated matrix, such as effects [perturbations, latents].
        noise_sab: Draws of its error: posterior draws minus their mean, or half the difference of the
            estimates from two halves of the data.
        quantile: Of the draws' largest singular values; it is the threshold.

    Raises:
        DataError: If there is no draw, shapes do not agree, or a value is not finite.

    Source: Weyl's inequality for singular values.
    """
    matrix, noise = np.asarray(matrix_ab, dtype=np.float64), np.asarray(noise_sab, dtype=np.float64)
    if matrix.ndim != 2 or noise.ndim != 3 or noise.shape[1:] != matrix.shape or not len(noise):
        raise DataError(
            f"expected a matrix [a, b] and draws of its noise [s, a, b], found shapes {matrix.shape} and "
            f"{noise.shape}."
        )
    if not (np.isfinite(matrix).all() and np.isfinite(noise).all()):
        raise DataError("expected finite values, found NaN or infinity. Check that the fit did not diverge.")
    values: Floats = np.linalg.svd(matrix, compute_uv=False).astype(np.float64)
    largest = np.linalg.svd(noise, compute_uv=False)[:, 0]
    threshold = float(np.quantile(largest, quantile))
    return Rank(int((values > threshold).sum()), values, threshold)


def shift_rank(fit: Fit, *, n_draws: int = 200, seed: int = 0) -> Rank:
    """In how many independent directions the fit's perturbations move its programmes.

    Fewer than there are programmes: some direction of the latent space is never moved, and perturbations
    cannot tell its axes. For other parameters (differences of weights), see :func:`numerical_rank`.

    Args:
        fit: A fit with a global latent ``shift``, and gates or none.
        n_draws: Posterior draws that tell the noise.
        seed: Their seed.

    Raises:
        PredictionError: The model has no ``shift``.
    """
    draws = global_draws(fit, n_draws, seed)
    if "shift" not in draws:
        raise PredictionError(
            "this model has no perturbation shifts (no global latent 'shift'); pass its parameters to "
            "numerical_rank"
        )
    effect_spk = (draws["shift"] * draws.get("gate", 1.0)).cpu().numpy()
    mean_pk = effect_spk.mean(0)
    return numerical_rank(mean_pk, effect_spk - mean_pk)


def alignment(
    run: Run,
    screen: Screen,
    *,
    block: str | None = None,
    rows: NDArray[np.int64] | None = None,
    max_cells: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Whether latents that should not feel perturbations look the same in perturbed and in control cells.

    Args:
        run: A fit, or latents of ``rows`` (an array, or a mapping from block to array).
        screen: The cells.
        block: The invariant block: name of a latent site. Not needed where there is only one.
        rows: Which cells; None is all.
        max_cells: Cells of a condition that enter the MMD at most, drawn at random.
        seed: Seed of these draws and of the halves of control.

    Returns:
        One row per condition, ``"control"`` first: ``n_cells``; ``mean_distance``, Euclidean distance of the
        mean latents from those of control, each latent divided by its standard deviation in control; and
        ``mmd``, unbiased squared maximum mean discrepancy from control. Lower is better for both. The row
        of control compares its two halves: that is what noise alone gives.

    Raises:
        DataError: There are fewer than 4 control cells, a condition has fewer than 2 cells, or the block is
            unknown.
    """
    rows = np.arange(screen.n_cells) if rows is None else np.asarray(rows)
    blocks = latent_blocks(run, screen, rows)
    if block is None and len(blocks) > 1 or block is not None and block not in blocks:
        raise DataError(f"expected block= to be one of {list(blocks)}, found {block!r}.")
    z_nk = np.asarray(blocks[next(iter(blocks)) if block is None else block], dtype=np.float64)
    condition_n = screen.condition_n[rows]
    if len(z_nk) != len(rows):
        raise DataError(f"expected latents of {len(rows)} cells, found {len(z_nk)}. Pass those of rows=.")
    rng = np.random.default_rng(seed)
    control_nk = rng.permutation(z_nk[condition_n == 0])
    if len(control_nk) < 4:
        raise DataError(f"expected at least 4 control cells, found {len(control_nk)}. Pass more rows.")
    sd_k = control_nk.std(0)
    sd_k = np.where(sd_k > 0, sd_k, 1.0)
    table = []
    for c in np.unique(condition_n[condition_n >= 0]):
        halves = np.array_split(control_nk, 2)
        cells, reference = halves if c == 0 else (rng.permutation(z_nk[condition_n == c]), control_nk)
        if len(cells) < 2:
            raise DataError(f"expected 2 cells of {screen.conditions[c]!r} or more, found 1. Leave it out.")
        gap_k = (cells.mean(0) - reference.mean(0)) / sd_k
        distance = mmd(reference[:max_cells] / sd_k, cells[:max_cells] / sd_k)
        table.append((screen.conditions[c], int((condition_n == c).sum()), np.linalg.norm(gap_k), distance))
    return pd.DataFrame(table, columns=["condition", "n_cells", "mean_distance", "mmd"])


def perturbation_auc(z_nk: NDArray[Any], label_n: NDArray[Any], *, seed: int = 0) -> float:
    """How well a classifier tells from some latents which perturbation a cell had; .5 is not at all.

    Logistic regression on the latents, their squares and products, five-fold cross-validated; the area
    under the ROC curve of each label against the rest, averaged over labels. Lower is better for latents
    that should not feel perturbations.

    Args:
        z_nk: Latents of cells that trained nothing.
        label_n: Their conditions.
        seed: Seed of the folds.

    Raises:
        DataError: There are fewer than two labels, or fewer than five cells of one.
    """
    labels, sizes = np.unique(label_n, return_counts=True)
    if len(labels) < 2 or sizes.min() < 5:
        raise DataError(
            f"expected two labels or more of at least 5 cells, found {dict(zip(labels, sizes, strict=True))}."
        )
    classifier = make_pipeline(
        StandardScaler(),
        PolynomialFeatures(2, include_bias=False),
        StandardScaler(),
        LogisticRegression(C=0.1),
    )
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    probability_nc = cross_val_predict(classifier, z_nk, label_n, cv=folds, method="predict_proba")
    areas = [roc_auc_score(label_n == c, probability_nc[:, i]) for i, c in enumerate(labels)]
    return float(np.mean(areas))


def mixing(
    blocks: Mapping[str, NDArray[Any]], label_n: NDArray[Any], *, n_neighbours: int = 15, seed: int = 0
) -> pd.DataFrame:
    """How well cells of different perturbations mix in each block of latents.

    An invariant block should mix them, a responsive one should not. No number alone is proof: latents that
    say nothing of a cell mix perfectly.

    Args:
        blocks: Name -> latents of the same cells, which trained nothing.
        label_n: Their conditions, at least five cells of each.
        n_neighbours: Neighbours of a cell that are looked at.
        seed: Seed of the classifier's folds.

    Returns:
        One row a block: ``auc``, as :func:`perturbation_auc` (.5: mixed); ``silhouette``, the mean silhouette
        of the conditions (0 or below: mixed, 1: apart); ``neighbours``, the share of nearest neighbours of
        the same condition, over the share that chance gives (1: mixed). Latents are divided by their
        standard deviation.

    Raises:
        DataError: As :func:`perturbation_auc`; or there are not more cells than neighbours.

    Source: Rousseeuw, J. Comput. Appl. Math. 1987 (silhouette); the share of neighbours follows the idea of
    kBET, Büttner et al., Nat. Methods 2019.
    """
    labels, code_n, sizes = np.unique(label_n, return_inverse=True, return_counts=True)
    if len(code_n) <= n_neighbours:
        raise DataError(f"expected more than {n_neighbours} cells, found {len(code_n)}; lower n_neighbours=.")
    by_chance = float((sizes * (sizes - 1)).sum() / (len(code_n) * (len(code_n) - 1)))
    rows = []
    for name, z_nk in blocks.items():
        scaled_nk = StandardScaler().fit_transform(z_nk)
        nearest = NearestNeighbors(n_neighbors=n_neighbours).fit(scaled_nk).kneighbors(return_distance=False)
        same = float((code_n[nearest] == code_n[:, None]).mean())
        auc = perturbation_auc(np.asarray(z_nk), label_n, seed=seed)
        rows.append((name, auc, float(silhouette_score(scaled_nk, code_n)), same / by_chance))
    return pd.DataFrame(rows, columns=["block", "auc", "silhouette", "neighbours"])


def _check_several(runs: Sequence[object]) -> None:
    if len(runs) < 2:
        raise DataError(
            f"expected at least 2 runs, found {len(runs)}. Train the same settings with another seed."
        )


def latent_blocks(run: Run, screen: Screen | None, rows: NDArray[np.int64] | None) -> dict[str, NDArray[Any]]:
    """Latents of the cells by block: posterior means of a fit, or what was given."""
    if isinstance(run, Mapping):
        return dict(run)
    if not isinstance(run, Fit):
        return {ONE_BLOCK: np.asarray(run)}
    if screen is None:
        raise DataError("fits need the cells; pass screen=Screen.from_spec(fit.screen, adata).")
    rows = np.arange(screen.n_cells) if rows is None else np.asarray(rows)
    guide = poutine.condition(run.guide, data=global_means(run))
    batches = Minibatches(screen, rows, _CELLS_AT_ONCE, shuffle=False, device=run.device)
    with seeded(run, run.seed):
        return {site: loc.numpy() for site, (loc, _) in encode(guide, batches).items()}


def _active(z_nk: Floats, active_variance: float) -> Floats:
    return z_nk[:, z_nk.var(0) > active_variance]


def _mcc(a_nk: Floats, b_nk: Floats, method: Literal["pearson", "spearman"]) -> float:
    """Mean |correlation| of matched latents; the larger number of latents counts."""
    n_latents = max(a_nk.shape[1], b_nk.shape[1])
    if n_latents == 0:
        return float("nan")
    return float(np.abs(matching(a_nk, b_nk, method=method).correlation_m).sum() / n_latents)


def _block_r2(a_nk: Floats, b_nk: Floats) -> float:
    if b_nk.shape[1] == 0:
        return float("nan")
    if a_nk.shape[1] == 0:
        return 0.0
    folds = KFold(_FOLDS, shuffle=True, random_state=0)
    return r2(b_nk, as_2d(cross_val_predict(LinearRegression(), a_nk, b_nk, cv=folds)))


def _similarity(a_nk: Floats, b_nk: Floats, method: str, lasso_alpha: float) -> Floats:
    """Similarity of the latents of two models, [latents of a, latents of b]."""
    if 0 in (a_nk.shape[1], b_nk.shape[1]):
        return np.zeros((a_nk.shape[1], b_nk.shape[1]))
    if method == "spearman":
        return np.abs(correlation(a_nk, b_nk, "spearman"))
    scale = np.sqrt(len(a_nk))
    lasso = Lasso(alpha=lasso_alpha).fit(unit(a_nk) * scale, unit(b_nk) * scale)
    return np.abs(lasso.coef_.reshape(b_nk.shape[1], a_nk.shape[1])).T


def _agreement(similarity_ab: Floats) -> float:
    """Equation 2: high when every latent of one model resembles exactly one of the other."""

    def one_side(similarity: Floats) -> float:
        total = similarity.sum(0)
        share = similarity.max(0, initial=0.0) ** 2 / np.where(total > 0, total, 1.0)
        return float(share.sum())

    n_latents = sum(similarity_ab.shape)
    return (one_side(similarity_ab) + one_side(similarity_ab.T)) / n_latents if n_latents else 0.0
