"""``interpret`` writes signatures, attributions, gene sets and kinds of doubles, on tiny data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import pandas as pd
import pytest

Run = Callable[..., Any]


@pytest.fixture
def gmt(tmp_path: Path) -> Path:
    path = tmp_path / "sets.gmt"
    genes = [f"gene{g}" for g in range(20)]
    path.write_text("\n".join(["\t".join(["A", "", *genes[:5]]), "\t".join(["B", "", *genes[5:7]])]))
    return path


def files(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_everything(cli: Run, run: Path, data: Path, gmt: Path) -> None:
    pytest.importorskip("captum")
    pytest.importorskip("gseapy")
    result = cli("interpret", run, "--data", data, "--gmt", gmt, "--cells", 50, "--out", "new/words")
    assert (result.code, result.err) == (0, [])
    tables = {"signatures", "attributions", "enrichment", "interactions"}
    assert files("new/words") == {*(f"{t}.csv" for t in tables), "signatures.png", "interactions.png"}
    signatures = pd.read_csv("new/words/signatures.csv")
    assert list(signatures) == ["programme", "gene", "change", "standardised"] and len(signatures) == 3 * 20
    assert list(pd.read_csv("new/words/attributions.csv"))[2:] == ["attribution", "magnitude"]
    assert pd.read_csv("new/words/enrichment.csv")["gene_set"].tolist() == ["A"] * 3
    kinds = pd.read_csv("new/words/interactions.csv")
    assert kinds["double"].tolist() == ["A+B"] * 2 and set(kinds["source"]) == {"measured", "predicted"}
    assert any(line.startswith("enrichment: 1 of 2 gene sets") for line in result.out)
    assert result.out[-2] == f"predicted: 1 {kinds['kind'].iloc[1]}"
    assert result.out[-1] == "interpretation: new/words"


def test_without_cells_and_gene_sets(cli: Run, run: Path) -> None:
    result = cli("interpret", run, "--cells", 50)
    assert result.code == 0
    assert files("interpretation") == {
        "signatures.csv",
        "signatures.png",
        "interactions.csv",
        "interactions.png",
    }
    assert set(pd.read_csv("interpretation/interactions.csv")["source"]) == {"predicted"}


def test_without_doubles(cli: Run, tiny_adata: ad.AnnData) -> None:
    tiny_adata[tiny_adata.obs["target"] != "A+B"].copy().write_h5ad("singles.h5ad")
    words = ["--perturbation", "target", "--control", "non-targeting", "--latents", 2, "--epochs", 1]
    assert cli("fit", "singles.h5ad", *words, "--warm-start", 0, "--quiet", "--out", "R").code == 0
    result = cli("interpret", "R", "--out", "I")
    assert "interactions: left out, the screen has no doubles" in result.out
    assert files("I") == {"signatures.csv", "signatures.png"}


def test_without_captum_the_rest_is_written(
    cli: Run, run: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = cli("interpret", run, "--data", data, "--cells", 20, "--out", "I")
    assert result.code == 0 and "pip install" in next(x for x in result.out if x.startswith("attributions"))
    assert "attributions.csv" not in files("I") and "interactions.csv" in files("I")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("A,gene1,gene2\n", "line 1"),
        ("A\tnone\tX1\tX2\n", "same names and the same case"),
    ],
)
def test_broken_gene_sets(cli: Run, run: Path, gmt: Path, content: str, said: str) -> None:
    gmt.write_text(content)
    result = cli("interpret", run, "--gmt", gmt, "--out", "I")
    assert result.code == 2 and len(result.err) == 1 and said in result.err[0]
    assert not list(Path("I").iterdir())


def test_other_mistakes(cli: Run, run: Path, data: Path) -> None:
    Path("file").write_text("")
    for words, said in (
        (["--gmt", "no.gmt"], "no.gmt"),
        (["--data", "no.h5ad"], "no.h5ad"),
        (["--out", "file"], "found the file"),
    ):
        result = cli("interpret", run, *words)
        assert result.code == 2 and len(result.err) == 1 and said in result.err[0]
