"""Rows of a matrix on disk, in few long reads; and work done ahead by a thread."""

import zlib
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import h5py
import numpy as np
from anndata.abc import CSRDataset
from anndata.compat import ZarrArray
from scipy import sparse

from pyro_causalcell.errors import DataError

__all__ = ["DiskRows", "ahead", "is_on_disk"]

BUFFER_BYTES = 64 * 2**20
"""Memory of the rows that are shuffled together. Some three times as much is needed while they are read."""
PORTION_BYTES = 16 * 2**20
"""Memory of the rows that are read before those not asked for among them are dropped."""
BLOCK_ROWS = 48
"""Neighbours on disk that are read together, at least: shorter reads cost more than what they bring."""
GAP_BYTES = 64 * 2**10
"""Rows not asked for are read, too, where skipping them would save less than this."""

READ_ERRORS = (OSError, RuntimeError, ValueError, EOFError, zlib.error)
"""What HDF5 and the codecs of zarr raise when they meet damaged data."""

T = TypeVar("T")


class DiskRows:
    """Rows of a cells × genes matrix in an h5ad or zarr file, sparse by rows (CSR) or dense.

    Neighbouring rows are read together. Where those asked for leave small gaps, the gaps are read too and
    dropped, in portions, so that memory depends on the rows asked for and not on where they lie.

    Args:
        values: anndata's CSR on disk, an h5py dataset, or a zarr array.
        where: Name for messages, such as ``adata.X``.

    Attributes:
        shape: Cells and genes.
        dtype: Type of the values on disk.
        n_buffer: Rows that make up a buffer of ``BUFFER_BYTES``.
        n_block: Neighbours to read together: a chunk of the file, but not so many that a buffer would hold
            rows of few places.

    Raises:
        DataError: The places of a sparse matrix's rows do not fit its values: the file was cut short.
    """

    def __init__(self, values: Any, where: str) -> None:
        self.shape: tuple[int, int] = (int(values.shape[0]), int(values.shape[1]))
        self.dtype = values.dtype
        self._is_sparse = isinstance(values, CSRDataset)
        source = values.group if self._is_sparse else values
        name = source.file.filename if isinstance(source, h5py.HLObject) else source.store_path
        self.where = f"{where} of {name}"
        if self._is_sparse:
            self._parts = [source["data"], source["indices"]]
            self._start_n = self._row_starts(source["indptr"])
        else:
            self._parts = [source]
            self._start_n = np.arange(self.shape[0] + 1)
        mean_length = max(1.0, self._start_n[-1] / max(1, self.shape[0]))
        row_bytes = 8 * mean_length if self._is_sparse else 4 * self.shape[1]  # as held: float32, int32
        self.n_buffer = max(1, int(BUFFER_BYTES / row_bytes))
        chunk = self._parts[0].chunks
        n_chunk = int(chunk[0] / mean_length) if chunk else 1
        self.n_block = max(1, min(max(BLOCK_ROWS, n_chunk), self.n_buffer // 32))
        self._n_gap = max(1, int(GAP_BYTES / row_bytes))
        self._n_portion = max(1, int(PORTION_BYTES / row_bytes))

    def __getitem__(self, rows: slice) -> Any:
        """Successive rows as they are stored, a CSR matrix or an array."""
        first, stop, _ = rows.indices(self.shape[0])
        return self._joined([self._read(first, stop)], np.arange(first, stop))

    def take(self, rows: np.ndarray) -> Any:
        """Some rows as float32, a CSR matrix or an array, in the order of rows; rows may repeat."""
        if not len(rows):
            return self[:0]
        wanted, back = np.unique(rows, return_inverse=True)
        first_r, stop_r = _runs(wanted, self._n_gap, self._n_portion)
        portion_r = np.cumsum(stop_r - first_r) // self._n_portion
        kept = []
        for portion in np.unique(portion_r):
            own_r = portion_r == portion
            runs = list(zip(first_r[own_r].tolist(), stop_r[own_r].tolist(), strict=True))
            read = np.concatenate([np.arange(*run) for run in runs])
            values = self._joined([self._read(*run) for run in runs], read)
            own = wanted[np.searchsorted(wanted, read[0]) : np.searchsorted(wanted, read[-1], side="right")]
            kept.append(values if len(own) == len(read) else values[np.searchsorted(read, own)])
        together = sparse.vstack(kept, format="csr") if self._is_sparse else np.concatenate(kept)
        return together[back].astype(np.float32, copy=False)

    def _row_starts(self, indptr: Any) -> np.ndarray:
        """Where the values of each row begin, int64 [n + 1]."""
        try:
            start_n = np.asarray(indptr[:], dtype=np.int64)
        except READ_ERRORS as error:
            raise DataError(_damaged(f"the places of all rows of {self.where}", str(error))) from error
        n_values = min(part.shape[0] for part in self._parts)
        expected = len(start_n) == self.shape[0] + 1 and start_n[0] == 0 and (np.diff(start_n) >= 0).all()
        if not expected or start_n[-1] > n_values:
            missing = f"{n_values} values, where its rows should have {start_n[-1]}" if expected else "others"
            raise DataError(
                _damaged(f"{self.shape[0]} successive rows in {self.where}", f"there are {missing}")
            )
        return start_n

    def _read(self, first: int, stop: int) -> list[np.ndarray]:
        """Values of successive rows, and their columns where they are sparse."""
        place = slice(int(self._start_n[first]), int(self._start_n[stop]))
        try:
            return [part[place] for part in self._parts]
        except READ_ERRORS as error:
            raise DataError(_damaged(f"rows {first} to {stop - 1} of {self.where}", str(error))) from error

    def _joined(self, pieces: list[list[np.ndarray]], rows: np.ndarray) -> Any:
        """Rows that were read piece by piece, as one matrix."""
        parts = [np.concatenate(part) for part in zip(*pieces, strict=True)]
        if not self._is_sparse:
            return parts[0]
        data, column = parts
        if column.size and not (column.min() >= 0 and column.max() < self.shape[1]):  # scipy would not look
            found = f"there are columns from {column.min()} to {column.max()}"
            raise DataError(
                _damaged(
                    f"columns below {self.shape[1]} in rows {rows[0]} to {rows[-1]} of {self.where}", found
                )
            )
        length_n = self._start_n[rows + 1] - self._start_n[rows]
        start_n = np.concatenate([[0], np.cumsum(length_n)]).astype(np.int32)  # one type, or scipy copies
        column = column.astype(np.int32, copy=False)
        return sparse.csr_matrix((data, column, start_n), shape=(len(rows), self.shape[1]))


def is_on_disk(values: Any) -> bool:
    """Whether these are values of a file whose rows can be read."""
    return isinstance(values, (CSRDataset, h5py.Dataset, ZarrArray))


def ahead(items: Generator[T, None, None], depth: int) -> Generator[T, None, None]:
    """The same items, made by a thread up to ``depth`` before they are asked for.

    An error in the thread is raised where its item is asked for. Whoever stops early, by an error or by
    dropping the generator, stops the thread after the item that it is at.

    Args:
        items: What makes them; it runs in the thread alone.
        depth: How many to make ahead, at least 1.
    """
    end: Any = object()
    with ThreadPoolExecutor(1) as thread:
        try:
            made = deque(thread.submit(next, items, end) for _ in range(depth))
            while (item := made.popleft().result()) is not end:
                made.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)
            items.close()


def _runs(rows: np.ndarray, n_gap: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """First rows and stops of what to read for rows that rise: no gap longer, no run longer than given."""
    cut = (np.diff(rows) > n_gap) | (np.diff(rows // most) > 0)
    return rows[np.concatenate([[True], cut])], rows[np.concatenate([cut, [True]])] + 1


def _damaged(expected: str, found: str) -> str:
    return (
        f"expected {expected}, found that they cannot be read: {found}. The file is damaged or cut short: "
        "fetch or write it again"
    )
