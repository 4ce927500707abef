"""Readers of public files: each checks the schema and brings targets, guides and batches to one form.

The result has obs ``target`` (``A``, ``A+B`` and one spelling of control), ``guide`` and ``batch``, all
categorical, beside the columns of the file, and says in ``uns["source"]`` and ``uns["dropped_cells"]``
where it comes from and how many cells were left out for which reason.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import anndata as ad
import numpy as np
import pandas as pd
from scipy import io, sparse

from pyro_causalcell.data import read
from pyro_causalcell.errors import DataError

__all__ = ["read_norman2019", "read_replogle2022"]

EXCLUDED_GUIDE = "NegCtrl1_NegCtrl0__NegCtrl1_NegCtrl0"
"""A control guide pair of Norman 2019 that its authors leave out."""

GEO_PARTS = {
    "matrix": "matrix.mtx",
    "genes": "genes.tsv",
    "barcodes": "barcodes.tsv",
    "identities": "cell_identities.csv",
}


def read_norman2019(path: str | Path, schema: Literal["geo", "scperturb", "cpa"]) -> ad.AnnData:
    """Reads Norman 2019 (K562, CRISPR activation, singles and pairs) from one of its public forms.

    ============= ================================================== ===================================
    schema        path                                               X
    ============= ================================================== ===================================
    ``geo``       folder with GSE133344's ``*matrix.mtx[.gz]``,      counts (CSR)
                  ``*genes.tsv[.gz]``, ``*barcodes.tsv[.gz]`` and
                  ``*cell_identities.csv[.gz]`` (filtered or raw)
    ``scperturb`` ``NormanWeissman2019_filtered.h5ad``               counts
    ``cpa``       ``Norman2019_raw.h5ad`` of the CPA archive         log-normalised, 5,000 genes; counts
                                                                     in ``layers["counts"]``, where kept
    ============= ================================================== ===================================

    Left out, and counted in ``uns["dropped_cells"]``: cells of the control guide pair
    NegCtrl1_NegCtrl0, as the data's authors do; in the GEO files also barcodes without an identity, with
    poor guide coverage, or that hold more than one cell.

    Args:
        path: The folder or file.
        schema: Which form it has.

    Returns:
        obs ``target`` with ``control`` for control cells, ``guide``, and ``batch`` (gemgroup).

    Raises:
        DataError: A file or column is missing, or the files do not fit each other.

    Source:
        Norman et al. 2019, Science 365, 786-793; GEO GSE133344.
    """
    if schema == "geo":
        adata, dropped = _norman_geo(Path(path))
    elif schema == "scperturb":
        adata, dropped = _norman_scperturb(path)
    elif schema == "cpa":
        adata, dropped = _norman_cpa(path)
    else:
        raise DataError(f"expected schema 'geo', 'scperturb' or 'cpa', found {schema!r}")
    adata.uns["source"] = f"Norman et al. 2019, Science; {schema} form"
    adata.uns["dropped_cells"] = dropped
    return adata


def read_replogle2022(
    path: str | Path,
    *,
    targets: Sequence[str] | None = None,
    genes: Sequence[str] | None = None,
) -> ad.AnnData:
    """Reads Replogle 2022 (K562, CRISPR interference) from a single-cell h5ad of gwps.wi.mit.edu.

    The genome-wide file is about 60 GB; it is read from disk, and only the wanted cells and genes are
    loaded. The paper of sVAE+ keeps the targets and genes of Replogle's Supplementary Table 3 (116,641
    cells, 1,187 genes) and no control cells; here control cells are always kept.

    Args:
        path: ``K562_gwps_raw_singlecell_01.h5ad``, or the essential-scale file of the same schema.
        targets: Targets to keep beside control cells; None keeps all. Names without cells are listed in
            ``uns["targets_without_cells"]``.
        genes: Symbols (var ``gene_name``) to keep; None keeps all.

    Returns:
        Raw counts in X; obs ``target`` with ``non-targeting`` for control cells, ``guide``, and ``batch``
        (gem_group). Genes keep their Ensembl names; pass ``gene_symbols="gene_name"`` to Screen for
        symbols.

    Raises:
        DataError: The file or a column is missing, or nothing is left.

    Source:
        Replogle et al. 2022, Cell 185, 2559-2575.
    """
    backed = read(path, backed=True)
    _need(backed, path, obs=["gene", "sgID_AB", "gem_group"], var=["gene_name"])
    label_n = backed.obs["gene"].astype(str).to_numpy()
    wanted = None if targets is None else {str(target) for target in targets}
    keep_n = (
        np.ones(backed.n_obs, dtype=bool) if wanted is None else np.isin(label_n, [*wanted, "non-targeting"])
    )
    keep_g = (
        np.ones(backed.n_vars, dtype=bool)
        if genes is None
        else backed.var["gene_name"].isin(genes).to_numpy()
    )
    if not keep_n.any() or not keep_g.any():
        raise DataError(
            f"expected cells of the targets and some of the genes in {path}, found {int(keep_n.sum())} cells "
            f"and {int(keep_g.sum())} genes; targets are values of obs['gene'], genes of var['gene_name']"
        )
    adata = backed[keep_n, keep_g].to_memory()
    _name_cells(adata, label_n[keep_n], adata.obs["sgID_AB"], adata.obs["gem_group"])
    adata.uns["source"] = "Replogle et al. 2022, Cell; single-cell h5ad of gwps.wi.mit.edu"
    adata.uns["dropped_cells"] = {"targets not asked for": int((~keep_n).sum())}
    adata.uns["targets_without_cells"] = sorted((wanted or set()) - set(label_n))
    return adata


def _norman_geo(folder: Path) -> tuple[ad.AnnData, dict[str, int]]:
    paths = {part: _one_file(folder, name) for part, name in GEO_PARTS.items()}
    genes = pd.read_csv(paths["genes"], sep="\t", header=None)
    barcodes = pd.read_csv(paths["barcodes"], sep="\t", header=None)[0].astype(str)
    identities = pd.read_csv(paths["identities"])
    columns = ["cell_barcode", "guide_identity", "gemgroup", "good_coverage", "number_of_cells"]
    missing = [column for column in columns if column not in identities]
    if missing or genes.shape[1] < 2:
        raise DataError(
            f"expected columns {columns} in {paths['identities'].name} and gene id and symbol in "
            f"{paths['genes'].name}, found {list(identities.columns)} and {genes.shape[1]} columns; "
            "download the files of GSE133344 again"
        )
    counts_gn = io.mmread(paths["matrix"])
    if counts_gn.shape != (len(genes), len(barcodes)):
        raise DataError(
            f"expected a matrix of {len(genes)} genes x {len(barcodes)} barcodes, found {counts_gn.shape}; "
            "take all four files from the same set (filtered or raw)"
        )
    obs = identities.drop_duplicates("cell_barcode").set_index("cell_barcode").reindex(barcodes)
    reasons = {
        "no guide identity": obs["guide_identity"].isna().to_numpy(),
        "poor guide coverage": (obs["good_coverage"].astype(str) != "True").to_numpy(),
        "more than one cell": (obs["number_of_cells"] != 1).to_numpy(),
        f"guide {EXCLUDED_GUIDE}": (obs["guide_identity"] == EXCLUDED_GUIDE).to_numpy(),
    }
    keep_n, dropped = _drop(reasons)
    var = pd.DataFrame({"gene_id": genes[0].to_numpy()}, index=genes[1].astype(str).to_numpy())
    adata = ad.AnnData(sparse.csr_matrix(counts_gn.T)[keep_n], obs=obs[keep_n], var=_unique(var))
    guide_n = adata.obs["guide_identity"].astype(str)
    _name_cells(
        adata, [_norman_target(guide) for guide in guide_n], guide_n, adata.obs["gemgroup"].astype(int)
    )
    return adata, dropped


def _norman_scperturb(path: str | Path) -> tuple[ad.AnnData, dict[str, int]]:
    adata = read(path)
    _need(adata, path, obs=["perturbation", "guide_id", "gemgroup"])
    excluded_n = (adata.obs["guide_id"].astype(str) == EXCLUDED_GUIDE).to_numpy()
    keep_n, dropped = _drop({f"guide {EXCLUDED_GUIDE}": excluded_n})
    adata = adata[keep_n].copy()
    targets = [label.replace("_", "+") for label in adata.obs["perturbation"].astype(str)]
    _name_cells(adata, targets, adata.obs["guide_id"], adata.obs["gemgroup"])
    return adata, dropped


def _norman_cpa(path: str | Path) -> tuple[ad.AnnData, dict[str, int]]:
    adata = read(path)
    _need(adata, path, obs=["guide_ids", "guide_identity", "gemgroup"])
    excluded_n = (adata.obs["guide_identity"].astype(str) == EXCLUDED_GUIDE).to_numpy()
    keep_n, dropped = _drop({f"guide {EXCLUDED_GUIDE}": excluded_n})
    adata = adata[keep_n].copy()
    targets = [label.replace(",", "+") or "control" for label in adata.obs["guide_ids"].astype(str)]
    _name_cells(adata, targets, adata.obs["guide_identity"], adata.obs["gemgroup"])
    return adata, dropped


def _norman_target(guide: str) -> str:
    """``A_NegCtrl0__A_NegCtrl0`` is A, ``A_B__A_B_2`` is A+B, and controls alone are ``control``."""
    parts = guide.split("__")[0].split("_")
    return "+".join(p for p in parts if not p.startswith("NegCtrl") and not p.isdigit()) or "control"


def _one_file(folder: Path, name: str) -> Path:
    """The file of a folder that ends in a name, packed or not."""
    found = sorted({*folder.glob(f"*{name}"), *folder.glob(f"*{name}.gz")})
    if len(found) != 1:
        raise DataError(
            f"expected one file *{name} or *{name}.gz in {folder}, found {[f.name for f in found]}; "
            "put the four files of one set (filtered or raw) of GSE133344 in a folder of their own"
        )
    return found[0]


def _need(adata: ad.AnnData, path: str | Path, obs: list[str], var: Sequence[str] = ()) -> None:
    for table, columns in (("obs", obs), ("var", var)):
        found = list(getattr(adata, table).columns)
        missing = [column for column in columns if column not in found]
        if missing:
            raise DataError(
                f"expected {table} columns {list(columns)} in {path}, found {found}: {missing} missing. "
                "Is this the file that the reader is for?"
            )


def _drop(reasons: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, int]]:
    """Cells to keep, and how many are dropped by each reason; a cell counts under its first one."""
    keep_n = np.ones(len(next(iter(reasons.values()))), dtype=bool)
    dropped = {}
    for reason, hit_n in reasons.items():
        dropped[reason] = int((hit_n & keep_n).sum())
        keep_n &= ~hit_n
    return keep_n, dropped


def _unique(var: pd.DataFrame) -> pd.DataFrame:
    """Gene symbols that repeat get their gene id appended, so that every name is unique."""
    repeated = var.index.duplicated(keep=False)
    var.index = pd.Index(np.where(repeated, var.index + "_" + var["gene_id"].astype(str), var.index))
    return var


def _name_cells(
    adata: ad.AnnData, targets: Sequence[str] | np.ndarray, guides: pd.Series, batches: pd.Series
) -> None:
    adata.obs["target"] = pd.Categorical(targets)
    adata.obs["guide"] = pd.Categorical(guides.astype(str))
    adata.obs["batch"] = pd.Categorical(batches.astype(str))
