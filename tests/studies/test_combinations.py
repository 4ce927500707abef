"""The studies of doubles: their grids, the paper's numbers, and quick runs from data to tables."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pyro_causalcell import simulate
from pyro_causalcell.baselines import RATES, log_cp10k
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import CausalCellError, DataError
from pyro_causalcell.studies import combinations, run_study
from pyro_causalcell.studies.combination_jobs import (
    CDAG,
    DAG,
    EFFORTS,
    HALF,
    INTERACTIONS,
    METHODS,
    METRICS,
    MOSTLY,
    REFERENCES,
    RESPONSIVE,
    SINGLES,
    SIZES,
    Drawn,
    TrueProcess,
    _logged,
    _of_file,
    _paper_split,
    _with_rest,
    most_variable,
    score_job,
)
from pyro_causalcell.studies.combinations import PAPER, _macro_f1, jobs_of_norman, jobs_of_simulated
from pyro_causalcell.studies.runner import Job

BASELINES = {"control mean", "perturbed mean", "matching mean", "additive", "elastic net"}
CEILINGS = {"interpolated duplicate", "technical duplicate"}
SEEN = "half of the doubles seen"

# ---------------------------------------------------------------- grids and the paper's numbers


def test_grid_of_the_simulated_screen() -> None:
    jobs = jobs_of_simulated(size="full", seeds=2)
    assert len({job.key for job in jobs}) == len(jobs)
    by_regime = {s: {j.method for j in jobs if j.setting == s} for s in ("no double seen", SEEN)}
    assert by_regime[SEEN] - by_regime["no double seen"] == {f"{INTERACTIONS} ({k})" for k in SIZES}
    assert {REFERENCES, "SAMS-VAE (35)", f"{CDAG} (105)", f"{HALF} (105)"} <= by_regime["no double seen"]
    assert f"{MOSTLY} (10)" not in by_regime[SEEN]  # the capacity is split at the paper's largest size
    small = jobs_of_simulated(methods=["CPA-VAE"], seeds=1)
    assert [job.method for job in small] == [REFERENCES, "CPA-VAE (20)"] * 2


def test_grid_of_the_subset_leaves_each_complete_double_out_once() -> None:
    jobs = jobs_of_norman(methods=[], seeds=1)
    doubles = [job.arguments["double"] for job in jobs]
    assert doubles == [*("KLF1+MAP2K6", "KLF1+TGFBR2", "MAP2K3+MAP2K6", "MAP2K3+SLC38A2", "MAPK1+TGFBR2")]
    assert {job.method for job in jobs} == {REFERENCES}


@pytest.mark.parametrize("jobs", [jobs_of_simulated, jobs_of_norman])
def test_unknown_methods(jobs) -> None:
    with pytest.raises(CausalCellError, match=r"unknown methods \['SAMS'\]; they are .*'SAMS-VAE'"):
        jobs(methods=["SAMS", "SAMS-VAE"])


def test_every_number_of_the_paper_has_its_row(tmp_path: Path) -> None:
    (tmp_path / "geo").mkdir()
    rows = {job.method for job in jobs_of_norman(data=tmp_path / "geo")} | {"additive"}
    assert {method for _, method, _ in PAPER} <= rows
    assert {metric for _, _, metric in PAPER} <= set(METRICS)
    assert {setting for setting, _, _ in PAPER} == {"doubles", "singles", "doubles, top 1,000 genes"}
    sizes = {k for effort in EFFORTS.values() for k in effort.sizes}
    assert sizes <= set(RESPONSIVE) and all(0 < RESPONSIVE[k] < k for k in sizes)


@pytest.mark.parametrize(
    ("setting", "method", "metric", "number"),
    [
        ("doubles", "Discrepancy-VAE (35)", "rmse_cell_vs_mean", 0.6037),  # Table 2
        ("doubles", f"{CDAG} (105)", "rmse_cell_vs_mean", 0.4474),
        ("singles", "SAMS-VAE (10)", "rmse_cell_vs_mean", 0.4114),  # Table 9
        ("singles", f"{DAG} (105)", "rmse_cell_vs_mean", 0.4155),
        ("singles", "Discrepancy-VAE (105)", "mmd_paired", 0.3243),  # Table 10
        ("doubles", f"{HALF} (105)", "r2_regression", 0.9649),  # Table 11
        ("singles", f"{CDAG} (105)", "r2_regression", 0.9977),  # Table 12
        ("doubles", "additive", "l2", 2.5407),  # Table 13
        ("doubles", f"{CDAG} (35)", "pearson_control", 0.6869),
        ("doubles, top 1,000 genes", "additive", "rmse_cell_vs_mean", 0.4332),  # Table 14
    ],
)
def test_numbers_of_the_paper(setting: str, method: str, metric: str, number: float) -> None:
    assert PAPER[setting, method, metric] == number


# ---------------------------------------------------------------- the simulated screen


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """One model and the references in both regimes at the quick size."""
    out = tmp_path_factory.mktemp("study")
    settings = {"methods": ["CPA-VAE"], "seeds": 1, "quick": True, "progress": False}
    return out, run_study("simulated-screen", out, **settings)


def test_tables_of_the_simulated_screen(quick: tuple[Path, pd.DataFrame]) -> None:
    out, table = quick
    written = pd.read_csv(out / "table.csv").drop(columns="paper")
    pd.testing.assert_frame_equal(written, table.drop(columns="paper"))
    assert set(table["setting"]) == {
        s + more for s in ("no double seen", SEEN) for more in ("", ", 20 DE genes")
    }
    assert {"CPA-VAE (4)", "CPA-VAE (4), with residuals", "oracle"} | BASELINES | CEILINGS <= set(
        table["method"]
    )
    assert table["paper"].isna().all() and (table["n_seeds"] == 1).all()
    found = table[table["setting"] == SEEN].set_index(["method", "metric"])["mean"]
    assert set(METRICS) == set(found["CPA-VAE (4)"].index)
    # Two epochs leave nearly everything.
    assert found["CPA-VAE (4), with residuals", "l2"] < 0.9 * found["CPA-VAE (4)", "l2"]
    # The process itself is closest, and the duplicates see held-out cells.
    assert found["oracle", "l2"] < found["additive", "l2"] < found["CPA-VAE (4)", "l2"]
    assert found["oracle", "rmse_cell_vs_mean"] < found["additive", "rmse_cell_vs_mean"]
    assert "e_distance" in found["matching mean"].index
    rows = pd.read_csv(out / "rows.csv")
    assert set(rows["seed"]) == {0} and {"kind_f1", "l2"} < set(rows)
    text = (out / "table.md").read_text()
    assert (
        "Quick size" in text and f"### {SEEN}\n" in text and "difference from additive, 4 conditions" in text
    )
    assert (out / "no-double-seen.png").read_bytes().startswith(b"\x89PNG")


def test_differences_are_paired_over_doubles(quick: tuple[Path, pd.DataFrame]) -> None:
    out, _ = quick
    scores, found = pd.read_csv(out / "scores.csv"), pd.read_csv(out / "differences.csv")
    assert set(found["reference"]) == {"additive", "matching mean", "elastic net"}
    of = scores[(scores["setting"] == "no double seen") & (scores["metric"] == "l2")]
    by_method = of.pivot(index="condition", columns="method", values="value")
    assert len(by_method) == 8 and by_method.index.str.startswith("seed 0: ").all()
    keys = ["setting", "reference", "method", "metric"]
    row = found.set_index(keys).loc[("no double seen", "additive", "oracle", "l2")]
    assert row["difference"] == pytest.approx((by_method["oracle"] - by_method["additive"]).mean())
    assert row["low"] < row["difference"] < row["high"] < 0 and row["better"] and row["n_conditions"] == 8


def test_ours_are_compared_with_every_method(quick: tuple[Path, pd.DataFrame]) -> None:
    scores = pd.read_csv(quick[0] / "scores.csv")
    theirs, ours = "CPA-VAE (4), with residuals", "sVAE+ (ours) (4), with residuals"
    found = combinations._differences(scores.replace({"method": {theirs: ours}}))
    of_ours = found[found["method"] == ours]
    have_none = {"control rates", "perturbed rates", "matching rates", "additive rates"}  # a likelihood alone
    assert set(of_ours["reference"]) == set(scores["method"]) - {theirs} - have_none
    assert set(found["reference"][found["method"] == "oracle"]) == set(combinations.AGAINST)
    page = combinations._differences_page(found)
    assert f"difference of {ours} from each, 8 conditions" in page and "| oracle | " in page


def test_kinds_are_scored_against_the_simulator(quick: tuple[Path, pd.DataFrame]) -> None:
    out, table = quick
    kinds = pd.read_csv(out / "kinds.csv")
    none = kinds[kinds["setting"] == "no double seen"]
    assert len(none) == 8 * none["method"].nunique() and not {"interpolated duplicate"} & set(none["method"])
    truth = simulate.combination_screen(**EFFORTS["quick"].screen, seed=0).uns["simulation"]
    kind = dict(zip(truth["conditions"], truth["kind_c"], strict=True))
    assert all(kind[row.condition.removeprefix("seed 0: ")] == row.kind for row in none.itertuples())
    assert (none[none["method"] == "additive"]["predicted"] == "additive").all()
    f1 = table.query("metric == 'kind_f1' and setting == 'no double seen'").set_index("method")["mean"]
    assert f1["additive"] == pytest.approx(2 * 0.25 / (0.25 + 1) / 4)  # two of eight are, all are called so
    by_kind = pd.read_csv(out / "by_kind.csv").query("method == 'oracle' and metric == 'l2'")
    assert set(by_kind["kind"]) == {"additive", "dominant", "saturated", "suppressed"}


def test_macro_f1_by_hand() -> None:
    kinds = pd.DataFrame(
        {
            "kind": ["additive"] * 2 + ["dominant"] * 2,
            "predicted": ["additive", "other", "dominant", "additive"],
        }
    )
    # additive: one found of two, one of two calls right; dominant: one of two, all calls right.
    assert _macro_f1(kinds) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_pairs_seen_in_training_get_shifts_of_their_own(tmp_path: Path) -> None:
    jobs = jobs_of_simulated(size="quick", methods=[INTERACTIONS], seeds=1)
    (job,) = [job for job in jobs if job.method == f"{INTERACTIONS} (4)"]
    scores = score_job(job, tmp_path)
    assert set(scores["scores"]["method"]) == {job.method, f"{job.method}, with residuals"}
    record = json.loads((tmp_path / "fit.json").read_text())
    assert len(record["model"]["settings"]["interactions"]) == 4 and job.setting == SEEN


def test_the_oracle_draws_new_cells() -> None:
    adata = simulate.combination_screen(**EFFORTS["quick"].screen)
    process, conditions = TrueProcess(adata), list(adata.obs["target"].cat.categories[:3])
    drawn = Drawn(process, conditions, n_cells=30, n_kept=10, seed=2, n_genes=100)
    (x_ng,) = process.cells(conditions[1:2], 30, seed=3)
    np.testing.assert_allclose(drawn.predict(conditions)[1], x_ng.mean(0))
    found = drawn.moments(conditions)
    np.testing.assert_allclose(found.variance_cg[1], x_ng.var(0, ddof=1))
    (kept,) = drawn.cells(conditions[1:2], 100)
    assert kept.shape == (10, 100) and {tuple(row) for row in kept} <= {tuple(row) for row in x_ng}


# ---------------------------------------------------------------- Norman 2019


def test_a_fit_predicts_the_genes_of_the_screen_and_their_share_of_the_total(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(EFFORTS, "quick", EFFORTS["quick"]._replace(epochs=25, n_drawn=300))
    jobs = jobs_of_norman(methods=["CPA-VAE"], seeds=1, quick=True)
    scores = pd.DataFrame(score_job(jobs[-1], tmp_path)["scores"]).query("genes == 'all'")
    found = scores.set_index(["method", "metric"])["value"]
    # The genes of the subset hold a part of all counts: a fit that gave them all of it would be off by 5.
    assert found[jobs[-1].method, "l2"] < 2.5
    assert found[f"{jobs[-1].method}, with residuals", "l2"] < 1.0
    references = pd.DataFrame(score_job(jobs[0], tmp_path)["scores"]).query("metric == 'nll'")
    nll = references.set_index("method")["value"]
    assert list(nll.index) == [f"{rates} rates" for rates in RATES] and nll["matching rates"] < nll.min() + 5
    assert nll["control rates"] < found[jobs[-1].method, "nll"] < 3 * nll["control rates"]  # 25 epochs


def test_subset_quick(tmp_path: Path) -> None:
    table = run_study("norman", tmp_path, methods=[], seeds=1, quick=True, progress=False)
    assert set(table["setting"]) == {f"subset: one double left out{more}" for more in ("", ", 20 DE genes")}
    found = table.query("setting == 'subset: one double left out'").set_index(["method", "metric"])["mean"]
    assert (
        found["additive", "pearson_control"] > 0.8 and found["additive", "l2"] < found["control mean", "l2"]
    )
    scores = pd.read_csv(tmp_path / "scores.csv")
    assert (
        set(scores["condition"]) == {"KLF1+MAP2K6", "KLF1+TGFBR2"} and not (tmp_path / "kinds.csv").exists()
    )


def _norman_file(path: Path, layer: bool) -> Path:
    """Cells in the form of the CPA archive: 60 genes; KLF1 and BAK1 alone and together, SET alone."""
    rng = np.random.default_rng(0)
    labels = ["", "KLF1", "BAK1", "KLF1,BAK1", "OSR2,SLC4A1", "SET", "KLF1"]
    label_n = np.repeat(labels, [60, 150, 60, 20, 20, 30, 50])
    counts_ng = rng.poisson(8.0, (len(label_n), 60)).astype(np.float32)
    counts_ng[np.char.find(label_n, "KLF1") >= 0, 7] += 60
    counts_ng[label_n == "OSR2,SLC4A1", 11] += 500  # seen in held-out cells alone
    obs = pd.DataFrame({"guide_ids": label_n, "guide_identity": "g", "gemgroup": 1})
    obs.index = [f"cell{n}" for n in range(len(obs))]
    var = pd.DataFrame(index=[f"gene{g}" for g in range(60)])
    logged = sparse.csr_matrix(np.log1p(counts_ng))
    layers = {"counts": sparse.csr_matrix(counts_ng)} if layer else None
    ad.AnnData(logged, obs, var, layers=layers).write_h5ad(path)
    return path


def test_the_split_of_the_paper(tmp_path: Path) -> None:
    path = _norman_file(tmp_path / "norman.h5ad", layer=True)
    job = Job("norman", "file", REFERENCES, 0, {"data": str(path)})
    task = _of_file(job)
    screen, split = task.screen, task.split
    name_n = np.array(screen.conditions)[screen.condition_n]
    assert set(task.parts) == {"doubles", "singles"} and task.duplicate is None
    doubles, rows = task.parts["doubles"]
    assert doubles == ["BAK1+KLF1"] and set(name_n[rows]) == {"BAK1+KLF1"}  # OSR2 was not measured alone
    singles, rows = task.parts["singles"]
    assert singles == ["KLF1"]  # the others have too few cells
    np.testing.assert_array_equal(rows, np.flatnonzero(name_n == "KLF1")[:96])
    assert set(name_n[split.train]) == {"control", "KLF1", "BAK1", "SET"} == set(name_n[split.validation])
    assert len(split.train) + len(split.validation) + len(split.test) == screen.n_cells
    assert screen.is_counts and {"KLF1", "BAK1", "SET"} < set(SINGLES)


def test_genes_are_chosen_by_training_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _norman_file(tmp_path / "norman.h5ad", layer=True)
    monkeypatch.setattr("pyro_causalcell.studies.combination_jobs.N_GENES", 5)
    job = Job("norman", "file", REFERENCES, 0, {"data": str(path)})
    screen = _of_file(job).screen
    assert screen.n_genes == 5 and "gene7" in screen.genes and "gene11" not in screen.genes
    x_ng = screen.x(np.arange(screen.n_cells))
    assert screen.library_n.min() > x_ng.sum(1).max()  # totals of all genes
    whole = _with_rest(screen)  # what models are fitted to
    assert whole.genes == [*screen.genes, "all other genes"]
    np.testing.assert_array_equal(whole.x(np.arange(whole.n_cells))[:, :5], x_ng)
    np.testing.assert_allclose(whole.library_n, screen.library_n)
    logged_ng = _logged(screen).x(np.arange(screen.n_cells))
    np.testing.assert_allclose(logged_ng, log_cp10k(x_ng, screen.library_n), rtol=1e-5)


def test_most_variable_genes_by_hand() -> None:
    x = np.array([[0.0, 1, 5], [0, 3, 5], [4, 1, 5], [4, 3, 5.5]])
    obs = pd.DataFrame({"target": ["control", "control", "A", "A"]}, index=list("abcd"))
    screen = Screen(ad.AnnData(x, obs), control="control")  # variances 4, 1 and less
    assert most_variable(screen, np.arange(4), 1).tolist() == [0]
    assert most_variable(screen, np.arange(4), 2).tolist() == [0, 1]
    assert most_variable(screen, np.arange(2), 1).tolist() == [1]


def test_a_file_without_counts_is_scored_and_fitted_as_it_is(tmp_path: Path) -> None:
    path = _norman_file(tmp_path / "norman.h5ad", layer=False)
    jobs = jobs_of_norman(data=path, quick=True, methods=["Discrepancy-VAE", "CPA-VAE"], seeds=1)
    assert [job.method for job in jobs] == [REFERENCES, "Discrepancy-VAE (4)", "CPA-VAE (4)"]
    for job in jobs[1:]:
        found = pd.DataFrame(score_job(job, tmp_path / job.key)["scores"])
        assert set(found["part"]) == {"doubles", "singles"} and "nll" not in set(found["metric"])
        assert set(found["method"]) == {job.method, f"{job.method}, with residuals"}
        assert np.isfinite(found["value"]).all()


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing; pass the file, or GEO's folder"):
        run_study("norman", tmp_path / "out", data=tmp_path / "norman.h5ad")
    (tmp_path / "norman.h5ad").write_text("no")
    with pytest.raises(DataError, match="that cannot be read"):
        run_study("norman", tmp_path / "out", data=tmp_path / "norman.h5ad")
    assert not (tmp_path / "out").exists()


def test_without_a_complete_double_there_is_nothing_to_score(tiny_adata: ad.AnnData) -> None:
    part = tiny_adata[tiny_adata.obs["target"] != "B"].copy()
    part.obs["target"] = part.obs["target"].cat.remove_unused_categories()
    split = _paper_split(Screen(part), 0)
    assert len(split.test) == 60 and split.name == "norman"


def test_every_method_names_a_model_of_the_package() -> None:
    models = {model for model, _ in METHODS.values()}
    assert models == {"sparse-shift", "sams-vae", "conditional-vae", "discrepancy-vae", "weight-variant-scm"}
