"""Gradients of the ELBO: run by Pyro at first, as one compiled graph once that repays its making.

A plain pair spends much of a step on effect handlers and on the dispatch of hundreds of small operations.
Both are the same in every step. So loss and gradients of one step are recorded (``make_fx``), and the flat
list of tensor operations is compiled.

Source: Horace He and Richard Zou, make_fx; Ansel et al., PyTorch 2, ASPLOS 2024 (torch.compile).
"""

import importlib
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_causalcell.batch import Batch
from pyro_causalcell.inference.elbo import Terms, elbo_terms
from pyro_causalcell.inference.pair import Pair

__all__ = ["Engine", "TracedStep", "eager_gradients"]

SWITCH_AFTER = 2000
"""Steps of a stage that run before the graph takes over. A number of steps, not the moment when the graph
is ready, so that the same seed gives the same digits; a graph that is late is waited for."""
REPAYS = 10_000
"""Shortest stage, in steps, that is compiled without being asked to."""
TOLERANCE = 1e-3
"""Largest difference of a gradient from Pyro's, as a share of that gradient's largest entry."""


class NotTraceableError(Exception):
    """The pair cannot be recorded; the message says why."""


def eager_gradients(pair: Pair, batch: Batch, weights: Mapping[str, float], n_particles: int = 1) -> Terms:
    """Add the gradients of the loss in nats per cell to the parameters' ``grad``; returns the terms."""
    terms = elbo_terms(pair.model, pair.guide, batch, weights, n_particles)
    _loss(terms, batch).backward()
    return {name: term.detach() for name, term in terms.items()}


def _loss(terms: Terms, batch: Batch) -> Tensor:
    return -torch.stack(list(terms.values())).sum() / batch.n_total


class _Program(nn.Module):
    """A pair as one module, so that its parameters can be exchanged."""

    def __init__(self, pair: Pair, n_particles: int):
        super().__init__()
        self.model, self.guide, self.n_particles = pair.model, pair.guide, n_particles

    def forward(self, batch: Batch, weights: Mapping[str, Tensor]) -> Terms:
        return elbo_terms(self.model, self.guide, batch, weights, self.n_particles)


class TracedStep:
    """Loss terms and gradients of one training step of a pair, recorded and compiled.

    What is not a tensor is fixed by the recording: the shapes of the batch, the number of cells in all, which
    parameters learn. Weights of sites may change.

    Args:
        pair: The pair, in training mode.
        batch: A minibatch of the usual size.
        weights: Site name -> multiplier of its term.
        n_particles: Draws of each cell's latents.

    Raises:
        NotTraceableError: The pair has operations whose result's shape depends on values, or reads values
            into Python.
    """

    def __init__(self, pair: Pair, batch: Batch, weights: Mapping[str, float], n_particles: int = 1):
        self.pair, self.program, self.n_particles = pair, _Program(pair, n_particles), n_particles
        self.names: list[str] = []
        self.parameters = [p for p in self.program.parameters() if p.requires_grad]
        self.used: list[bool] = []
        self.key = self._key(batch, weights)
        self.graph = self._record(batch, weights)
        self._check(self.graph)
        self.run: Callable[..., Sequence[Tensor]] = self.graph

    def fits(self, batch: Batch, weights: Mapping[str, float]) -> bool:
        """Whether a batch is of the recorded kind."""
        return self.key == self._key(batch, weights)

    def compile(self, batch: Batch, weights: Mapping[str, float]) -> None:
        """Compile; neither the pair nor the random stream is touched. May run in a thread of its own."""
        inputs: list[Any] = [*self._inputs(batch, weights, copy=True)]
        with torch.no_grad():  # the random stream is to be the one that Pyro would use
            self.run = torch._inductor.compile(self.graph, inputs, options={"fallback_random": True})

    def __call__(self, batch: Batch, weights: Mapping[str, float]) -> Terms:
        """Set the parameters' gradients; returns the terms."""
        with torch.no_grad():
            outputs = self.run(*self._inputs(batch, weights))
        terms = dict(zip(self.names, outputs, strict=False))
        gradients = iter(outputs[len(self.names) :])
        for parameter, used in zip(self.parameters, self.used, strict=True):
            parameter.grad = next(gradients) if used else None
        return terms

    def difference(self, batch: Batch, weights: Mapping[str, float]) -> float:
        """Largest difference of a gradient from Pyro's, as a share of that gradient's largest entry."""
        steps: list[Callable[[], Terms]] = [
            lambda: eager_gradients(self.pair, batch, weights, self.n_particles),
            lambda: self(batch, weights),
        ]
        found = []
        buffers = [b.clone() for b in self.program.buffers()]
        for step in steps:
            self.program.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=_cuda(batch)):
                terms = step()
            gradients = [p.grad for p in self.parameters if p.grad is not None]
            found.append([_loss(terms, batch), *gradients])
            for buffer, before in zip(self.program.buffers(), buffers, strict=True):
                buffer.data.copy_(before)
        self.program.zero_grad(set_to_none=True)
        if len(found[0]) != len(found[1]):
            return float("inf")
        sizes = torch.stack([a.abs().max() for a in found[0]])
        errors = torch.stack([(a - b).abs().max() for a, b in zip(*found, strict=True)])
        # before a BatchNorm the gradient of a bias is 0 up to rounding: no size to compare with
        shares = errors / sizes.clamp(min=1e-3 * float(sizes[1:].max()))
        return float(shares.nan_to_num(nan=float("inf")).max())

    def _record(self, batch: Batch, weights: Mapping[str, float]) -> GraphModule:
        leaves, spec = tree_flatten(batch)
        n_parameters, n_buffers = len(list(self.program.parameters())), len(list(self.program.buffers()))
        named = [n for n, _ in self.program.named_parameters()] + [n for n, _ in self.program.named_buffers()]
        learn = [p.requires_grad for p in self.program.parameters()]

        def step(*inputs: Tensor) -> list[Tensor]:
            parameters, rest = list(inputs[:n_parameters]), inputs[n_parameters:]
            state = dict(zip(named, [*parameters, *rest[:n_buffers]], strict=True))
            weight = dict(zip(weights, rest[n_buffers : n_buffers + len(weights)], strict=True))
            here = _filled(leaves, spec, rest[n_buffers + len(weights) :])
            terms = torch.func.functional_call(self.program, state, (here, weight))
            learned = [p for p, wanted in zip(parameters, learn, strict=True) if wanted]
            gradients = torch.autograd.grad(_loss(terms, batch), learned, allow_unused=True)
            self.names, self.used = list(terms), [g is not None for g in gradients]
            return [*(t.detach() for t in terms.values()), *(g for g in gradients if g is not None)]

        try:
            with torch.random.fork_rng(devices=_cuda(batch)), pyro.validation_enabled(False):
                return make_fx(step)(*self._inputs(batch, weights, copy=True))
        except Exception as error:  # whatever a user's model may do that cannot be recorded
            raise NotTraceableError(f"{type(error).__name__}: {error}") from error

    @staticmethod
    def _check(graph: GraphModule) -> None:
        """Refuse a recording that would be right for the recorded values alone."""
        bad = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        names = {str(n.target) for n in graph.graph.nodes if bad & set(getattr(n.target, "tags", ()))}
        if names:
            raise NotTraceableError(f"the pair uses {sorted(names)}, whose result depends on values")

    def _inputs(self, batch: Batch, weights: Mapping[str, float], copy: bool = False) -> list[Tensor]:
        state = [*self.program.parameters(), *self.program.buffers()]
        if copy:
            state = [t.detach().clone().requires_grad_(t.requires_grad) for t in state]
        device = batch.u_np.device
        weight = [torch.as_tensor(w, dtype=torch.float32, device=device) for w in weights.values()]
        return [*state, *weight, *(leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))]

    def _key(self, batch: Batch, weights: Mapping[str, float]) -> Any:
        leaves, spec = tree_flatten(batch)
        kinds = [
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        learn = [p.requires_grad for p in self.program.parameters()]
        modes = [module.training for module in self.program.modules()][1:]
        return kinds, str(spec), list(weights), learn, modes


def _filled(leaves: list[Any], spec: TreeSpec, tensors: tuple[Tensor, ...]) -> Batch:
    """The batch with other tensors."""
    left = iter(tensors)
    batch: Batch = tree_unflatten([next(left) if isinstance(f, Tensor) else f for f in leaves], spec)
    return batch


def _cuda(batch: Batch) -> list[torch.device]:
    return [batch.u_np.device] if batch.u_np.device.type == "cuda" else []


class Engine:
    """Takes the steps of one stage of training: eagerly, then by a :class:`TracedStep`.

    The graph is recorded at the first step and compiled beside the training. Before it takes over, its
    gradients are compared with Pyro's on a batch it has not seen. Where it cannot be made, or differs, a
    warning says why, and training goes on eagerly.

    Args:
        pair: The pair.
        compile: True switches after the first step; False never; None after ``SWITCH_AFTER`` steps, where
            the stage is long enough to repay it.
        n_steps: Expected length of the stage.
        age: Steps of the stage that were taken before (a resumed run).
        n_particles: Draws of each cell's latents.
    """

    def __init__(self, pair: Pair, compile: bool | None, n_steps: int, age: int = 0, n_particles: int = 1):
        self.pair, self.age, self.n_particles = pair, age, n_particles
        self.wanted = n_steps >= REPAYS if compile is None else compile
        self.switch = 1 if compile else SWITCH_AFTER
        self.traced: TracedStep | None = None
        self.thread: threading.Thread | None = None
        self.problem: str | None = None

    def gradients(self, batch: Batch, weights: Mapping[str, float]) -> Terms:
        """Set the parameters' gradients (they were cleared); returns the terms."""
        if self.wanted:
            if self.traced is None:
                self._start(batch, weights)
            if self.age >= self.switch and self.thread is not None:
                self._switch(batch, weights)
        self.age += 1
        if self.wanted and self.thread is None and self.traced and self.traced.fits(batch, weights):
            return self.traced(batch, weights)
        return eager_gradients(self.pair, batch, weights, self.n_particles)

    def _start(self, batch: Batch, weights: Mapping[str, float]) -> None:
        try:
            self.traced = TracedStep(self.pair, batch, weights, self.n_particles)
        except NotTraceableError as error:
            self._give_up(str(error))
            return
        with warnings.catch_warnings():  # torch's compiler imports what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._inductor.compile_fx")
        self.thread = threading.Thread(target=self._compile, args=(batch, dict(weights)), daemon=True)
        self.thread.start()

    def _compile(self, batch: Batch, weights: Mapping[str, float]) -> None:
        assert self.traced is not None
        try:
            self.traced.compile(batch, weights)
        except Exception as error:  # told in the training's own thread
            self.problem = f"{type(error).__name__}: {error}"

    def _switch(self, batch: Batch, weights: Mapping[str, float]) -> None:
        assert self.thread is not None and self.traced is not None
        if not self.traced.fits(batch, weights):  # the short batch at the end of an epoch
            return
        self.thread.join()
        self.thread = None
        difference = 0.0 if self.problem else self.traced.difference(batch, weights)
        if difference > TOLERANCE:
            self.problem = f"its gradients differ from Pyro's by {difference:.2g} of their size"
        if self.problem:
            self._give_up(self.problem)

    def _give_up(self, why: str) -> None:
        self.wanted, self.traced = False, None
        warnings.warn(
            f"training goes on without a compiled step: {why.splitlines()[0]}. The result is the same, the "
            "training slower; pass compile=False to leave this out",
            stacklevel=2,
        )
