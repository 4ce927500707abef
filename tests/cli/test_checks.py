"""``check`` and ``sbc`` write tables, figures and the verdict, on tiny data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import xarray as xr

from pyro_causalcell.inference import Fit

Run = Callable[..., Any]
PNG = b"\x89PNG"


def test_check_writes_statistics_and_calibration(cli: Run, run: Path, data: Path) -> None:
    result = cli("check", run, data, "--samples", 10, "--out", "new/checks")
    assert (result.code, result.err) == (0, [])
    assert {p.name for p in Path("new/checks").iterdir()} == {
        *("checks.csv", "checks.png", "checks.nc", "calibration.csv", "coverage.png", "pit.png", "risk.png")
    }
    assert result.out[0] == f"cells: {len(Fit.load(run).split.validation)} validation cells, not trained on"
    table = pd.read_csv("new/checks/checks.csv")
    assert set(table["condition"]) == {"control", "A", "B", "C", "D", "A+B"}
    outside = (table["observed"] < table["low"]) | (table["observed"] > table["high"])
    assert result.out[1].endswith(f"{outside.sum()} of 30 statistics")
    assert result.out[-2].startswith("calibration: ") and "calibrated" in result.out[-2]
    assert pd.read_csv("new/checks/calibration.csv")["gene_class"].iloc[-1] == "all"
    assert Path("new/checks/pit.png").read_bytes().startswith(PNG)
    with xr.open_dataset("new/checks/checks.nc", group="posterior_predictive", engine="h5netcdf") as group:
        assert group["zero_fraction"].dims == ("chain", "draw", "condition")


def test_check_of_chosen_statistics_groups_and_the_prior(cli: Run, run: Path, data: Path) -> None:
    words = ["--statistic", "maximum", "--statistic", "gene_mean", "--by", "batch", "--samples", 5, "--prior"]
    assert cli("check", run, data, *words, "--out", "C").code == 0
    table = pd.read_csv("C/checks.csv")
    assert list(table)[:2] == ["batch", "statistic"] and len(table) == 2 * (1 + 20)
    assert {p.name for p in Path("C").iterdir()} == {"checks.csv", "checks.png", "checks.nc"}
    assert cli("check", run, data, "--by", "all", "--samples", 5, "--out", "D").code == 0
    assert set(pd.read_csv("D/checks.csv")["group"]) == {"all cells"}


def test_check_of_another_file_has_no_training_cells_to_class_genes_by(
    cli: Run, run: Path, tiny_adata: ad.AnnData
) -> None:
    tiny_adata[:50].copy().write_h5ad("some.h5ad")
    result = cli("check", run, "some.h5ad", "--samples", 5, "--out", "C")
    assert result.code == 0 and "calibration: left out" in result.out[-2]
    assert not Path("C/calibration.csv").exists()


def test_mistakes(cli: Run, run: Path, data: Path) -> None:
    for words, said in (
        (["--statistic", "mode"], "unknown statistic 'mode'"),
        (["--by", "donor"], "obs['donor'] not found"),
    ):
        result = cli("check", run, data, *words, "--out", "C")
        assert result.code == 2 and len(result.err) == 1 and said in result.err[0]


def test_sbc_writes_ranks_and_verdict(cli: Run, own_model: Path) -> None:
    sizes = ["--targets", 1, "--genes", 5, "--cells", 10, "--replicates", 4, "--draws", 9, "--epochs", 2]
    result = cli("sbc", own_model, *sizes, "--quiet", "--out", "S")
    assert (result.code, result.err) == (0, [])
    assert pd.read_csv("S/ranks.csv").shape == (4, 2)
    table = pd.read_csv("S/sbc.csv")
    assert table["quantity"].tolist() == ["z[0]", "z[1]"]
    assert result.out[0].split(":")[0] in ("uniform", "rejected") and result.out[-1] == "sbc: S"
    assert Path("S/sbc.png").read_bytes().startswith(PNG)


def test_sbc_names_the_factor_in_the_way(cli: Run) -> None:
    result = cli("sbc", "sparse-shift", "--out", "S")
    assert result.code == 2 and "--settings.min_effect 0" in result.err[0]
