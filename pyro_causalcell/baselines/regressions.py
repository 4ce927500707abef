"""Linear regressions of the response on a description of the targets."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.linear_model import ElasticNet, RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_causalcell.baselines.means import TrainingMeans, condition_means, halves
from pyro_causalcell.baselines.predictors import Baseline
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["ElasticNetOnTargets", "RidgeOnEmbeddings", "pca_embedding", "random_embedding"]

_DIMENSIONS = 10
_RIDGES = np.logspace(-3, 4, 15)
_SHRINKAGES = np.geomspace(1.0, 1e-3, 10)  # shares of the penalty that closes every coefficient
_L1_RATIO = 0.5
_FEWEST = 3  # conditions: with fewer there is nothing to choose a penalty by


def pca_embedding(
    means: TrainingMeans, n_dimensions: int = _DIMENSIONS, further: Sequence[str] = ()
) -> pd.DataFrame:
    """Describe each target by how its own gene moves over the training conditions.

    The loadings of the target's gene in a PCA of the condition means, scaled by the singular values. A
    target that is no gene of the screen gets zeros: a gene that moves with nothing. It is also a table for
    ``Screen(embeddings=)`` that needs no knowledge but the training cells.

    Args:
        means: Means of the training cells.
        n_dimensions: Components at most.
        further: Targets that no cell carries, which must be genes of the screen.

    Returns:
        Table with one row per target.

    Raises:
        DataError: A further target is no gene of the screen.

    Source: Ahlmann-Eltze, Huber and Anders, Nature Methods 2025 (linear baseline, P from the training data).
    """
    strange = [name for name in further if name not in means.spec.genes]
    if strange:
        raise DataError(
            f"expected genes of the screen, whose own expression describes them, found {shown(strange)}; "
            "pass a table of embeddings with rows for them"
        )
    mean_cg = np.stack(list(means.seen.values()))
    _, singular_k, loading_kg = np.linalg.svd(mean_cg - mean_cg.mean(0), full_matrices=False)
    loading_gk = (singular_k[:, None] * loading_kg).T[:, :n_dimensions]
    genes = pd.DataFrame(loading_gk, means.spec.genes)
    return genes.reindex(sorted({*means.spec.targets, *further}), fill_value=0.0)


def random_embedding(targets: Sequence[str], seed: int, n_dimensions: int = _DIMENSIONS) -> pd.DataFrame:
    """Describe each target by noise: what an embedding without knowledge would score."""
    noise_pe = np.random.default_rng(seed).standard_normal((len(targets), n_dimensions))
    return pd.DataFrame(noise_pe, list(targets))


class _Regression(Baseline):
    """Mean expression as a linear function of the sum of its targets' features."""

    features: pd.DataFrame
    regression: Any

    def _features(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        u_cp = self.means.spec.design(conditions).astype(np.float64)
        features_ce: NDArray[np.float64] = u_cp @ self.features.to_numpy(dtype=np.float64)
        return features_ce

    def _predict(self, targets: list[str]) -> NDArray[np.float64]:
        if not targets:
            return self.control_g
        mean_cg: NDArray[np.float64] = self.regression.predict(
            self._features([self.means.spec.separator.join(targets)])
        )
        return mean_cg[0]

    def _training(self) -> tuple[list[str], NDArray[np.float64], NDArray[np.float64]]:
        """Names, means and weights of the training conditions."""
        names = list(self.means.seen)
        if len(names) < _FEWEST:
            raise DataError(
                f"the {self.name} needs {_FEWEST} perturbed training conditions, found {len(names)}; "
                "take the perturbed mean."
            )
        weight_c = np.array([self.means.cells[name] for name in names], dtype=np.float64)
        return names, np.stack(list(self.means.seen.values())), weight_c


class RidgeOnEmbeddings(_Regression):
    """Ridge regression of condition means on embeddings of their targets, summed over a combination.

    Its intercept is the response that all perturbations share, so an embedding without information leaves
    about the perturbed mean. The penalty is chosen by leave-one-out error over the training conditions.

    Args:
        means: Means of the training cells.
        embedding: Table with one row per target (index: target names).
        name: What tables and figures call it.

    Raises:
        DataError: A target has no row, a value is not finite, or there are fewer than three perturbed
            training conditions.

    Source: Ahlmann-Eltze, Huber and Anders, Nature Methods 2025 (linear baseline).
    """

    name = "ridge on embeddings"

    def __init__(self, means: TrainingMeans, embedding: pd.DataFrame, name: str = "ridge on embeddings"):
        super().__init__(means)
        self.name = name
        missing = [target for target in means.spec.targets if target not in embedding.index]
        if missing:
            raise DataError(
                f"expected a row of embeddings for each target, found none for {len(missing)}: "
                f"{shown(missing)}; the index must hold target names"
            )
        self.features = embedding.loc[means.spec.targets].astype(np.float64)
        if not np.isfinite(self.features.to_numpy()).all():
            raise DataError("expected finite embeddings, found NaN or infinity; fill them")
        names, mean_cg, weight_c = self._training()
        self.regression = make_pipeline(StandardScaler(), RidgeCV(_RIDGES))
        self.regression.fit(self._features(names), mean_cg, ridgecv__sample_weight=weight_c)


class ElasticNetOnTargets(_Regression):
    """Elastic net of condition means on the targets (multi-hot): sparse, shrunk effects that add up.

    An unseen target gets what all perturbations share, as the perturbed mean does. The penalty is the one
    that, fitted to one half of the training cells, best predicts the condition means of the other half.

    Args:
        means: Means of the training cells.
        seed: Of the halves.

    Raises:
        DataError: There are fewer than three perturbed training conditions, or none with two cells.
    """

    name = "elastic net"

    def __init__(self, means: TrainingMeans, seed: int = 0):
        super().__init__(means)
        targets = means.spec.targets
        self.features = pd.DataFrame(np.eye(len(targets)), targets)
        names, mean_cg, weight_c = self._training()
        pairs = [name for name in names if means.cells[name] > 1]
        if not pairs:
            raise DataError("the elastic net needs a training condition with two cells, found none.")
        first, second = halves(means.screen, means.rows, pairs, seed)
        first_cg, second_cg = (condition_means(means.screen, half, pairs) for half in (first, second))
        pair_weight_c = np.array([means.cells[name] for name in pairs], dtype=np.float64)

        def error(share: float) -> float:
            fitted = self._fit(pairs, first_cg, pair_weight_c, share)
            squared_c = ((fitted.predict(self._features(pairs)) - second_cg) ** 2).mean(1)
            return float(np.average(squared_c, weights=pair_weight_c))

        self.share = min(_SHRINKAGES, key=error)
        self.regression = self._fit(names, mean_cg, weight_c, self.share)

    def _fit(
        self, names: list[str], mean_cg: NDArray[np.float64], weight_c: NDArray[np.float64], share: float
    ) -> ElasticNet:
        u_cp = self._features(names)
        weight_c = weight_c / weight_c.sum()
        centred_cp = u_cp - weight_c @ u_cp
        centred_cg = mean_cg - weight_c @ mean_cg
        closed = np.abs((weight_c[:, None] * centred_cp).T @ centred_cg).max() / _L1_RATIO
        net = ElasticNet(alpha=max(share * closed, 1e-12), l1_ratio=_L1_RATIO, max_iter=10_000)
        return net.fit(u_cp, mean_cg, sample_weight=weight_c)
