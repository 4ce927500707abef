"""Named splits of a screen into training, validation and test cells."""

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pyro_causalcell.data.screen import Screen
from pyro_causalcell.data.spec import CONTROL, nearest, shown
from pyro_causalcell.errors import DataError

__all__ = [
    "Split",
    "held_out_batches",
    "held_out_combinations",
    "held_out_guides",
    "held_out_perturbations",
    "held_out_times",
    "random_cells",
]


@dataclass(frozen=True, eq=False)
class Split:
    """Rows of a screen for training, validation and test. Together they are all rows, each once.

    Attributes:
        name: How the split was made, such as ``"random_cells"``.
        train: int64 rows, rising.
        validation: int64 rows, rising.
        test: int64 rows, rising.
        seed: Seed of the random choices.
        settings: The arguments, what was held out, and the number of cells (``n_cells``).
    """

    name: str
    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray
    seed: int
    settings: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{key}={shown(value, 5) if isinstance(value, list) else value}"
            for key, value in self.settings.items()
        )
        return (
            f"Split({self.name}: {len(self.train)} training, {len(self.validation)} validation, "
            f"{len(self.test)} test cells; seed={self.seed}{', ' + settings if settings else ''})"
        )

    def save(self, path: str | Path) -> None:
        """Writes the split as an .npz file; an older file of that name stays until the new one is whole."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        with part.open("wb") as file:
            np.savez_compressed(
                file,
                name=np.array(self.name),
                train=self.train,
                validation=self.validation,
                test=self.test,
                seed=np.array(self.seed),
                settings=np.array(json.dumps(self.settings)),
            )
        os.replace(part, path)

    @classmethod
    def load(cls, path: str | Path) -> "Split":
        """Reads what ``save`` wrote.

        Raises:
            DataError: The file is missing, cut short, or not a split.
        """
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as values:
                return cls(
                    name=str(values["name"]),
                    train=values["train"],
                    validation=values["validation"],
                    test=values["test"],
                    seed=int(values["seed"]),
                    settings=json.loads(str(values["settings"])),
                )
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise DataError(f"expected a split written by Split.save, cannot read {path}: {error}") from error


def random_cells(screen: Screen, validation: float = 0.1, test: float = 0.0, seed: int = 0) -> Split:
    """Random cells, stratified by condition. Every condition keeps at least one training cell.

    Where the screen knows tracks (``track=``), they are drawn whole.

    Args:
        screen: The screen.
        validation: Fraction of all cells for validation.
        test: Fraction of all cells for test.
        seed: Seed.

    Raises:
        DataError: Fractions outside [0, 1), or nothing left to train on.
    """
    if not (0 <= validation and 0 <= test and validation + test < 1):
        raise DataError(f"expected fractions with a sum below 1, found validation={validation}, test={test}")
    rng = np.random.default_rng(seed)
    rows = np.arange(screen.n_cells)
    if screen.previous_n is not None:
        rows = np.flatnonzero(screen.previous_n < 0)  # where tracks begin
    test_rows = _stratified(screen, rows, test, rng)
    rest = np.setdiff1d(rows, test_rows)
    validation_rows = _stratified(screen, rest, validation / (1 - test), rng)
    return Split(
        "random_cells",
        _with_tracks(screen, np.setdiff1d(rest, validation_rows)),
        _with_tracks(screen, validation_rows),
        _with_tracks(screen, test_rows),
        seed,
        {"validation": validation, "test": test, "n_cells": screen.n_cells},
    )


def held_out_perturbations(
    screen: Screen, targets: Sequence[str] | float, seed: int = 0, validation: float = 0.1
) -> Split:
    """Holds out every cell whose condition contains one of some targets, alone or in a combination.

    Args:
        screen: The screen.
        targets: Names of targets, or the fraction of targets to draw.
        seed: Seed.
        validation: Fraction of the remaining cells for validation, stratified by condition.

    Raises:
        DataError: A target is unknown, the fraction is outside (0, 1), or nothing is left to train on.
    """
    rng = np.random.default_rng(seed)
    held = _chosen(targets, screen.targets, "target", rng)
    held_c = [bool(set(screen.describe().split(condition)) & set(held)) for condition in screen.conditions]
    test_n = _in_conditions(screen, held_c)
    return _held_out(screen, "held_out_perturbations", test_n, held, rng, seed, validation)


def held_out_combinations(
    screen: Screen, conditions: Sequence[str] | float, seed: int = 0, validation: float = 0.1
) -> Split:
    """Holds out some combinations; control, all single perturbations and other combinations stay.

    Args:
        screen: The screen.
        conditions: Names of combinations (the order of targets is free), or the fraction to draw.
        seed: Seed.
        validation: Fraction of the remaining cells for validation, stratified by condition.

    Raises:
        DataError: The screen has no combinations, or as for ``held_out_perturbations``.
    """
    rng = np.random.default_rng(seed)
    combinations = [c for c in screen.conditions if len(screen.describe().split(c)) > 1]
    if not combinations:
        raise DataError(
            "expected combinations of targets, found only single ones; is "
            f"{screen.describe().separator!r} the separator?"
        )
    if not isinstance(conditions, (int, float)):
        conditions = [screen.canonical(condition) for condition in _names(conditions)]
    held = _chosen(conditions, combinations, "combination", rng)
    test_n = _in_conditions(screen, [condition in held for condition in screen.conditions])
    return _held_out(screen, "held_out_combinations", test_n, held, rng, seed, validation)


def held_out_guides(
    screen: Screen, guides: Sequence[str] | float, seed: int = 0, validation: float = 0.1
) -> Split:
    """Holds out the cells of some guides, to ask whether an effect carries over to another guide.

    Args:
        screen: A screen with ``guide=``.
        guides: Names of guides, or a fraction: of each condition with several guides, that fraction is
            drawn (at least one, never all). Guides of control cells are not drawn.
        seed: Seed.
        validation: Fraction of the remaining cells for validation, stratified by condition.

    Raises:
        DataError: The screen has no guides, or as for ``held_out_perturbations``.
    """
    if screen.guide_n is None:
        raise DataError("this split needs the guide of each cell; pass guide= (an obs column) to Screen")
    rng = np.random.default_rng(seed)
    if isinstance(guides, (int, float)):
        held = _guides_of_each_condition(screen, screen.guide_n, _fraction(guides, "guide"), rng)
    else:
        held = _chosen(guides, sorted(set(screen.guide_n.tolist())), "guide", rng)
    return _held_out(screen, "held_out_guides", np.isin(screen.guide_n, held), held, rng, seed, validation)


def held_out_batches(
    screen: Screen, column: str, values: Sequence[str] | float, seed: int = 0, validation: float = 0.1
) -> Split:
    """Holds out the cells of some batches: replicates, lanes, donors.

    Args:
        screen: The screen.
        column: obs column of batches.
        values: Values of that column, or the fraction to draw.
        seed: Seed.
        validation: Fraction of the remaining cells for validation, stratified by condition.

    Raises:
        DataError: The column is missing, or as for ``held_out_perturbations``.
    """
    if column not in screen.adata.obs:
        raise DataError(
            f"obs[{column!r}] not found; columns are {list(screen.adata.obs.columns)}. Pass column="
        )
    rng = np.random.default_rng(seed)
    value_n = screen.adata.obs[column].astype(str).to_numpy(dtype=str)
    held = _chosen(values, sorted(set(value_n.tolist())), f"value of obs[{column!r}]", rng)
    test_n = np.isin(value_n, held)
    return _held_out(screen, "held_out_batches", test_n, held, rng, seed, validation, column=column)


def held_out_times(
    screen: Screen, times: float | Sequence[float], seed: int = 0, validation: float = 0.1
) -> Split:
    """Holds out every cell of some snapshots: those between others to interpolate, the last to extrapolate.

    Args:
        screen: A screen with ``time=``.
        times: Times of the snapshots to hold out, in the units of that column.
        seed: Seed.
        validation: Fraction of the remaining cells for validation, stratified by condition.

    Raises:
        DataError: The screen has no times, a time is none of its snapshots, or nothing is left to train on.
    """
    if screen.time_n is None:
        raise DataError("this split needs the time of each cell; pass time= (an obs column) to Screen")
    known = [float(str(time)) for time in np.unique(screen.time_n)]  # 0.1 in float32 is 0.1
    held = sorted(set(np.atleast_1d(times).tolist()))
    unknown = [time for time in held if time not in known]
    if unknown or not held:
        raise DataError(
            f"expected times of snapshots to hold out, found {unknown}; the screen has {shown(known)}"
        )
    test_n = np.isin(screen.time_n, np.array(held, dtype=screen.time_n.dtype))
    rng = np.random.default_rng(seed)
    return _held_out(screen, "held_out_times", test_n, held, rng, seed, validation)


def _stratified(screen: Screen, rows: np.ndarray, fraction: float, rng: np.random.Generator) -> np.ndarray:
    """A fraction of rows, spread evenly over conditions, leaving at least one row of each."""
    if fraction == 0:
        return np.empty(0, dtype=np.int64)
    shuffled = rng.permutation(rows)
    condition_n = screen.condition_n[shuffled]
    by_condition = np.argsort(condition_n, kind="stable")
    # A systematic sample of the sorted rows: the share of each condition is right to within one cell.
    steps = np.floor((np.arange(len(rows) + 1) * fraction) + rng.random())
    taken = np.zeros(len(rows), dtype=bool)
    taken[by_condition] = np.diff(steps) > 0
    for condition in np.unique(condition_n):
        members = np.flatnonzero(condition_n == condition)
        if taken[members].all():
            taken[members[0]] = False
    return np.sort(shuffled[taken])


def _with_tracks(screen: Screen, rows: np.ndarray) -> np.ndarray:
    """The rows, and where the screen knows tracks all that follows on them."""
    if screen.track_n is None:
        return rows
    return np.flatnonzero(np.isin(screen.track_n, screen.track_n[rows]))


def _names(names: Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _fraction(value: float, what: str) -> float:
    if not 0 < value < 1:
        raise DataError(
            f"expected a list of names or a fraction between 0 and 1 of each {what}, found {value}"
        )
    return float(value)


def _chosen(names: Sequence[str] | float, known: list[str], what: str, rng: np.random.Generator) -> list[str]:
    """The named ones, or a random fraction of the known ones; at least one."""
    if isinstance(names, (int, float)):
        n = max(1, round(_fraction(names, what) * len(known)))
        return sorted(rng.choice(known, size=n, replace=False).tolist())
    held = sorted(set(_names(names)))
    for name in held:
        if name not in known:
            near = nearest(name, known)
            hint = f"did you mean {' or '.join(near)}?" if near else f"the screen has {shown(known)}"
            raise DataError(f"unknown {what} {name!r}: {hint}")
    if not held:
        raise DataError(f"expected at least one {what} to hold out, found an empty list")
    return held


def _guides_of_each_condition(
    screen: Screen, guide_n: np.ndarray, fraction: float, rng: np.random.Generator
) -> list[str]:
    held: list[str] = []
    for c, condition in enumerate(screen.conditions):
        guides = np.unique(guide_n[screen.condition_n == c])
        if condition != CONTROL and len(guides) > 1:
            n = min(max(1, round(fraction * len(guides))), len(guides) - 1)
            held += rng.choice(guides, size=n, replace=False).tolist()
    if not held:
        raise DataError(
            "expected conditions with more than one guide, found none; name the guides to hold out"
        )
    return sorted(held)


def _in_conditions(screen: Screen, held_c: list[bool]) -> np.ndarray:
    """Whether each cell's condition is held out; cells of unknown conditions are not."""
    return np.isin(screen.condition_n, np.flatnonzero(held_c))


def _held_out(
    screen: Screen,
    name: str,
    test_n: np.ndarray,
    held: Sequence[str] | Sequence[float],
    rng: np.random.Generator,
    seed: int,
    validation: float,
    **settings: Any,
) -> Split:
    if not 0 <= validation < 1:
        raise DataError(f"expected validation between 0 and 1, found {validation}")
    rest = np.flatnonzero(~test_n)
    if not len(rest):
        raise DataError(f"nothing is left to train on once {shown(held)} are held out; hold out fewer")
    validation_rows = _stratified(screen, rest, validation, rng)
    settings |= {"held_out": list(held), "validation": validation, "n_cells": screen.n_cells}
    return Split(
        name, np.setdiff1d(rest, validation_rows), validation_rows, np.flatnonzero(test_n), seed, settings
    )
