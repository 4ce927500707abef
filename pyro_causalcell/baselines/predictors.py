"""The predictors that a model must beat before its predictions mean anything."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from pyro_causalcell.baselines.means import TrainingMeans, training_means
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

__all__ = ["Additive", "Baseline", "ControlMean", "MatchingMean", "PerturbedMean", "fit_baselines"]


class Baseline(ABC):
    """Predicts the mean expression of a condition from means of the training cells alone.

    To add one, subclass it, give it a ``name`` and write ``_predict``.

    Args:
        means: Means of the training cells; ``Baseline.fit`` computes them.

    Raises:
        DataError: The baseline needs control cells, and there were none to train on.
    """

    name: ClassVar[str]
    needs_control: ClassVar[bool] = False

    def __init__(self, means: TrainingMeans):
        self.means = means
        if self.needs_control:
            _ = self.control_g  # told now, not at the first prediction

    @property
    def control_g(self) -> NDArray[np.float64]:
        """Mean of the control cells.

        Raises:
            DataError: There were none to train on.
        """
        if self.means.control_g is None:
            raise DataError(
                f"the {self.name} needs control cells for this, and the training rows hold 0 control cells; "
                "take a baseline without needs_control, for perturbed conditions only."
            )
        return self.means.control_g

    @classmethod
    def fit(cls, screen: Screen, rows: NDArray[np.int64]) -> Self:
        """Fit on the training cells ``rows`` of ``screen``."""
        return cls(training_means(screen, rows))

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k.

        Raises:
            DataError: A condition names a target the screen does not know, or is control, and there were no
                control cells to train on.
        """
        u_cp = self.means.spec.design(conditions)
        targets = np.array(self.means.spec.targets, dtype=object)
        return np.stack([self._predict(list(targets[u_p != 0])) for u_p in u_cp])

    @abstractmethod
    def _predict(self, targets: list[str]) -> NDArray[np.float64]:
        """Mean expression under these targets together; an empty list is control."""


class ControlMean(Baseline):
    """Nothing changes: the mean of the control cells."""

    name = "control mean"
    needs_control = True

    def _predict(self, targets: list[str]) -> NDArray[np.float64]:
        return self.control_g


class PerturbedMean(Baseline):
    """All perturbations do the same: the mean of all perturbed cells."""

    name = "perturbed mean"

    def _predict(self, targets: list[str]) -> NDArray[np.float64]:
        return self.means.perturbed_g if targets else self.control_g


class MatchingMean(Baseline):
    """The mean over the components, each perturbed alone; the perturbed mean stands in for an unseen one."""

    name = "matching mean"

    def _predict(self, targets: list[str]) -> NDArray[np.float64]:
        if not targets:
            return self.control_g
        return np.mean([self.means.singles.get(t, self.means.perturbed_g) for t in targets], axis=0)


class Additive(Baseline):
    """Control plus the effects of the components; an unseen one has the effect of the perturbed mean.

    Source: Ahlmann-Eltze, Huber and Anders, Nature Methods 2025.
    """

    name = "additive"
    needs_control = True

    def _predict(self, targets: list[str]) -> NDArray[np.float64]:
        control_g = self.control_g
        effects = [self.means.singles.get(t, self.means.perturbed_g) - control_g for t in targets]
        return control_g + np.sum(effects, axis=0) if effects else control_g


def fit_baselines(screen: Screen, rows: NDArray[np.int64]) -> dict[str, Baseline]:
    """Every baseline by name, all fitted on one pass over the training cells.

    Without control cells among ``rows``, the control mean and the additive baseline are left out.
    """
    means = training_means(screen, rows)
    kinds: list[type[Baseline]] = [ControlMean, PerturbedMean, MatchingMean, Additive]
    has_control = means.control_g is not None
    return {kind.name: kind(means) for kind in kinds if has_control or not kind.needs_control}
