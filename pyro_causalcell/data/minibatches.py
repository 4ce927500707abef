"""Minibatches of a screen: resident integers where they fit, row reads where they do not."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data.screen import Screen
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["Anchors", "Minibatches"]

Anchors = Literal["batch", "random", "twin"]
"""Where the control cell that a cell is compared with comes from; see :class:`Minibatches`."""


class Minibatches:
    """Minibatches of some cells of a screen, with anchors for models that need them.

    x is held on the device in the smallest safe type (int16 or int32 for counts, float32 otherwise) if
    that fits the budget; otherwise rows are read from the AnnData, sparse or on disk, batch by batch.
    The order of an epoch depends on the seed and its number only, so a resumed run repeats it. Every
    epoch holds each cell once, and the sizes of its batches differ by at most one.

    ``anchors`` gives each cell a control cell, ``Batch.control``: ``"batch"`` draws one of the same batch
    and covariates, ``"random"`` any, ``"twin"`` takes the cell's own from the screen's twin layer. Where the
    screen has times, anchors that are drawn are of the same time.

    Args:
        screen: The screen.
        rows: Rows of the screen to use [m]; ``index_n`` of a batch counts within them.
        batch_size: Largest number of cells in a batch.
        shuffle: Draw a new order for every epoch; otherwise keep the order of rows.
        seed: Seed of the orders and of the anchors.
        device: Where the batches are.
        memory_budget_gb: Memory x may take on the device, in GiB.
        anchors: Control cell of each cell, see above; None gives none.
        controls: Rows of the control cells that anchors are drawn from; None takes those among ``rows``.

    Raises:
        DataError: No rows, rows outside the screen, a batch size below one, or cells without an anchor.
    """

    def __init__(
        self,
        screen: Screen,
        rows: np.ndarray,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        device: str | torch.device = "cpu",
        memory_budget_gb: float = 4.0,
        anchors: Anchors | None = None,
        controls: np.ndarray | None = None,
    ) -> None:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= screen.n_cells:
            raise DataError(
                f"expected rows between 0 and {screen.n_cells - 1}, found {rows}; is the split of it?"
            )
        if batch_size < 1:
            raise DataError(f"expected a batch size of at least 1, found {batch_size}")
        self.screen, self.rows, self.batch_size = screen, rows, batch_size
        self.shuffle, self.seed = shuffle, seed
        n_bytes = memory_budget_gb * 2**30
        self._cells = _Cells(screen, rows, device, n_bytes)
        self._anchors: _Cells | None = None
        self._pools: list[np.ndarray] = []
        if anchors == "twin":
            self._anchors = _Cells(screen, rows, device, n_bytes - self._cells.n_bytes, twin=True)
        elif anchors is not None:
            controls = rows if controls is None else controls
            controls = controls[screen.condition_n[controls] == 0]
            self._pools, self._pool_n = _pools(screen, rows, controls, anchors == "batch")
            self._anchors = _Cells(screen, controls, device, n_bytes - self._cells.n_bytes)

    @property
    def is_resident(self) -> bool:
        """Whether x is held on the device."""
        return self._cells.is_resident

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch 0."""
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, in an order set by the seed and the epoch's number.

        Args:
            epoch: Number of the epoch, from 0.
        """
        n = len(self.rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)
        rng = np.random.default_rng([self.seed, epoch, 1])
        for index in np.array_split(order, len(self)):
            batch = self._cells.batch(index)
            if self._anchors is not None:
                batch = batch._replace(control=self._anchors.batch(self._drawn(index, rng)))
            yield batch

    def _drawn(self, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which anchor each of some cells gets."""
        if not self._pools:
            return index
        pool_n = self._pool_n[index]
        sizes = np.array([len(pool) for pool in self._pools])
        place_n = rng.integers(sizes[pool_n])
        return np.array([self._pools[p][i] for p, i in zip(pool_n, place_n, strict=True)], dtype=np.int64)


class _Cells:
    """The tensors of some cells, or of their twins in control."""

    def __init__(
        self,
        screen: Screen,
        rows: np.ndarray,
        device: str | torch.device,
        budget_bytes: float,
        twin: bool = False,
    ) -> None:
        self.screen, self.rows, self.device = screen, rows, torch.device(device)
        self._read = screen.twin_x if twin else screen.x
        u_dp, design_n = screen.designs
        self._u_dp = self._tensor(np.zeros_like(u_dp) if twin else u_dp)
        self._design_n = self._tensor(design_n[rows])
        library_n = screen.twin_library_n if twin else screen.library_n
        self._library_n1 = self._tensor(library_n[rows, None])
        self._batch_nb = self._tensor(screen.batch_nb[rows])
        self._condition_n = self._tensor(0 * rows if twin else screen.condition_n[rows])
        self._time_n = None if screen.time_n is None else self._tensor(screen.time_n[rows])
        dtype = _smallest_type(screen)
        self.n_bytes = len(rows) * screen.n_genes * dtype.itemsize
        self._x_ng = self._resident(dtype) if self.n_bytes <= budget_bytes else None

    @property
    def is_resident(self) -> bool:
        return self._x_ng is not None

    def batch(self, index: np.ndarray) -> Batch:
        index_n = self._tensor(index)
        x_ng = (
            self._tensor(self._read(self.rows[index])) if self._x_ng is None else self._x_ng[index_n].float()
        )
        return Batch(
            x_ng=x_ng,
            u_np=self._u_dp[self._design_n[index_n]],
            library_n1=self._library_n1[index_n],
            batch_nb=self._batch_nb[index_n],
            condition_n=self._condition_n[index_n],
            index_n=index_n,
            n_total=len(self.rows),
            time_n=None if self._time_n is None else self._time_n[index_n],
        )

    def _resident(self, dtype: torch.dtype) -> Tensor:
        """Values of all rows on the device, filled in chunks so that no second copy is ever held."""
        x_ng = torch.empty(len(self.rows), self.screen.n_genes, dtype=dtype, device=self.device)
        step = max(1, 16_000_000 // self.screen.n_genes)
        for start in range(0, len(self.rows), step):
            x_ng[start : start + step] = torch.from_numpy(self._read(self.rows[start : start + step]))
        return x_ng

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _pools(
    screen: Screen, rows: np.ndarray, controls: np.ndarray, same_batch: bool
) -> tuple[list[np.ndarray], np.ndarray]:
    """Places of the control cells of each batch, and the batch of each row."""
    if not len(controls):
        raise DataError(
            "this model compares cells with control cells, found none among the training cells; pass "
            "control= as the screen names them, or switch the comparison off (alignment='none')"
        )
    time_n = np.zeros(screen.n_cells, np.float32) if screen.time_n is None else screen.time_n
    kind_nb = np.column_stack([time_n, screen.batch_nb]) if same_batch else time_n[:, None]
    kinds, kind_n = np.unique(kind_nb[rows], axis=0, return_inverse=True)
    pools = [np.flatnonzero((kind_nb[controls] == kind).all(1)) for kind in kinds]
    lacking = [kind for kind, pool in zip(kinds, pools, strict=True) if not len(pool)]
    if lacking:
        times = [] if screen.time_n is None else [f"time {kind[0]:g}" for kind in lacking]
        batches = ["/".join(np.array(screen.batch_names)[kind[1:] > 0]) for kind in lacking if same_batch]
        named = [" in ".join(filter(None, parts)) for parts in zip_longest(times, batches)]
        wider = ", or pass anchors='random' to compare with control cells of any batch" if same_batch else ""
        raise DataError(
            f"expected control cells at every time and in every batch, found none in {shown(named)}; leave "
            f"those cells out{wider}"
        )
    return pools, kind_n.ravel()


def _smallest_type(screen: Screen) -> torch.dtype:
    """The smallest type that holds x without loss."""
    if not screen.is_counts:
        return torch.float32
    if screen.max_value <= torch.iinfo(torch.int16).max:
        return torch.int16
    return torch.int32 if screen.max_value <= torch.iinfo(torch.int32).max else torch.float32
