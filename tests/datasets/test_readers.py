import gzip

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import io, sparse

from pyro_causalcell.data import Screen, held_out_perturbations
from pyro_causalcell.datasets import read_norman2019, read_replogle2022, replogle_pathways
from pyro_causalcell.errors import DataError

BAD = "NegCtrl1_NegCtrl0__NegCtrl1_NegCtrl0"
IDENTITIES = [
    # guide, good_coverage, number_of_cells
    ("KLF1_NegCtrl0__KLF1_NegCtrl0", True, 1),
    ("NegCtrl0_BAK1__NegCtrl0_BAK1", True, 1),
    ("SET_KLF1__SET_KLF1", True, 1),
    ("TGFBR2_IGDCC3__TGFBR2_IGDCC3_2", True, 1),
    ("NegCtrl10_NegCtrl0__NegCtrl10_NegCtrl0", True, 1),
    (BAD, True, 1),
    ("KLF1_NegCtrl0__KLF1_NegCtrl0", False, 1),
    ("KLF1_NegCtrl0__KLF1_NegCtrl0", True, 2),
]
KEPT = ["KLF1", "BAK1", "SET+KLF1", "TGFBR2+IGDCC3", "control"]


def counts(n, g):
    return np.random.default_rng(0).poisson(3.0, (n, g)).astype(np.float32) + 1


def write_geo(folder, packed):
    x_ng = counts(9, 4)
    barcodes = [f"BC{n}-1" for n in range(9)]  # the last has no identity
    text = {
        "genes.tsv": "ENSG1\tKLF1\nENSG2\tBAK1\nENSG3\tDUP\nENSG4\tDUP\n",
        "barcodes.tsv": "".join(f"{b}\n" for b in barcodes),
        "cell_identities.csv": pd.DataFrame(
            {
                "cell_barcode": barcodes[:8],
                "guide_identity": [i[0] for i in IDENTITIES],
                "read_count": 100,
                "UMI_count": 10,
                "coverage": 10.0,
                "gemgroup": [1, 1, 2, 2, 1, 1, 1, 1],
                "good_coverage": [i[1] for i in IDENTITIES],
                "number_of_cells": [i[2] for i in IDENTITIES],
            }
        )[::-1].to_csv(index=False),
    }
    io.mmwrite(folder / "GSE133344_filtered_matrix.mtx", sparse.coo_matrix(x_ng.T.astype(int)))
    for name, content in text.items():
        (folder / f"GSE133344_filtered_{name}").write_text(content)
    if packed:
        for path in list(folder.iterdir()):
            with gzip.open(f"{path}.gz", "wb") as file:
                file.write(path.read_bytes())
            path.unlink()
    return x_ng


@pytest.mark.parametrize("packed", [False, True])
def test_norman_from_geo(tmp_path, packed):
    x_ng = write_geo(tmp_path, packed)
    adata = read_norman2019(tmp_path, "geo")
    assert adata.obs["target"].tolist() == KEPT
    np.testing.assert_array_equal(adata.X.toarray(), x_ng[:5])
    assert adata.obs["batch"].tolist() == ["1", "1", "2", "2", "1"]
    assert adata.var_names.tolist() == ["KLF1", "BAK1", "DUP_ENSG3", "DUP_ENSG4"]
    assert adata.uns["dropped_cells"] == {
        "no guide identity": 1,
        "poor guide coverage": 1,
        "more than one cell": 1,
        f"guide {BAD}": 1,
    }
    screen = Screen(adata, control="control", batch="batch", guide="guide")
    screen.require_counts()
    assert "IGDCC3+TGFBR2" in screen.conditions


def test_norman_geo_folder_that_does_not_fit(tmp_path):
    write_geo(tmp_path, False)
    genes = tmp_path / "GSE133344_filtered_genes.tsv"
    whole = genes.read_text()
    genes.write_text("ENSG1\tKLF1\n")
    with pytest.raises(DataError, match=r"1 genes x 9 barcodes, found \(4, 9\)"):
        read_norman2019(tmp_path, "geo")
    genes.write_text(whole)
    identities = tmp_path / "GSE133344_filtered_cell_identities.csv"
    identities.write_text("cell_barcode,guide\nBC0-1,A\n")
    with pytest.raises(
        DataError, match=r"columns \['cell_barcode', 'guide_identity', .*found \['cell_barcode', 'guide'\]"
    ):
        read_norman2019(tmp_path, "geo")
    identities.unlink()
    with pytest.raises(DataError, match=r"one file \*cell_identities.csv or .*found \[\]"):
        read_norman2019(tmp_path, "geo")


def h5ad(path, x, obs, var=None, layers=None):
    obs = pd.DataFrame(obs, index=[f"c{n}" for n in range(len(x))])
    var = pd.DataFrame(var or {}, index=[f"ENSG{g}" for g in range(x.shape[1])])
    ad.AnnData(sparse.csr_matrix(x), obs=obs, var=var, layers=layers).write_h5ad(path)
    return path


def test_norman_from_scperturb(tmp_path):
    obs = {
        "guide_id": [
            "KLF1_NegCtrl0__KLF1_NegCtrl0",
            "SET_KLF1__SET_KLF1",
            "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0",
            BAD,
        ],
        "perturbation": ["KLF1", "SET_KLF1", "control", "control"],
        "gemgroup": [1, 2, 3, 4],
        "nperts": [1, 2, 0, 0],
    }
    adata = read_norman2019(h5ad(tmp_path / "n.h5ad", counts(4, 5), obs), "scperturb")
    assert adata.obs["target"].tolist() == ["KLF1", "SET+KLF1", "control"]
    assert adata.uns["dropped_cells"] == {f"guide {BAD}": 1}
    assert Screen(adata, control="control", batch="batch").targets == ["KLF1", "SET"]


def test_norman_from_cpa(tmp_path):
    x_ng = counts(4, 5)
    obs = {
        "guide_ids": ["KLF1", "KLF1,SET", "", ""],
        "guide_identity": [
            "KLF1_NegCtrl0__KLF1_NegCtrl0",
            "KLF1_SET__KLF1_SET",
            "NegCtrl0_NegCtrl0__NegCtrl0_NegCtrl0",
            BAD,
        ],
        "gemgroup": [1, 2, 3, 4],
    }
    path = h5ad(tmp_path / "n.h5ad", np.log1p(x_ng), obs, layers={"counts": sparse.csr_matrix(x_ng)})
    adata = read_norman2019(path, "cpa")
    assert adata.obs["target"].tolist() == ["KLF1", "KLF1+SET", "control"]
    Screen(adata, control="control").require_normalised()
    Screen(adata, control="control", layer="counts").require_counts()


@pytest.mark.parametrize(("schema", "column"), [("scperturb", "perturbation"), ("cpa", "guide_ids")])
def test_norman_h5ad_of_another_schema(tmp_path, schema, column):
    path = h5ad(tmp_path / "n.h5ad", counts(2, 3), {"gene": ["A", "B"]})
    with pytest.raises(DataError, match=rf"expected obs columns \[.*'{column}'.*found \['gene'\]"):
        read_norman2019(path, schema)
    with pytest.raises(DataError, match="expected schema 'geo', 'scperturb' or 'cpa', found 'gears'"):
        read_norman2019(path, "gears")


def replogle_file(path):
    obs = {
        "gem_group": [1, 2, 1, 2, 1, 1],
        "gene": ["EXOSC1", "non-targeting", "MED1", "EXOSC1", "non-targeting", "TP53"],
        "sgID_AB": [f"g{n}|h{n}" for n in range(6)],
        "UMI_count": 100.0,
    }
    x_ng = counts(6, 4)
    adata = ad.AnnData(
        x_ng,
        obs=pd.DataFrame(obs, index=[f"c{n}" for n in range(6)]),
        var=pd.DataFrame({"gene_name": ["A", "B", "C", "D"]}, index=[f"ENSG{g}" for g in range(4)]),
    )
    adata.write_h5ad(path)
    return x_ng


def test_replogle(tmp_path):
    path = tmp_path / "k562.h5ad"
    x_ng = replogle_file(path)
    whole = read_replogle2022(path)
    assert whole.shape == (6, 4) and not whole.isbacked
    assert whole.uns["dropped_cells"] == {"targets not asked for": 0}
    part = read_replogle2022(path, targets=["EXOSC1", "MED1", "NOPE"], genes=["D", "B"])
    np.testing.assert_array_equal(part.X, x_ng[:5][:, [1, 3]])
    assert part.uns["dropped_cells"] == {"targets not asked for": 1}
    assert part.uns["targets_without_cells"] == ["NOPE"]
    screen = Screen(part, batch="batch", guide="guide", gene_symbols="gene_name")
    assert screen.genes == ["B", "D"] and screen.targets == ["EXOSC1", "MED1"]
    pathway = [t for t in replogle_pathways()["EXOSOME"] if t in screen.targets]
    assert held_out_perturbations(screen, pathway).test.tolist() == [0, 3]


def test_replogle_mistakes(tmp_path):
    path = tmp_path / "k562.h5ad"
    replogle_file(path)
    with pytest.raises(DataError, match="found 5 cells and 0 genes|found 6 cells and 0 genes"):
        read_replogle2022(path, genes=["Z"])
    other = h5ad(tmp_path / "o.h5ad", counts(2, 3), {"gene": ["A", "B"]})
    with pytest.raises(DataError, match=r"\['sgID_AB', 'gem_group'\] missing"):
        read_replogle2022(other)


def test_pathways_have_the_sizes_of_the_paper():
    pathways = replogle_pathways()
    # LSM5 stands twice in the released spliceosome list, which the paper counts as 35
    assert [len(set(p)) for p in pathways.values()] == [20, 34, 26, 23, 97, 43, 53, 40]
    assert sum(len(p) for p in pathways.values()) == len({t for p in pathways.values() for t in p}) == 336
