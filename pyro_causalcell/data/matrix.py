"""Row access to the matrix of an AnnData, whether dense, sparse or on disk, and one checked pass over it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from anndata.abc import CSCDataset
from scipy import sparse

from pyro_causalcell.data.disk import DiskRows, is_on_disk
from pyro_causalcell.errors import DataError

__all__ = ["Matrix", "Scan", "as_dense", "looks_like_counts"]

CHUNK_VALUES = 16_000_000
"""Values of a dense chunk: 64 MB as float32."""


@dataclass
class Scan:
    """What one pass over the matrix finds.

    Attributes:
        totals_n: float64 row sums.
        seen_g: Whether a gene has a value other than zero in any cell.
        empty_n: Whether a cell has zeros only.
        is_counts: Whether all values are non-negative integers.
        odd_value: First value that is negative or not an integer.
        max_value: Largest value.
    """

    totals_n: np.ndarray
    seen_g: np.ndarray
    empty_n: np.ndarray
    is_counts: bool
    odd_value: float | None
    max_value: float


class Matrix:
    """Rows of a cells × genes matrix.

    Those on disk are read when they are asked for. A CSC matrix is turned into CSR once, in memory, since
    its rows cannot be read alone; the AnnData keeps its own.

    Args:
        values: numpy array, scipy sparse matrix or array, h5py dataset, zarr array, or anndata's sparse
            matrix on disk.
        columns: Columns to keep, in this order; None keeps all.
        where: Name for messages, such as ``adata.X``.

    Attributes:
        shape: Cells and genes.
        disk: What reads the rows from disk; None where they are in memory.

    Raises:
        DataError: The type is not one of these, the values are no numbers, or the file is damaged.
    """

    def __init__(self, values: Any, columns: np.ndarray | None, where: str) -> None:
        if isinstance(values, CSCDataset):
            values = values.to_memory()
        if sparse.issparse(values):
            values = values.tocsr()
        elif not isinstance(values, np.ndarray) and not is_on_disk(values):
            raise DataError(
                f"expected {where} as a numpy array, a scipy sparse matrix or a backed h5ad, "
                f"found {type(values).__name__}; convert it, or read the file with pyro_causalcell.data.read"
            )
        if values.dtype.kind not in "fiub":
            raise DataError(f"expected numbers in {where}, found dtype {values.dtype}; convert it to float32")
        self.disk = DiskRows(values, where) if is_on_disk(values) else None
        self._values: Any = values if self.disk is None else self.disk
        self._columns = columns
        self.where = where
        self.shape = (values.shape[0], values.shape[1] if columns is None else len(columns))

    def dense(self, rows: np.ndarray) -> np.ndarray:
        """float32 [len(rows), g], in the order of rows; rows may repeat."""
        return as_dense(self.take(rows))

    def take(self, rows: np.ndarray) -> Any:
        """The same as a CSR matrix where the matrix is sparse; of the stored type in memory."""
        part = self._values[rows] if self.disk is None else self.disk.take(rows)
        return part if self._columns is None else part[:, self._columns]

    def chunks(self, n_rows: int | None = None) -> Iterator[tuple[int, Any]]:
        """First row and values of successive chunks of rows, sparse where the matrix is sparse."""
        stop = self.shape[0] if n_rows is None else min(n_rows, self.shape[0])
        step = max(1, CHUNK_VALUES // max(1, self._values.shape[1]))
        for start in range(0, stop, step):
            part = self._values[start : min(start + step, stop)]
            yield start, part if self._columns is None else part[:, self._columns]

    def scan(self, cells: np.ndarray, genes: list[str]) -> Scan:
        """One pass in chunks: totals, empty cells and genes, whether these are counts.

        Raises:
            DataError: A value is NaN or infinite; the first one's cell and gene are named.
        """
        n, g = self.shape
        found = Scan(np.zeros(n), np.zeros(g, dtype=bool), np.zeros(n, dtype=bool), True, None, -np.inf)
        for start, part in self.chunks():
            values = part.data if sparse.issparse(part) else part
            if not np.isfinite(values).all():
                raise DataError(self._not_finite(start, part, cells, genes))
            rows = slice(start, start + part.shape[0])
            filled = part != 0
            found.totals_n[rows] = np.asarray(part.sum(axis=1, dtype=np.float64)).ravel()
            found.empty_n[rows] = np.asarray(filled.sum(axis=1)).ravel() == 0
            found.seen_g |= np.asarray(filled.sum(axis=0)).ravel() > 0
            found.max_value = max(found.max_value, float(values.max()) if values.size else 0.0)
            if found.is_counts:
                found.odd_value = _odd_value(values)
                found.is_counts = found.odd_value is None
        return found

    def _not_finite(self, start: int, part: Any, cells: np.ndarray, genes: list[str]) -> str:
        dense = part.toarray() if sparse.issparse(part) else part
        bad = np.argwhere(~np.isfinite(dense))
        row, column = bad[0]
        return (
            f"expected finite values in {self.where}, found {dense[row, column]} in cell "
            f"{cells[start + row]!r}, gene {genes[column]!r} (and {len(bad) - 1} more among the rows "
            "read with it); remove or repair those cells or genes"
        )


def _odd_value(values: np.ndarray) -> float | None:
    """The first value that no count can have."""
    if values.dtype.kind in "ub":
        return None
    odd = (values < 0) | (values != np.floor(values))
    return float(values[odd].flat[0]) if odd.any() else None


def as_dense(values: Any) -> np.ndarray:
    """Some rows, sparse or not, as a dense float32 array."""
    dense = values.toarray() if sparse.issparse(values) else values
    return np.ascontiguousarray(dense, dtype=np.float32)


def looks_like_counts(values: Any) -> bool:
    """Whether the first 200 rows hold non-negative integers, and not zeros only."""
    part = values[:200]
    flat = part.data if sparse.issparse(part) else np.asarray(part)
    return bool(flat.size and np.isfinite(flat).all() and _odd_value(flat) is None and flat.max() > 0)
