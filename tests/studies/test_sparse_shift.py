"""The study of the sVAE+ paper: its grid, its numbers, and a quick run from data to table."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from pyro_causalcell.errors import CausalCellError
from pyro_causalcell.studies import run_study
from pyro_causalcell.studies.runner import Job
from pyro_causalcell.studies.sparse_shift import DEFAULT, METHODS, PAPER, RELEASED, score_job, table_jobs

COLUMNS = ["study", "setting", "method", "metric", "mean", "sd", "n_seeds", "paper"]
TABLE_1 = "Table 1: p = 15"


def test_the_whole_grid() -> None:
    jobs = table_jobs()
    assert len({job.key for job in jobs}) == len(jobs)
    settings = list(dict.fromkeys(job.setting for job in jobs))
    assert len(settings) == 1 + 3 + 3 + 3 + 3 + 3 + 5 + 6
    assert {job.seed for job in jobs} == {0, 1, 2, 3, 4}
    table_1 = {job.method for job in jobs if job.setting == TABLE_1}
    assert set(METHODS) < table_1 and "oracle" in table_1
    assert all(DEFAULT in {j.method for j in jobs if j.setting == s} for s in settings)


def test_every_number_of_the_paper_has_its_jobs() -> None:
    asked = {(job.setting, job.method) for job in table_jobs()}
    assert {key[:2] for key in PAPER} <= asked


@pytest.mark.parametrize(
    ("setting", "method", "metric", "number"),
    [
        (TABLE_1, RELEASED, "pearson_mcc", 0.88),
        (TABLE_1, RELEASED, "graph_f1", 0.51),
        (TABLE_1, "sVAE", "i_nll_paper", 318.26),
        (TABLE_1, "VAE", "r2_linear", 0.82),
        ("Table 4: p = 20", RELEASED, "pearson_mcc_heldout", 0.76),
        ("Table 5: s = 0.2", RELEASED, "i_nll_paper", 309.45),
        ("Table 6: e = 5", "iVAE", "pearson_mcc_heldout", 0.67),
        ("Table 7: s = 0.7 to 0.99", "sVAE", "i_nll_paper", 710.88),
        ("Table 8: e = 5 to 7", RELEASED, "pearson_mcc_heldout", 0.46),
        ("Table 10: 12 of 15 latents targeted", RELEASED, "pearson_mcc", 0.85),
    ],
)
def test_numbers_of_the_paper(setting: str, method: str, metric: str, number: float) -> None:
    assert PAPER[setting, method, metric] == number


def test_methods_without_a_graph_have_no_graph_scores_in_the_paper() -> None:
    assert not {m for _, method, m in PAPER if method in ("VAE", "β-VAE") and m.startswith("graph")}


@pytest.mark.parametrize("unknown", [{"tables": ("1", "2")}, {"methods": ["VAE", "VAE+"]}])
def test_unknown_tables_and_methods(tmp_path: Path, unknown: dict) -> None:
    with pytest.raises(
        CausalCellError, match=r"unknown \['(2|VAE\+)'\]; tables are .*'figure-4'.*methods .*VAE"
    ):
        run_study("sparse-shift", tmp_path, **unknown)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """Four rows of Table 1, one seed, at the quick size."""
    out = tmp_path_factory.mktemp("study")
    methods = [DEFAULT, "VAE", "oracle", "training mean"]
    settings = {"tables": ("1",), "methods": methods, "seeds": 1, "quick": True, "progress": False}
    return out, run_study("sparse-shift", out, **settings)


def test_quick_run_writes_the_table(quick: tuple[Path, pd.DataFrame]) -> None:
    out, table = quick
    written = pd.read_csv(out / "table.csv")
    assert list(written.columns) == list(table.columns) == COLUMNS
    assert set(written["study"]) == {"sparse-shift"} and set(written["setting"]) == {TABLE_1}
    assert set(written["method"]) == {DEFAULT, "VAE", "oracle", "training mean"}
    assert (written["n_seeds"] == 1).all() and np.isfinite(written["mean"]).all()
    by_name = written.set_index(["method", "metric"])
    assert by_name.loc[("VAE", "pearson_mcc"), "paper"] == 0.46
    assert pd.isna(by_name.loc[(DEFAULT, "pearson_mcc"), "paper"])
    assert {"graph_f1", "i_nll_clean", "i_nll_paper", "pareto_k_bad"} <= set(by_name.loc[DEFAULT].index)
    assert "graph_f1" not in by_name.loc["VAE"].index
    text = (out / "table.md").read_text()
    assert "Quick size" in text and "### Table 1: p = 15" in text and f"| {DEFAULT} |" in text


def test_the_table_holds_what_earlier_calls_finished(quick: tuple[Path, pd.DataFrame]) -> None:
    out, table = quick
    settings = {"tables": ("1",), "seeds": 1, "quick": True, "progress": False}
    again = run_study("sparse-shift", out, methods=["training mean"], **settings)
    pd.testing.assert_frame_equal(again, table)
    assert again["method"].drop_duplicates().tolist() == ["VAE", DEFAULT, "oracle", "training mean"]


def test_an_interrupted_fit_is_trained_to_its_end(tmp_path: Path) -> None:
    (job,) = table_jobs(("1",), methods=["VAE"], seeds=1, quick=True)
    first = score_job(job, tmp_path)
    record = json.loads((tmp_path / "fit.json").read_text())
    (tmp_path / "fit.json").write_text(json.dumps({**record, "finished": False}))  # as after Ctrl-C
    assert score_job(job, tmp_path) == pytest.approx(first, rel=1e-3)
    assert json.loads((tmp_path / "fit.json").read_text())["finished"] is True


def test_quick_run_draws_figures(quick: tuple[Path, pd.DataFrame]) -> None:
    out, _ = quick
    for name in ("table-1.png", "edge_reliability.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    curve = pd.read_csv(out / "edge_reliability.csv")
    assert curve["n"].sum() == 20 * 15  # every edge of the trained interventions once


def test_the_oracle_is_the_best_and_the_mean_the_worst(quick: tuple[Path, pd.DataFrame]) -> None:
    nll = quick[1].query("metric == 'i_nll_clean'").set_index("method")["mean"]
    assert nll["oracle"] < nll[DEFAULT] and nll["oracle"] < nll["training mean"]
    excess = quick[1].query("metric == 'excess_clean'").set_index("method")["mean"]
    assert excess[DEFAULT] == pytest.approx(nll[DEFAULT] - nll["oracle"])
    assert "oracle" not in excess.index


@pytest.mark.parametrize("method", ["condition mean", "PCA", "PCA, turned"])
def test_references(tmp_path: Path, method: str) -> None:
    (job,) = table_jobs(("1",), methods=[method], seeds=1, quick=True)
    scores = score_job(job, tmp_path)
    if method == "condition mean":
        assert set(scores) == {"i_nll_clean"} and scores["i_nll_clean"] > 0
    else:
        assert 0 < scores["pearson_mcc"] < 1 and "graph_f1" not in scores


def test_out_of_domain_cells_and_the_two_largest_shifts(tmp_path: Path) -> None:
    arguments = {"preset": "clean", "n_latents": 5, "sparsity": 0.2, "effect": 1.0}
    shifted = {**arguments, "out_of_domain": {"effect": 3.0}, "quick": True}
    scores = score_job(Job("sparse-shift", "Table 8: e = 1 to 3", "iVAE", 0, shifted), tmp_path)
    assert np.isfinite([scores["i_nll_clean"], scores["i_nll_paper"], scores["validation_loss"]]).all()
    assert 0 <= scores["pearson_mcc_heldout"] <= 1
    assert "edge_probability" not in scores and 0 <= scores["graph_f1"] <= 1
