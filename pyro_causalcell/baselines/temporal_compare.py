"""Methods that predict over time beside the baselines: unseen perturbations and unseen times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pyro_causalcell.baselines.compare import Comparison, check_names, check_unseen, components
from pyro_causalcell.baselines.means import draw_cells, training_means
from pyro_causalcell.baselines.regressions import pca_embedding
from pyro_causalcell.baselines.temporal import (
    AdditiveInTime,
    DuplicateInTime,
    LinearInTime,
    MeanAtTime,
    NoChange,
    RegressionInTime,
    Snapshots,
    TimeBaseline,
    TimeCellPredictor,
    TimeMatchedControl,
    TimePredictor,
    snapshots,
)
from pyro_causalcell.data import Screen, Split
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.distance import distance_scores
from pyro_causalcell.evaluate.response import (
    auprc,
    auprc_over_prevalence,
    auroc,
    de_labels_top_k,
    de_labels_train,
    mae,
    other_genes,
    pearson_of_effects,
    r2_of_effects,
    r2_of_means,
    rmse,
)

__all__ = ["TimeRecipe", "compare_times", "time_references"]

TimeRecipe = Callable[[Screen, NDArray[np.int64], int], TimePredictor]
"""Trains a predictor over time: from the screen, its training rows and a seed."""

Floats = NDArray[np.float64]

_MANY = 20  # held-out cells a condition needs at a time before its mean is worth predicting
_FEWEST = 4  # two for each half
_DE_CELLS = 500
_REGRESSED = 3  # perturbed training conditions that a regression needs


def compare_times(
    screen: Screen,
    methods: Sequence[TimePredictor | TimeRecipe],
    splits: Sequence[Split],
    *,
    seeds: Sequence[int] = (0,),
    min_cells: int = _MANY,
    n_cells: int = 0,
    n_top: int = 100,
) -> Comparison:
    """Score methods and all baselines over time on the same held-out cells.

    The held-out cells of each condition at each time are split in two. All methods are scored on the first
    half; the second half is the technical duplicate. The perturbed genes themselves are not scored.

    Effects are differences from the mean of all control cells of the same time, whether these were held out
    or not; they have no value at a time without control cells, and for control. Changed genes come in two
    readings: ``..._test_top`` takes the genes of largest measured effect in the scored cells, and
    ``..._train_de`` the genes that any training perturbation changes at any time (Welch's t-test against
    control, false discovery rate .05), one set for the whole fold.

    Args:
        screen: A screen with ``time=``.
        methods: Predictors over time, used as they are in every fold, and recipes, trained anew in every
            fold: functions of screen, rows and seed, or classes such as ``RENGE``. The baselines are always
            there.
        splits: Folds: ``make_folds(screen, n_folds=len(screen.targets))`` leaves each perturbation out once,
            ``held_out_times`` snapshots.
        seeds: Seeds of the halves and of the recipes.
        min_cells: Held-out cells a condition needs at a time; pairs with fewer are in ``left_out``.
        n_cells: Cells of a condition at a time, at most, for the E-distance in 50 principal components of
            training cells; 0 leaves it out.
        n_top: Genes of largest effect that count as changed.

    Returns:
        A comparison whose table also has a column time. Its summaries average over times, folds and seeds
        first; their bootstrap is over conditions, and a screen with control cells alone has no intervals.

    Raises:
        DataError: A split holds out no condition with enough cells at a time, a method has seen held-out
            cells, two methods share a name, or a prediction has another shape or is not finite.
    """
    if not splits:
        raise DataError("expected at least one split, found none; pass held_out_times or make_folds.")
    tables, left_out = [], []
    for f, split in enumerate(splits):
        held = snapshots(screen, split.test) if len(split.test) else None
        pairs = [] if held is None else _pairs(held, min_cells)
        if held is None or not pairs:
            raise DataError(
                f"no condition has {max(min_cells, _FEWEST)} held-out cells at a time in {split}."
            )
        left_out += [(f, *few) for few in _few(held, pairs)]
        for seed in seeds:
            own = [_trained(method, screen, split.train, seed) for method in methods]
            for method in own:
                check_unseen(method, split)
            fold = _Fold(screen, split.train, held, pairs, seed, n_cells, n_top)
            tables += [fold.scores(m).assign(fold=f, seed=seed) for m in fold.with_references(own)]
    table = pd.concat(tables, ignore_index=True)
    return Comparison(
        table[["method", "fold", "seed", "condition", "time", "metric", "value"]],
        pd.DataFrame(left_out, columns=["fold", "condition", "time", "cells"]),
        [repr(split) for split in splits],
        list(dict.fromkeys(method.name for method in own)),
    )


def time_references(means: Snapshots) -> list[TimeBaseline]:
    """Every baseline over time that these training cells allow.

    A screen without perturbed training cells has no change and linear in time. Regressions need control
    cells and three perturbed conditions; they run on the principal components of the training cells
    (``pca_embedding``), and on the screen's own embeddings where it has some.
    """
    found: list[TimeBaseline] = [NoChange(means), LinearInTime(means)]
    if not means.perturbed:
        return found
    found += [MeanAtTime(means), AdditiveInTime(means), AdditiveInTime(means, counts=True)]
    if not means.has_control:
        return found
    found.append(TimeMatchedControl(means))
    if len(means.perturbed) < _REGRESSED:
        return found
    screen = means.screen
    table = pca_embedding(training_means(screen, means.rows))
    found += [
        RegressionInTime(means, "ridge", table, "ridge in time, PCA embedding"),
        RegressionInTime(means, "elastic net", table, "elastic net in time, PCA embedding"),
    ]
    if screen.embedding_pe is not None:
        given = pd.DataFrame(screen.embedding_pe, screen.targets)
        found += [
            RegressionInTime(means, "ridge", given, "ridge in time, given embedding"),
            RegressionInTime(means, "elastic net", given, "elastic net in time, given embedding"),
        ]
    return found


def _trained(
    method: TimePredictor | TimeRecipe, screen: Screen, train: NDArray[np.int64], seed: int
) -> TimePredictor:
    """The predictor itself, or what the recipe makes of the training cells."""
    if isinstance(method, TimePredictor) and not isinstance(method, type):  # a class has its methods too
        return method
    return method(screen, train, seed)


def _pairs(held: Snapshots, min_cells: int) -> list[tuple[int, int]]:
    """Indices (condition, time) with enough cells; control only where nothing else is measured."""
    enough_ct = held.cells_ct >= max(min_cells, _FEWEST)
    if enough_ct[1:].any():
        enough_ct[0] = False
    return [(int(c), int(t)) for c, t in np.argwhere(enough_ct)]


def _few(held: Snapshots, pairs: list[tuple[int, int]]) -> list[tuple[str, float, int]]:
    """Condition, time and number of cells of the held-out pairs with too few."""
    few_ct = held.cells_ct > 0
    few_ct[tuple(np.transpose(pairs))] = False
    few_ct[0] = False
    names = held.screen.conditions
    return [(names[c], float(held.times[t]), int(held.cells_ct[c, t])) for c, t in np.argwhere(few_ct)]


@dataclass
class _Fold:
    """The held-out pairs of one fold, and what a method's predictions of them score."""

    screen: Screen
    train: NDArray[np.int64]
    held: Snapshots
    pairs: list[tuple[int, int]]
    seed: int
    n_cells: int
    n_top: int

    def __post_init__(self) -> None:
        self.index_c = sorted({c for c, _ in self.pairs})
        self.index_t = sorted({t for _, t in self.pairs})
        self.conditions = [self.screen.conditions[c] for c in self.index_c]
        self.times = self.held.times[self.index_t].tolist()
        self.place = (
            np.array([self.index_c.index(c) for c, _ in self.pairs]),
            np.array([self.index_t.index(t) for _, t in self.pairs]),
        )
        self.means = snapshots(self.screen, self.train)
        first, second = self._halves()
        self.duplicate = DuplicateInTime(snapshots(self.screen, np.concatenate(second)))
        names = [self.screen.conditions[c] for c, _ in self.pairs]
        self.scored_cg = other_genes(self.screen, names)
        scored = DuplicateInTime(snapshots(self.screen, np.concatenate(first)))
        self.true_cg = scored.predict(self.conditions, self.times)[self.place]
        self.control_cg = self._control()
        self.changed_g = _changed_genes(self.means, self.seed)
        if self.n_cells:
            self.pca = components(self.screen, self.train, self.seed)
            self.cells = [
                self.pca.transform(draw_cells(self.screen, rows, self.n_cells, self.seed)) for rows in first
            ]

    def with_references(self, own: Sequence[TimePredictor]) -> list[TimePredictor]:
        """The methods, every baseline and the duplicate."""
        everything = [*own, *time_references(self.means), self.duplicate]
        check_names([method.name for method in everything])
        return everything

    def scores(self, method: TimePredictor) -> pd.DataFrame:
        """Columns method, condition, time, metric, value."""
        predicted_ctg = method.predict(self.conditions, self.times)
        shape = (len(self.conditions), len(self.times), self.screen.n_genes)
        if predicted_ctg.shape != shape:
            raise DataError(
                f"{method.name} predicts the shape {predicted_ctg.shape}; expected (conditions, times, "
                f"genes) = {shape}."
            )
        predicted_cg = predicted_ctg[self.place]
        if not np.isfinite(predicted_cg).all():
            raise DataError(f"expected finite means, found NaN or infinity in those of {method.name}.")
        values = self._responses(predicted_cg)
        if self.n_cells and isinstance(method, TimeCellPredictor):
            drawn = method.cells(self.conditions, self.times, self.n_cells, self.seed)
            placed = [self.pca.transform(drawn[i][j]) for i, j in zip(*self.place, strict=True)]
            values |= distance_scores(self.cells, placed, ("e_distance",))
        columns = {
            "method": method.name,
            "condition": [self.screen.conditions[c] for c, _ in self.pairs],
            "time": [self.held.times[t] for _, t in self.pairs],
        }
        return pd.concat([pd.DataFrame(columns | {"metric": m, "value": v}) for m, v in values.items()])

    def _responses(self, p: Floats) -> dict[str, Floats]:
        y, scored = self.true_cg, self.scored_cg
        scores = {
            "rmse": rmse(y, p, scored),
            "mae": mae(y, p, scored),
            "r2_means": r2_of_means(y, p, scored),
        }
        if self.control_cg is None:
            return scores
        o = self.control_cg
        defined_c1 = np.isfinite(o).all(1, keepdims=True)
        among = scored & defined_c1
        effect, predicted = np.where(defined_c1, [y - o, p - o], 0.0)
        zero_g = np.zeros(y.shape[1])
        scores["pearson_control"] = pearson_of_effects(effect, predicted, zero_g, among)
        scores["r2_effects"] = r2_of_effects(y, p, o, scored)
        labels = {"test_top": de_labels_top_k(effect, zero_g, among, self.n_top)}
        if self.changed_g is not None:
            labels["train_de"] = among & self.changed_g
            scores["pearson_train_de"] = pearson_of_effects(effect, predicted, zero_g, labels["train_de"])
        size = np.abs(predicted)
        for source, label_cg in labels.items():
            scores[f"auroc_{source}"] = auroc(label_cg, size, scored)
            scores[f"auprc_{source}"] = auprc(label_cg, size, scored)
            scores[f"auprc_lift_{source}"] = auprc_over_prevalence(label_cg, size, scored)
        return scores

    def _halves(self) -> tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]:
        """Rows of each pair to score on, and those of the duplicate."""
        rng = np.random.default_rng(self.seed)
        both = [np.array_split(rng.permutation(self.held.cells(c, t)), 2) for c, t in self.pairs]
        return [half for _, half in both], [half for half, _ in both]

    def _control(self) -> Floats | None:
        """Mean of all control cells at each pair's time, NaN without; None where control is predicted."""
        if self.index_c == [0]:
            return None
        known = snapshots(self.screen, np.union1d(self.train, self.held.rows))
        control_tg = DuplicateInTime(known).predict([self.screen.conditions[0]], self.times)[0]
        return np.asarray(control_tg[self.place[1]])


def _changed_genes(means: Snapshots, seed: int) -> NDArray[np.bool_] | None:
    """Genes that any training perturbation changes at any time; None where no time has both and control."""
    changed = []
    for t in np.flatnonzero(means.cells_ct[0]):
        there = [c for c in means.perturbed if means.cells_ct[c, t]]
        control_ng, *cells = (
            draw_cells(means.screen, means.cells(c, int(t)), _DE_CELLS, seed) for c in [0, *there]
        )
        if cells:
            changed.append(de_labels_train(cells, control_ng, "t").any(0))
    return np.any(changed, axis=0) if changed else None
