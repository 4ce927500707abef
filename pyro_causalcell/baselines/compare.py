"""Methods beside the baselines: folds, seeds, paired differences and calibrated scores."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from pyro_causalcell.baselines.duplicates import InterpolatedDuplicate, TechnicalDuplicate
from pyro_causalcell.baselines.means import (
    Moments,
    TrainingMeans,
    draw_cells,
    halves,
    moments,
    training_means,
)
from pyro_causalcell.baselines.predictors import (
    Baseline,
    CellPredictor,
    Predictor,
    TimeMatchedMean,
    baselines_of,
)
from pyro_causalcell.baselines.regressions import (
    ElasticNetOnTargets,
    RidgeOnEmbeddings,
    pca_embedding,
    random_embedding,
)
from pyro_causalcell.data import (
    Screen,
    Split,
    held_out_combinations,
    held_out_perturbations,
    random_cells,
)
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.distance import DISTANCES, PAIRED, distance_scores
from pyro_causalcell.evaluate.response import (
    METRICS,
    Metric,
    Truth,
    additive_means,
    de_labels_train,
    effect_weights,
    other_genes,
    response_scores,
    t_against_rest,
)

__all__ = [
    "CEILING",
    "CEILINGS",
    "FLOOR",
    "Comparison",
    "MEASURES",
    "OVER_TIME",
    "Recipe",
    "Space",
    "SplitKind",
    "average_conditions",
    "check_names",
    "check_unseen",
    "compare",
    "components",
    "make_folds",
    "measured_truth",
    "references",
    "score_predictors",
]

Recipe = Callable[[Screen, NDArray[np.int64], int], Predictor]
"""Trains a predictor: from the screen, its training rows and a seed."""
SplitKind = Literal["held-out-perturbations", "held-out-combinations", "random"]
CEILING = TechnicalDuplicate.name
"""The method that shows what repeating the experiment would score."""
CEILINGS = (InterpolatedDuplicate.name, CEILING)
"""Methods that see held-out cells, and so are no baselines."""
FLOOR = "perturbed mean"
"""The baseline that calibrated scores start from, if no other is named."""
OVER_TIME = {"pearson_train_de": Metric("Pearson of effects against control, training DE genes", True, 1.0)}
"""Metrics of comparisons over time alone."""
LIKELIHOOD = {"nll": Metric("negative log-likelihood of a cell, nats", False, None)}
"""Of counts, given their total; for methods that have one."""
MEASURES: dict[str, Metric] = METRICS | OVER_TIME | DISTANCES | PAIRED | LIKELIHOOD
"""Every metric a comparison may hold: heading, direction, score of a perfect prediction."""
_MANY = 20  # held-out cells a condition needs before its mean is worth predicting
_FEWEST = 3  # perturbed training conditions that a regression needs
_TEST_SHARE = 0.2
_COMPONENTS = 50  # of the space that distances are measured in
_PCA_CELLS = 5000
_INTERVAL = (0.025, 0.975)


def make_folds(
    screen: Screen, kind: SplitKind = "held-out-perturbations", n_folds: int = 5, seed: int = 0
) -> list[Split]:
    """Splits that together hold out everything once, or repeated random splits.

    Args:
        screen: The screen.
        kind: ``"held-out-perturbations"`` and ``"held-out-combinations"`` deal the targets or combinations
            out to the folds, so that each is held out once. ``"random"`` holds out a fifth of the cells of
            every condition, anew in each fold.
        n_folds: Folds; a single one holds out a fifth of the targets or combinations.
        seed: Seed.

    Raises:
        DataError: There are fewer targets or combinations than folds.
    """
    seeds = range(seed, seed + n_folds)
    if kind == "random":
        return [random_cells(screen, validation=0.0, test=_TEST_SHARE, seed=s) for s in seeds]
    hold_out = held_out_perturbations if kind == "held-out-perturbations" else held_out_combinations
    if n_folds == 1:
        return [hold_out(screen, _TEST_SHARE, seed=seed, validation=0.0)]
    names = screen.targets
    if kind == "held-out-combinations":
        names = [name for name in screen.conditions if len(screen.describe().split(name)) > 1]
    if len(names) < n_folds:
        raise DataError(
            f"expected at least one name per fold, found {len(names)} for {n_folds} folds; ask for fewer."
        )
    dealt = np.array_split(np.random.default_rng(seed).permutation(names), n_folds)
    folds = zip(dealt, seeds, strict=True)
    return [hold_out(screen, sorted(part.tolist()), seed=s, validation=0.0) for part, s in folds]


def compare(
    screen: Screen,
    methods: Sequence[Predictor | Recipe] = (),
    splits: Sequence[Split] | None = None,
    *,
    seeds: Sequence[int] = (0,),
    min_cells: int = _MANY,
    n_cells: int = 0,
) -> "Comparison":
    """Score methods and all baselines on the same held-out cells.

    The held-out cells of each condition are split in two. All methods are scored on the first half; the
    second half is the technical duplicate. The perturbed genes themselves are not scored.

    Args:
        screen: The screen.
        methods: Predictors (``ModelPredictor``, ``PredictionsFile``, your own), used as they are in every
            fold, and recipes, trained anew in every fold. The baselines are always there.
        splits: Folds; ``make_folds(screen)`` if None.
        seeds: Seeds of the halves and of the recipes.
        min_cells: Held-out cells a condition needs; those with fewer are listed in ``left_out``.
        n_cells: Cells of a condition, at most, for the metrics that need cells (see ``score_predictors``);
            0 leaves them out.

    Raises:
        DataError: A split holds out no cells or no condition with enough cells, a fit has seen held-out
            cells, two methods share a name, or a prediction has another shape or is not finite.
    """
    splits = make_folds(screen) if splits is None else splits
    tables, left_out = [], []
    for f, split in enumerate(splits):
        conditions, few = _scored_conditions(screen, split, min_cells)
        left_out += [(f, name, n) for name, n in few.items()]
        for seed in seeds:
            own = [
                method if isinstance(method, Predictor) else method(screen, split.train, seed)
                for method in methods
            ]
            for method in own:
                check_unseen(method, split)
            scores = score_predictors(screen, split.train, split.test, conditions, own, seed, n_cells)
            tables.append(scores.assign(fold=f, seed=seed))
    table = pd.concat(tables, ignore_index=True)
    return Comparison(
        table[["method", "fold", "seed", "condition", "metric", "value"]],
        pd.DataFrame(left_out, columns=["fold", "condition", "cells"]),
        [repr(split) for split in splits],
        list(dict.fromkeys(method.name for method in own)),
    )


def score_predictors(
    screen: Screen,
    train: NDArray[np.int64],
    held_out: NDArray[np.int64],
    conditions: Sequence[str],
    predictors: Sequence[Predictor],
    seed: int = 0,
    n_cells: int = 0,
) -> pd.DataFrame:
    """Score predictors, every baseline and the duplicates on one half of the held-out cells.

    Args:
        screen: The screen.
        train: Rows that the baselines are fitted to.
        held_out: Rows to score on.
        conditions: Conditions to score, each with at least four of these cells.
        predictors: Methods to score beside the baselines; they come first.
        seed: Of the halves, and of the baselines that draw.
        n_cells: Cells of a condition, at most, for the metrics that need cells: genes changed according to
            training cells, and distances of distributions (for methods that predict cells; in 50 principal
            components of training cells). 0 leaves them out.

    Returns:
        A tidy table with columns method, condition, metric, value; metrics are keys of ``MEASURES``. Left
        out are metrics without a value for any method, as those of training cells for unseen conditions, and
        without training control cells what needs them.

    Raises:
        DataError: Two methods share a name, or a prediction has another shape or is not finite.
    """
    scored, duplicate = halves(screen, held_out, conditions, seed)
    means = training_means(screen, train)
    everything = [*predictors, *references(means, seed)]
    if screen.time_n is not None:
        everything.append(TimeMatchedMean(screen, train, held_out))
    everything += [InterpolatedDuplicate(screen, train, duplicate), TechnicalDuplicate(screen, duplicate)]
    check_names([method.name for method in everything])
    truth = measured_truth(screen, means, scored, conditions)
    space = None
    if n_cells:
        labels = _changed_genes(screen, means, conditions, n_cells, seed)
        truth = replace(truth, de_train_cg=labels)
        space = Space(screen, train, scored, conditions, n_cells, seed)
    tables = []
    for method in everything:
        values = response_scores(truth, method.predict(conditions), method.name)
        if space is not None and isinstance(method, CellPredictor):
            values |= space.distances(method)
        for metric, value_c in values.items():
            columns = {"method": method.name, "condition": list(conditions), "metric": metric}
            tables.append(pd.DataFrame(columns | {"value": value_c}))
    table = pd.concat(tables, ignore_index=True)
    defined = table.groupby("metric")["value"].transform("count") > 0
    return table[defined].reset_index(drop=True)


def check_names(names: Sequence[str]) -> None:
    """Raises DataError if two methods share a name."""
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise DataError(f"expected one name per method, found several named {shown(twice)}; pass name=.")


def references(means: TrainingMeans, seed: int = 0) -> list[Baseline]:
    """Every baseline that these training cells allow: means of means, then regressions."""
    return [*baselines_of(means).values(), *_regressions(means, seed)]


class Space:
    """Principal components of training cells, in which predicted cells are held against measured ones.

    Args:
        screen: The screen.
        train: Rows that the components are fitted to, at most 5,000 of them.
        scored: Rows of measured cells.
        conditions: Conditions to score.
        n_cells: Cells of a condition, at most.
        seed: Of the draws.

    Attributes:
        measured: The measured cells of each condition, before they are placed.
    """

    def __init__(
        self,
        screen: Screen,
        train: NDArray[np.int64],
        scored: NDArray[np.int64],
        conditions: Sequence[str],
        n_cells: int,
        seed: int,
    ):
        self.conditions, self.n_cells, self.seed = conditions, n_cells, seed
        self.pca = components(screen, train, seed)
        self.measured = _cells_of(screen, scored, conditions, n_cells, seed)
        self.truth = self._placed(self.measured)

    def distances(self, method: CellPredictor) -> dict[str, NDArray[np.float64]]:
        """Distances of a method's cells from the measured ones, condition by condition."""
        predicted = method.cells(self.conditions, self.n_cells, self.seed)
        return distance_scores(self.truth, self._placed(predicted))

    def _placed(self, cells: Sequence[NDArray[np.float64]]) -> list[NDArray[np.float64]]:
        return [self.pca.transform(x_ng) for x_ng in cells]


def components(screen: Screen, train: NDArray[np.int64], seed: int) -> PCA:
    """The 50 principal components of training cells, of 5,000 at most, that distances are measured in."""
    train_ng = draw_cells(screen, train, _PCA_CELLS, seed)
    return PCA(min(_COMPONENTS, *train_ng.shape), random_state=seed).fit(train_ng)


def _cells_of(
    screen: Screen, rows: NDArray[np.int64], conditions: Sequence[str], n_cells: int, seed: int
) -> list[NDArray[np.float64]]:
    """At most ``n_cells`` cells of each condition; none where ``rows`` hold none."""
    code = [screen.conditions.index(name) for name in conditions]
    return [draw_cells(screen, rows[screen.condition_n[rows] == c], n_cells, seed) for c in code]


def _changed_genes(
    screen: Screen, means: TrainingMeans, conditions: Sequence[str], n_cells: int, seed: int
) -> NDArray[np.bool_] | None:
    """Genes that a condition changes according to training cells; None without training control cells."""
    if means.control_g is None:
        return None
    control_ng, *cells = _cells_of(screen, means.rows, [screen.conditions[0], *conditions], n_cells, seed)
    return de_labels_train(cells, control_ng)


def _regressions(means: TrainingMeans, seed: int) -> list[Baseline]:
    if len(means.seen) < _FEWEST:
        return []
    spec = means.spec
    embeddings = {
        "ridge on PCA embedding": pca_embedding(means),
        "ridge on random embedding": random_embedding(spec.targets, seed),
    }
    if means.screen.embedding_pe is not None:
        embeddings["ridge on given embedding"] = pd.DataFrame(means.screen.embedding_pe, spec.targets)
    ridges: list[Baseline] = [RidgeOnEmbeddings(means, table, name) for name, table in embeddings.items()]
    enough = max(means.cells.values()) > 1
    return [*ridges, ElasticNetOnTargets(means, seed)] if enough else ridges


def measured_truth(
    screen: Screen, means: TrainingMeans, scored: NDArray[np.int64], conditions: Sequence[str]
) -> Truth:
    """What to score predictions of conditions against: means and spread of the cells ``scored``.

    Args:
        screen: The screen.
        means: Means of the training cells: references of effects, weights and sums of single effects.
        scored: Rows to score on.
        conditions: Conditions with cells among them.
    """
    code = [screen.conditions.index(name) for name in conditions]
    scored_cg = other_genes(screen, conditions)
    of_test = moments(screen, scored)
    weights = [
        effect_weights(t_against_rest(*found)[code], scored_cg)
        for found in (moments(screen, means.rows), of_test)
    ]
    targets = [screen.describe().split(name) for name in conditions]
    additive_cg = None
    if means.control_g is not None and any(len(names) == 2 for names in targets):
        additive_cg = additive_means(targets, means.singles, means.control_g)
    return Truth(
        conditions=conditions,
        true_cg=of_test.mean_cg[code],
        perturbed_g=means.perturbed_g,
        scored_cg=scored_cg,
        control_g=means.control_g,
        variance_cg=_spread(of_test, code),
        weight_train_cg=weights[0],
        weight_test_cg=weights[1],
        additive_cg=additive_cg,
    )


def _spread(found: Moments, code: list[int]) -> NDArray[np.float64]:
    """Mean squared distance of the cells of some conditions from their mean, (c, g)."""
    n_c1 = found.cells_c[code][:, None]
    return np.nan_to_num(found.variance_cg[code]) * (n_c1 - 1) / n_c1


def _scored_conditions(screen: Screen, split: Split, min_cells: int) -> tuple[list[str], dict[str, int]]:
    """Held-out conditions with enough cells, and the number of cells of those without."""
    if not len(split.test):
        raise DataError(
            f"expected held-out test cells, found none in {split}; hold out perturbations, combinations or a "
            "share of the cells (test=0.2)."
        )
    cells_c = np.bincount(screen.condition_n[split.test], minlength=len(screen.conditions))
    held = {name: int(n) for name, n in zip(screen.conditions[1:], cells_c[1:], strict=True) if n}
    few = {name: n for name, n in held.items() if n < max(min_cells, 4)}
    if len(few) == len(held):
        raise DataError(
            f"no perturbed condition has {max(min_cells, 4)} held-out cells; the largest has "
            f"{max(held.values(), default=0)}. Hold out more cells or lower min_cells=."
        )
    return [name for name in held if name not in few], few


def check_unseen(method: Any, split: Split) -> None:
    """Raises DataError if a method says that it was trained on held-out cells (``seen_rows``)."""
    seen_rows = getattr(method, "seen_rows", None)
    if seen_rows is None:
        return
    leaked = np.intersect1d(seen_rows, split.test)
    if len(leaked):
        raise DataError(
            f"{method.name} was trained on {len(leaked)} of the {len(split.test)} held-out cells of {split}; "
            "compare it on its own split, or fit it again on this one."
        )


# ---------------------------------------------------------------- from scores to statements


@dataclass(frozen=True)
class Comparison:
    """Scores of methods on the same cells, and what follows from them.

    Intervals are 95 % percentile intervals of a bootstrap over conditions. Every method is resampled alike,
    so differences are paired. A condition's score is first averaged over the folds and seeds it was scored
    in.

    Attributes:
        table: Columns method, fold, seed, condition, metric, value.
        left_out: Columns fold, condition, cells: held-out conditions with too few cells to score.
        splits: The folds in words.
        own: Names of the methods that were put beside the baselines.
        n_resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """

    table: pd.DataFrame
    left_out: pd.DataFrame
    splits: Sequence[str] = ()
    own: Sequence[str] = ()
    n_resamples: int = 2000
    seed: int = 0

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods, in the order they were scored."""
        return list(dict.fromkeys(self.table["method"]))

    @cached_property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of ``MEASURES``."""
        found = set(self.table["metric"])
        return [metric for metric in MEASURES if metric in found]

    def summary(self) -> pd.DataFrame:
        """Mean score of each method over the conditions where it is defined.

        Returns:
            Columns method, metric, mean, low, high, n_conditions.
        """
        rows = []
        for metric, value_mc in self._values.items():
            index_bc = self._resamples(len(value_mc.columns))
            for method in self.methods:
                mean, low, high, n = _interval(value_mc.loc[method].to_numpy(), index_bc)
                rows.append((method, metric, mean, low, high, n))
        return pd.DataFrame(rows, columns=["method", "metric", "mean", "low", "high", "n_conditions"])

    def differences(self, reference: str = FLOOR) -> pd.DataFrame:
        """Mean difference of each method from a reference, paired by condition.

        Args:
            reference: Name of a method.

        Returns:
            Columns method, metric, difference, low, high, better, n_conditions; ``better`` says whether
            the interval lies on the better side of zero. NaN where the two share no defined condition.

        Raises:
            DataError: There is no such method.
        """
        rows = []
        for metric, value_mc in self._of(reference).items():
            index_bc = self._resamples(len(value_mc.columns))
            sign = _sign(metric)
            for method in self.methods:
                if method == reference:
                    continue
                difference_c = (value_mc.loc[method] - value_mc.loc[reference]).to_numpy()
                mean, low, high, n = _interval(difference_c, index_bc)
                rows.append((method, metric, mean, low, high, min(sign * low, sign * high) > 0, n))
        columns = ["method", "metric", "difference", "low", "high", "better", "n_conditions"]
        return pd.DataFrame(rows, columns=columns)

    def calibrated(self, reference: str = FLOOR) -> pd.DataFrame:
        """Where each method lies between a baseline (0) and the technical duplicate (1).

        (method - baseline) / (duplicate - baseline), each averaged over the conditions where all three are
        defined. Never clipped: below 0 a method is worse than the baseline, above 1 it has less noise than
        a repeated experiment.

        Args:
            reference: Name of the baseline.

        Returns:
            Columns method, metric, score, low, high, resolved, n_conditions. ``resolved`` says whether the
            duplicate beats the baseline at all: if not, the metric cannot tell methods apart on these cells.

        Raises:
            DataError: There is no such method.
        """
        rows = []
        for metric, value_mc in self._of(reference).items():
            index_bc = self._resamples(len(value_mc.columns))
            base_c = value_mc.loc[reference].to_numpy()
            span_c = value_mc.loc[CEILING].to_numpy() - base_c
            _, low, high, _ = _interval(span_c, index_bc)
            resolved = bool(min(_sign(metric) * low, _sign(metric) * high) > 0)
            for method in self.methods:
                if method in (reference, CEILING):
                    continue
                gain_c = value_mc.loc[method].to_numpy() - base_c
                score, low, high, n = _ratio_interval(gain_c, span_c, index_bc)
                rows.append((method, metric, score, low, high, resolved, n))
        columns = ["method", "metric", "score", "low", "high", "resolved", "n_conditions"]
        return pd.DataFrame(rows, columns=columns)

    @cached_property
    def _values(self) -> dict[str, pd.DataFrame]:
        """Metric to a table of methods by conditions."""
        mean = self.table.groupby(["metric", "method", "condition"], sort=False)["value"].mean()
        return {metric: mean[metric].unstack("condition").reindex(self.methods) for metric in self.metrics}

    def _of(self, reference: str) -> Mapping[str, pd.DataFrame]:
        if reference not in self.methods:
            raise DataError(f"no method named {reference!r} was scored; methods are {shown(self.methods)}.")
        return self._values

    def _resamples(self, n_conditions: int) -> NDArray[np.int64]:
        rng = np.random.default_rng(self.seed)
        return rng.integers(n_conditions, size=(self.n_resamples, n_conditions))


def average_conditions(table: pd.DataFrame) -> pd.DataFrame:
    """Average a table of scores over conditions.

    Args:
        table: Columns method, metric, value.

    Returns:
        Columns method, metric, mean, sd, n_conditions, in the order methods and metrics came in. Conditions
        whose score is undefined are not counted.
    """
    grouped = table.groupby(["method", "metric"], sort=False)["value"]
    named = grouped.agg(mean="mean", sd="std", n_conditions="count")
    return named.reset_index()


def _sign(metric: str) -> int:
    return 1 if MEASURES[metric].higher_is_better else -1


def _interval(value_c: NDArray[np.float64], index_bc: NDArray[np.int64]) -> tuple[float, float, float, int]:
    """Mean over defined conditions, its bootstrap interval, and their number."""
    return _ratio_interval(value_c, np.where(np.isnan(value_c), np.nan, 1.0), index_bc)


def _ratio_interval(
    top_c: NDArray[np.float64], bottom_c: NDArray[np.float64], index_bc: NDArray[np.int64]
) -> tuple[float, float, float, int]:
    """Ratio of two means over the conditions where both are defined, its bootstrap interval, their number."""
    defined_c = ~np.isnan(top_c) & ~np.isnan(bottom_c)
    n = int(defined_c.sum())
    top_c, bottom_c = np.where(defined_c, top_c, 0.0), np.where(defined_c, bottom_c, 0.0)
    if n == 0 or bottom_c.sum() == 0:
        return np.nan, np.nan, np.nan, n
    ratio = float(top_c.sum() / bottom_c.sum())
    if n == 1:
        return ratio, np.nan, np.nan, n
    top_b, bottom_b = top_c[index_bc].sum(1), bottom_c[index_bc].sum(1)
    ratio_b = top_b[bottom_b != 0] / bottom_b[bottom_b != 0]
    low, high = np.quantile(ratio_b, _INTERVAL)
    return ratio, float(low), float(high), n
