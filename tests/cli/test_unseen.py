"""Targets that no training cell carries, from the command line."""

import anndata as ad
import pandas as pd
import pytest

from pyro_causalcell.inference import Fit


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.csv"
    values = {"A": [1.0, 0.0], "B": [0.0, 1.0], "C": [1.0, 0.1], "D": [0.0, 0.0], "NEW": [0.9, 0.0]}
    pd.DataFrame.from_dict(values, orient="index").to_csv(path)
    return path


def test_a_new_target_is_predicted_from_a_table(cli, fit_words, table, tmp_path) -> None:
    assert cli(*fit_words("run", "--embeddings", table, "--unseen", "NEW")).code == 0
    assert Fit.load(tmp_path / "run").screen.targets == ["A", "B", "C", "D", "NEW"]
    words = ("predict", "run", "--perturb", "NEW", "--perturb", "A+NEW", "--cells", 5, "--out", "new.h5ad")
    assert cli(*words).code == 0
    assert set(ad.read_h5ad(tmp_path / "new.h5ad").obs["condition"]) == {"NEW", "A+NEW"}


def test_pca_describes_genes_by_the_training_cells(cli, fit_words, tmp_path) -> None:
    assert cli(*fit_words("run", "--embeddings", "pca", "--unseen", "gene3", "--hold-out", "C")).code == 0
    fitted = Fit.load(tmp_path / "run")
    assert fitted.screen.targets == ["A", "B", "C", "D", "gene3"]
    assert fitted.dims.target_cells[2] == 0 and fitted.dims.n_embedding > 0
    assert cli("predict", "run", "--perturb", "gene3", "--cells", 3, "--out", "new.h5ad").code == 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--unseen", "NEW"], "expected --embeddings for the unseen targets NEW"),
        (["--embeddings", "pca", "--unseen", "NEW"], "expected genes of the screen"),
        (["--embeddings", "none.csv"], "expected a CSV file of embeddings at none.csv, found none"),
    ],
)
def test_mistakes_are_told(cli, fit_words, more, said) -> None:
    result = cli(*fit_words("run", *more))
    assert result.code == 2 and said in " ".join(result.err)


def test_an_unknown_target_is_told_how_it_could_be_known(cli, run) -> None:
    result = cli("predict", run, "--perturb", "NEW", "--out", "new.h5ad")
    assert result.code == 2 and "fit with embeddings of the targets" in " ".join(result.err)
