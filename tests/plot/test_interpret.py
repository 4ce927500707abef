import numpy as np
import pandas as pd
import pytest

from pyro_causalcell import plot
from pyro_causalcell.errors import DataError


@pytest.fixture
def signatures():
    genes = ["a", "b", "c", "d"]
    return pd.DataFrame([[3.0, -4.0, 0.1, 0.0], [0.0, 2.0, 0.1, -1.0]], ["k1", "k2"], genes)


@pytest.fixture
def doubles():
    return pd.DataFrame(
        {
            "double": ["A+B", "A+C", "B+C", "C+D"],
            "source": ["predicted", "measured", "measured", "measured"],
            "kind": ["suppressed", "additive", "dominant", "unknown"],
            "residual_share": [0.6, 0.1, 0.5, np.nan],
            "size_ratio": [0.3, 1.8, 1.0, np.nan],
        }
    )


def test_leading_genes_stand_in_the_order_of_their_programmes(signatures):
    ax, bar = plot.signature_heatmap(signatures, n_genes=2).axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["b", "a", "d"]
    assert ax.images[0].get_array().tolist() == [[-4.0, 2.0], [3.0, 0.0], [0.0, -1.0]]
    assert ax.images[0].get_clim() == (-4.0, 4.0)


def test_chosen_programmes(signatures):
    ax = plot.signature_heatmap(signatures, ["k2"], n_genes=1).axes[0]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["k2"]
    with pytest.raises(DataError, match="k3"):
        plot.signature_heatmap(signatures, ["k3"])


def test_each_source_has_a_panel_and_each_kind_a_shape(doubles):
    figure = plot.interaction_map(doubles)
    measured, predicted = figure.axes
    assert (measured.get_title(loc="left"), predicted.get_title(loc="left")) == ("measured", "predicted")
    assert [text.get_text() for text in measured.texts] == ["B+C"]  # those that add are not named
    assert [text.get_text() for text in predicted.texts] == ["A+B"]
    assert measured.get_xlim() == predicted.get_xlim()
    drawn = [points.get_offsets().tolist() for points in measured.collections if len(points.get_offsets())]
    assert [[1.8, 0.1]] in drawn and [[1.0, 0.5]] in drawn
    (legend,) = figure.legends
    assert {text.get_text() for text in legend.get_texts()} == {"additive", "dominant", "suppressed"}


def test_nothing_to_draw_is_said(doubles):
    with pytest.raises(DataError, match="no double"):
        plot.interaction_map(doubles[doubles["kind"] == "unknown"])
    with pytest.raises(DataError, match="residual_share"):
        plot.interaction_map(doubles.drop(columns="residual_share"))
