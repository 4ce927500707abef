"""Several processes that train one pair, each on its share of every minibatch.

All processes hold the same parameters and draw the same order of cells. Of each minibatch a process takes a
slice, which the plates scale to the whole screen as they would any minibatch. The gradients of the slices,
weighted by their cells, add up to the gradient of the minibatch. Losses are averaged likewise, and what
comes after an epoch is decided from numbers that all processes share, so that all decide the same.

``torchrun`` starts the processes. Gradients come from the engine, not from a wrapped module, and travel as
one flat tensor.
"""

import atexit
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pyro_causalcell.errors import TrainingError
from pyro_causalcell.inference.elbo import Terms

__all__ = ["Ranks", "is_first_process", "join", "local_device"]


@dataclass(frozen=True)
class Ranks:
    """The processes that train a pair together; by default this one alone, where nothing is exchanged.

    Attributes:
        index: Number of this process, from 0.
        count: Number of processes.
    """

    index: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.index == 0

    def part(self, n: int) -> slice:
        """This process's slice of a minibatch of n cells; the slices' sizes differ by at most one.

        Raises:
            TrainingError: The minibatch has fewer cells than there are processes.
        """
        if n < self.count:
            raise TrainingError(
                f"expected at least {self.count} cells in a minibatch, one for each process, found {n}; "
                "pass a larger batch_size=, or start fewer processes"
            )
        return slice(n * self.index // self.count, n * (self.index + 1) // self.count)

    def average(self, parameters: Iterable[nn.Parameter], terms: Terms, share: float) -> Terms:
        """Replace each gradient by the sum over processes, weighted by their shares of the minibatch.

        This method and those below end in a ``TrainingError`` where another process has ended.

        Args:
            parameters: The same in all processes. One that had no gradient counts as zero.
            terms: Terms of the ELBO of this process's slice.
            share: Its cells, as a share of the minibatch.

        Returns:
            The terms of the whole minibatch.
        """
        if self.count == 1:
            return terms
        learned = [p for p in parameters if p.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learned]
        tensors = [*gradients, *(term.detach() for term in terms.values())]
        flat = torch.cat([t.reshape(-1) for t in tensors]) * share
        with _alive():
            dist.all_reduce(flat)
        summed = flat.split([t.numel() for t in tensors])
        for parameter, gradient in zip(learned, summed, strict=False):
            parameter.grad = gradient.view_as(parameter)
        return dict(zip(terms, flat[len(flat) - len(terms) :], strict=True))

    def any(self, here: bool) -> bool:
        """Whether something holds in any process. All must ask."""
        if self.count == 1:
            return here
        flag = torch.tensor(float(here))
        with _alive():
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def from_first(self, measure: Callable[[], float]) -> float:
        """A number that the first process works out while the others wait."""
        if self.count == 1:
            return measure()
        value = torch.tensor(measure() if self.is_first else 0.0, dtype=torch.float64)
        with _alive():
            dist.broadcast(value, 0)
        return float(value)

    def adopt(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over the first process's parameters and buffers, so that no difference can grow."""
        if self.count == 1:
            return
        for tensors in state.values():
            for tensor in tensors.values():
                sent = tensor.detach().contiguous()
                with _alive():
                    dist.broadcast(sent, 0)
                tensor.detach().copy_(sent)

    def own_draws(self, seed: int, epoch: int) -> None:
        """Give each process draws of its own for an epoch.

        The first goes on with its stream, which its checkpoint holds. The others' follow from seed, epoch and
        number, so that a resumed run repeats them.
        """
        if not self.is_first:
            torch.manual_seed(int(np.random.SeedSequence([seed, epoch, self.index]).generate_state(1)[0]))


def join() -> Ranks:
    """The processes that ``torchrun`` started, or those of a process group that exists already.

    Tensors on the CPU go by gloo, those on GPUs by NCCL.
    """
    if not dist.is_initialized():
        if not dist.is_torchelastic_launched():
            return Ranks()
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        atexit.register(dist.destroy_process_group)
    return Ranks(dist.get_rank(), dist.get_world_size())


def is_first_process() -> bool:
    """Whether this process reports results: all but one do not, where several train together."""
    return not dist.is_initialized() or dist.get_rank() == 0


def local_device(device: str) -> str:
    """``"auto"`` and ``"cuda"`` as the GPU that is this process's own, where several share a machine."""
    several = dist.is_initialized() and dist.get_world_size() > 1
    if several and device in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    return device


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TrainingError(
            "another process that trains this pair has ended, see what it said; the last checkpoint stays, "
            "go on from it with resume=True"
        ) from error
