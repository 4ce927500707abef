"""Trained models and known truth as predictors."""

from collections.abc import Sequence

import anndata as ad
import numpy as np
from numpy.typing import NDArray

from pyro_causalcell.baselines.means import log_cp10k
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import predict

__all__ = ["ModelPredictor", "Oracle", "TimeModelPredictor", "log_expression"]


class ModelPredictor:
    """A trained fit as a predictor: the mean of cells drawn from its posterior predictive.

    Args:
        fit: The fit.
        name: What tables and figures call it.
        n_cells: Cells drawn for a mean. Their noise should not count beside that of the held-out cells.
        seed: Seed of the draws.
        basal: Control cells that predicted cells start from (``predict(basal=)``); None draws latents from
            the prior. A model whose encoder was trained on control cells alone needs them.

    Attributes:
        seen_rows: Rows that the fit has looked at, in training or to know when to stop.
    """

    def __init__(
        self,
        fit: Fit,
        name: str = "model",
        n_cells: int = 2000,
        seed: int = 0,
        basal: Screen | None = None,
    ):
        self.fit, self.name, self.n_cells, self.seed, self.basal = fit, name, n_cells, seed, basal
        self.seen_rows = np.union1d(fit.split.train, fit.split.validation)

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k."""
        # One condition at a time: the cells of all of them may not fit in memory.
        return np.stack([self._drawn(name, self.n_cells, self.seed).mean(0) for name in conditions])

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """Cells of each condition, drawn from the posterior predictive."""
        return [self._drawn(name, n_cells, seed) for name in conditions]

    def _drawn(self, condition: str, n_cells: int, seed: int) -> NDArray[np.float64]:
        return log_expression(
            self.fit, predict(self.fit, [condition], n_cells=n_cells, basal=self.basal, seed=seed)
        )


class TimeModelPredictor:
    """A fit of a model that follows cells over time, as a predictor over time.

    Args:
        fit: The fit.
        name: What tables and figures call it.
        n_cells: Cells drawn for a mean.
        seed: Seed of the draws.
        basal: Cells that set out for a time from the last of their snapshots that is not after it, and lend
            their library sizes; control cells usually. None predicts populations: the past of cells is drawn
            from the condition's own snapshots, their libraries from the training cells around the time.

    Attributes:
        seen_rows: Rows that the fit has looked at, in training or to know when to stop.

    Raises:
        PredictionError: The model does not follow cells over time, or basal cells have no times.
    """

    def __init__(
        self,
        fit: Fit,
        name: str = "model",
        n_cells: int = 2000,
        seed: int = 0,
        basal: Screen | None = None,
    ):
        if "time" not in getattr(fit.model, "needs", set()):
            raise PredictionError(
                "this model does not follow cells over time; fit temporal-scm, or take ModelPredictor"
            )
        if basal is not None and basal.time_n is None:
            raise PredictionError("basal cells need times; open them with Screen.from_spec(fit.screen, ...)")
        self.fit, self.name, self.n_cells, self.seed, self.basal = fit, name, n_cells, seed, basal
        self.seen_rows = np.union1d(fit.split.train, fit.split.validation)

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> NDArray[np.float64]:
        """Mean expression of each condition at each time, shape (c, t, g), in log1p CP10k.

        Raises:
            PredictionError: No basal cell is as early as a time.
        """
        drawn = ((self._drawn(name, time, self.n_cells, self.seed) for time in times) for name in conditions)
        return np.stack([[x_ng.mean(0) for x_ng in of_condition] for of_condition in drawn])

    def cells(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[NDArray[np.float64]]]:
        """Cells drawn from the posterior predictive: one list per condition, one array per time.

        Raises:
            PredictionError: No basal cell is as early as a time.
        """
        return [[self._drawn(name, time, n_cells, seed) for time in times] for name in conditions]

    def _drawn(self, condition: str, time: float, n_cells: int, seed: int) -> NDArray[np.float64]:
        drawn = predict(
            self.fit, [condition], n_cells=n_cells, basal=self._start(time), times=[time], seed=seed
        )
        return log_expression(self.fit, drawn)

    def _start(self, time: float) -> Screen | None:
        """The last snapshot of the basal cells up to a time."""
        if self.basal is None or self.basal.time_n is None:
            return None
        time_n = self.basal.time_n
        before_n = time_n <= np.float32(time)
        if not before_n.any():
            raise PredictionError(
                f"expected basal cells of the time {time:g} or before, found none before {time_n.min():g}; "
                "add earlier ones"
            )
        last_n = before_n & (time_n == time_n[before_n].max())
        return Screen.from_spec(self.fit.screen, self.basal.adata[last_n].copy())


def log_expression(fit: Fit, drawn: ad.AnnData) -> NDArray[np.float64]:
    """Predicted cells in log1p CP10k; normalised values as they are."""
    x_ng = np.asarray(drawn.X, dtype=np.float64)
    if not fit.screen.is_counts:
        return x_ng
    library_given = fit.screen.library is not None
    return log_cp10k(x_ng, drawn.obs["library"].to_numpy() if library_given else x_ng.sum(1))


class Oracle:
    """The true process of a simulation as a predictor: new counts around the true expected ones.

    Nothing is estimated; its error is the noise of the scored cells. No method can be expected to do better
    but by chance.

    Args:
        screen: Simulated counts.
        expected_ng: True expected counts of every cell of the screen, [n, g]
            (``simulate.expected_counts``).
        inverse_dispersion: Draw negative binomial instead of Poisson counts.
        n_draws: New counts drawn for each cell.
        seed: Seed of the draws.

    Raises:
        DataError: The screen holds no counts, or the expected counts are of another shape.
    """

    name = "oracle"

    def __init__(
        self,
        screen: Screen,
        expected_ng: NDArray[np.floating],
        inverse_dispersion: float | None = None,
        n_draws: int = 10,
        seed: int = 0,
    ):
        shape = (screen.n_cells, screen.n_genes)
        if expected_ng.shape != shape or not screen.is_counts:
            raise DataError(
                f"the oracle needs a screen of counts and expected counts of shape {shape}; found "
                f"{'counts' if screen.is_counts else 'normalised values'} and shape {expected_ng.shape}."
            )
        self.screen, self.expected_ng, self.inverse_dispersion = screen, expected_ng, inverse_dispersion
        self.n_draws, self.seed = n_draws, seed

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k.

        Raises:
            DataError: The screen has no cell of a condition.
        """
        rng = np.random.default_rng(self.seed)
        means = []
        for name in conditions:
            rows = self._rows(name)
            means.append(np.mean([self._drawn(rows, rng).mean(0) for _ in range(self.n_draws)], axis=0))
        return np.stack(means)

    def cells(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """New counts of at most ``n_cells`` cells of each condition."""
        rng = np.random.default_rng(seed)
        return [self._drawn(rng.permutation(self._rows(name))[:n_cells], rng) for name in conditions]

    def _rows(self, condition: str) -> NDArray[np.int64]:
        name = self.screen.canonical(condition)
        if name not in self.screen.conditions:
            raise DataError(f"the simulation has no cells of {condition!r}; leave it out.")
        return np.flatnonzero(self.screen.condition_n == self.screen.conditions.index(name))

    def _drawn(self, rows: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.float64]:
        rate_ng = self.expected_ng[rows]
        if self.inverse_dispersion is not None:
            rate_ng = rate_ng * rng.gamma(self.inverse_dispersion, 1 / self.inverse_dispersion, rate_ng.shape)
        x_ng = rng.poisson(rate_ng).astype(np.float64)
        library_n = x_ng.sum(1) if self.screen.describe().library is None else self.screen.library_n[rows]
        return log_cp10k(x_ng, library_n)
