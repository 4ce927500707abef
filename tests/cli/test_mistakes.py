"""Bad input: exit code 2, one line on stderr that says what is wrong and what to do, nothing written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pytest
import torch

Run = Callable[..., Any]
COLUMNS = ("--perturbation", "target", "--control", "non-targeting")


def assert_mistake(result: Any, *parts: str) -> None:
    assert result.code == 2, result
    assert result.out == [] and len(result.err) == 1, result
    assert result.err[0].startswith("pyro-causalcell: ")
    for part in parts:
        assert part in result.err[0], result.err[0]


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["expected a command: simulate, fit"]),
        (["fti"], ["unknown command 'fti'", "did you mean fit?"]),
        (["fit"], ["missing DATA, --perturbation, --out", "pyro-causalcell fit --help"]),
        (["graph", "run"], ["missing --out"]),
        (["graph", "run", "--out"], ["--out", "expected one argument"]),
        (["graph", "run", "more", "--out", "G.csv"], ["unexpected argument 'more'"]),
        (
            ["graph", "run", "--uot", "G.csv", "--out", "G.csv"],
            ["unknown option --uot", "did you mean --out?"],
        ),
        (["report", "run", "--data", "cells.h5ad", "--out", "R"], ["DATA is given without --data"]),
        (
            ["predict", "r", "--perturb", "A", "--out", "P", "--cells", "many"],
            ["whole number", "--cells", "'many'"],
        ),
        (
            ["predict", "r", "--perturb", "A", "--out", "P", "--units", "tpm"],
            ["one of counts, lognorm", "'tpm'"],
        ),
        (
            ["fit", "d", *COLUMNS, "--out", "r", "--lr", "fast"],
            ["expected a number above 0 for --lr, found 'fast'"],
        ),
        (
            ["fit", "d", *COLUMNS, "--out", "r", "--lr", "-1"],
            ["expected a number above 0 for --lr, found '-1'"],
        ),
        (
            ["fit", "d", *COLUMNS, "--out", "r", "--epochs", "0"],
            ["whole number above 0 for --epochs, found '0'"],
        ),
        (["fit", "d", *COLUMNS, "--out", "r", "--batch-size", "x"], ["for --batch-size, found 'x'"]),
        (
            ["fit", "d", *COLUMNS, "--out", "r", "--weights.z", "big"],
            ["names with values for --weights", "'big'"],
        ),
        (["fit", "--config", "none.yaml"], ["none.yaml"]),
        (["fit", "d", *COLUMNS, "--no-controls", "--out", "r"], ["--control NAME", "--no-controls", "both"]),
        (
            ["fit", "d", "--perturbation", "target", "--out", "r"],
            ["--control NAME", "--no-controls", "neither"],
        ),
        (["fit", "d", *COLUMNS, "--out", "r", "--resume", "--overwrite"], ["exclude each other"]),
        (["fit", "d", *COLUMNS, "--out", "r", "--settings.lr", "1"], ["pass it as --lr"]),
        (
            ["fit", "d", *COLUMNS, "--out", "r", "--likelihood", "nb", "--settings.likelihood", "nb"],
            ["likelihood is given twice"],
        ),
        (["evaluate", "r", "d", "--particles", "3", "--out", "E.nc"], ["at least 25 particles, found 3"]),
        (["report", "r", "d", "--particles", "3", "--out", "R.html"], ["at least 25 particles, found 3"]),
    ],
)
def test_arguments(cli: Run, words: list[str], parts: list[str]) -> None:
    assert_mistake(cli(*words), *parts)
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [("nope: 3\n", ["nope"]), ("data: [\n", ["parsing"]), ("epochs: ten\n", ["--epochs", "'ten'"])],
)
def test_a_configuration_that_cannot_be_used(cli: Run, text: str, parts: list[str]) -> None:
    Path("fit.yaml").write_text(text)
    assert_mistake(cli("fit", "d.h5ad", *COLUMNS, "--out", "run", "--config", "fit.yaml"), *parts)


# --------------------------------------------------------------------- data


@pytest.fixture
def fit_changed(cli: Run, tiny_adata: ad.AnnData) -> Run:
    """Fit the tiny screen after a change to it."""

    def run(change: Callable[[ad.AnnData], ad.AnnData | None], *more: object) -> Any:
        changed = change(tiny_adata)
        (tiny_adata if changed is None else changed).write_h5ad("d.h5ad")
        return cli("fit", "d.h5ad", *COLUMNS, "--epochs", 1, "--quiet", "--out", "run", *more)

    return run


def put(row: int, column: int, value: float) -> Callable[[ad.AnnData], None]:
    def change(adata: ad.AnnData) -> None:
        dense = adata.X.toarray()
        dense[row, column] = value
        adata.X = dense

    return change


def empty(cells: int = 0, genes: int = 0) -> Callable[[ad.AnnData], None]:
    def change(adata: ad.AnnData) -> None:
        dense = adata.X.toarray()
        dense[:cells] = 0
        dense[:, :genes] = 0
        adata.X = dense

    return change


def normalised(adata: ad.AnnData) -> None:
    adata.layers["raw_counts"] = adata.X.copy()
    adata.X = adata.X.log1p()


def repeated(axis: str) -> Callable[[ad.AnnData], None]:
    def change(adata: ad.AnnData) -> None:
        names = list(getattr(adata, f"{axis}_names"))
        names[1] = names[0]
        setattr(adata, f"{axis}_names", names)

    return change


def few(adata: ad.AnnData) -> ad.AnnData:
    kept = np.flatnonzero(adata.obs["target"] != "D").tolist()
    return adata[sorted(kept + np.flatnonzero(adata.obs["target"] == "D")[:2].tolist())].copy()


UNCHANGED = put(0, 0, 1.0)


@pytest.mark.parametrize(
    ("change", "more", "parts"),
    [
        (
            UNCHANGED,
            ["--perturbation", "guide_id"],
            ["obs['guide_id'] not found", "'target', 'guide', 'batch'"],
        ),
        (UNCHANGED, ["--batch", "lane"], ["obs['lane'] not found", "Pass --batch"]),
        (UNCHANGED, ["--layer", "counts"], ["layers['counts'] not found"]),
        (few, ["--min-cells", "10"], ["at least 10 cells", "(--min-cells)", "D (2)"]),
        (put(3, 4, np.nan), [], ["finite", "nan", "gene4"]),
        (put(3, 4, np.inf), [], ["finite", "inf", "gene4"]),
        (put(3, 4, -1.0), [], ["non-negative integers", "-1"]),
        (put(3, 4, 0.5), [], ["non-negative integers", "0.5"]),
        (normalised, [], ["raw_counts", "pass --layer raw_counts", "Gaussian"]),
        (UNCHANGED, ["--likelihood", "gaussian"], ["normalised", "--layer"]),
        (empty(cells=3), [], ["3 of 400 cells have zeros only", "--allow-empty"]),
        (empty(genes=2), [], ["2 of 20 genes are zero in every cell", "--allow-empty"]),
        (repeated("obs"), [], ["unique cell names", "obs_names_make_unique"]),
        (repeated("var"), [], ["unique gene names", "var_names_make_unique"]),
        (UNCHANGED, ["--hold-out", "E"], ["unknown target 'E'"]),
        (UNCHANGED, ["--hold-out", "A", "--hold-out", "A+B"], ["only single", "--hold-out"]),
        (UNCHANGED, ["--hold-out", "A", "--test", "0.1"], ["leave out --test"]),
        (UNCHANGED, ["--test", "0.95"], ["sum below 1", "--validation 0.1"]),
        (UNCHANGED, ["--settings.n_hiden", "3"], ["n_hiden", "did you mean n_hidden"]),
        (UNCHANGED, ["--model", "sparse-shfit"], ["no model named 'sparse-shfit'", "sparse-shift"]),
        (UNCHANGED, ["--model", "mine.py:Mine"], ["mine.py not found"]),
        (UNCHANGED, ["--device", "warp"], ["'warp'", "--device auto"]),
        (UNCHANGED, ["--warm-start", "3", "--epochs", "2"], ["--warm-start 3", "--epochs 2"]),
        (UNCHANGED, ["--settings.n_hidden", "-3"], ["SparseShift could not be built"]),
        (UNCHANGED, ["--settings.alpha", "-1"], ["the guide", "fails on a minibatch"]),
        (UNCHANGED, ["--weights.zz", "2"], ["zz", "z"]),
    ],
)
def test_fit(fit_changed: Run, change: Any, more: list[str], parts: list[str]) -> None:
    assert_mistake(fit_changed(change, *more), *parts)
    assert not Path("run").exists()


def test_no_control_cells(cli: Run, data: Path) -> None:
    words = ["--perturbation", "target", "--control", "NT", "--control", "none", "--out", "run"]
    assert_mistake(
        cli("fit", data, *words),
        "no control cells",
        "['NT', 'none']",
        "non-targeting (100 cells)",
        "Pass --control",
    )


@pytest.mark.parametrize("change", [empty(cells=3), empty(genes=2)])
def test_empty_cells_and_genes_are_kept_when_asked_for(fit_changed: Run, change: Any) -> None:
    assert fit_changed(change, "--allow-empty").code == 0


def test_files_that_are_no_screen(cli: Run, data: Path) -> None:
    whole = data.read_bytes()
    Path("cut.h5ad").write_bytes(whole[: len(whole) // 2])
    Path("text.h5ad").write_text("cell,gene\n")
    for name, part in [
        ("none.h5ad", "found none"),
        ("cut.h5ad", "cut short"),
        ("text.h5ad", "another format"),
    ]:
        assert_mistake(cli("fit", name, *COLUMNS, "--out", "run"), name, part)
    assert not Path("run").exists()


# --------------------------------------------------------------- run folders


def test_a_run_is_not_written_over(cli: Run, run: Path, fit_words: Run) -> None:
    shutil.copytree(run, "run")
    assert_mistake(cli(*fit_words("run")), "already holds a run", "--resume", "--overwrite")
    assert_mistake(cli(*fit_words("run", "--resume")), "other settings")  # it had batches and three epochs
    assert cli(*fit_words("run", "--overwrite")).code == 0
    Path("run/checkpoint.pt").unlink()
    assert_mistake(cli(*fit_words("run", "--resume")), "no checkpoint to go on from")
    Path("mine").mkdir()
    Path("mine/notes.txt").write_text("keep me")
    assert_mistake(cli(*fit_words("mine", "--overwrite")), "no run folder")
    assert_mistake(cli(*fit_words("mine/notes.txt")), "expected a folder")


@pytest.mark.parametrize(
    "words", [("graph",), ("latents", "DATA"), ("predict", "--perturb", "A"), ("report", "DATA")]
)
def test_every_reader_refuses_a_run_that_is_not_there(cli: Run, data: Path, words: tuple[str, ...]) -> None:
    command, *more = [str(data) if word == "DATA" else word for word in words]
    assert_mistake(cli(command, "nowhere", *more, "--out", "out"), "no fit at nowhere")


def newer(folder: Path) -> None:
    record = json.loads((folder / "fit.json").read_text())
    (folder / "fit.json").write_text(json.dumps(record | {"format": 99}))


def cut(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return change


def foreign(folder: Path) -> None:
    torch.save({"model": {"a": torch.zeros(3)}, "guide": {}}, folder / "weights.pt")


def not_tensors(folder: Path) -> None:
    torch.save([1, 2], folder / "weights.pt")


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (newer, ["format 99", "update pyro_causalcell"]),
        (cut("weights.pt"), ["weights.pt cannot be read", "cut short"]),
        (cut("fit.json"), ["fit.json is not a fit's record"]),
        (cut("split.npz"), ["damaged", "split"]),
        (foreign, ["weights.pt does not fit the model"]),
        (not_tensors, ["weights.pt", "not the state of a fit"]),
        (lambda folder: (folder / "weights.pt").unlink(), ["weights.pt not found"]),
        (lambda folder: (folder / "fit.json").unlink(), ["no fit at run", "unfinished run"]),
    ],
)
def test_damaged_runs(cli: Run, run: Path, change: Callable[[Path], None], parts: list[str]) -> None:
    shutil.copytree(run, "run")
    change(Path("run"))
    assert_mistake(cli("graph", "run", "--out", "G.csv"), *parts)
    assert not Path("G.csv").exists()


@pytest.mark.parametrize("change", [cut("checkpoint.pt"), lambda f: torch.save([1], f / "checkpoint.pt")])
def test_a_damaged_checkpoint_is_not_resumed(
    cli: Run, fit_words: Run, change: Callable[[Path], None]
) -> None:
    assert cli(*fit_words("run")).code == 0
    change(Path("run"))
    assert_mistake(cli(*fit_words("run", "--resume")), "checkpoint.pt")


# -------------------------------------------------------------------- others


def test_an_unknown_perturbation(cli: Run, run: Path) -> None:
    result = cli("predict", run, "--perturb", "A+b", "--out", "P.h5ad")
    assert_mistake(result, "unknown perturbation target 'b'", "did you mean B?")
    assert not Path("P.h5ad").exists()


def test_predictions_that_make_no_sense(cli: Run, run: Path) -> None:
    assert_mistake(
        cli("predict", run, "--perturb", "A", "--cells", 0, "--out", "P.h5ad"), "above 0 for --cells"
    )
    assert_mistake(cli("predict", run, "--perturb", "A+", "--out", "P.h5ad"), "empty part")


def test_places_that_cannot_be_written(cli: Run, run: Path, data: Path) -> None:
    Path("file").write_text("")
    assert_mistake(cli("graph", run, "--out", "file/G.csv"), "could not be written")
    assert_mistake(cli("graph", run, "--out", "."), "name a file in it")
    shutil.copy(data, "d.h5ad")
    assert_mistake(cli("latents", run, "d.h5ad", "--out", "d.h5ad"), "the file that is read")


def test_cells_of_another_screen(cli: Run, run: Path, tiny_adata: ad.AnnData) -> None:
    tiny_adata[:, :5].copy().write_h5ad("genes.h5ad")
    assert_mistake(cli("latents", run, "genes.h5ad", "--out", "L.h5ad"), "fitted genes", "gene5")
    tiny_adata.obs["target"] = tiny_adata.obs["target"].astype(str).replace("C", "X")
    tiny_adata.write_h5ad("targets.h5ad")
    assert_mistake(cli("latents", run, "targets.h5ad", "--out", "L.h5ad"), "X", "not fitted")


# ------------------------------------------------------------ a user's own pair


def own_words(data: Path, *more: object) -> list[object]:
    return ["fit", data, *COLUMNS, "--model", "mine.py:Mine", "--epochs", 1, "--quiet", "--out", "run", *more]


def test_own_pair_works_without_latents_and_likelihood(cli: Run, data: Path, own_model: Path) -> None:
    assert cli(*own_words(data, "--settings.width", 3)).code == 0
    own_model.unlink()  # the run keeps its own copy
    assert cli("latents", "run", data, "--out", "L.h5ad").code == 0
    result = ad.read_h5ad("L.h5ad")
    assert result.obsm["X_causalcell"].shape == (400, 3)
    assert len(result.uns["causalcell"]["programmes"]) == 3
    assert cli("predict", "run", "--perturb", "A", "--cells", 5, "--out", "P.h5ad").code == 0
    assert cli("evaluate", "run", data, "--particles", 25, "--quiet", "--out", "E.nc").code == 0
    assert_mistake(cli("graph", "run", "--out", "G.csv"), "no perturbation shifts")


def test_own_pair_told_about_latents_it_does_not_have(cli: Run, data: Path, own_model: Path) -> None:
    assert_mistake(
        cli(*own_words(data, "--latents", 3)), "neither Mine nor MineGuide has a setting 'n_latents'"
    )


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        (
            'pyro.sample("z", dist.Normal(loc',
            'pyro.sample("w", dist.Normal(loc',
            ["lacks ['z']", "has ['w']"],
        ),
        ("0.5).to_event(1)", "0.5)", ["guide", "mine.py"]),
        ("import pyro\n", "import pyrro\n", ["mine.py could not be imported", "pyrro"]),
        ("self.decode(z)", "self.decode(z[:, :1])", ["the model (Mine in", "fails on a minibatch"]),
        ("class MineGuide", "class Other", ["mine.py", "Other"]),
    ],
)
def test_own_pair_that_does_not_fit(
    cli: Run, data: Path, own_model: Path, old: str, new: str, parts: list[str]
) -> None:
    own_model.write_text(own_model.read_text().replace(old, new))
    assert_mistake(cli(*own_words(data)), *parts)
    assert not Path("run").exists()
