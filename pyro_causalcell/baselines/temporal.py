"""Predictions over time: what a predictor is, and the simple ones that must always be beaten.

Cells of snapshots are not paired. All times are in the units of the screen's time column.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, Self, runtime_checkable

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from sklearn.linear_model import MultiTaskElasticNet, Ridge
from sklearn.model_selection import GridSearchCV, GroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from pyro_causalcell.baselines.means import draw_cells, group_moments, resampled_residuals
from pyro_causalcell.data import Screen
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError, PredictionError

__all__ = [
    "AdditiveInTime",
    "DuplicateInTime",
    "LinearInTime",
    "MeanAtTime",
    "NoChange",
    "RegressionInTime",
    "Snapshots",
    "TargetFeatures",
    "TimeBaseline",
    "TimeCellPredictor",
    "TimeMatchedControl",
    "TimePredictor",
    "alone",
    "line_weights",
    "require_after",
    "require_course",
    "snapshots",
]

Floats = NDArray[np.float64]
Rows = NDArray[np.int64]

_RIDGES = np.logspace(-2, 4, 13)
_SHRINKAGES = np.geomspace(1.0, 1e-2, 7)  # shares of the penalty that closes every coefficient
_L1_RATIO = 0.5
_FOLDS = 5


@runtime_checkable
class TimePredictor(Protocol):
    """Anything that predicts the mean expression of conditions at times."""

    @property
    def name(self) -> str:
        """What tables and figures call it."""
        ...

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> Floats:
        """Mean expression of each condition at each time in log1p CP10k, shape (c, t, g)."""
        ...


@runtime_checkable
class TimeCellPredictor(TimePredictor, Protocol):
    """A predictor of cells over time, which distribution metrics can score."""

    def cells(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[Floats]]:
        """At most ``n_cells`` cells [n, g] in log1p CP10k: one list per condition, one array per time."""
        ...


# ---------------------------------------------------------------- what the cells say


@dataclass(frozen=True)
class Snapshots:
    """Cells reduced to the mean of each condition at each time, in log1p CP10k.

    Attributes:
        screen: The screen.
        rows: The cells, rising.
        times: Times with cells, rising.
        mean_ctg: Over all ``screen.conditions``; NaN where a condition has no cell at a time.
        variance_ctg: Unbiased; NaN for fewer than two cells.
        cells_ct: Number of cells.
    """

    screen: Screen
    rows: Rows
    times: Floats
    mean_ctg: Floats
    variance_ctg: Floats
    cells_ct: NDArray[np.int64]

    @property
    def perturbed(self) -> list[int]:
        """Indices of the perturbed conditions that have cells."""
        return [int(c) for c in np.flatnonzero(self.cells_ct.sum(1)) if c > 0]

    @property
    def has_control(self) -> bool:
        """Whether there are control cells."""
        return bool(self.cells_ct[0].any())

    def find(self, condition: str) -> int | None:
        """Index of a condition; None for a perturbed one without cells here.

        Raises:
            DataError: It names an unknown target.
        """
        self.screen.design([condition])
        name = self.screen.canonical(condition)
        if name not in self.screen.conditions:
            return None
        c = self.screen.conditions.index(name)
        return c if c == 0 or self.cells_ct[c].any() else None

    def course(self, conditions: Sequence[int]) -> tuple[Floats, Floats]:
        """Times at which some conditions together have cells, and the mean of these cells, (t, g).

        Raises:
            DataError: There are none.
        """
        cells_ct = self.cells_ct[list(conditions)]
        there_t = cells_ct.sum(0) > 0
        if not there_t.any():
            names = [self.screen.conditions[c] for c in conditions] or "perturbed conditions"
            raise DataError(f"expected training cells of {names}, found none; keep some in training.")
        sum_tg = (cells_ct[..., None] * np.nan_to_num(self.mean_ctg[list(conditions)])).sum(0)
        return self.times[there_t], sum_tg[there_t] / cells_ct.sum(0)[there_t, None]

    def at(self, conditions: Sequence[int], times: Sequence[float]) -> Floats:
        """Mean of some conditions' cells, on straight lines through their snapshots (``line_weights``)."""
        known, mean_tg = self.course(conditions)
        return line_weights(known, times) @ mean_tg

    def cells(self, condition: int, time: int) -> Rows:
        """Rows of one condition at ``times[time]``."""
        assert self.screen.time_n is not None
        here_n = self.screen.time_n[self.rows] == np.float32(self.times[time])
        return self.rows[here_n & (self.screen.condition_n[self.rows] == condition)]


def snapshots(screen: Screen, rows: Rows) -> Snapshots:
    """Reduce cells to the mean of each condition at each time.

    Args:
        screen: A screen with ``time=``.
        rows: Cells, for example those of training.

    Raises:
        DataError: The screen has no times, ``rows`` is empty, or a cell has an unknown condition.
    """
    if screen.time_n is None:
        raise DataError("predictions over time need the time of each cell; pass time= to Screen")
    rows = np.sort(np.asarray(rows, dtype=np.int64))
    if not len(rows) or (screen.condition_n[rows] < 0).any():
        raise DataError(
            f"expected cells of known conditions, found {len(rows)} rows with "
            f"{int((screen.condition_n[rows] < 0).sum())} unknown; pass rows of the fitted screen."
        )
    times, time_n = np.unique(screen.time_n[rows], return_inverse=True)
    shape = (len(screen.conditions), len(times))
    group_n = screen.condition_n[rows] * len(times) + time_n
    found = group_moments(screen, rows, group_n, shape[0] * shape[1])
    return Snapshots(
        screen,
        rows,
        times.astype(str).astype(np.float64),  # 0.1 stays 0.1
        found.mean_cg.reshape(*shape, -1),
        found.variance_cg.reshape(*shape, -1),
        found.cells_c.reshape(shape),
    )


def line_weights(known: Floats, times: Sequence[float]) -> Floats:
    """Weights of known points for values at times, on straight lines from point to point.

    Before the first and after the last point the nearest line goes on; a single point holds for all times.

    Args:
        known: Times of the points, rising, shape (s,).
        times: Times asked for, shape (t,).

    Returns:
        Shape (t, s), each row with sum 1.
    """
    asked = np.asarray(times, dtype=np.float64)
    weight_ts = np.zeros((len(asked), len(known)))
    if len(known) == 1:
        return weight_ts + 1.0
    left_t = np.clip(np.searchsorted(known, asked, side="right") - 1, 0, len(known) - 2)
    share_t = (asked - known[left_t]) / (known[left_t + 1] - known[left_t])
    row_t = np.arange(len(asked))
    weight_ts[row_t, left_t] = 1 - share_t
    weight_ts[row_t, left_t + 1] = share_t
    return weight_ts


def require_course(means: Snapshots, onset: float, name: str) -> None:
    """Checks that training cells show a course that starts at the onset.

    Raises:
        DataError: There are no control cells, fewer than two times, or a snapshot lies before the onset.
    """
    if not means.has_control or len(means.times) < 2:
        raise DataError(
            f"{name} needs control cells and two training times, found {int(means.cells_ct[0].sum())} "
            f"control cells and the times {means.times.tolist()}; keep more in training."
        )
    require_after(means.times, onset, name)


def require_after(times: Sequence[float] | Floats, onset: float, name: str) -> None:
    """Checks that no time lies before the onset.

    Raises:
        DataError: One does.
    """
    if min(times) < onset:
        raise DataError(f"{name} starts at onset={onset}, found the time {min(times)} before it; pass onset=")


@contextmanager
def alone(seed: int) -> Iterator[None]:
    """Gives torch random draws of its own and one thread: networks this small lose time with more."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class TargetFeatures:
    """Numbers that describe a condition: of its targets, summed. Control is zeros.

    Without a table each target has its own column. With one they are its columns, standardised over the
    targets with training cells, and first the number of targets.

    Args:
        screen: The screen.
        rows: Training cells.
        embedding: Table with one row per target (index: target names); None for one column per target.

    Raises:
        DataError: A target has no row, or a value is not finite.
    """

    def __init__(self, screen: Screen, rows: Rows, embedding: pd.DataFrame | None = None):
        self.screen = screen
        seen = np.unique(screen.condition_n[rows])
        self.seen_p = (screen.design([screen.conditions[c] for c in seen]) != 0).any(0)
        self.one_hot = embedding is None
        self.table_pe = np.eye(len(screen.targets)) if embedding is None else self._standardised(embedding)

    @property
    def n_features(self) -> int:
        """Number of columns."""
        return int(self.table_pe.shape[1])

    def __call__(self, conditions: Sequence[str]) -> Floats:
        """Features of conditions, shape (c, e)."""
        features_ce: Floats = self.screen.design(conditions).astype(np.float64) @ self.table_pe
        return features_ce

    def require_known(self, conditions: Sequence[str], name: str) -> None:
        """Checks that there is something to tell these conditions by.

        Raises:
            PredictionError: There is no table, and a target has no training cell.
        """
        u_cp = self.screen.design(conditions) != 0
        unseen = [t for t, new in zip(self.screen.targets, u_cp.any(0) & ~self.seen_p, strict=True) if new]
        if self.one_hot and unseen:
            raise PredictionError(
                f"{name} was trained without cells of {shown(unseen)} and knows nothing of them; pass "
                "embedding= (a table with one row per target)."
            )

    def _standardised(self, embedding: pd.DataFrame) -> Floats:
        missing = [target for target in self.screen.targets if target not in embedding.index]
        if missing:
            raise DataError(
                f"expected a row of embeddings for each target, found none for {len(missing)}: "
                f"{shown(missing)}; the index must hold target names"
            )
        table_pe = embedding.loc[self.screen.targets].to_numpy(dtype=np.float64)
        if not np.isfinite(table_pe).all():
            raise DataError("expected finite embeddings, found NaN or infinity; fill them")
        if self.seen_p.any():
            spread_e = table_pe[self.seen_p].std(0)
            table_pe = (table_pe - table_pe[self.seen_p].mean(0)) / np.where(spread_e > 0, spread_e, 1.0)
        return np.column_stack([np.ones(len(table_pe)), table_pe])


# ---------------------------------------------------------------- means of means


class TimeBaseline(ABC):
    """Predicts the mean of a condition at a time from the means of training snapshots alone.

    To add one, subclass it, give it a ``name`` and write ``_course``.

    Args:
        means: Means of the training cells (``snapshots``); ``fit`` computes them.

    Raises:
        DataError: The baseline needs control cells, and there were none to train on.
    """

    name: str
    needs_control: ClassVar[bool] = False

    def __init__(self, means: Snapshots):
        self.means = means
        if self.needs_control and not means.has_control:
            raise DataError(f"the {self.name} needs control cells, and the training rows hold none.")

    @classmethod
    def fit(cls, screen: Screen, rows: Rows) -> Self:
        """Fit on the training cells ``rows`` of ``screen``."""
        return cls(snapshots(screen, rows))

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> Floats:
        """Mean expression of each condition at each time, shape (c, t, g), in log1p CP10k.

        Raises:
            DataError: A condition names an unknown target, or the training cells hold nothing to predict it
                from.
        """
        return np.stack([self._course(name, times) for name in conditions])

    def cells(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[Floats]]:
        """Predicted means with the spread of the control cells of the nearest training time.

        Without control cells, with that of the perturbed cells.
        """
        means = self.means
        lenders = [0] if means.has_control else means.perturbed
        known, mean_sg = means.course(lenders)
        lent = []
        for nearest in np.abs(np.asarray(times)[:, None] - known).argmin(1):
            s = int(np.flatnonzero(means.times == known[nearest])[0])
            rows = np.concatenate([means.cells(c, s) for c in lenders])
            lent.append(resampled_residuals(means.screen, rows, mean_sg[nearest], n_cells, seed))
        mean_ctg = self.predict(conditions, times)
        return [[mean_g + x_ng for mean_g, x_ng in zip(m_tg, lent, strict=True)] for m_tg in mean_ctg]

    @abstractmethod
    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        """Mean expression of one condition at each time, (t, g)."""


class NoChange(TimeBaseline):
    """Nothing happens any more: the condition's last training snapshot up to that time.

    Before its first snapshot, the first. A condition without training cells is taken for control.
    """

    name = "no change"

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        c = self.means.find(condition)
        known, mean_tg = self.means.course([0 if c is None else c])
        last_t = np.searchsorted(known, np.asarray(times, dtype=np.float64), side="right") - 1
        return np.asarray(mean_tg[np.maximum(last_t, 0)])


class TimeMatchedControl(TimeBaseline):
    """The perturbation does nothing: the mean of control cells at that time, on lines between snapshots."""

    name = "time-matched control"
    needs_control = True

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        self.means.find(condition)
        return self.means.at([0], times)


class MeanAtTime(TimeBaseline):
    """All perturbations do the same: the mean of perturbed training cells at that time, on lines between."""

    name = "time-matched mean"

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        return self.means.at([0] if self.means.find(condition) == 0 else self.means.perturbed, times)


class LinearInTime(TimeBaseline):
    """Straight lines between the means of a condition's snapshots; the last line goes on beyond them.

    A condition without training cells is taken for the mean of the perturbed cells.
    """

    name = "linear in time"

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        c = self.means.find(condition)
        return self.means.at(self.means.perturbed if c is None else [c], times)


class AdditiveInTime(TimeBaseline):
    """An effect of the condition and an effect of the time, by least squares on the table of means.

    mean[c, t] = a[c] + b[t] over the pairs with training cells. Between and beyond the training times b goes
    on along straight lines. A condition without training cells has the mean effect of the perturbed ones.

    Args:
        means: Means of the training cells.
        counts: Add counts per 10,000 in place of their log1p.
    """

    def __init__(self, means: Snapshots, counts: bool = False):
        self.name = "additive in time, counts" if counts else "additive in time"
        super().__init__(means)
        self.counts = counts
        seen_c, seen_t = np.nonzero(means.cells_ct)
        n_c, n_t = means.cells_ct.shape
        design = np.zeros((len(seen_c), n_c + n_t))
        design[np.arange(len(seen_c)), seen_c] = design[np.arange(len(seen_c)), n_c + seen_t] = 1.0
        mean_ng = means.mean_ctg[seen_c, seen_t]
        # The shortest solution: conditions and times share one free constant, which cancels in every sum.
        effect_g = np.linalg.lstsq(design, np.expm1(mean_ng) if counts else mean_ng, rcond=None)[0]
        self.condition_cg, self.time_tg = effect_g[:n_c], effect_g[n_c:]

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        c = self.means.find(condition)
        if c is None and not self.means.perturbed:
            raise DataError(f"the {self.name} knows no perturbed cells to predict {condition!r} from.")
        effect_g = self.condition_cg[self.means.perturbed if c is None else [c]].mean(0)
        sum_tg = effect_g + line_weights(self.means.times, times) @ self.time_tg
        return np.log1p(np.maximum(sum_tg, 0.0)) if self.counts else sum_tg


class RegressionInTime(TimeBaseline):
    """Linear regression of effects on what describes the targets, time, and their products.

    The effect of a condition against control at the same time is linear in [e, t, e t], with e the features
    of the condition (:class:`TargetFeatures`). Control is added back. The penalty is chosen by cross-
    validation within the training cells: over conditions with an embedding, over times without one.

    Args:
        means: Means of the training cells.
        kind: ``"ridge"``, or ``"elastic net"`` with one set of coefficients for all genes.
        embedding: Table with one row per target, as from scGPT or UCE; None for one column per target, where
            an unseen target gets what all perturbations share.
        name: What tables and figures call it.

    Raises:
        DataError: There are no control cells, or fewer than two conditions (with an embedding) or times
            (without) to choose the penalty by, or the table does not fit (:class:`TargetFeatures`).
    """

    needs_control = True

    def __init__(
        self,
        means: Snapshots,
        kind: Literal["ridge", "elastic net"] = "ridge",
        embedding: pd.DataFrame | None = None,
        name: str | None = None,
    ):
        self.name = f"{kind} in time" if name is None else name
        super().__init__(means)
        self.features = TargetFeatures(means.screen, means.rows, embedding)
        seen_c, seen_t = np.nonzero(means.cells_ct)
        seen_c, seen_t = seen_c[seen_c > 0], seen_t[seen_c > 0]
        group_n = seen_t if embedding is None else seen_c
        n_groups = len(set(group_n.tolist()))
        if n_groups < 2:
            what = "training times" if embedding is None else "perturbed training conditions"
            raise DataError(
                f"the {self.name} needs two {what}, found {n_groups}; take the time-matched mean."
            )
        names = [means.screen.conditions[c] for c in seen_c]
        x_nf = self._inputs(names, means.times[seen_t])
        effect_ng = means.mean_ctg[seen_c, seen_t] - means.at([0], means.times[seen_t].tolist())
        self.regression = _tuned(kind, x_nf, effect_ng, group_n)

    def _inputs(self, conditions: Sequence[str], time_n: Floats) -> Floats:
        e_nf, t_n1 = self.features(conditions), np.asarray(time_n, dtype=np.float64)[:, None]
        return np.column_stack([e_nf, t_n1, e_nf * t_n1])

    def _course(self, condition: str, times: Sequence[float]) -> Floats:
        control_tg = self.means.at([0], times)
        if self.means.find(condition) == 0:
            return control_tg
        x_tf = self._inputs([condition] * len(times), np.asarray(times))
        return np.asarray(control_tg + self.regression.predict(x_tf))


def _tuned(kind: str, x_nf: Floats, effect_ng: Floats, group_n: NDArray[Any]) -> Any:
    """A fitted regression on standardised inputs, its penalty by grouped cross-validation."""
    if kind == "ridge":
        penalties, regression = _RIDGES, Ridge()
    else:
        scaled_nf = StandardScaler().fit_transform(x_nf)
        covariance_fg = scaled_nf.T @ (effect_ng - effect_ng.mean(0)) / len(x_nf)
        closed = max(float(np.linalg.norm(covariance_fg, axis=1).max()) / _L1_RATIO, 1e-9)
        penalties = closed * _SHRINKAGES
        regression = MultiTaskElasticNet(l1_ratio=_L1_RATIO, max_iter=20_000, tol=1e-3)
    folds = GroupKFold(min(_FOLDS, len(set(group_n.tolist()))))
    model = make_pipeline(StandardScaler(), regression)
    grid = {f"{model.steps[-1][0]}__alpha": penalties}
    search = GridSearchCV(model, grid, scoring="neg_mean_squared_error", cv=folds)
    return search.fit(x_nf, effect_ng, groups=group_n).best_estimator_


class DuplicateInTime:
    """What repeating the experiment would score: other cells of the same conditions and times.

    Args:
        means: Means of the cells that predict (``snapshots``); none of the cells that are scored.
    """

    name = "technical duplicate"

    def __init__(self, means: Snapshots):
        self.means = means

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> Floats:
        """Mean of the cells of each condition at each time, shape (c, t, g); NaN where there are none."""
        mean_ctg = np.full((len(conditions), len(times), self.means.screen.n_genes), np.nan)
        for i, j, c, t in self._found(conditions, times):
            mean_ctg[i, j] = self.means.mean_ctg[c, t]
        return mean_ctg

    def cells(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[Floats]]:
        """At most ``n_cells`` of the cells of each condition at each time."""
        screen = self.means.screen
        drawn = [[np.empty((0, screen.n_genes)) for _ in times] for _ in conditions]
        for i, j, c, t in self._found(conditions, times):
            drawn[i][j] = draw_cells(screen, self.means.cells(c, t), n_cells, seed)
        return drawn

    def _found(self, conditions: Sequence[str], times: Sequence[float]) -> list[tuple[int, int, int, int]]:
        """Places of the asked pairs, and of the same pairs among the means."""
        known = self.means.times.astype(np.float32).tolist()
        place = {time: t for t, time in enumerate(known)}
        found = []
        for i, name in enumerate(conditions):
            c = self.means.find(name)
            for j, time in enumerate(np.asarray(times, dtype=np.float32).tolist()):
                if c is not None and time in place:
                    found.append((i, j, c, place[time]))
        return found
