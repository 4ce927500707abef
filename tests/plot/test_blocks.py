import numpy as np
import pytest

from pyro_causalcell.errors import DataError
from pyro_causalcell.plot import block_maps


@pytest.fixture
def cells():
    """Forty cells each of control and three perturbations; the second block feels two of them."""
    rng = np.random.default_rng(0)
    names = np.repeat(["control", "A", "B", "C"], 40)
    responsive = rng.standard_normal((160, 2)) + 8.0 * (names == "A")[:, None] - 5.0 * (names == "B")[:, None]
    return {"invariant": rng.standard_normal((160, 3)), "responsive": responsive}, names


def test_a_panel_for_each_block_with_the_furthest_perturbations_named(cells):
    blocks, names = cells
    figure = block_maps(blocks, names, n_named=2)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in figure.axes] == ["invariant", "responsive"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["A", "B", "control", "other perturbations"]
    grey, control, first, second = (c.get_offsets() for c in figure.axes[1].collections)
    assert [len(grey), len(control), len(first), len(second)] == [40, 40, 40, 40]
    centre, other = first.mean(0), control.mean(0)
    spread = np.linalg.norm(first - centre, axis=1).mean()
    assert np.linalg.norm(centre - other) > 2 * spread  # A lies apart in the block that feels it


def test_the_same_seed_gives_the_same_map(cells):
    blocks, names = cells
    first, again = (block_maps(blocks, names, seed=3).axes[0].collections[0].get_offsets() for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_cells_and_conditions_have_to_fit(cells):
    blocks, names = cells
    with pytest.raises(DataError, match="found 159"):
        block_maps(blocks, names[:-1])
