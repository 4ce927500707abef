"""Everything the page shows, computed from a fit and its cells."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from numpy.typing import NDArray

from pyro_causalcell.baselines import ModelPredictor, score_predictors
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError, PredictionError
from pyro_causalcell.evaluate.audit import Audit, audit
from pyro_causalcell.evaluate.calibration import Calibration, calibration
from pyro_causalcell.evaluate.checks import OF_COUNTS, OF_NORMALISED, check
from pyro_causalcell.evaluate.draws import draw_globals, replicates
from pyro_causalcell.evaluate.identifiability import latent_blocks, mixing
from pyro_causalcell.evaluate.interpret import classify_doubles, doubles_of, enrichment, programme_signatures
from pyro_causalcell.evaluate.likelihood import iw_nll
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import effects, graph, programme_names
from pyro_causalcell.report.over_time import OverTime, follows_cells, gather_over_time
from pyro_causalcell.report.replicates import Moments

__all__ = ["ALL_CELLS", "Blocks", "Cells", "Evidence", "control_rows", "gather", "scored_means"]

INTERVAL = 0.9
ALL_CELLS = "all cells"
"""Name of the group that holds every checked cell."""
_CHECKED = 2000  # cells of the predictive checks: more do not change the picture
_CALIBRATED = 1000  # cells whose intervals are measured: a class's coverage is then known to half a point
_WEIGHED = 500  # cells of the importance-weighted likelihood, the slowest part
_MIXED = 3000  # cells whose neighbours are looked at
_CLASSIFIED = 10  # of them a condition needs to be told from others
_REPLICATES = 50  # p-values in steps of 2 %
_DRAWS = 100  # of each cell, for its intervals
_MANY = 20  # held-out cells a condition needs before its mean is worth predicting
_METRICS = [  # one of each kind; ``compare`` has them all
    "rmse",
    "pearson_control",
    "pearson_perturbed",
    "r2_effects",
    "weighted_r2_train",
    "centroid_accuracy",
    "discrimination_cosine",
]
_DRAWN = 2000  # cells drawn from the model for a condition's mean: their noise must not count


@dataclass(frozen=True)
class Cells:
    """Cells that the evidence is judged on.

    Attributes:
        rows: Rows of the screen.
        words: What they are, as in a sentence.
    """

    rows: NDArray[np.int64]
    words: str

    def sample(self, n: int, seed: int) -> "Cells":
        """At most ``n`` of these cells, at random, in rising order."""
        if len(self.rows) <= n:
            return self
        rows = np.sort(np.random.default_rng(seed).choice(self.rows, n, replace=False))
        return Cells(rows, f"{n:,} of the {self.words}")


@dataclass(frozen=True)
class Blocks:
    """Programmes of some cells by block, and how well each block mixes perturbations.

    Attributes:
        parts: Name of a block -> programmes, the responsive one last.
        conditions: Condition of each cell.
        table: What ``evaluate.mixing`` returns.
        cells: Which cells.
    """

    parts: dict[str, NDArray[np.float64]]
    conditions: NDArray[np.str_]
    table: pd.DataFrame
    cells: Cells


@dataclass(frozen=True)
class Evidence:
    """What was computed from a fit for its page.

    Attributes:
        graph: Columns perturbation, programme, probability, effect, effect_sd; no rows if the model has no
            edges.
        signatures: What ``evaluate.programme_signatures`` returns.
        enrichment: What ``evaluate.enrichment`` returns; None without gene sets.
        doubles: What ``evaluate.classify_doubles`` returns; None for a screen without doubles.
        effects: Gene effects of the perturbations with a likely edge; None if there are none.
        held_out: Cells of the comparison with the baselines.
        scores: Columns method, condition, metric, value; empty if no condition has enough cells.
        checked: Cells of the predictive checks.
        checks: Arguments of ``plot.predictive_checks``.
        check_table: What ``evaluate.check`` returns, of all cells together and then of each condition.
        n_replicates: Replicated data sets of the predictive checks.
        calibrated: Cells of the calibration.
        calibration: What ``evaluate.calibration`` returns for them.
        audit: What the design can identify, with the fit's own graph; None for control cells alone.
        weighed: Cells of the likelihood.
        likelihood: nll, pareto_k, ess and mc_se of each.
        n_particles: Draws per cell of the likelihood.
        over_time: Responses over time; None for models that do not follow cells over time.
        blocks: Invariant and responsive programmes of held-out cells; None for models without an invariant
            block, and for those over time, where time moves both.
    """

    graph: pd.DataFrame
    signatures: xr.Dataset
    enrichment: pd.DataFrame | None
    doubles: pd.DataFrame | None
    effects: xr.Dataset | None
    held_out: Cells
    scores: pd.DataFrame
    checked: Cells
    checks: dict[str, NDArray[np.float64]]
    check_table: pd.DataFrame
    n_replicates: int
    calibrated: Cells
    calibration: Calibration
    audit: Audit | None
    weighed: Cells
    likelihood: xr.Dataset
    n_particles: int
    over_time: OverTime | None
    blocks: Blocks | None


def gather(
    fit: Fit,
    screen: Screen,
    n_particles: int,
    seed: int,
    gene_sets: Mapping[str, Sequence[str]] | None = None,
) -> Evidence:
    """Compute everything.

    Args:
        fit: The fit.
        screen: The cells it was fitted on, all of them.
        n_particles: Draws per cell of the likelihood.
        seed: Of every random choice.
        gene_sets: Name -> genes, to look for among the genes of programmes.

    Raises:
        DataError: ``screen`` has another number of cells than the fitted one, or no gene set has enough of
            its genes.
    """
    held_out = _held_out(fit, screen)
    signatures = programme_signatures(fit, seed=seed)
    found = _enrichment(signatures, gene_sets, seed)  # before the long work: foreign gene names end it
    edges = _edges(fit)
    likely = [
        p for p in dict.fromkeys(edges.loc[edges["probability"] > 0.5, "perturbation"]) if p in screen.targets
    ]
    checked, weighed = held_out.sample(_CHECKED, seed), held_out.sample(_WEIGHED, seed)
    calibrated = held_out.sample(_CALIBRATED, seed)
    checks, table = _checks(fit, screen, checked.rows, seed)
    return Evidence(
        graph=edges,
        signatures=signatures,
        enrichment=found,
        doubles=classify_doubles(fit, screen, seed=seed) if doubles_of(fit.screen) else None,
        effects=effects(fit, likely, interval=INTERVAL, seed=seed) if likely else None,
        held_out=held_out,
        scores=scored_means(fit, screen, held_out.rows, seed),
        checked=checked,
        checks=checks,
        check_table=table,
        n_replicates=_REPLICATES,
        calibrated=calibrated,
        calibration=calibration(fit, screen, calibrated.rows, n_samples=_DRAWS, seed=seed),
        audit=_audit(fit, screen, edges, seed),
        weighed=weighed,
        likelihood=iw_nll(fit, screen, weighed.rows, n_particles=n_particles, seed=seed),
        n_particles=n_particles,
        over_time=_over_time(fit, screen, edges, likely, held_out, seed),
        blocks=_blocks(fit, screen, held_out, seed),
    )


def _blocks(fit: Fit, screen: Screen, held_out: Cells, seed: int) -> Blocks | None:
    """Two blocks of programmes, of conditions with cells enough to look for them."""
    if not hasattr(fit.model, "n_invariant") or follows_cells(fit):
        return None
    code_n = screen.condition_n[held_out.rows]
    known = held_out.rows[code_n >= 0]
    kept = Cells(known, held_out.words).sample(_MIXED, seed)
    code_n = screen.condition_n[kept.rows]
    enough_n = np.bincount(code_n)[code_n] >= _CLASSIFIED
    rows, code_n = kept.rows[enough_n], code_n[enough_n]
    if len(np.unique(code_n)) < 2:
        return None
    names = np.array(screen.conditions)[code_n]
    parts = {site.removeprefix("z_"): z_nk for site, z_nk in latent_blocks(fit, screen, rows).items()}
    return Blocks(parts, names, mixing(parts, names, seed=seed), Cells(rows, kept.words))


def _over_time(
    fit: Fit, screen: Screen, edges: pd.DataFrame, likely: Sequence[str], held_out: Cells, seed: int
) -> OverTime | None:
    if not follows_cells(fit):
        return None
    return gather_over_time(fit, screen, edges, likely, (held_out.rows, held_out.words), INTERVAL, seed)


def _enrichment(
    signatures: xr.Dataset, gene_sets: Mapping[str, Sequence[str]] | None, seed: int
) -> pd.DataFrame | None:
    if gene_sets is None:
        return None
    return enrichment(signatures["standardised"].to_pandas(), gene_sets, seed=seed)


def _edges(fit: Fit) -> pd.DataFrame:
    """The graph; no rows for a model in which perturbations move nothing, which has none."""
    try:
        return graph(fit)
    except PredictionError:
        return pd.DataFrame(columns=["perturbation", "programme", "probability", "effect", "effect_sd"])


def _held_out(fit: Fit, screen: Screen) -> Cells:
    """Test cells, or validation cells, or else training cells; the words say which."""
    split = fit.split
    fitted = len(split.train) + len(split.validation) + len(split.test)
    if screen.n_cells != fitted:
        raise DataError(
            f"the fit's split is of {fitted} cells and these data have {screen.n_cells}; pass the AnnData "
            "that was fitted."
        )
    if len(split.test):
        return Cells(split.test, f"{len(split.test):,} held-out test cells")
    if len(split.validation):
        return Cells(split.validation, f"{len(split.validation):,} held-out validation cells")
    return Cells(split.train, f"{len(split.train):,} training cells (none were held out)")


def _checks(
    fit: Fit, screen: Screen, rows: NDArray[np.int64], seed: int
) -> tuple[dict[str, NDArray[np.float64]], pd.DataFrame]:
    """Moments, and statistics of all cells and of each condition; replicates pass by one at a time."""
    observed_ng, condition_n = screen.x(rows), screen.condition_n[rows]
    statistic = OF_COUNTS if screen.is_counts else OF_NORMALISED
    draws, moments = draw_globals(fit, _REPLICATES, seed), Moments(observed_ng, condition_n)

    def table(
        copies: Iterable[NDArray[np.float32]], group_n: NDArray[np.int64], names: list[str]
    ) -> pd.DataFrame:
        return check(observed_ng, copies, group_n, names, statistic=statistic, interval=INTERVAL)

    first, again = (replicates(fit, screen, rows, draws, _REPLICATES, seed) for _ in range(2))
    tables = [
        table(moments.watch(first), np.zeros_like(condition_n), [ALL_CELLS]),
        table(again, condition_n, screen.conditions),
    ]
    return moments.arrays(), pd.concat(tables, ignore_index=True)


def _audit(fit: Fit, screen: Screen, edges: pd.DataFrame, seed: int) -> Audit | None:
    """With the fit's graph, or without one for a model that has none; None for control cells alone."""
    if not screen.condition_n[fit.split.train].any():
        return None
    if edges.empty:
        return audit(screen, len(programme_names(fit)), rows=fit.split.train, seed=seed)
    return audit(screen, fit=fit, seed=seed)


def control_rows(fit: Fit, screen: Screen) -> NDArray[np.int64]:
    """Control cells that the model was trained on; none for a screen without controls."""
    train = fit.split.train
    return train[screen.condition_n[train] == 0]


def scored_means(fit: Fit, screen: Screen, rows: NDArray[np.int64], seed: int) -> pd.DataFrame:
    """The model, the baselines and the technical duplicate, scored on one half of the held-out cells.

    Args:
        fit: The fit.
        screen: The screen.
        rows: Held-out cells; perturbed conditions with at least 20 of them are scored.
        seed: Of the halves and of the model's draws.

    Returns:
        Columns method, condition, metric, value; empty if no condition has enough cells. Without training
        control cells, what needs them is left out.
    """
    cells_c = np.bincount(screen.condition_n[rows], minlength=len(screen.conditions))
    conditions = [c for c, n in zip(screen.conditions[1:], cells_c[1:], strict=True) if n >= _MANY]
    if not conditions:
        return pd.DataFrame(columns=["method", "condition", "metric", "value"])
    model = ModelPredictor(fit, n_cells=_DRAWN, seed=seed)
    scores = score_predictors(screen, fit.split.train, rows, conditions, [model], seed)
    return scores[scores["metric"].isin(_METRICS)].reset_index(drop=True)
