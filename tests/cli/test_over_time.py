"""Commands of fits that follow cells over time, on a tiny simulated time course."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import pytest
import xarray as xr

from pyro_causalcell.cli import main
from pyro_causalcell.simulate import temporal_scm

Run = Callable[..., Any]


@pytest.fixture(scope="session")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run fitted to snapshots "D1", "D2" and "D4". Tests read it and leave it alone."""
    folder = tmp_path_factory.mktemp("course")
    adata = temporal_scm(
        n_genes=40,
        n_invariant=1,
        n_responsive=2,
        n_perturbations=3,
        n_combinations=1,
        times=(1, 2, 4),
        cells_per_snapshot=20,
        truth_draws=5,
    )
    train = adata[adata.obs["split"] == "train"].copy()
    train.obs["day"] = [f"D{time:g}" for time in train.obs["time"]]
    train.write_h5ad(folder / "course.h5ad")
    words = ["--perturbation", "target", "--control", "control", "--time", "day", "--model", "temporal-scm"]
    words += ["--invariant", "1", "--responsive", "2", "--likelihood", "gaussian", "--epochs", "2"]
    words += ["--warm-start", "0", "--settings.n_hidden", "8", "--quiet", "--out", str(folder / "run")]
    assert main(["fit", str(folder / "course.h5ad"), *words]) == 0
    return folder / "run"


def test_times_are_predicted(cli: Run, course: Path) -> None:
    words = ["--perturb", "P01", "--perturb", "control", "--cells", 5]
    result = cli("predict", course, *words, "--time", 2, "--time", 4.5, "--out", "P.h5ad")
    assert (result.code, result.err) == (0, [])
    assert result.out[0].startswith("20 cells of 2 perturbations at 2 times (2, 4.5) x 40 genes in the units")
    cells = ad.read_h5ad("P.h5ad").obs
    assert cells.groupby(["condition", "time"], observed=True).size().to_dict() == {
        (name, time): 5 for name in ("P01", "control") for time in (2.0, 4.5)
    }
    every = cli("predict", course, *words, "--out", "P.h5ad")
    assert "at 3 times (1, 2, 4)" in every.out[0]


def test_the_lagged_graph_stands_beside_the_graph(cli: Run, course: Path) -> None:
    result = cli("graph", course, "--out", "new/G.csv")
    assert result.code == 0 and result.out[2].startswith("6 possible lagged edges, ")
    assert result.out[2].endswith(": new/G_lagged.csv")
    assert "cut" in pd.read_csv("new/G.csv")
    lagged = pd.read_csv("new/G_lagged.csv")
    assert list(lagged) == ["parent", "programme", "probability", "weight", "weight_sd"] and len(lagged) == 6


def test_other_models_have_no_lagged_graph(cli: Run, run: Path) -> None:
    result = cli("graph", run, "--out", "G.csv")
    assert result.code == 0 and len(result.out) == 2
    assert [path.name for path in Path().iterdir()] == ["G.csv"]


def test_trajectories(cli: Run, course: Path) -> None:
    words = ["--perturb", "P01+P02", "--perturb", "control", "--samples", 3, "--cells", 10]
    result = cli("trajectories", course, *words, "--out", "new/T.nc")
    assert (result.code, result.err) == (0, [])
    assert result.out[0].startswith("2 conditions x 3 times x 3 programmes, in standard deviations of a")
    moved = result.out[1:]
    assert len(moved) == 3 and all("from control at time" in line for line in moved)
    assert moved[0].startswith("- P01+P02, ") and "90 % interval" in moved[0]
    with xr.open_dataset("new/T.nc", engine="h5netcdf") as paths:
        assert list(paths) == ["mean", "low", "high", "cell_sd"]
        assert paths["time"].values.tolist() == [1, 2, 4]
    once = cli("trajectories", course, *words[:2], "--time", 2, "--time", 3, *words[4:], "--out", "T.nc")
    assert once.out[0].startswith("1 condition x 2 times")
    assert all("from time 2 at time" in line for line in once.out[1:])


@pytest.mark.parametrize("time", ["D2", "0.5", "nan", "inf"])
@pytest.mark.parametrize("command", ["predict", "trajectories"])
def test_times_that_are_none(cli: Run, course: Path, command: str, time: str) -> None:
    result = cli(command, course, "--perturb", "P01", "--time", 2, "--time", time, "--out", "X")
    assert result.code == 2 and len(result.err) == 1 and not Path("X").exists()
    assert f"expected numbers from 1 on for --time, found 2, {time}" in result.err[0]
    assert "(column day) are 1, 2, 4" in result.err[0]


@pytest.mark.parametrize("command", ["predict", "trajectories"])
def test_models_without_time(cli: Run, run: Path, command: str) -> None:
    result = cli(command, run, "--perturb", "A", "--time", 2, "--out", "X")
    assert result.code == 2 and "leave out --time" in result.err[0]


def test_what_cannot_be_followed(cli: Run, run: Path, course: Path) -> None:
    still = cli("trajectories", run, "--perturb", "A", "--out", "T.nc")
    assert still.code == 2 and "does not follow cells over time; fit temporal-scm" in still.err[0]
    unknown = cli("trajectories", course, "--perturb", "P1", "--out", "T.nc")
    assert unknown.code == 2 and "did you mean" in unknown.err[0]
    assert not Path("T.nc").exists()


def test_tracks_are_named_at_the_fit(cli: Run, course: Path) -> None:
    adata = ad.read_h5ad(course.parent / "course.h5ad")
    kept = adata[adata.obs["target"] == "P01"][:12].copy()  # simulated snapshots, here said to be four tracks
    cells = ad.concat([kept, adata[adata.obs["target"] == "control"][:12]], index_unique="-")
    cells.obs["day"], cells.obs["cell"] = ["D1", "D2", "D4"] * 8, [f"c{i // 3}" for i in range(24)]
    cells.write_h5ad("tracked.h5ad")
    words = ["--perturbation", "target", "--control", "control", "--time", "day", "--model", "temporal-scm"]
    words += ["--invariant", 1, "--responsive", 1, "--likelihood", "gaussian", "--epochs", 1, "--quiet"]
    words += ["--warm-start", 0, "--settings.n_hidden", 4, "--validation", 0.25, "--out", "tracked"]
    result = cli("fit", "tracked.h5ad", *words, "--track", "cell")
    assert (result.code, result.err) == (0, [])
    history = pd.read_csv("tracked/history.csv")
    assert (history["term_z_past"] == 0).all()
    wrong = cli("fit", "tracked.h5ad", *words[:-1], "other", "--track", "day")
    assert wrong.code == 2 and "one cell at a time" in wrong.err[0]
