"""What a fit has to remember about a screen: its settings, names and sizes, without the cells."""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pyro_causalcell.errors import DataError

__all__ = ["CONTROL", "ScreenSpec", "nearest"]

CONTROL = "control"
"""The canonical name of the control condition."""


def nearest(name: str, known: Sequence[str], n: int = 3) -> list[str]:
    """The known names closest to a name that was not found, without regard to case."""
    by_upper = {k.upper(): k for k in known}
    return [by_upper[match] for match in difflib.get_close_matches(name.upper(), list(by_upper), n=n)]


@dataclass(frozen=True)
class ScreenSpec:
    """Settings and names of a screen. It can be written as JSON and read without the AnnData.

    Attributes:
        perturbation: obs column with the perturbation of each cell.
        control: Spellings of the control condition in that column.
        separator: What joins the targets of a combination.
        layer: Layer that holds x; None is ``adata.X``.
        batch: obs columns of batches and other categorical covariates.
        time: obs column of times.
        dose: obs column of doses.
        library: obs column of total counts; None sums x over genes.
        guide: obs column of guides.
        gene_symbols: var column of gene names; None is ``adata.var_names``.
        min_cells: Cells each condition must have.
        allow_empty: Whether cells and genes without any count are accepted.
        conditions: Canonical condition names; the first is ``"control"``.
        targets: Perturbation targets, sorted: the columns of the design.
        genes: Gene names: the columns of x.
        batch_names: ``"column=value"``: the columns of the one-hot batch matrix.
        is_counts: Whether x holds non-negative integers only.
        condition_cells: Cells of each condition.
        times: Times of the snapshots, sorted.
    """

    perturbation: str
    control: list[str]
    separator: str = "+"
    layer: str | None = None
    batch: list[str] = field(default_factory=list)
    time: str | None = None
    dose: str | None = None
    library: str | None = None
    guide: str | None = None
    gene_symbols: str | None = None
    min_cells: int = 1
    allow_empty: bool = False
    conditions: list[str] = field(default_factory=list)
    targets: list[str] = field(default_factory=list)
    genes: list[str] = field(default_factory=list)
    batch_names: list[str] = field(default_factory=list)
    is_counts: bool = False
    condition_cells: dict[str, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)

    def to_json(self) -> str:
        """The spec as a JSON object."""
        return json.dumps(dataclasses.asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ScreenSpec":
        """Reads what ``to_json`` wrote.

        Raises:
            DataError: The text is not the JSON of a ScreenSpec.
        """
        fields = dataclasses.fields(cls)
        names, later = {f.name for f in fields}, {"times"}  # not in the runs of the first versions
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"expected the JSON of a ScreenSpec, found text that is no JSON ({error})"
            ) from error
        if not isinstance(values, dict) or set(values) | later != names:
            found = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise DataError(f"expected a ScreenSpec with the fields {sorted(names)}, found {found}")
        return cls(**values)

    def split(self, condition: str) -> list[str]:
        """The targets named in a condition, in the order written; spellings of control fall out."""
        if self.is_control(condition):
            return []
        parts = [part.strip() for part in str(condition).split(self.separator)]
        if "" in parts:
            raise DataError(
                f"expected targets joined by {self.separator!r}, found condition {condition!r} with an empty "
                "part; rename it or pass another separator="
            )
        return [part for part in parts if not self.is_control(part)]

    def is_control(self, name: str) -> bool:
        """Whether a name is a spelling of control."""
        return str(name).strip() in {CONTROL, *self.control}

    def canonical(self, condition: str) -> str:
        """The one name of a condition: targets sorted and joined; ``"control"`` if there are none.

        ``"B+A"`` and ``"A+B"`` are one condition, as are ``"A+ctrl"`` and ``"A"`` where ctrl is a
        spelling of control. A target named twice counts once.

        Raises:
            DataError: A part of the name is empty.
        """
        return self.separator.join(sorted(set(self.split(condition)))) or CONTROL

    def design(self, conditions: Sequence[str]) -> np.ndarray:
        """The design of conditions, measured or not: 1 for each target, zeros for control.

        Args:
            conditions: Names such as ``"A"``, ``"A+B"`` or ``"control"``; the order of targets is free.

        Returns:
            float32 [c, p].

        Raises:
            DataError: A target is unknown; the nearest known names are suggested.
        """
        if isinstance(conditions, str):
            raise DataError(
                f"expected a list of conditions, found the text {conditions!r}; pass [{conditions!r}]"
            )
        column = {target: i for i, target in enumerate(self.targets)}
        u_cp = np.zeros((len(conditions), len(self.targets)), dtype=np.float32)
        for c, condition in enumerate(conditions):
            for target in self.split(condition):
                if target not in column:
                    raise DataError(self._unknown(target))
                u_cp[c, column[target]] = 1.0
        return u_cp

    def _unknown(self, target: str) -> str:
        near = nearest(target, self.targets)
        known = f"did you mean {' or '.join(near)}?" if near else f"the targets are {shown(self.targets)}"
        return (
            f"unknown perturbation target {target!r}: {known}. To predict one that no cell carries, fit with "
            "embeddings of the targets and name it as unseen"
        )


def shown(names: Sequence[object], n: int = 20) -> str:
    """A list as text, cut after n entries."""
    text = ", ".join(str(name) for name in names[:n])
    return f"{text}, ... ({len(names)} in all)" if len(names) > n else text
