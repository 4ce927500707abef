"""Cells by principal components in place of genes, for simulations without noise.

A Gaussian likelihood with one variance a gene, and an encoder of genes, see little beyond the leading
components: each gene is mostly them. What bends the cells is in the small ones, which say as much where
nothing is noise.
"""

import anndata as ad
import numpy as np
import pandas as pd
from sklearn.decomposition import PCA

__all__ = ["by_components", "components_of"]

NEGLIGIBLE = 1e-8
"""Share of the variance that may be left out: what rounding makes of the rank."""


def components_of(x_ng: np.ndarray) -> PCA:
    """All components of training cells, to be scaled to unit variance among them.

    Args:
        x_ng: Values of training cells.
    """
    return PCA(1 - NEGLIGIBLE, svd_solver="full", whiten=True).fit(np.asarray(x_ng, dtype=np.float64))


def by_components(adata: ad.AnnData, pca: PCA) -> ad.AnnData:
    """The cells with components for genes, in x and in every layer; all else of them stays.

    Args:
        adata: Cells x genes.
        pca: From :func:`components_of`.
    """
    names = pd.DataFrame(index=[f"component_{m}" for m in range(pca.n_components_)])
    layers = {name: _scores(pca, x_ng) for name, x_ng in adata.layers.items()}
    return ad.AnnData(
        _scores(pca, adata.X), obs=adata.obs, var=names, obsm=dict(adata.obsm), uns=adata.uns, layers=layers
    )


def _scores(pca: PCA, x_ng: np.ndarray) -> np.ndarray:
    return np.asarray(pca.transform(np.asarray(x_ng, dtype=np.float64)), dtype=np.float32)
