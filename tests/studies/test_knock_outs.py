"""Knock-outs over time, one left out at a time: what both studies share, and which files they take."""

import hashlib
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.errors import CausalCellError, DataError
from pyro_causalcell.studies import knock_outs, run_study, runner
from pyro_causalcell.studies.knock_outs import HIPSC, IPSC2


@pytest.fixture(scope="module")
def cells() -> ad.AnnData:
    return knock_outs.simulated_screen(HIPSC, "quick", seed=3)


@pytest.fixture(scope="module")
def file(cells, tmp_path_factory):
    """The simulated screen as a user's file: other names of columns and controls."""
    path = tmp_path_factory.mktemp("screen") / "screen.h5ad"
    names = cells.obs["target"].astype(str).replace("control", "NT")
    obs = pd.DataFrame({"gene": names, "day": cells.obs["time"].map("D{:.0f}".format)})
    ad.AnnData(cells.X, obs, pd.DataFrame(index=cells.var_names)).write_h5ad(path)
    return path


@pytest.fixture(scope="module")
def clones() -> ad.AnnData:
    """A simulated screen as the file of the authors, with 16 further cells that the paper leaves out."""
    cells = knock_outs.simulated_screen(IPSC2._replace(control_share=1.0), "quick", seed=4)
    rows = np.r_[: cells.n_obs, :16]
    target = cells.obs["target"].astype(str).replace({"control": "SCR", "P01": "NKX2.5"}).to_numpy()[rows]
    stage = cells.obs["time"].map("D{:.0f}".format).to_numpy()[rows]
    clone = target + "-1"
    stage[-16:-10], target[-10:-4], clone[-4:] = "D23", "B2M", "SCR-2"
    names = [f"cell{i}" for i in range(len(rows))]
    obs = pd.DataFrame({"perturbation": target, "stage": stage, "clone": clone}, index=names)
    genes = ["NKX2-5" if name == "P01" else name for name in cells.var_names]
    return ad.AnnData(np.asarray(cells.X)[rows], obs, pd.DataFrame(index=genes))


@pytest.fixture
def in_this_process(monkeypatch) -> None:
    """Jobs without workers, which take seconds to start."""

    def run_jobs(jobs, work, out, **_) -> None:
        (out / "jobs").mkdir(exist_ok=True)
        for job in jobs:
            assert runner._one(job, work, out / "jobs", Path.cwd()) is None

    monkeypatch.setattr(knock_outs, "run_jobs", run_jobs)


def test_grid_leaves_every_knock_out_out_once() -> None:
    for protocol, n in ((HIPSC, 23), (IPSC2, 5)):
        jobs = knock_outs.table_jobs(protocol, seeds=2)
        assert len({job.key for job in jobs}) == len(jobs) == 2 * (1 + len(knock_outs.METHODS)) * n * 2
        assert len({job.arguments["target"] for job in jobs}) == n
        assert {job.setting for job in jobs} == set(knock_outs.SETTINGS)
        assert {job.study for job in jobs} == {protocol.name}
    with pytest.raises(CausalCellError, match=r"unknown \['CellOT'\]"):
        knock_outs.table_jobs(HIPSC, methods=("CellOT",))
    with pytest.raises(CausalCellError, match="pass data= as well"):
        knock_outs.table_jobs(HIPSC, embeddings="table.csv")


def test_results_of_finished_runs_are_still_found() -> None:
    jobs = knock_outs.table_jobs(HIPSC)
    assert jobs[0].key == "informative-embeddings-references-0_73073006"
    assert jobs[-1].key == "random-embeddings-lfads-2_647f5714"
    keys = "\n".join(job.key for job in jobs)
    assert hashlib.sha256(keys.encode()).hexdigest()[:16] == "e9864a2c4596ccce"
    assert not {job.key for job in jobs} & {job.key for job in knock_outs.table_jobs(IPSC2)}


@pytest.mark.parametrize(
    ("protocol", "published", "n_control", "times"),
    [(HIPSC, 25_293, 1_052, [2, 3, 4, 5]), (IPSC2, 24_766, 1_356, [0, 2, 6, 12])],
)
def test_the_screen_has_the_shape_of_the_study(protocol, published, n_control, times) -> None:
    full = {**protocol.screens["full"], "n_genes": 60, "n_invariant": 1}
    cells = knock_outs.simulated_screen(protocol._replace(screens={"full": full}))
    assert abs(cells.n_obs - published) < 50
    assert (cells.obs["target"] == "control").sum() == n_control
    assert sorted(cells.obs["time"].unique()) == times
    assert protocol.screens["full"]["n_genes"] == 1000


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


def test_nothing_has_acted_at_time_0() -> None:
    cells = knock_outs.simulated_screen(IPSC2, "quick", seed=3)
    names = cells.uns["simulation"]["perturbations"]
    own = {True: 0.0, False: 0.0}  # transcripts of the targets' own genes on day 0, and after it
    control = dict(own)
    for target in names:
        of_gene = pd.Series(np.asarray(cells[:, target].X).ravel(), cells.obs_names)
        for start in own:
            at = (cells.obs["time"] == 0) == start
            own[start] += of_gene[at & (cells.obs["target"] == target)].mean()
            control[start] += of_gene[at & (cells.obs["target"] == "control")].mean()
    assert own[True] > 0.7 * control[True]
    assert own[False] < 0.3 * control[False]


def test_informative_embeddings_know_the_mechanism_and_random_ones_do_not(cells) -> None:
    record = cells.uns["simulation"]
    informative, random = cells.uns[knock_outs.INFORMATIVE], cells.uns[knock_outs.RANDOM]
    assert informative.shape == random.shape
    assert list(informative.index) == list(random.index) == list(record["perturbations"])
    big = HIPSC.screens["quick"] | {"n_perturbations": 40, "cells_per_snapshot": 1, "n_genes": 90}
    many = knock_outs.simulated_screen(HIPSC._replace(screens={"quick": big}), "quick")
    true_pv = many.uns["simulation"]["shift_pv"]
    for name, low, high in ((knock_outs.INFORMATIVE, 0.85, 1.0), (knock_outs.RANDOM, 0.0, 0.5)):
        table_pe = many.uns[name].to_numpy()
        slope = np.linalg.lstsq(table_pe - table_pe.mean(0), true_pv - true_pv.mean(0), rcond=None)[0]
        left = true_pv - true_pv.mean(0) - (table_pe - table_pe.mean(0)) @ slope
        assert low <= 1 - left.var() / true_pv.var() <= high


def test_genes_are_chosen_without_the_held_out_cells(file) -> None:
    cells = knock_outs.read_screen(file, HIPSC)
    assert set(cells.uns["dropped_cells"].values()) == {0}
    screen = knock_outs._screen_of(cells, HIPSC)
    assert screen.describe().times == [2, 3, 4, 5]
    assert screen.targets == [f"P0{p}" for p in range(1, 6)]
    rows = knock_outs._rows_without(screen, "P02")
    assert not (cells.obs["target"].to_numpy()[rows] == "P02").any()
    assert len(rows) == 5 * 4 * 24
    chosen = knock_outs._variable_genes(screen, rows, 10)
    assert set(screen.targets) <= set(np.array(screen.genes)[chosen])
    changed = cells.copy()
    held = (cells.obs["target"] == "P02").to_numpy()
    changed.X[held] = np.random.default_rng(0).permuted(changed.X[held], axis=1)
    again = knock_outs._screen_of(changed, HIPSC)
    np.testing.assert_array_equal(chosen, knock_outs._variable_genes(again, rows, 10))


def test_a_file_without_the_columns_is_refused(cells, tmp_path) -> None:
    ad.AnnData(cells.X, cells.obs[["target"]], cells.var).write_h5ad(tmp_path / "timeless.h5ad")
    with pytest.raises(DataError, match="an obs column time or day or stage"):
        knock_outs.table_jobs(HIPSC, data=tmp_path / "timeless.h5ad")


def test_cells_that_the_paper_leaves_out_are_counted(clones, tmp_path) -> None:
    clones.copy().write_h5ad(tmp_path / "clones.h5ad")
    cells = knock_outs.read_screen(tmp_path / "clones.h5ad", IPSC2)
    dropped = {"at other times": 6, "of B2M": 6, "in strata of fewer than 20": 4}
    assert cells.uns["dropped_cells"] == dropped
    assert cells.n_obs == clones.n_obs - 16
    assert not cells.obs.isin(["D23", "B2M", "SCR-2"]).any(axis=None)
    screen = knock_outs._screen_of(cells, IPSC2)
    assert screen.targets == ["NKX2-5", "P02", "P03", "P04", "P05"]  # as the gene is called
    assert screen.describe().times == [0, 2, 6, 12]
    assert (screen.condition_n == 0).sum() == 4 * 24


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda obs: obs.drop(columns="clone"), r"column clone in .*found \['perturbation', 'stage'\]"),
        (lambda obs: obs.assign(clone=obs["clone"].where(obs["stage"] != "D2")), r"obs\['clone'\] for every"),
        (lambda obs: obs.assign(stage=obs["stage"].replace("D12", "D13")), r"days \[0, 2, 6, 12\], found"),
        (lambda obs: obs.assign(perturbation=obs["perturbation"].replace("SCR", "WT")), "no control cells"),
    ],
)
def test_a_file_that_does_not_fit_the_protocol_is_refused(clones, tmp_path, change, message) -> None:
    obs = change(clones.obs)
    ad.AnnData(clones.X, obs, clones.var).write_h5ad(tmp_path / "other.h5ad")
    with pytest.raises(DataError, match=message):
        knock_outs.table_jobs(IPSC2, data=tmp_path / "other.h5ad")


def _scores(ours: list[float], other: list[float]) -> pd.DataFrame:
    rows = [
        ("informative embeddings", method, 0, f"P{i}", 2.0, "rmse", value)
        for method, values in (("ours", ours), ("no change", other))
        for i, value in enumerate(values)
    ]
    columns = ["setting", "method", "seed", "condition", "time", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def test_differences_are_ours_less_the_others() -> None:
    better = knock_outs._differences(_scores([1.0, 2.0, 3.0], [1.5, 2.5, 3.6])).iloc[0]
    assert better["difference"] == pytest.approx(-1.6 / 3)
    assert better["better"] and better["n_conditions"] == 3  # a lower error
    worse = knock_outs._differences(_scores([1.5, 2.5, 3.6], [1.0, 2.0, 3.0]))
    assert not worse["better"].any()
    assert "**-0.533" in knock_outs._differences_page(
        knock_outs._differences(_scores([1.0, 2.0, 3.0], [1.5, 2.5, 3.6]))
    )
    assert knock_outs._differences(_scores([1.0], [1.0]).query("method != 'ours'")).empty


def test_the_quick_study_runs_and_goes_on(tmp_path) -> None:
    chosen = {"methods": ("ours", "RENGE"), "seeds": 1, "quick": True, "progress": False}
    table = run_study("hipsc", tmp_path, **chosen)
    by = table.set_index(["setting", "method", "metric"])["mean"].sort_index()
    for setting in knock_outs.SETTINGS:
        assert by[setting, "technical duplicate", "rmse"] < by[setting, "no change", "rmse"]
        assert {"rmse", "e_distance"} <= set(by[setting, "ours"].index)
        assert "rmse" in by[setting, "RENGE"].index
    # What does not look at the embeddings is the same in both settings.
    np.testing.assert_allclose(*(by[s, "time-matched mean", "rmse"] for s in knock_outs.SETTINGS))
    assert list(table["method"].unique())[:2] == ["ours", "RENGE"]
    assert "r2_means" not in set(table["metric"])
    assert "simulated" in (tmp_path / "table.md").read_text()
    differences = pd.read_csv(tmp_path / "differences.csv")
    assert set(differences["reference"]) >= {"RENGE", "time-matched mean", "ridge in time, given embedding"}
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "jobs").glob("*.json")}
    run_study("hipsc", tmp_path, **chosen)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_studies_keep_apart_in_one_folder(tmp_path, in_this_process) -> None:
    chosen = {"seeds": 1, "quick": True}
    other = run_study("ipsc2", tmp_path, methods=("RENGE",), **chosen)
    assert "Means leave out day 0" in (tmp_path / "table.md").read_text()
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert sorted(scores["time"].unique()) == [0, 2, 6, 12]
    own = scores.query("setting == 'random embeddings' and method == 'RENGE' and metric == 'rmse'")
    row = other.query("setting == 'random embeddings' and method == 'RENGE' and metric == 'rmse'").iloc[0]
    assert row["mean"] == pytest.approx(own.loc[own["time"] > 0, "value"].mean())
    assert list(other["study"].unique()) == ["ipsc2"]
    assert "RENGE" in set(other["method"])
    assert "r2_means" in set(other["metric"])
    assert other["paper"].isna().all()
    table = run_study("hipsc", tmp_path, methods=(), **chosen)
    assert "day 0" not in (tmp_path / "table.md").read_text()
    assert list(table["study"].unique()) == ["hipsc"]
    assert "RENGE" not in set(table["method"])


def test_ours_is_told_the_programmes_of_the_simulation_and_the_onset_where_it_is_known(
    clones, file, tmp_path
):
    clones.copy().write_h5ad(tmp_path / "clones.h5ad")
    told = {}
    for protocol, data in ((HIPSC, file), (IPSC2, tmp_path / "clones.h5ad")):
        for where in (None, data):
            job = next(
                job
                for job in knock_outs.table_jobs(protocol, data=where, seeds=1, methods=["ours"])
                if job.method == "ours"
            )
            settings = knock_outs._settings(job, knock_outs.EFFORTS["full"])
            told[protocol.name, where is None] = settings["n_responsive"], settings["onset"]
            assert settings["n_invariant"] == 10
    assert told == {
        ("hipsc", True): (6, 0.0),
        ("hipsc", False): (6, 0.0),
        ("ipsc2", True): (3, 0.0),
        ("ipsc2", False): (3, None),
    }


def test_a_users_file_is_studied(file, tmp_path, in_this_process) -> None:
    table = run_study("hipsc", tmp_path, data=file, methods=(), seeds=1, quick=True)
    assert set(table["setting"]) == {knock_outs.PRINCIPAL, knock_outs.RANDOM}
    assert "Real data: screen.h5ad. One" in (tmp_path / "table.md").read_text()
    paper = table.set_index(["setting", "method", "metric"])["paper"]
    assert paper[knock_outs.PRINCIPAL, "elastic net in time, PCA embedding", "rmse"] == 0.105


def test_a_file_of_clones_is_studied(clones, tmp_path, in_this_process) -> None:
    clones.copy().write_h5ad(tmp_path / "clones.h5ad")
    chosen = {"methods": ("RENGE",), "seeds": 1, "quick": True}
    table = run_study("ipsc2", tmp_path, data=tmp_path / "clones.h5ad", **chosen)
    page = (tmp_path / "table.md").read_text()
    assert "Cells left out: 6 at other times, 6 of B2M, 4 in strata of fewer than 20." in page
    paper = table.set_index(["setting", "method", "metric"])["paper"]
    assert paper[knock_outs.PRINCIPAL, "RENGE", "rmse"] == 0.7724
    assert paper[knock_outs.PRINCIPAL, "elastic net in time, PCA embedding", "r2_means"] == 0.7212
    assert paper.loc[knock_outs.RANDOM].isna().all()


def test_the_papers_table_5() -> None:
    own = {metric: value for (_, method, metric), value in IPSC2.paper.items() if method == "ours"}
    assert own == {
        "rmse": 0.6346,
        "r2_means": 0.9852,
        "mae": 0.4712,
        "pearson_control": 0.7510,
        "auroc_test_top": 0.8303,
        "auprc_test_top": 0.3061,
    }
    assert set(own) <= set(IPSC2.metrics)
