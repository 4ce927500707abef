"""What two perturbations do together: one rule for simulated, measured and predicted doubles."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "ADDITIVE_BELOW",
    "SUPPRESSED_BELOW",
    "Interaction",
    "InteractionKind",
    "interaction",
    "interaction_kind",
]

InteractionKind = Literal["additive", "dominant", "suppressed", "saturated", "new programme", "other"]
"""Kinds of doubles; :func:`interaction_kind` has the rule of each."""
Array = NDArray[np.floating[Any]]

ADDITIVE_BELOW = 0.2
"""Length of the residual, as a share of the two single effects together, up to which they add."""
SUPPRESSED_BELOW = 0.6
"""Length of the double's effect, as a share of the longer single one, below which it is suppressed."""
_SAME_DIRECTION = 0.5  # cosine of two effects from which they share their programmes
_LEFT_BELOW = 0.5  # share of a single effect below which the other target has taken it away
_NEW_ABOVE = 0.5  # share of the double's length outside the plane of the single effects
_PARALLEL = 0.01  # share of the larger variance below which the plane's second direction may be noise alone


class Interaction(NamedTuple):
    """The kind of a double and the numbers behind it. A ratio to an effect of length zero is NaN.

    Attributes:
        kind: As :func:`interaction_kind` defines it.
        residual_share: Length of the residual, over the lengths of the two single effects together.
        size_ratio: Length of the double's effect, over that of the longer single one.
        cosine: Between the two single effects.
        residual_cosine: Between the residual and the sum of the single effects.
        left_first: Length of double - second, over that of first: how much of first is left.
        left_second: Length of double - first, over that of second.
        new_share: Length of the part of double that no mixture of first and second makes, over its length.
    """

    kind: InteractionKind
    residual_share: float
    size_ratio: float
    cosine: float
    residual_cosine: float
    left_first: float
    left_second: float
    new_share: float


def interaction_kind(first_g: Array, second_g: Array, double_g: Array) -> InteractionKind:
    """The kind of a double, read off three effects: differences from control in log1p CP10k, or any one unit.

    With e = double - first - second, the interaction residual:

    1. additive: the length of e is at most 0.2 of the lengths of first and second together;
    2. suppressed: otherwise, and double is shorter than 0.6 of the longer of first and second;
    3. saturated: otherwise, where the two effects point the same way (cosine above 0.5) and e points against
       their sum (cosine below -0.5);
    4. dominant: otherwise, where e takes away most of one effect: e + first is shorter than half of first, or
       the same with second;
    5. new programme: otherwise, where more than half of the length of double lies outside the plane of first
       and second: no mixture of the two makes it;
    6. other: none of these, for example more than the sum.

    Leave out the targets' own genes, as every metric does.

    Args:
        first_g: Effect of the first target alone.
        second_g: Effect of the second target alone.
        double_g: Effect of both together.
    """
    effect_3g = np.stack([first_g, second_g, double_g]).astype(np.float64)
    return interaction(effect_3g @ effect_3g.T).kind


def interaction(product_33: NDArray[np.float64]) -> Interaction:
    """As :func:`interaction_kind`, with the numbers behind the kind.

    All of them follow from the inner products of the three effects. Of measured means the products are
    too large, by the noise of the means in every gene: take its expected share off first.

    Args:
        product_33: Inner products of the effects of first, second and double.
    """
    inner_dd = _DIRECTIONS @ product_33 @ _DIRECTIONS.T
    length = dict(zip(_NAMES, np.sqrt(np.maximum(np.diag(inner_dd), 0.0)).tolist(), strict=True))

    def cosine(a: str, b: str) -> float:
        inner = float(inner_dd[_NAMES.index(a), _NAMES.index(b)])
        return min(max(_ratio(inner, length[a] * length[b]), -1.0), 1.0)

    singles = length["first"] + length["second"]
    numbers = {
        "residual_share": _ratio(length["residual"], singles),
        "size_ratio": _ratio(length["double"], max(length["first"], length["second"])),
        "cosine": cosine("first", "second"),
        "residual_cosine": cosine("residual", "sum"),
        "left_first": _ratio(length["double - second"], length["first"]),
        "left_second": _ratio(length["double - first"], length["second"]),
        "new_share": _outside(product_33),
    }
    if length["residual"] <= ADDITIVE_BELOW * singles:
        return Interaction("additive", **numbers)
    return Interaction(_not_additive(**numbers), **numbers)


_COMBINED = {  # of first, second and double
    "first": (1, 0, 0),
    "second": (0, 1, 0),
    "double": (0, 0, 1),
    "sum": (1, 1, 0),
    "residual": (-1, -1, 1),
    "double - second": (0, -1, 1),
    "double - first": (-1, 0, 1),
}
_NAMES, _DIRECTIONS = list(_COMBINED), np.array(list(_COMBINED.values()), dtype=np.float64)


def _not_additive(
    size_ratio: float,
    cosine: float,
    residual_cosine: float,
    left_first: float,
    left_second: float,
    new_share: float,
    **_: float,
) -> InteractionKind:
    """Rules 2 to 6; comparisons with NaN are false."""
    if size_ratio < SUPPRESSED_BELOW:
        return "suppressed"
    if cosine > _SAME_DIRECTION and residual_cosine < -_SAME_DIRECTION:
        return "saturated"
    if left_first < _LEFT_BELOW or left_second < _LEFT_BELOW:
        return "dominant"
    return "new programme" if new_share > _NEW_ABOVE else "other"


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else np.nan


def _outside(product_33: NDArray[np.float64]) -> float:
    """Length of the part of the third vector outside the plane of the others, as a share of its length."""
    plane_22, onto_2, size = product_33[:2, :2], product_33[:2, 2], float(product_33[2, 2])
    spread_2, axis_22 = np.linalg.eigh(plane_22)
    kept_2 = (spread_2 > 0) & (spread_2 >= _PARALLEL * spread_2[-1])
    inside = float(((axis_22.T @ onto_2)[kept_2] ** 2 / spread_2[kept_2]).sum())
    return float(np.sqrt(np.clip(1 - _ratio(inside, max(size, 0.0)), 0.0, 1.0)))
