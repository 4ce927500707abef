"""Minibatches of a screen: resident integers where they fit, row reads where they do not."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data.screen import Screen
from pyro_causalcell.errors import DataError

__all__ = ["Minibatches"]


class Minibatches:
    """Minibatches of some cells of a screen.

    x is held on the device in the smallest safe type (int16 or int32 for counts, float32 otherwise) if
    that fits the budget; otherwise rows are read from the AnnData, sparse or on disk, batch by batch.
    The order of an epoch depends on the seed and its number only, so a resumed run repeats it. Every
    epoch holds each cell once, and the sizes of its batches differ by at most one.

    Args:
        screen: The screen.
        rows: Rows of the screen to use [m]; ``index_n`` of a batch counts within them.
        batch_size: Largest number of cells in a batch.
        shuffle: Draw a new order for every epoch; otherwise keep the order of rows.
        seed: Seed of the orders.
        device: Where the batches are.
        memory_budget_gb: Memory x may take on the device, in GiB.

    Raises:
        DataError: No rows, rows outside the screen, or a batch size below one.
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
    ) -> None:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= screen.n_cells:
            raise DataError(
                f"expected rows between 0 and {screen.n_cells - 1}, found {rows}; is the split of it?"
            )
        if batch_size < 1:
            raise DataError(f"expected a batch size of at least 1, found {batch_size}")
        self.screen, self.rows, self.batch_size = screen, rows, batch_size
        self.shuffle, self.seed, self.device = shuffle, seed, torch.device(device)
        u_dp, design_n = screen.designs
        self._u_dp = self._tensor(u_dp)
        self._design_n = self._tensor(design_n[rows])
        self._library_n1 = self._tensor(screen.library_n[rows, None])
        self._batch_nb = self._tensor(screen.batch_nb[rows])
        self._condition_n = self._tensor(screen.condition_n[rows])
        self._time_n = None if screen.time_n is None else self._tensor(screen.time_n[rows])
        dtype = _smallest_type(screen)
        n_bytes = len(rows) * screen.n_genes * dtype.itemsize
        self._x_ng = self._resident(dtype) if n_bytes <= memory_budget_gb * 2**30 else None

    @property
    def is_resident(self) -> bool:
        """Whether x is held on the device."""
        return self._x_ng is not None

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
        for index in np.array_split(order, len(self)):
            yield self._batch(index)

    def _batch(self, index: np.ndarray) -> Batch:
        index_n = self._tensor(index)
        x_ng = (
            self._tensor(self.screen.x(self.rows[index]))
            if self._x_ng is None
            else self._x_ng[index_n].float()
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
            x_ng[start : start + step] = torch.from_numpy(self.screen.x(self.rows[start : start + step]))
        return x_ng

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _smallest_type(screen: Screen) -> torch.dtype:
    """The smallest type that holds x without loss."""
    if not screen.is_counts:
        return torch.float32
    if screen.max_value <= torch.iinfo(torch.int16).max:
        return torch.int16
    return torch.int32 if screen.max_value <= torch.iinfo(torch.int32).max else torch.float32
