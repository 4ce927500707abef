"""The kind of a double: hand-worked effects. Simulated doubles of known kind are in tests/simulate."""

import numpy as np
import pytest

from pyro_causalcell.data import interaction, interaction_kind

UP, SIDE, NEW = np.eye(3)


@pytest.mark.parametrize(
    ("first", "second", "double", "kind"),
    [
        (UP, SIDE, UP + SIDE, "additive"),
        (UP, SIDE, 0.95 * UP + 1.05 * SIDE, "additive"),
        (UP, SIDE, UP + SIDE + 0.39 * NEW, "additive"),  # within a fifth of 1 + 1
        (UP, SIDE, UP + SIDE + 0.41 * NEW, "other"),
        (UP, UP, 1.1 * UP, "saturated"),
        (UP, 0.8 * UP, 0.5 * UP, "suppressed"),
        (UP, SIDE, SIDE, "dominant"),
        (UP, -SIDE, 0.2 * UP - SIDE, "dominant"),
        (UP, SIDE, 2 * UP + 2 * SIDE, "other"),
        (UP, SIDE, UP + SIDE + 2 * NEW, "new programme"),
        (UP, UP, UP + 2 * NEW, "new programme"),
        (0 * UP, 0 * UP, 0 * UP, "additive"),
    ],
)
def test_kinds(first, second, double, kind):
    assert interaction_kind(first, second, double) == kind
    assert interaction_kind(second, first, double) == kind
    assert interaction_kind(7 * first, 7 * second, 7 * double) == kind  # any unit


def products(*effects):
    return np.array(effects) @ np.array(effects).T


def test_numbers_behind_a_kind():
    found = interaction(products(3 * UP, 4 * SIDE, 4 * SIDE + 3 * NEW))
    assert found.kind == "new programme"
    assert found.size_ratio == pytest.approx(5 / 4)
    assert found.residual_share == pytest.approx(np.sqrt(18) / 7)
    assert found.cosine == pytest.approx(0)
    assert found.residual_cosine == pytest.approx(-9 / (np.sqrt(18) * 5))  # (-3, 0, 3) against (3, 4, 0)
    assert found.left_first == pytest.approx(1)  # 3 NEW is as long as 3 UP
    assert found.left_second == pytest.approx(np.sqrt(9 + 16 + 9) / 4)
    assert found.new_share == pytest.approx(3 / 5)


def test_what_has_no_length_has_no_ratio():
    found = interaction(products(0 * UP, UP, UP))
    assert found.kind == "additive" and found.left_second == 1
    assert np.isnan(found.left_first) and np.isnan(found.cosine)


def test_products_with_the_noise_taken_off_may_be_negative():
    found = interaction(np.array([[1.0, 0.2, 1.0], [0.2, -0.1, 0.0], [1.0, 0.0, 0.9]]))
    assert np.isnan(found.left_second)  # the second effect is not told from nothing
    assert 0 <= found.new_share <= 1 and found.residual_share >= 0
