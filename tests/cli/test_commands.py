"""Each command does what it says, on tiny data."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pyro_causalcell import __version__, datasets, report, studies
from pyro_causalcell import cli as room
from pyro_causalcell.baselines import condition_means
from pyro_causalcell.data import Screen
from pyro_causalcell.inference import Fit

Run = Callable[..., Any]


def test_simulate_writes_counts_and_truth(cli: Run) -> None:
    words = ["--preset", "clean", "--n-interventions", 3, "--n-latents", 2, "--n-genes", 40]
    result = cli(
        "simulate", *words, "--cells-per-intervention", 10, "--n-control-cells", 5, "--out", "new/S.h5ad"
    )
    assert (result.code, result.err) == (0, [])
    adata = ad.read_h5ad("new/S.h5ad")
    assert adata.shape == (35, 40) and adata.obsm["z"].shape == (35, 2)
    assert adata.uns["simulation"]["preset"] == "clean"
    assert "--control control --latents 2" in result.out[-1]


def test_simulate_names_the_setting_that_does_not_fit(cli: Run) -> None:
    result = cli("simulate", "--preset", "paper", "--library-size", 100, "--out", "S.h5ad")
    assert result.code == 2 and len(result.err) == 1 and "library" in result.err[0]
    assert not Path("S.h5ad").exists()


@pytest.mark.parametrize(
    ("process", "words", "cells", "said"),
    [
        (
            "latent-scm",
            "--n-genes 40 --n-train 130 --n-test 26 --n-combinations 1 --cells-per-combination 5",
            161,
            (
                "13 perturbations",
                "--likelihood gaussian --model weight-variant-scm --invariant 7 --responsive 4",
            ),
        ),
        (
            "temporal-scm",
            "--n-genes 40 --n-perturbations 2 --n-combinations 1 --times [1,3] --cells-per-snapshot 5",
            40,
            (
                "3 perturbations",
                "--likelihood gaussian --time time --model temporal-scm --invariant 7 --responsive 4",
            ),
        ),
        (
            "screen",
            "--n-genes 60 --n-targets 7 --n-doubles 0 --cells-per-condition 3 --n-control-cells 9",
            30,
            ("7 perturbations", "--control control --latents 7"),
        ),
    ],
)
def test_simulate_chooses_a_process(cli: Run, process: str, words: str, cells: int, said: Any) -> None:
    result = cli("simulate", "--process", process, *words.split(), "--out", "S.h5ad")
    assert (result.code, result.err) == (0, [])
    adata = ad.read_h5ad("S.h5ad")
    assert adata.n_obs == cells and adata.uns["simulation"]["simulated"]
    for line, part in zip(result.out, said, strict=True):
        assert part in line


def test_simulate_takes_real_control_cells(cli: Run) -> None:
    counts = np.random.default_rng(0).poisson(3.0, (50, 20)).astype(np.float32)
    ad.AnnData(np.zeros((50, 20)), layers={"counts": counts}).write_h5ad("C.h5ad")
    words = "--process screen --n-targets 7 --n-doubles 0 --n-genes 20 --cells-per-condition 2".split()
    words += "--n-control-cells 400 --controls C.h5ad --layer counts".split()
    assert cli("simulate", *words, "--out", "S.h5ad").code == 0
    adata = ad.read_h5ad("S.h5ad")
    assert adata.X[:400].mean() == pytest.approx(3.0, rel=0.05)


def test_simulate_refuses_settings_of_another_process(cli: Run) -> None:
    result = cli("simulate", "--process", "screen", "--n-latents", 3, "--out", "S.h5ad")
    assert result.code == 2 and "--n-latents" in result.err[0] and "n_doubles" in result.err[0]
    result = cli("simulate", "--controls", "C.h5ad", "--out", "S.h5ad")
    assert result.code == 2 and "--controls" in result.err[0]
    assert not Path("S.h5ad").exists()


def test_fit_keeps_what_was_asked_for(cli: Run, fit_words: Run) -> None:
    result = cli(
        *fit_words("new/run", "--batch", "batch", "--likelihood", "poisson", "--seed", 5),
        *["--settings.min_effect", 0.25, "--weights.z", 2, "--lr", 0.01, "--test", 0.2],
    )
    assert (result.code, result.err) == (0, [])
    fit = Fit.load("new/run")
    assert fit.screen.batch == ["batch"] and fit.screen.control == ["non-targeting"] and fit.seed == 5
    chosen = fit.settings["model"]["settings"]
    assert (chosen["n_latents"], chosen["likelihood"]) == (3, "poisson")
    assert (chosen["n_hidden"], chosen["min_effect"]) == (16, 0.25)
    assert (fit.training["weights"], fit.training["lr"], len(fit.history)) == ({"z": 2.0}, 0.01, 2)
    assert len(fit.split.test) == 80
    assert [line.split(":")[0] for line in result.out][-2:] == ["run", "next"]


def test_zero_inflated_counts_from_fit_to_prediction(cli: Run, fit_words: Run, data: Path) -> None:
    assert cli(*fit_words("run", "--likelihood", "zinb")).code == 0
    assert Fit.load("run").model.zero_logit_g.shape == (20,)
    assert cli("check", "run", data, "--samples", 5, "--out", "checks").code == 0
    assert cli("evaluate", "run", data, "--particles", 25, "--out", "L.nc").code == 0
    assert cli("predict", "run", "--perturb", "A+B", "--cells", 5, "--out", "P.h5ad").code == 0
    assert ad.read_h5ad("P.h5ad").shape == (5, 20)


@pytest.mark.parametrize(
    ("held", "test_cells"), [(["A+B"], {"A+B"}), (["B+A"], {"A+B"}), (["C", "D"], {"C", "D"})]
)
def test_fit_holds_out_conditions(
    cli: Run, fit_words: Run, tiny_adata: ad.AnnData, held: list[str], test_cells: set[str]
) -> None:
    words = [word for name in held for word in ("--hold-out", name)]
    assert cli(*fit_words("run", *words)).code == 0
    split = Fit.load("run").split
    assert set(tiny_adata.obs["target"].iloc[split.test]) == test_cells
    assert not set(tiny_adata.obs["target"].iloc[split.train]) & test_cells


def test_fit_without_controls(cli: Run, tiny_adata: ad.AnnData) -> None:
    tiny_adata[tiny_adata.obs["target"] != "non-targeting"].copy().write_h5ad("perturbed.h5ad")
    words = ["--no-controls", "--latents", 2, "--epochs", 1, "--settings.n_hidden", 8, "--quiet"]
    assert cli("fit", "perturbed.h5ad", "--perturbation", "target", *words, "--out", "run").code == 0
    assert Fit.load("run").screen.control == []


def test_report_of_a_screen_without_controls(cli: Run) -> None:
    sizes = ["--n-interventions", 5, "--cells-per-intervention", 40, "--n-genes", 40, "--n-latents", 3]
    assert cli("simulate", *sizes, "--out", "S.h5ad").code == 0
    words = ["--no-controls", "--latents", 3, "--epochs", 2, "--settings.n_hidden", 16, "--quiet"]
    assert cli("fit", "S.h5ad", "--perturbation", "target", *words, "--out", "run").code == 0
    result = cli("report", "run", "S.h5ad", "--particles", 25, "--out", "R.html")
    assert result == (0, ["report: R.html"], [])
    assert "which was not measured here" in Path("R.html").read_text()


def test_fit_reads_a_file_that_stays_on_disk(cli: Run, fit_words: Run) -> None:
    assert cli(*fit_words("memory")).code == 0
    assert cli(*fit_words("disk", "--backed")).code == 0
    losses = [Fit.load(name).history["validation_loss"] for name in ("memory", "disk")]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_latents(cli: Run, run: Path, data: Path) -> None:
    assert cli("latents", run, data, "--out", "new/L.h5ad").code == 0
    result = ad.read_h5ad("new/L.h5ad")
    assert result.obsm["X_causalcell"].shape == result.obsm["X_causalcell_sd"].shape == (400, 3)
    assert (result.obsm["X_causalcell_sd"] > 0).all()
    assert list(result.uns["causalcell"]["programmes"]) == ["programme_1", "programme_2", "programme_3"]
    assert result.obs["target"].value_counts()["non-targeting"] == 100


def test_graph(cli: Run, run: Path) -> None:
    assert cli("graph", run, "--out", "new/G.csv").code == 0
    table = pd.read_csv("new/G.csv")
    assert list(table) == ["perturbation", "programme", "probability", "effect", "effect_sd"]
    assert len(table) == 4 * 3 and table["probability"].between(0, 1).all()


def test_direct_effects_stand_beside_the_graph(cli: Run, fit_words: Callable[..., list[str]]) -> None:
    assert cli(*fit_words("direct", "--settings.direct", "true")).code == 0
    result = cli("graph", "direct", "--out", "new/G.csv")
    assert result.code == 0 and result.out[-1].startswith("80 direct effects on genes, ")
    table = pd.read_csv("new/G_direct.csv")
    assert list(table) == ["perturbation", "gene", "effect", "effect_sd"] and len(table) == 4 * 20
    wrong = cli(*fit_words("wrong", "--settings.direct", "maybe"))
    assert wrong.code != 0 and "takes direct= one of [False, True], found 'maybe'" in wrong.err[-1]


def test_predict_repeated_names_and_lists(cli: Run, run: Path) -> None:
    assert (
        cli("predict", run, "--perturb", "A", "--perturb", "C+B", "--cells", 7, "--out", "P.h5ad").code == 0
    )
    result = ad.read_h5ad("P.h5ad")
    assert result.obs["condition"].value_counts().to_dict() == {"A": 7, "B+C": 7}
    assert result.uns["causalcell"]["units"] == "counts" and (result.X == np.round(result.X)).all()
    assert cli("predict", run, "--perturb", "[A, C+B]", "--cells", 7, "--out", "Q.h5ad").code == 0
    np.testing.assert_array_equal(ad.read_h5ad("Q.h5ad").X, result.X)


def test_predict_from_the_control_cells_of_a_file(
    cli: Run, run: Path, data: Path, tiny_adata: ad.AnnData
) -> None:
    words = ["--cells", 9, "--basal", data, "--units", "lognorm", "--out", "P.h5ad"]
    assert cli("predict", run, "--perturb", "A", *words).code == 0
    result = ad.read_h5ad("P.h5ad")
    assert set(tiny_adata.obs["target"][result.obs["basal_cell"]]) == {"non-targeting"}
    assert result.uns["causalcell"]["units"] == "lognorm"


def test_predict_adds_what_is_left_of_measured_means(cli: Run, run: Path, data: Path) -> None:
    words = ["predict", run, "--perturb", "A", "--perturb", "control", "--cells", 200, "--basal", data]
    assert cli(*words, "--units", "lognorm", "--out", "P.h5ad").code == 0
    assert cli(*words, "--measured", data, "--out", "Q.h5ad").code == 0
    bare, corrected = ad.read_h5ad("P.h5ad"), ad.read_h5ad("Q.h5ad")
    assert corrected.uns["causalcell"]["units"] == "lognorm" and corrected.uns["causalcell"]["residuals"]
    screen = Screen.from_spec(Fit.load(run).screen, ad.read_h5ad(data))
    measured = condition_means(screen, np.arange(screen.n_cells), ["A", "control"])
    of = [(bare.obs["condition"] == name).to_numpy() for name in ("A", "control")]
    gap = [
        np.abs(a.X[n].mean(0) - m).mean()
        for a in (bare, corrected)
        for n, m in zip(of, measured, strict=True)
    ]
    assert gap[2] < 0.7 * gap[0] and gap[3] < 0.7 * gap[1]


def test_residuals_are_of_log_normalised_values(cli: Run, run: Path, data: Path) -> None:
    words = ["predict", run, "--perturb", "A", "--measured", data, "--units", "counts", "--out", "P.h5ad"]
    result = cli(*words)
    assert result.code == 2 and "leave out --units counts" in result.err[0] and not Path("P.h5ad").exists()


def test_predict_needs_control_cells_to_start_from(cli: Run, run: Path, tiny_adata: ad.AnnData) -> None:
    tiny_adata[tiny_adata.obs["target"] == "A"].copy().write_h5ad("A.h5ad")
    result = cli("predict", run, "--perturb", "B", "--basal", "A.h5ad", "--out", "P.h5ad")
    assert result.code == 2 and "no control cells in A.h5ad" in result.err[0]


def test_evaluate_takes_held_out_cells_of_the_fitted_file(cli: Run, run: Path, data: Path) -> None:
    result = cli("evaluate", run, data, "--particles", 50, "--out", "new/E.nc", "--quiet")
    assert (result.code, result.err, len(result.out)) == (0, [], 5)
    fit = Fit.load(run)
    with xr.open_dataset("new/E.nc", engine="h5netcdf") as table:
        assert list(table) == ["nll", "pareto_k", "ess", "mc_se"]
        assert table.sizes["cell"] == len(fit.split.validation)
        assert table.attrs["cells"] == "validation cells, not trained on"
        assert table.attrs["n_particles"] == 50
        assert f"mean NLL: {float(table['nll'].mean()):.2f}" in result.out[1]
        assert set(table["condition"].values) <= set(fit.screen.conditions)


def test_evaluate_advises_more_particles_where_k_is_bad(cli: Run, run: Path, data: Path) -> None:
    few = cli("evaluate", run, data, "--particles", 25, "--out", "E.nc", "--quiet")
    assert "do not rank models" in few.out[-1] and "more --particles" in few.out[-1]


def test_evaluate_all_cells_of_the_fitted_file(cli: Run, run: Path, data: Path) -> None:
    words = ["--cells", "all", "--particles", 25, "--threads", 1, "--out", "E.nc", "--quiet"]
    assert cli("evaluate", run, data, *words).out[0] == "cells: 400 all cells, with those trained on"


@pytest.mark.parametrize(("k", "advice"), [(0.2, "can be compared"), (0.9, "do not rank models")])
def test_advice_follows_pareto_k(capsys: pytest.CaptureFixture[str], k: float, advice: str) -> None:
    cells = {"nll": [3.0, 5.0], "pareto_k": [0.1, k], "ess": [7.0, 9.0]}
    table = xr.Dataset({name: ("cell", values) for name, values in cells.items()})
    room._print_likelihood(table.assign_attrs(n_particles=10, cells="cells"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cells: 2 cells" and advice in lines[4]
    assert lines[1] == "mean NLL: 4.00 nats per cell, standard error 1.00"
    assert lines[2] == f"Pareto k above 0.7: {50 * (k > 0.7):.1f}% of cells"
    assert lines[3] == "effective particles: median 8.0 of 10"


def test_evaluate_takes_all_cells_of_another_file(
    cli: Run, run: Path, data: Path, tiny_adata: ad.AnnData
) -> None:
    tiny_adata[:30].copy().write_h5ad("other.h5ad")
    assert cli("evaluate", run, "other.h5ad", "--particles", 25, "--out", "E.nc", "--quiet").code == 0
    with xr.open_dataset("E.nc", engine="h5netcdf") as table:
        assert table.sizes["cell"] == 30
        assert table.attrs["cells"] == "all cells of a file that was not fitted"
    refused = cli("evaluate", run, "other.h5ad", "--cells", "validation", "--out", "F.nc", "--quiet")
    assert refused.code == 2 and "needs the fitted file" in refused.err[0]
    shuffled = tiny_adata[::-1].copy()  # as many cells of each condition, but the split's rows are others
    shuffled.write_h5ad("shuffled.h5ad")
    assert (
        cli("evaluate", run, "shuffled.h5ad", "--cells", "validation", "--out", "F.nc", "--quiet").code == 2
    )
    assert cli("evaluate", run, data, "--cells", "test", "--out", "F.nc", "--quiet").code == 2
    assert not Path("F.nc").exists()


def test_report(cli: Run, run: Path, data: Path) -> None:
    result = cli("report", run, data, "--particles", 30, "--out", "new/report.html")
    assert (result.code, result.out) == (0, ["report: new/report.html"])
    page = Path("new/report.html").read_text()
    assert page.startswith("<!doctype html>") or page.startswith("<!DOCTYPE html>")
    assert "programme" in page


def test_demo_fits_reports_and_tells_what_it_found(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = datasets.papalexi2021()
    chosen = np.random.default_rng(0).choice(whole.n_obs, 700, replace=False)
    part = whole[chosen, :40].copy()
    part = part[np.asarray(part.X.sum(1)).ravel() > 0, np.asarray(part.X.sum(0)).ravel() > 0].copy()
    monkeypatch.setattr(datasets, "papalexi2021", lambda: part)
    reported = []
    monkeypatch.setattr(
        report, "write_report", lambda fit, data, path, seed: reported.append((fit, data, path))
    )
    result = cli("demo", "--epochs", 2, "--quiet")
    assert (result.code, result.err) == (0, [])
    fit = Fit.load("demo/run")
    assert fit.settings["model"]["settings"]["n_latents"] == 10
    assert fit.screen.control == ["non-targeting"] and fit.screen.batch == ["bio_rep"] and fit.seed == 0
    assert len(pd.read_csv("demo/graph.csv")) == 25 * 10
    assert [(f.path, s.n_cells, p) for f, s, p in reported] == [
        (Path("demo/run"), part.n_obs, Path("demo/report.html"))
    ]
    assert result.out[-3:] == [
        "run: demo/run",
        "graph: demo/graph.csv",
        "report (open it in a browser): demo/report.html",
    ]
    assert any(line.startswith("- ") for line in result.out)


def test_study(cli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(studies, "run_study", lambda name, out, **more: asked.append((name, out, more)))
    assert cli("study", "sparse-shift", "--quick").out == ["study: sparse-shift"]
    assert cli("study", "sparse-shift", "--out", "there", "--workers", 2, "--quiet").out == ["study: there"]
    here = {"executor": "processes"}
    assert asked == [
        ("sparse-shift", Path("sparse-shift"), {"quick": True, "workers": 1, "progress": True, **here}),
        ("sparse-shift", Path("there"), {"quick": False, "workers": 2, "progress": False, **here}),
    ]
    words = ("--seeds", 1, "--full", "--methods", "SAMS-VAE", "--methods", "CPA-VAE", "--executor", "ray")
    assert cli("study", "simulated-screen", *words, "--quiet").out == ["study: simulated-screen"]
    assert asked[-1][2] == {
        "methods": ["SAMS-VAE", "CPA-VAE"],
        "seeds": 1,
        "full": True,
        "quick": False,
        "workers": 1,
        "executor": "ray",
        "progress": False,
    }
    monkeypatch.undo()
    foreign = cli("study", "sparse-shift", "--data", "norman.h5ad", "--out", "there")
    assert foreign.code == 2 and "sparse-shift has no setting ['data']" in foreign.err[0]
    absent = cli("study", "norman", "--data", "norman.h5ad", "--out", "there", "--quiet")
    assert absent.code == 2 and "norman.h5ad, found nothing" in absent.err[0] and not Path("there").exists()
    unknown = cli("study", "sparse-shfit", "--out", "there")
    assert unknown.code == 2 and "sparse-shift" in unknown.err[0] and not Path("there").exists()


def test_outputs_are_replaced_only_when_whole(
    cli: Run, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("L.h5ad").write_text("old")

    def full(self: ad.AnnData, path: Path) -> None:
        Path(path).write_text("half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ad.AnnData, "write_h5ad", full)
        result = cli("latents", run, data, "--out", "L.h5ad")
    assert result.code == 2 and len(result.err) == 1 and "No space left" in result.err[0]
    assert [p.name for p in Path().iterdir()] == ["L.h5ad"] and Path("L.h5ad").read_text() == "old"
    assert cli("latents", run, data, "--out", "L.h5ad").code == 0
    assert ad.read_h5ad("L.h5ad").n_obs == 400


def test_module_runs_from_another_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pyro_causalcell"]
    shown = subprocess.run([*command, "--version"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (shown.returncode, shown.stdout.split()[-1]) == (0, __version__)
    wrong = subprocess.run(
        [*command, "graph", "nowhere", "--out", "G.csv"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wrong.returncode == 2 and wrong.stdout == ""
    assert wrong.stderr.count("\n") == 1 and "no fit at nowhere" in wrong.stderr


def test_every_command_is_public() -> None:
    assert set(room.COMMANDS) == set(room.__all__) - {"main"}
