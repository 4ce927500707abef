"""The predictors that a model must beat before its predictions mean anything."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from pyro_causalcell.baselines.means import (
    TrainingMeans,
    draw_cells,
    expression,
    resampled_residuals,
    training_means,
)
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

__all__ = [
    "Additive",
    "Baseline",
    "CellPredictor",
    "ControlMean",
    "MatchingMean",
    "PerturbedMean",
    "Predictor",
    "TimeMatchedMean",
    "baselines_of",
    "fit_baselines",
]


@runtime_checkable
class Predictor(Protocol):
    """Anything that predicts the mean expression of conditions."""

    @property
    def name(self) -> str:
        """What tables and figures call it."""
        ...

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition in log1p CP10k, shape (c, g)."""
        ...


@runtime_checkable
class CellPredictor(Predictor, Protocol):
    """A predictor of cells, which distribution metrics can score."""

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """At most ``n_cells`` cells of each condition in log1p CP10k, each of shape (n, g)."""
        ...


class Baseline(ABC):
    """Predicts the mean expression of a condition from means of the training cells alone.

    To add one, subclass it, give it a ``name`` and write ``_predict``.

    Args:
        means: Means of the training cells; ``Baseline.fit`` computes them.

    Raises:
        DataError: The baseline needs control cells, and there were none to train on.
    """

    name: str
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

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """Predicted means with the spread of control cells: what sets training control cells off their mean.

        Without control cells, that of perturbed cells. The same draws, with replacement, lend it to every
        condition.
        """
        screen, rows = self.means.screen, self.means.rows
        control_g, perturbed_g = self.means.control_g, self.means.perturbed_g
        has_control = control_g is not None
        lenders = rows[(screen.condition_n[rows] == 0) == has_control]
        own_g = perturbed_g if control_g is None else control_g
        residual_ng = resampled_residuals(screen, lenders, own_g, n_cells, seed)
        return [mean_g + residual_ng for mean_g in self.predict(conditions)]

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

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """Perturbed cells drawn from the training cells, the same ones for every condition."""
        screen, rows = self.means.screen, self.means.rows
        drawn = draw_cells(screen, rows[screen.condition_n[rows] > 0], n_cells, seed)
        return [drawn] * len(conditions)


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


class TimeMatchedMean:
    """All perturbations do the same at one time: perturbed training cells of the times of the asked cells.

    Which times a condition was measured at is part of the design, so the held-out cells may tell it. A time
    without perturbed training cells takes the nearest time that has some.

    Args:
        screen: A screen with ``time=``.
        train: Training cells.
        asked: Cells to be predicted; their times are used, their expression is not.

    Raises:
        DataError: The screen has no times, or ``train`` holds no perturbed cell.
    """

    name = "time-matched mean"

    def __init__(self, screen: Screen, train: NDArray[np.int64], asked: NDArray[np.int64]):
        if screen.time_n is None:
            raise DataError("the time-matched mean needs the time of each cell; pass time= to Screen")
        perturbed = train[screen.condition_n[train] > 0]
        if not len(perturbed):
            raise DataError(f"the time-matched mean needs perturbed cells; the {len(train)} rows hold none.")
        self.screen, self.asked = screen, np.asarray(asked, dtype=np.int64)
        self.times = np.unique(screen.time_n[perturbed])
        self.mean_tg = np.stack(
            [expression(screen, perturbed[screen.time_n[perturbed] == time]).mean(0) for time in self.times]
        )

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k.

        Raises:
            DataError: None of the asked cells has this condition.
        """
        assert self.screen.time_n is not None
        means = []
        for name in conditions:
            found = self.screen.canonical(name)
            known = self.screen.conditions
            code = known.index(found) if found in known else len(known)
            time_n = self.screen.time_n[self.asked[self.screen.condition_n[self.asked] == code]]
            if not len(time_n):
                raise DataError(f"no asked cells of {name!r}, so its times are unknown; leave it out.")
            nearest_n = np.abs(time_n[:, None] - self.times).argmin(1)
            means.append(self.mean_tg[nearest_n].mean(0))
        return np.stack(means)


def fit_baselines(screen: Screen, rows: NDArray[np.int64]) -> dict[str, Baseline]:
    """The baselines that are means of means, by name, all fitted on one pass over the training cells.

    Without control cells among ``rows``, the control mean and the additive baseline are left out.
    """
    return baselines_of(training_means(screen, rows))


def baselines_of(means: TrainingMeans) -> dict[str, Baseline]:
    """As ``fit_baselines``, from means that are there already."""
    kinds: list[type[Baseline]] = [ControlMean, PerturbedMean, MatchingMean, Additive]
    has_control = means.control_g is not None
    return {kind.name: kind(means) for kind in kinds if has_control or not kind.needs_control}
