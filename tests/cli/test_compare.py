"""The command that puts fits and other programs' predictions beside the baselines."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.baselines import condition_means
from pyro_causalcell.data import Screen

Run = Callable[..., Any]
COLUMNS = ("--perturbation", "target", "--control", "non-targeting")
FILES = {"scores.csv", "summary.csv", "differences.csv", "calibrated.csv"}
FILES |= {"comparison.md", "comparison.png", "calibrated.png"}


@pytest.fixture
def theirs(tiny_adata: ad.AnnData, tmp_path: Path) -> Path:
    """Means of every condition, as another program would write them."""
    screen = Screen(tiny_adata)
    names = screen.conditions[1:]
    means = condition_means(screen, np.arange(screen.n_cells), names)
    table = pd.DataFrame(means, columns=screen.genes).assign(condition=names)
    table.to_csv(tmp_path / "theirs.csv", index=False)
    return tmp_path / "theirs.csv"


def test_baselines_alone(cli: Run, data: Path) -> None:
    result = cli("compare", data, *COLUMNS, "--folds", 2, "--seeds", 2, "--out", "new/C")
    assert (result.code, result.err) == (0, [])
    assert result.out[0] == "5 held-out conditions, 2 folds"
    assert result.out[-1] == "comparison: new/C/comparison.md"
    assert {p.name for p in Path("new/C").iterdir()} == FILES
    scores = pd.read_csv("new/C/scores.csv")
    assert set(scores["seed"]) == {0, 1} and set(scores["fold"]) == {0, 1}
    (duplicate,) = [line for line in result.out if line.startswith("technical duplicate")]
    mean = pd.read_csv("new/C/summary.csv").query("method == 'technical duplicate' and metric == 'rmse'")
    assert duplicate == f"technical duplicate: RMSE {mean['mean'].item():.4f}"


def test_a_run_is_compared_on_its_own_test_cells(cli: Run, data: Path, fit_words: Run, theirs: Path) -> None:
    assert cli(*fit_words("run", "--hold-out", "A+B")).code == 0
    words = ["--run", "run", "--predictions", theirs, "--units", "lognorm", "--cells", 25]
    result = cli("compare", data, *COLUMNS, *words, "--out", "C")
    assert (result.code, result.err) == (0, [])
    assert result.out[0] == "1 held-out conditions, 1 folds"
    scores = pd.read_csv("C/scores.csv")
    assert list(dict.fromkeys(scores["method"]))[:2] == ["run", "theirs"]
    assert "e_distance" in set(scores.loc[scores["method"] == "run", "metric"])
    assert "e_distance" not in set(scores.loc[scores["method"] == "theirs", "metric"])


def test_cells_that_a_run_was_not_fitted_to(
    cli: Run, data: Path, fit_words: Run, tiny_adata: ad.AnnData
) -> None:
    assert cli(*fit_words("one", "--hold-out", "A+B")).code == 0
    assert cli(*fit_words("two", "--hold-out", "D")).code == 0
    tiny_adata[:300].copy().write_h5ad("part.h5ad")
    tiny_adata.layers["more"] = tiny_adata.X * 2
    for words, parts in [
        (["part.h5ad", "--run", "one"], ["run one was fitted to other cells"]),
        ([data, "--run", "one", "--run", "two"], ["runs one and two kept other cells"]),
        ([data, "--run", "one", "--split", "random"], ["leave out --split"]),
    ]:
        result = cli("compare", *words, *COLUMNS, "--out", "C")
        assert result.code == 2 and len(result.err) == 1
        assert all(part in result.err[0] for part in parts), result.err[0]
        assert not Path("C/comparison.md").exists()


def test_a_run_without_test_cells(cli: Run, run: Path, data: Path) -> None:
    result = cli("compare", data, *COLUMNS, "--run", run, "--out", "C")
    assert result.code == 2 and "expected held-out test cells, found none" in result.err[0]


def test_mistakes_are_told(cli: Run, data: Path, theirs: Path) -> None:
    Path("file").write_text("")
    for words, part in [
        (["--predictions", theirs], "pass --units or set uns['units']"),
        (["--split", "held-out-combinations"], "found 1 for 5 folds"),
        (["--reference", "mean"], "no method named 'mean'"),
        (["--out", "file"], "expected a folder as --out"),
        (["--split", "guides"], "one of held-out-perturbations"),
        (["--min-cells", 1000], "lower --min-cells"),
    ]:
        folds = [] if part.startswith("found 1") else ["--folds", 2]
        out = [] if "--out" in words else ["--out", "C"]
        result = cli("compare", data, *COLUMNS, *folds, *words, *out)
        assert result.code == 2 and len(result.err) == 1, result
        assert part in result.err[0], result.err[0]


def test_conditions_left_out_are_named(cli: Run, tiny_adata: ad.AnnData) -> None:
    of_d = np.flatnonzero(tiny_adata.obs["target"] == "D")
    tiny_adata[np.setdiff1d(np.arange(tiny_adata.n_obs), of_d[20:])].copy().write_h5ad("few.h5ad")
    words = ["--split", "random", "--folds", 2, "--min-cells", 8]
    result = cli("compare", "few.h5ad", *COLUMNS, *words, "--out", "C")
    assert result.out[:2] == ["4 held-out conditions, 2 folds", "left out, too few cells: D"]
    assert "D (4, fold 1)" in Path("C/comparison.md").read_text()


def test_a_run_is_scored_a_second_time_with_what_it_leaves(cli: Run, data: Path, fit_words: Run) -> None:
    assert cli(*fit_words("run", "--hold-out", "A+B")).code == 0
    result = cli("compare", data, *COLUMNS, "--run", "run", "--residuals", "--out", "C")
    assert (result.code, result.err) == (0, [])
    scores = pd.read_csv("C/scores.csv").set_index(["method", "metric"])["value"]
    assert scores["run, with residuals", "l2"] < scores["run", "l2"]  # three epochs leave much
