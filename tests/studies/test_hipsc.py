import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.errors import CausalCellError, DataError
from pyro_causalcell.studies import hipsc


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return hipsc.simulated_screen("quick", seed=3)


@pytest.fixture(scope="module")
def file(cells, tmp_path_factory):
    """The simulated screen as a user's file: other names of columns and controls."""
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    names = cells.obs["target"].astype(str).replace("control", "NT")
    obs = pd.DataFrame({"gene": names, "day": cells.obs["time"].map("D{:.0f}".format)})
    ad.AnnData(cells.X, obs, pd.DataFrame(index=cells.var_names)).write_h5ad(path)
    return path


def test_grid_leaves_every_knock_out_out_once() -> None:
    jobs = hipsc.table_jobs(seeds=2)
    assert len({job.key for job in jobs}) == len(jobs) == 2 * (1 + len(hipsc.METHODS)) * 23 * 2
    assert len({job.arguments["target"] for job in jobs}) == 23
    assert {job.setting for job in jobs} == set(hipsc.SETTINGS)
    with pytest.raises(CausalCellError, match=r"unknown \['CellOT'\]"):
        hipsc.table_jobs(methods=("CellOT",))
    with pytest.raises(CausalCellError, match="pass data= as well"):
        hipsc.table_jobs(embeddings="table.csv")


def test_the_screen_has_the_shape_of_the_study() -> None:
    effort = hipsc.EFFORTS["full"].screen
    n_cells = (effort["n_perturbations"] + 1) * len(hipsc.DAYS) * effort["cells_per_snapshot"]
    assert abs(n_cells - 25_293) < 96
    assert effort["n_genes"] == 1000


def test_targets_are_genes_that_are_knocked_down(cells) -> None:
    x = pd.DataFrame(cells.X, columns=cells.var_names)
    control, perturbed = (
        (cells.obs["target"] == "control").to_numpy(),
        cells.uns["simulation"]["perturbations"],
    )
    for target in perturbed:
        own = (cells.obs["target"] == target).to_numpy()
        assert x.loc[own, target].mean() < 0.4 * x.loc[control, target].mean()
    assert cells.var_names.is_unique


def test_informative_embeddings_know_the_mechanism_and_random_ones_do_not(cells) -> None:
    record = cells.uns["simulation"]
    informative, random = cells.uns[hipsc.INFORMATIVE], cells.uns[hipsc.RANDOM]
    assert informative.shape == random.shape
    assert list(informative.index) == list(random.index) == list(record["perturbations"])
    big = {**hipsc.EFFORTS["quick"].screen, "n_perturbations": 40, "cells_per_snapshot": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hipsc.EFFORTS, "many", hipsc.EFFORTS["quick"]._replace(screen=big | {"n_genes": 90}))
        many = hipsc.simulated_screen("many")
    true_pv = many.uns["simulation"]["shift_pv"]
    for name, low, high in ((hipsc.INFORMATIVE, 0.85, 1.0), (hipsc.RANDOM, 0.0, 0.5)):
        table_pe = many.uns[name].to_numpy()
        slope = np.linalg.lstsq(table_pe - table_pe.mean(0), true_pv - true_pv.mean(0), rcond=None)[0]
        left = true_pv - true_pv.mean(0) - (table_pe - table_pe.mean(0)) @ slope
        assert low <= 1 - left.var() / true_pv.var() <= high


def test_genes_are_chosen_without_the_held_out_cells(file) -> None:
    cells = hipsc.read_screen(file)
    screen = hipsc._screen_of(cells)
    assert screen.describe().times == [2, 3, 4, 5]
    assert screen.targets == [f"P0{p}" for p in range(1, 6)]
    rows = hipsc._rows_without(screen, "P02")
    assert not (cells.obs["target"].to_numpy()[rows] == "P02").any()
    assert len(rows) == 5 * 4 * 24
    chosen = hipsc._variable_genes(screen, rows, 10)
    assert set(screen.targets) <= set(np.array(screen.genes)[chosen])
    changed = cells.copy()
    held = (cells.obs["target"] == "P02").to_numpy()
    changed.X[held] = np.random.default_rng(0).permuted(changed.X[held], axis=1)
    again = hipsc._screen_of(changed)
    np.testing.assert_array_equal(chosen, hipsc._variable_genes(again, rows, 10))


def test_a_file_without_the_columns_is_refused(cells, tmp_path) -> None:
    ad.AnnData(cells.X, cells.obs[["target"]], cells.var).write_h5ad(tmp_path / "timeless.h5ad")
    with pytest.raises(DataError, match="an obs column time or day"):
        hipsc.table_jobs(data=tmp_path / "timeless.h5ad")


def _scores(ours: list[float], other: list[float]) -> pd.DataFrame:
    rows = [
        ("informative embeddings", method, 0, f"P{i}", 2.0, "rmse", value)
        for method, values in (("ours", ours), ("no change", other))
        for i, value in enumerate(values)
    ]
    columns = ["setting", "method", "seed", "condition", "time", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_differences_are_ours_less_the_others() -> None:
    better = hipsc._differences(_scores([1.0, 2.0, 3.0], [1.5, 2.5, 3.6])).iloc[0]
    assert better["difference"] == pytest.approx(-1.6 / 3)
    assert better["better"] and better["n_conditions"] == 3  # a lower error
    worse = hipsc._differences(_scores([1.5, 2.5, 3.6], [1.0, 2.0, 3.0]))
    assert not worse["better"].any()
    assert "**-0.533" in hipsc._differences_page(
        hipsc._differences(_scores([1.0, 2.0, 3.0], [1.5, 2.5, 3.6]))
    )
    assert hipsc._differences(_scores([1.0], [1.0]).query("method != 'ours'")).empty


def test_the_quick_study_runs_and_goes_on(tmp_path) -> None:
    chosen = {"methods": ("ours", "RENGE"), "seeds": 1, "quick": True, "progress": False}
    table = hipsc.run(tmp_path, **chosen)
    by = table.set_index(["setting", "method", "metric"])["mean"].sort_index()
    for setting in hipsc.SETTINGS:
        assert by[setting, "technical duplicate", "rmse"] < by[setting, "no change", "rmse"]
        assert {"rmse", "e_distance"} <= set(by[setting, "ours"].index)
        assert "rmse" in by[setting, "RENGE"].index
    # What does not look at the embeddings is the same in both settings.
    np.testing.assert_allclose(*(by[s, "time-matched mean", "rmse"] for s in hipsc.SETTINGS))
    assert "simulated" in (tmp_path / "table.md").read_text()
    differences = pd.read_csv(tmp_path / "differences.csv")
    assert set(differences["reference"]) >= {"RENGE", "time-matched mean", "ridge in time, given embedding"}
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    hipsc.run(tmp_path, **chosen)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_a_users_file_is_studied(file, tmp_path) -> None:
    table = hipsc.run(tmp_path, data=file, methods=(), seeds=1, quick=True, progress=False)
    assert set(table["setting"]) == {hipsc.PRINCIPAL, hipsc.RANDOM}
    assert "Real data: screen.h5ad" in (tmp_path / "table.md").read_text()
    paper = table.set_index(["setting", "method", "metric"])["paper"]
    assert paper[hipsc.PRINCIPAL, "elastic net in time, PCA embedding", "rmse"] == 0.105
