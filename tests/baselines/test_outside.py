import importlib.util

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from pyro_causalcell.baselines import (
    CellPredictor,
    PredictionsFile,
    Predictor,
    TimeCellPredictor,
    TimePredictionsFile,
    TimePredictor,
    condition_means,
)
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError

ASKED = ["A", "A+B"]


@pytest.fixture
def means_cg(tiny_screen):
    return condition_means(tiny_screen, np.arange(tiny_screen.n_cells), ASKED)


@pytest.fixture
def table(tiny_screen, means_cg):
    frame = pd.DataFrame(means_cg, columns=tiny_screen.genes)
    frame.insert(0, "condition", ["A", "B+A"])
    return frame


@pytest.fixture
def cells(tiny_adata):
    """The cells of A and A+B as counts, as another program would write them."""
    adata = tiny_adata[tiny_adata.obs["target"].isin(ASKED)].copy()
    adata.obs = pd.DataFrame({"condition": adata.obs["target"].astype(str)})
    return adata


def test_means_of_a_table(tiny_screen, table, means_cg):
    found = PredictionsFile(table, tiny_screen, units="lognorm", name="theirs")
    assert isinstance(found, Predictor) and not isinstance(found, CellPredictor)
    assert (found.name, found.kind, found.conditions) == ("theirs", "means", ASKED)
    np.testing.assert_allclose(found.predict(["B+A", "A"]), means_cg[::-1])


def test_csv(tiny_screen, table, means_cg, tmp_path):
    table.to_csv(tmp_path / "theirs.csv", index=False)
    found = PredictionsFile(tmp_path / "theirs.csv", tiny_screen, units="lognorm")
    assert found.name == "theirs"
    np.testing.assert_allclose(found.predict(ASKED), means_cg)


def test_parquet(tiny_screen, table, means_cg, tmp_path):
    pytest.importorskip("pyarrow")
    table.to_parquet(tmp_path / "theirs.parquet")
    found = PredictionsFile(tmp_path / "theirs.parquet", tiny_screen, units="lognorm")
    np.testing.assert_allclose(found.predict(ASKED), means_cg)


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is installed")
def test_parquet_without_pyarrow_says_what_to_install(tiny_screen, tmp_path):
    (tmp_path / "theirs.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"pyro-causalcell\[parquet\]"):
        PredictionsFile(tmp_path / "theirs.parquet", tiny_screen, units="lognorm")


def test_cells_in_counts_with_other_genes_in_another_order(tiny_screen, cells, means_cg, tmp_path):
    extra = ad.AnnData(sp.csr_matrix(np.ones((cells.n_obs, 1), dtype=np.float32)), cells.obs.copy())
    extra.var_names = ["elsewhere"]
    theirs = ad.concat([cells[:, ::-1], extra], axis=1)
    theirs.obs = cells.obs
    theirs.uns["units"] = "counts"
    theirs.write_h5ad(tmp_path / "theirs.h5ad")
    found = PredictionsFile(tmp_path / "theirs.h5ad", tiny_screen)
    assert isinstance(found, CellPredictor) and found.kind == "cells"
    assert found.extra_genes == ["elsewhere"]
    np.testing.assert_allclose(found.predict(ASKED), means_cg, rtol=1e-6)
    of_a, of_ab = found.cells(ASKED, n_cells=11)
    assert of_a.shape == of_ab.shape == (11, 20)
    assert set(map(tuple, of_a)) <= set(map(tuple, found.cells(["A"], n_cells=99)[0]))


def test_own_predictions_say_their_units(tiny_screen, cells):
    cells.uns["causalcell"] = {"units": "counts"}
    assert PredictionsFile(cells, tiny_screen).predict(["A"]).shape == (1, 20)


def test_counts_of_some_genes_need_the_total_over_all(tiny_adata, cells, means_cg):
    tiny_adata.obs["total"] = 2.0 * np.asarray(tiny_adata.X.sum(1)).ravel()
    screen = Screen(tiny_adata, library="total")
    with pytest.raises(DataError, match=r"give obs\['library'\]"):
        PredictionsFile(cells, screen, units="counts")
    cells.obs["library"] = tiny_adata.obs["total"][cells.obs_names]
    expected = condition_means(screen, np.arange(screen.n_cells), ASKED)
    found = PredictionsFile(cells, screen, units="counts").predict(ASKED)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert not np.allclose(expected, means_cg)


def test_missing_conditions_are_named(tiny_screen, table):
    found = PredictionsFile(table, tiny_screen, units="lognorm", name="theirs")
    with pytest.raises(DataError, match="theirs lacks 2 of the 3 conditions to be scored: B, C"):
        found.predict(["A", "B", "C"])


def _with_nan(table):
    table.loc[1, ["gene3", "gene7"]] = np.nan


def _as_counts(table):
    table.iloc[:, 1:] = np.round(np.expm1(table.iloc[:, 1:]))


def _per_million(table):
    table.iloc[:, 1:] = np.log1p(100 * np.expm1(table.iloc[:, 1:]))


def _tiny_scale(table):
    table.iloc[:, 1:] /= 20


def _effects(table):
    table.iloc[:, 1:] -= 6.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns=["gene3", "gene5"], inplace=True), r"lacks 2 .*20 genes: gene3, gene5"),
        (_with_nan, r"2 values are NaN or infinite, of the conditions A\+B and the genes gene3, gene7"),
        (lambda t: t.__setitem__("condition", ["A+B", "B+A"]), r"several for A\+B"),
        (lambda t: t.__setitem__("condition", ["A", "Z"]), "unknown perturbation target 'Z'"),
        (lambda t: t.__setitem__("condition", ["A", None]), "1 rows have no condition"),
        (lambda t: t.drop(columns="condition", inplace=True), "'condition' not found"),
        (lambda t: t.__setitem__("note", ["x", "y"]), "text in note"),
        (_as_counts, "look like counts or another scale; pass units='counts'"),
        (_per_million, "at most 9.21, found values up to 1"),
        (_tiny_scale, "these are other units"),
        (_effects, "effects or scaled values"),
    ],
)
def test_wrong_tables(tiny_screen, table, change, message):
    change(table)
    with pytest.raises(DataError, match=message):
        PredictionsFile(table, tiny_screen, units="lognorm")


def test_units_must_be_stated_and_fit(tiny_screen, table, cells, tiny_adata):
    with pytest.raises(DataError, match="units 'counts' or 'lognorm' .* found None"):
        PredictionsFile(table, tiny_screen)
    with pytest.raises(DataError, match="mean of counts is not the mean of log"):
        PredictionsFile(table, tiny_screen, units="counts")
    cells.X = np.log1p(cells.X.toarray())
    with pytest.raises(DataError, match="look normalised; pass units='lognorm'"):
        PredictionsFile(cells, tiny_screen, units="counts")
    cells.X = -np.round(np.expm1(cells.X))
    with pytest.raises(DataError, match="expected counts, found values from -"):
        PredictionsFile(cells, tiny_screen, units="counts")
    tiny_adata.X = tiny_adata.X * 0.37
    cells.X = np.round(-cells.X)
    with pytest.raises(DataError, match="holds counts, and the screen normalised values"):
        PredictionsFile(cells, Screen(tiny_adata), units="counts")


def test_rows_that_are_neither_cells_nor_means(tiny_screen, table):
    mixed = pd.concat([table, table.iloc[:1]])
    with pytest.raises(DataError, match=r"some conditions have one row \(B\+A\) and others several \(A\)"):
        PredictionsFile(mixed, tiny_screen, units="lognorm")
    assert PredictionsFile(mixed, tiny_screen, units="lognorm", kind="cells").predict(["A"]).shape == (1, 20)
    with pytest.raises(DataError, match="several for A"):
        PredictionsFile(mixed, tiny_screen, units="lognorm", kind="means")


def test_files_that_are_no_predictions(tiny_screen, cells, tmp_path):
    with pytest.raises(DataError, match="found none"):
        PredictionsFile(tmp_path / "none.h5ad", tiny_screen)
    with pytest.raises(DataError, match=r"cannot read .*none\.csv"):
        PredictionsFile(tmp_path / "none.csv", tiny_screen)
    with pytest.raises(DataError, match=r"obs\['name'\] not found; columns are \['condition'\]"):
        PredictionsFile(cells, tiny_screen, column="name")
    cells.var_names = ["gene1", *cells.var_names[1:]]
    cells.uns["units"] = "counts"
    with pytest.raises(DataError, match="lacks 1 .* gene0"):
        PredictionsFile(cells, tiny_screen)


# ---------------------------------------------------------------- over time


def test_means_over_time(tiny_screen, table, means_cg, tmp_path):
    later = table.copy()
    later[tiny_screen.genes] += 0.5
    pd.concat([table.assign(day=2), later.assign(day=4.5)]).to_csv(tmp_path / "theirs.csv", index=False)
    found = TimePredictionsFile(tmp_path / "theirs.csv", tiny_screen, time="day", units="lognorm")
    assert isinstance(found, TimePredictor) and not isinstance(found, TimeCellPredictor)
    assert (found.name, found.times) == ("theirs", [2.0, 4.5])
    means_ctg = found.predict(["A+B", "A"], [4.5, 2.0])
    np.testing.assert_allclose(means_ctg, np.stack([means_cg[::-1] + 0.5, means_cg[::-1]], axis=1))
    with pytest.raises(DataError, match=r"lacks the times \[3.0\]; it has 2.0, 4.5"):
        found.predict(["A"], [2.0, 3.0])
    with pytest.raises(DataError, match="theirs at 2 lacks 1 of the 1 conditions"):
        found.predict(["B"], [2.0])


def test_cells_over_time(tiny_screen, cells, means_cg):
    cells.obs["time"] = np.where(np.arange(cells.n_obs) % 2, "1", "3")
    found = TimePredictionsFile(cells, tiny_screen, name="theirs", units="counts")
    assert isinstance(found, TimeCellPredictor)
    drawn = found.cells(ASKED, [1.0, 3.0], 10)
    assert [[x_ng.shape for x_ng in of_condition] for of_condition in drawn] == [[(10, 20)] * 2] * 2
    everything = found.cells(ASKED, [1.0, 3.0], 1000)
    np.testing.assert_allclose([np.concatenate(x).mean(0) for x in everything], means_cg)
    with pytest.raises(DataError, match="Pass time="):
        TimePredictionsFile(cells, tiny_screen, time="hour", units="counts")
    cells.obs["time"] = "soon"
    with pytest.raises(DataError, match="expected a number in 'time' for every row, found 120 others"):
        TimePredictionsFile(cells, tiny_screen, units="counts")
