"""What a method leaves of the measured means, carried over to conditions that nobody measured."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from pyro_causalcell.baselines.means import moments
from pyro_causalcell.baselines.predictors import Predictor
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

__all__ = ["WithResiduals", "random_effects"]

RESIDUALS = ", with residuals"
"""What a method with residuals is called after its own name."""
SPREADS = np.r_[0.0, np.geomspace(1e-5, 10, 25)]
"""Variances of effects that are thought possible, as shares of a gene's variance within conditions."""
_LEAST_VARIANCE = 1e-6  # of a gene's cells: no cell of a condition may have shown it


class WithResiduals:
    r"""A method, plus what it leaves of the measured means of training conditions.

    Programmes say much of what a perturbation does, never all: some genes answer to one target alone. For
    the training conditions c both the method's mean and the measured one are known. Gene by gene their
    difference is taken for a common error, effects of targets, which add up in combinations, and noise:

    .. math::
        \bar x_{cg} - \hat x_{cg} = b_g + \sum_p u_{cp}\, \delta_{pg} + \epsilon_{cg}, \qquad
            \delta_{pg} \sim \mathrm{Normal}(0, \tau_g^2), \qquad
            \epsilon_{cg} \sim \mathrm{Normal}\left(0, s_g^2 / n_c\right)

    s² is the variance of a gene within conditions and n the cells of a condition. b has a flat prior, τ/s a
    log-uniform one with an atom at zero, and both are integrated out: the less a gene's differences exceed
    their noise, the more is shrunk away. What a target does to its own gene says nothing of other targets, so
    it is left as measured, where the target was measured alone. A prediction adds b + Σ u δ; a target
    that no training cell carries has δ = 0.

    What δ cannot know: an effect that the double's other target suppresses. It is added all the same.

    Cells of counts are scaled gene by gene to the corrected mean, so that zeros stay zeros and no mean is
    negative; normalised values, whose zero may mean anything, are moved.

    Args:
        method: The method. It has to predict the training conditions as well.
        screen: The screen.
        rows: Its training cells.

    Raises:
        DataError: ``rows`` hold no perturbed condition of two cells or more.

    Source: random effects and their best linear unbiased prediction, Henderson, Biometrics 1975.
    """

    def __init__(self, method: Predictor, screen: Screen, rows: NDArray[np.int64]):
        self.method, self.name = method, f"{method.name}{RESIDUALS}"
        self.spec, self.is_counts = screen.describe(), screen.is_counts
        self.seen_rows = np.union1d(rows, getattr(method, "seen_rows", rows))
        found = moments(screen, rows)
        (seen,) = np.nonzero(found.cells_c > 1)
        names = [screen.conditions[c] for c in seen]
        if not any(seen > 0):
            raise DataError(
                "residuals need perturbed conditions of two training cells or more, found none; pass the "
                "rows that the method was trained on."
            )
        cells_c, u_cp = found.cells_c[seen], self.spec.design(names).astype(np.float64)
        spread_g = (cells_c - 1) @ found.variance_cg[seen]
        noise_g = np.maximum(spread_g / (cells_c - 1).sum(), _LEAST_VARIANCE)
        left_cg = found.mean_cg[seen] - method.predict(names)
        own_pg = self._own(names, left_cg, screen.genes)
        self.common_g, effect_pg = random_effects(left_cg - u_cp @ own_pg, noise_g, cells_c, u_cp)
        self.effect_pg = own_pg + effect_pg

    def _own(
        self, names: Sequence[str], left_cg: NDArray[np.float64], genes: Sequence[str]
    ) -> NDArray[np.float64]:
        """What is left of the effects of targets on their own genes, beyond what is left of control."""
        own_pg = np.zeros((len(self.spec.targets), left_cg.shape[1]))
        at, of_gene = {name: c for c, name in enumerate(names)}, {gene: g for g, gene in enumerate(genes)}
        reference_g = left_cg[0] if self.spec.is_control(names[0]) else np.zeros_like(left_cg[0])
        for p, target in enumerate(self.spec.targets):
            if target in at and target in of_gene:
                g = of_gene[target]
                own_pg[p, g] = left_cg[at[target], g] - reference_g[g]
        return own_pg

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k."""
        return self._corrected(self.method.predict(conditions), conditions)

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """The method's cells with the means of ``predict``, log1p CP10k.

        Raises:
            DataError: The method predicts no cells.
        """
        draw = getattr(self.method, "cells", None)
        if draw is None:
            raise DataError(f"{self.method.name} predicts means alone, so it has no cells to correct.")
        drawn = draw(conditions, n_cells, seed)
        means = self.method.predict(conditions)
        return [self.moved(*of) for of in zip(drawn, means, conditions, strict=True)]

    def moved(
        self, x_ng: NDArray[np.float64], mean_g: NDArray[np.float64], condition: str
    ) -> NDArray[np.float64]:
        """Cells that the method drew of a condition, moved from the method's mean to the corrected one."""
        (target_g,) = self._corrected(mean_g[None], [condition])
        if not self.is_counts:
            return x_ng + (target_g - mean_g)
        ratio_g = np.ones_like(mean_g)
        np.divide(target_g, mean_g, out=ratio_g, where=mean_g > 0)
        return x_ng * ratio_g

    def _corrected(self, mean_cg: NDArray[np.float64], conditions: Sequence[str]) -> NDArray[np.float64]:
        corrected_cg = mean_cg + self.common_g + self.spec.design(conditions) @ self.effect_pg
        return np.maximum(corrected_cg, 0.0) if self.is_counts else corrected_cg


def random_effects(
    y_cg: NDArray[np.float64],
    noise_g: NDArray[np.float64],
    cells_c: NDArray[np.int64],
    u_cp: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """An intercept and random effects of targets for each gene; their spread is integrated out on a grid.

    Args:
        y_cg: Values to explain.
        noise_g: Variance of their noise, times the cells behind a value.
        cells_c: Cells behind a value.
        u_cp: Design.

    Returns:
        The intercepts, shape (g,), and the posterior means of the effects, shape (p, g).
    """
    share_c = cells_c / cells_c.sum()
    typical_p, typical_g = share_c @ u_cp, share_c @ y_cg
    root_c1 = np.sqrt(cells_c)[:, None]
    left_ck, size_k, axes_kp = np.linalg.svd(root_c1 * (u_cp - typical_p), full_matrices=False)
    seen_kg = left_ck.T @ (root_c1 * (y_cg - typical_g)) / np.sqrt(noise_g)
    fit_rg, effect_rkg = [], []
    for ratio in SPREADS:
        spread_k1 = (1 + ratio * size_k**2)[:, None]
        fit_rg.append(-0.5 * (np.log(spread_k1) + seen_kg**2 / spread_k1).sum(0))
        effect_rkg.append((ratio * size_k)[:, None] / spread_k1 * seen_kg)
    weight_rg = softmax(np.array(fit_rg), axis=0)
    effect_kg = np.einsum("rg,rkg->kg", weight_rg, np.array(effect_rkg)) * np.sqrt(noise_g)
    effect_pg = axes_kp.T @ effect_kg
    return typical_g - typical_p @ effect_pg, effect_pg
