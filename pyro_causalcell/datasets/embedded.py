"""Small real data sets inside the package. PROVENANCE.md beside this file says where they come from."""

from importlib.resources import as_file, files

import anndata as ad
import pandas as pd

from pyro_causalcell.data import read

__all__ = ["norman2019_subset", "papalexi2021", "semrau2017"]

MAX_RECOVERY_ERROR = 0.1
"""Counts recovered from normalised values are off by less than this, or the cell is left out."""


def papalexi2021() -> ad.AnnData:
    """CRISPR knock-out of 25 genes in THP-1 cells (ECCITE-seq).

    20,729 cells x 299 genes, raw UMI counts in X. obs: ``target`` (25 genes and ``non-targeting``),
    ``guide``, ``bio_rep``, ``guide_umi``, ``guide_frac`` and ``total_counts_299``; the UMI counts of
    110 guides are in ``obsm["grna_counts"]``. The totals of these 299 genes are not the full library.

    ``Screen(papalexi2021(), batch="bio_rep", guide="guide")``

    Source:
        Papalexi et al. 2021, Nature Genetics 53, 322-331.
    """
    return _embedded("papalexi2021.h5ad", "Papalexi et al. 2021, Nature Genetics")


def norman2019_subset() -> ad.AnnData:
    """CRISPR activation of single genes and pairs in K562 cells (Perturb-seq), a small part.

    3,373 cells x 120 genes, log1p of counts per 10,000 in X, counts in ``layers["counts"]``. obs:
    ``perturbation`` (18 single targets, 15 pairs such as ``A+B``, and ``control``), ``gemgroup`` (lane)
    and ``ncounts`` (total counts over all genes). The counts were recovered from the normalised values;
    the 2 cells where that failed (``recov_err`` above 0.1) are left out and counted in
    ``uns["dropped_cells"]``.

    ``Screen(norman2019_subset(), "perturbation", "control", layer="counts", batch="gemgroup")``

    Source:
        Norman et al. 2019, Science 365, 786-793.
    """
    adata = _embedded("norman2019_subset.h5ad", "Norman et al. 2019, Science")
    failed_n = (adata.obs["recov_err"] > MAX_RECOVERY_ERROR).to_numpy()
    adata = adata[~failed_n].copy()
    adata.uns["dropped_cells"] = {f"recov_err above {MAX_RECOVERY_ERROR}": int(failed_n.sum())}
    return adata


def semrau2017() -> ad.AnnData:
    """A time course of mouse embryonic stem cells after retinoic acid.

    2,449 cells x 41 genes, raw UMI counts in X. obs: ``time_h`` (nine times from 0 to 96 hours) and
    ``target``, which is ``control`` for all: every cell was treated, so there is nothing to compare with, and
    only times can be held out. Totals of these 41 genes are small (a median of 12) and not the full library;
    16 cells have none.

    ``Screen(semrau2017(), control="control", time="time_h", allow_empty=True)``

    Source:
        Semrau et al. 2017, Nature Communications 8, 1096.
    """
    adata = _embedded("semrau2017.h5ad", "Semrau et al. 2017, Nature Communications")
    adata.obs["target"] = pd.Categorical(["control"] * adata.n_obs)
    return adata


def _embedded(name: str, source: str) -> ad.AnnData:
    with as_file(files("pyro_causalcell.datasets") / name) as path:
        adata = read(path)
    adata.uns["source"] = source
    return adata
