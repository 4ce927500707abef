import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import Comparison
from pyro_causalcell.errors import DataError
from pyro_causalcell.report import write_comparison


@pytest.fixture
def compared():
    """Made-up scores: own lies halfway, and the Pearson correlation cannot tell."""
    values = {
        "own": ([3.0, 2.0], [0.5, 0.6]),
        "perturbed mean": ([4.0, 3.0], [np.nan, np.nan]),
        "technical duplicate": ([2.0, 1.0], [0.9, 0.8]),
    }
    rows = [
        (method, 0, 0, f"c{c}", metric, value)
        for method, both in values.items()
        for metric, value_c in zip(("rmse", "pearson_perturbed"), both, strict=True)
        for c, value in enumerate(value_c)
    ]
    table = pd.DataFrame(rows, columns=["method", "fold", "seed", "condition", "metric", "value"])
    left_out = pd.DataFrame({"fold": [0], "condition": ["rare"], "cells": [3]})
    return Comparison(table, left_out, ["Split(by hand)"], ["own"])


def test_everything_is_written(compared, tmp_path):
    page = write_comparison(compared, tmp_path / "new" / "there")
    assert page == tmp_path / "new" / "there" / "comparison.md"
    names = {"scores.csv", "summary.csv", "differences.csv", "calibrated.csv", "comparison.md"}
    assert {p.name for p in page.parent.iterdir()} == names | {"comparison.png", "calibrated.png"}
    assert (page.parent / "comparison.png").read_bytes().startswith(b"\x89PNG")
    pd.testing.assert_frame_equal(pd.read_csv(page.parent / "scores.csv"), compared.table)


def test_the_page_says_what_was_scored_and_how_far_to_trust_it(compared, tmp_path):
    text = write_comparison(compared, tmp_path).read_text()
    assert "3 methods, 2 held-out conditions, 1 folds" in text and "fold 0: Split(by hand)" in text
    assert "too few held-out cells: rare (3, fold 0)" in text
    assert "| RMSE (log1p CP10k) ↓ | 2.500 [2.000, 3.000] |" in text
    assert "**-1.000 [-1.000, -1.000]**" in text  # better than the baseline in every resample
    assert "| RMSE (log1p CP10k) ↓ | 0.500 [0.500, 0.500] |" in text
    assert "does not beat the perturbed mean on pearson_perturbed" in text
    assert "not defined" in text and "nan" not in text


def test_no_metric_that_tells_is_said_and_not_drawn_as_a_table(compared, tmp_path):
    only = compared.table[compared.table["metric"] == "pearson_perturbed"]
    text = write_comparison(Comparison(only, compared.left_out), tmp_path).read_text()
    assert text.rstrip().endswith("None.")


def test_nothing_is_written_for_an_unknown_reference(compared, tmp_path):
    with pytest.raises(DataError, match="no method named 'mean'"):
        write_comparison(compared, tmp_path / "new", "mean")
    assert not (tmp_path / "new").exists()
