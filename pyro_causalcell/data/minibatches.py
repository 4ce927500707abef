"""Minibatches of a screen: resident integers where they fit, row reads where they do not."""

import warnings
from collections.abc import Callable, Generator, Iterator
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data.disk import ahead
from pyro_causalcell.data.matrix import as_dense
from pyro_causalcell.data.screen import Screen
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["Anchors", "Minibatches"]

Anchors = Literal["batch", "random", "twin"]
"""Where the control cell that a cell is compared with comes from; see :class:`Minibatches`."""

LEAST_BATCHES = 4
"""Batches of a buffer, however large each of them is."""
BATCHES_AHEAD = 2
"""Batches that a thread makes ready while the last one is used, where x is read."""


class Minibatches:
    """Minibatches of some cells of a screen, with anchors for models that need them.

    x is held on the device in the smallest safe type (int16 or int32 for counts, float32 otherwise) if
    that fits the budget. Otherwise a thread reads rows from the AnnData, in memory or on disk, while the
    last batch is used. Every epoch holds each cell once, and the sizes of its batches differ by at most one.

    From disk, rows come in buffers of many batches and are shuffled within them; a second thread reads the
    next buffer. A buffer is made of short blocks of neighbours, one from every stretch of the file, drawn
    anew in each epoch: it holds cells of the whole file, and of each condition about its share, even where
    cells lie sorted by condition. Memory does not grow with the number of cells, but for what is known of
    each cell beside x. The order of an epoch depends on its number, the seed, and whether x is read from
    disk, so a resumed run repeats it.

    Where the screen knows tracks, each cell comes with the same cell at the time before, ``Batch.previous``.

    ``anchors`` gives each cell a control cell, ``Batch.control``: ``"batch"`` draws one of the same batch
    and covariates, ``"random"`` any, ``"twin"`` takes the cell's own from the screen's twin layer. Where the
    screen has times, anchors that are drawn are of the same time. Anchors are resident, too, where they fit
    what the cells leave of the budget. Otherwise they are read like the cells: those of a buffer are blocks
    of neighbours among the control cells, in random order; each control cell is as likely as before.

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
        part: Which cells of a minibatch of so many to make, for one of several processes; all by default.

    Raises:
        DataError: No rows, rows outside the screen, a batch size below one, cells without an anchor, or a
            part of a track without what was before it.
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
        part: Callable[[int], slice] = slice,
    ) -> None:
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) == 0 or rows.min() < 0 or rows.max() >= screen.n_cells:
            raise DataError(
                f"expected rows between 0 and {screen.n_cells - 1}, found {rows}; is the split of it?"
            )
        if batch_size < 1:
            raise DataError(f"expected a batch size of at least 1, found {batch_size}")
        self.screen, self.rows, self.batch_size = screen, rows, batch_size
        self.shuffle, self.seed, self._part = shuffle, seed, part
        self._cells = _Cells(screen, rows, device, memory_budget_gb * 2**30)
        self._previous_n = None if screen.previous_n is None else _places_before(screen, rows)
        self._anchors: _Cells | None = None
        self._pools: list[np.ndarray] = []
        if anchors == "twin":
            self._anchors = _Cells(screen, rows, device, self._cells.bytes_left, twin=True)
        elif anchors is not None:
            controls = rows if controls is None else controls
            controls = controls[screen.condition_n[controls] == 0]
            self._pools, self._pool_n = _pools(screen, rows, controls, anchors == "batch")
            self._anchors = _Cells(screen, controls, device, self._cells.bytes_left)
        both = [self._cells] if self._anchors is None else [self._cells, self._anchors]
        self._reads = not all(cells.is_resident for cells in both)
        from_disk = [cells for cells in both if cells.is_on_disk]
        self._n_block = max((cells.n_block for cells in from_disk), default=1)
        self._per_buffer = 1
        if from_disk:
            self._per_buffer = max(LEAST_BATCHES, min(cells.n_buffer for cells in from_disk) // batch_size)

    @property
    def is_resident(self) -> bool:
        """Whether x is held on the device."""
        return self._cells.is_resident

    @property
    def memory_left_gb(self) -> float:
        """What cells and anchors leave of the budget, in GiB."""
        last = self._cells if self._anchors is None else self._anchors
        return last.bytes_left / 2**30

    def __len__(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.rows) // self.batch_size)

    @property
    def sizes(self) -> list[int]:
        """Cells of each batch of an epoch, those of other processes included."""
        size, n_larger = divmod(len(self.rows), len(self))
        return [size + (i < n_larger) for i in range(len(self))]

    def __iter__(self) -> Iterator[Batch]:
        """The batches of epoch 0."""
        return self.epoch(0)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of one epoch, in an order set by the seed and the epoch's number.

        Args:
            epoch: Number of the epoch, from 0.

        Raises:
            DataError: The file is damaged; it and the rows are named.
        """
        buffers = self._buffers(epoch)
        if self._per_buffer > 1:
            buffers = ahead(buffers, 1)
        batches = self._batches(buffers)
        return ahead(batches, BATCHES_AHEAD) if self._reads else batches

    def _buffers(self, epoch: int) -> Generator["_Buffer", None, None]:
        rng = np.random.default_rng([self.seed, epoch, 1])
        for whole in self._order(epoch):
            all_index = np.concatenate(whole)
            places = np.split(np.arange(len(all_index)), np.cumsum([len(part) for part in whole])[:-1])
            places = [place[self._part(len(place))] for place in places]
            own = np.concatenate(places)
            index = all_index[own]
            buffer = _Buffer([all_index[place] for place in places], self._cells.values(index))
            if self._anchors is not None:
                drawn = self._drawn(all_index, rng)[own]  # as one process would draw them
                buffer = buffer._replace(drawn=drawn, control=self._anchors.values(drawn))
            if self._previous_n is not None:
                buffer = buffer._replace(previous=self._cells.values(self._previous_n[index]))
            yield buffer

    def _batches(self, buffers: Generator["_Buffer", None, None]) -> Generator[Batch, None, None]:
        try:
            for buffer in buffers:
                start = 0
                for index in buffer.parts:
                    part = slice(start, start + len(index))
                    batch = self._cells.batch(index, buffer.x, part)
                    if self._anchors is not None:
                        control = self._anchors.batch(buffer.drawn[part], buffer.control, part)
                        batch = batch._replace(control=control)
                    if self._previous_n is not None:
                        previous = self._cells.batch(self._previous_n[index], buffer.previous, part)
                        batch = batch._replace(previous=previous)
                    yield batch
                    start += len(index)
        finally:
            buffers.close()

    def _order(self, epoch: int) -> Iterator[list[np.ndarray]]:
        """Which cells each batch holds, for the batches of one buffer after another."""
        n, rng = len(self.rows), np.random.default_rng([self.seed, epoch])
        n_buffers = -(-len(self) // self._per_buffer)
        in_blocks = self.shuffle and self._per_buffer > 1 and n_buffers > 1  # one buffer is the whole
        if in_blocks:
            order = np.argsort(self.rows, kind="stable")[_dealt(rng, n, self._n_block, n_buffers)]
        else:
            order = rng.permutation(n) if self.shuffle else np.arange(n)
        batches = np.array_split(order, len(self))
        for places in np.array_split(np.arange(len(self)), n_buffers):
            parts = batches[places[0] : places[-1] + 1]
            if in_blocks:
                mixed = rng.permutation(np.concatenate(parts))
                parts = np.split(mixed, np.cumsum([len(part) for part in parts])[:-1])
            yield parts

    def _drawn(self, index: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Which anchor each of some cells gets."""
        if not self._pools or self._anchors is None:
            return index
        size_p = np.array([len(pool) for pool in self._pools])
        place_n = rng.integers(size_p[self._pool_n[index]])
        by_pool = np.argsort(self._pool_n[index], kind="stable")
        pool_n = self._pool_n[index][by_pool]
        own_p = np.bincount(pool_n, minlength=len(size_p))
        first_n = (np.cumsum(own_p) - own_p)[pool_n]  # where its pool begins among these cells
        # The first cells of a pool draw a block each; the others go on, one after the other, in those blocks.
        step_n, block_n = np.divmod(
            np.arange(len(index)) - first_n, -(-own_p // self._anchors.n_block)[pool_n]
        )
        place_n = (place_n[by_pool][first_n + block_n] + step_n) % size_p[pool_n]
        drawn_n = np.empty(len(index), dtype=np.int64)
        drawn_n[by_pool] = np.concatenate(self._pools)[(np.cumsum(size_p) - size_p)[pool_n] + place_n]
        return drawn_n


class _Buffer(NamedTuple):
    """The cells of successive batches, and their values where they are not resident."""

    parts: list[np.ndarray]
    x: Any
    drawn: np.ndarray = np.empty(0, dtype=np.int64)
    control: Any = None
    previous: Any = None


class _Cells:
    """The tensors of some cells, or of their twins in control.

    Attributes:
        bytes_left: What is left of the budget.
        n_block: Neighbours to read together; 1 where any row is read as fast as the next.
        n_buffer: Rows to read at once from disk.
    """

    def __init__(
        self,
        screen: Screen,
        rows: np.ndarray,
        device: str | torch.device,
        budget_bytes: float,
        twin: bool = False,
    ) -> None:
        self.rows = rows
        self.device = torch.empty(0, device=device).device  # with its number: a thread has its own default
        self._matrix = screen.twin_matrix if twin else screen.matrix
        u_dp, design_n = screen.designs
        self._n_targets = u_dp.shape[1]
        carried = _carried(sparse.csr_matrix(u_dp.shape, dtype=u_dp.dtype) if twin else u_dp)
        self._target_dm, self._dose_dm = (self._tensor(part) for part in carried)
        self._design_n = self._tensor(design_n[rows])
        library_n = screen.twin_library_n if twin else screen.library_n
        self._library_n1 = self._tensor(library_n[rows, None])
        self._batch_nb = self._tensor(screen.batch_nb[rows])
        self._condition_n = self._tensor(0 * rows if twin else screen.condition_n[rows])
        self._time_n = None if screen.time_n is None else self._tensor(screen.time_n[rows])
        self.bytes_left = budget_bytes
        self._x_ng = self._resident(_smallest_type(screen))
        disk = None if self.is_resident else self._matrix.disk
        self.is_on_disk = disk is not None
        self.n_block = 1 if disk is None else disk.n_block
        self.n_buffer = 1 if disk is None else disk.n_buffer

    @property
    def is_resident(self) -> bool:
        return self._x_ng is not None

    def values(self, index: np.ndarray) -> Any:
        """Values of some cells for ``batch``, as they are stored; None where they are resident."""
        return self._matrix.take(self.rows[index]) if self._x_ng is None else None

    def batch(self, index: np.ndarray, values: Any, part: slice) -> Batch:
        """The batch of some cells, whose values are part of those read."""
        index_n = self._tensor(index)
        if self._x_ng is None:
            x_ng = self._tensor(as_dense(values[part]))
        else:
            x_ng = self._x_ng.index_select(0, index_n).float()  # indexing is four times slower
        design_n = self._design_n[index_n]
        u_np = torch.zeros(len(index), self._n_targets, device=self.device)
        return Batch(
            x_ng=x_ng,
            u_np=u_np.scatter_add_(1, self._target_dm[design_n], self._dose_dm[design_n]),
            library_n1=self._library_n1[index_n],
            batch_nb=self._batch_nb[index_n],
            condition_n=self._condition_n[index_n],
            index_n=index_n,
            n_total=len(self.rows),
            time_n=None if self._time_n is None else self._time_n[index_n],
            most=self._target_dm.shape[1],
        )

    def _resident(self, dtype: torch.dtype) -> Tensor | None:
        """Values of all rows on the device, if they fit the budget and the device."""
        n_bytes = len(self.rows) * self._matrix.shape[1] * dtype.itemsize
        if n_bytes > self.bytes_left:
            return None
        try:
            x_ng = self._filled(dtype)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            self.bytes_left = n_bytes / 2
        else:
            self.bytes_left -= n_bytes
            return x_ng
        warnings.warn(
            f"{self.device} has no room for the {n_bytes / 2**30:.2g} GiB of {self._matrix.where}, though "
            f"memory_budget_gb= allows them: training goes on with a budget of {n_bytes / 2**31:.2g} GiB and "
            "reads the cells batch by batch; pass a smaller memory_budget_gb= to leave this out",
            stacklevel=4,
        )
        return None

    def _filled(self, dtype: torch.dtype) -> Tensor:
        """Values of all rows, filled in chunks so that no second copy is ever held."""
        n, g = len(self.rows), self._matrix.shape[1]
        x_ng = torch.empty(n, g, dtype=dtype, device=self.device)
        step = max(1, 16_000_000 // g)
        for start in range(0, n, step):
            x_ng[start : start + step] = torch.from_numpy(self._matrix.dense(self.rows[start : start + step]))
        return x_ng

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(self.device)


def _places_before(screen: Screen, rows: np.ndarray) -> np.ndarray:
    """Place among rows of each cell at the time before, or its own at the first, int64 [m]."""
    place_n = np.full(screen.n_cells + 1, -1)  # the last one: nothing before
    place_n[rows] = np.arange(len(rows))
    before_m = screen.previous_n[rows]  # type: ignore[index]
    found_m = place_n[before_m]
    lacking_m = (before_m >= 0) & (found_m < 0)
    if lacking_m.any():
        raise DataError(
            f"expected whole tracks among these cells, found {int(lacking_m.sum())} of {len(rows)} without "
            "the same cell at the time before; split whole tracks, as random_cells does, or "
            "open the screen without track="
        )
    return np.where(before_m < 0, np.arange(len(rows)), found_m)


def _carried(u_dp: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """The targets that each design holds and their doses, each [d, m]; shorter rows end with doses of 0."""
    place_m = np.arange(u_dp.getnnz(1).max(initial=0))
    is_held_dm = place_m < u_dp.getnnz(1)[:, None]
    target_dm, dose_dm = np.zeros(is_held_dm.shape, np.int64), np.zeros(is_held_dm.shape, np.float32)
    target_dm[is_held_dm], dose_dm[is_held_dm] = u_dp.indices, u_dp.data
    return target_dm, dose_dm


def _dealt(rng: np.random.Generator, n: int, n_block: int, n_buffers: int) -> np.ndarray:
    """The places 0 to n - 1 in blocks, those of each buffer together.

    Places are cut into blocks of neighbours, and successive blocks are dealt like cards: of every
    ``n_buffers`` of them, each buffer gets one. A buffer has its blocks in random order, so that it does not
    matter which of them a cut between two buffers, which need not be equal, leaves to the next.
    """
    n_blocks = -(-n // n_block)
    deals = np.tile(np.arange(n_buffers), (-(-n_blocks // n_buffers), 1))
    buffer_of_block = rng.permuted(deals, axis=1).ravel()[:n_blocks]
    rank_of_block = np.argsort(np.argsort(buffer_of_block + rng.random(n_blocks)))
    return np.argsort(np.repeat(rank_of_block, n_block)[:n], kind="stable")


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


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the CPU's allocator, which has no error of its own, found no room."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _smallest_type(screen: Screen) -> torch.dtype:
    """The smallest type that holds x without loss."""
    if not screen.is_counts:
        return torch.float32
    if screen.max_value <= torch.iinfo(torch.int16).max:
        return torch.int16
    return torch.int32 if screen.max_value <= torch.iinfo(torch.int32).max else torch.float32
