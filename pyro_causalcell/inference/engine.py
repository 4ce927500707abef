"""Gradients of the ELBO: run by Pyro at first, as one compiled graph once that repays its making.

A plain pair spends much of a step on effect handlers and on the dispatch of hundreds of small operations.
Both are the same in every step. So loss and gradients of one step are recorded (``make_fx``), and the flat
list of tensor operations is compiled. On processors that MKL, torch's default library, is not made for, large
matrix products go to oneDNN, which takes half the time there.

Source: Horace He and Richard Zou, make_fx; Ansel et al., PyTorch 2, ASPLOS 2024 (torch.compile).
"""

import importlib
import inspect
import math
import platform
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from pyro_causalcell.batch import Batch
from pyro_causalcell.inference.elbo import Terms, elbo_terms
from pyro_causalcell.inference.pair import Pair

__all__ = ["EagerStep", "Engine", "TracedStep", "keep_freed_memory"]

STEP_SECONDS, VALUE_SECONDS = 3e-3, 6e-8
"""About what an eager step takes on one processor: in all, and for each gene of each cell. An estimate, not a
measurement, so that the same seed gives the same digits: they change in the last places with the engine."""
COMPILE_SECONDS = 20.0
"""About what recording and compiling take. The graph takes over after so many steps; one that is late is
waited for."""
REPAYS_SECONDS = 60.0
"""Shortest stage, in seconds of eager steps, that is compiled without being asked to."""
WARM_RUNS = 3
"""Runs of a compiled step on a GPU before it is captured as a CUDA graph."""
MOST_GRAPHS = 2
"""Kinds of minibatches that are compiled; others are taken eagerly."""
LARGE_PRODUCT = 1_000_000
"""Multiplications from which a matrix product is given to oneDNN: a call costs more there."""
TOLERANCE = {"highest": 1e-3, "high": 1e-2, "medium": 1e-1}
"""Largest difference of a gradient from Pyro's, as a share of that gradient's largest entry, by torch's
precision of matrix products."""


def _mkl_is_fast() -> bool:
    """Whether matrix products are by MKL, on a processor of its maker."""
    about = Path("/proc/cpuinfo")
    names = about.read_text() if about.exists() else platform.processor()
    return torch.backends.mkl.is_available() and "GenuineIntel" in names


TAKES_ONEDNN = torch.backends.mkldnn.is_available() and not _mkl_is_fast()
"""Whether large matrix products go to oneDNN."""

_COMPILER = threading.Lock()  # torch patches its modules while it records or compiles: one at a time
_OPERATORS = torch.library.Library("pyro_causalcell", "DEF")
_OPERATORS.define("product(Tensor left, Tensor right, Tensor? bias) -> Tensor")


class NotTraceableError(Exception):
    """The pair cannot be recorded; the message says why."""


def keep_freed_memory() -> None:
    """Let blocks of memory of up to 30 MiB be used again.

    The allocator of Linux (glibc) returns large blocks to the system as soon as they are freed, and pages
    every tensor of the next step or particles in anew, which can take as long as to work them out. What
    counts as large grows with the blocks that were freed before: one that nothing was written to is enough.
    """
    torch.empty(30 * 2**20, dtype=torch.uint8, device="cpu")


class EagerStep:
    """Loss terms and gradients of one training step of a pair, by Pyro.

    While the pair runs, some costs of a small step are saved. Large products of ``nn.Linear`` go to oneDNN
    where that is faster. And Pyro tells handlers of every parameter that is read. It does not use their
    answer for the plain modules that a PyroModule holds: these are made plain attributes meanwhile, which it
    does not see. So are, after the first step, the parameters that came past all handlers as they were.

    Args:
        pair: The pair. Modules that it gets later run as they are.
        n_particles: Draws of each cell's latents.
    """

    def __init__(self, pair: Pair, n_particles: int = 1):
        self.pair, self.n_particles = pair, n_particles
        modules = [m for side in (pair.model, pair.guide) for m in side.modules()]
        self.layers = [m for m in modules if type(m) is nn.Linear and TAKES_ONEDNN]
        self.holders = [m for m in modules if isinstance(m, PyroModule)]
        self.unaltered: set[Tensor] | None = None

    def __call__(self, batch: Batch, weights: Mapping[str, float]) -> Terms:
        """Add the gradients of the loss in nats per cell to the parameters' ``grad``; returns the terms."""
        with self._shortened(), _Reads() if self.unaltered is None else nullcontext() as reads:
            terms = elbo_terms(self.pair.model, self.pair.guide, batch, weights, self.n_particles)
        if reads is not None:
            self.unaltered = reads.unaltered
        _loss(terms, batch).backward()
        return {name: term.detach() for name, term in terms.items()}

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        found: list[tuple[nn.Module, str, Any]] = [
            (layer, "forward", partial(_linear, layer)) for layer in self.layers
        ]
        for holder in self.holders:
            plain = (c for c in holder._modules.items() if not isinstance(c[1], PyroModule))
            found += [(holder, name, child) for name, child in plain]
            read = (name for name, p in holder._parameters.items() if p in (self.unaltered or ()))
            given = (name.removesuffix("_unconstrained") for name in read)
            found += [(holder, name, getattr(holder, name)) for name in given]
        found = [(module, name, value) for module, name, value in found if name not in module.__dict__]
        for module, name, value in found:
            module.__dict__[name] = value
        try:
            yield
        finally:
            for module, name, _ in found:
                module.__dict__.pop(name, None)


class _Reads(Messenger):
    """Sees which parameters come past the handlers inside the pair as they are.

    No prior was put on them, and no plate takes some of their rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.unaltered: set[Tensor] = set()

    def _pyro_post_param(self, msg: Message) -> None:
        if hasattr(msg["value"], "unconstrained") and msg["kwargs"].get("event_dim") is None:
            self.unaltered.add(msg["value"].unconstrained())


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
        _keep_draws(self.graph)
        if batch.u_np.device.type == "cpu" and TAKES_ONEDNN:
            _choose_library(self.graph)
        self.run: Callable[..., Sequence[Tensor]] = self.graph

    def fits(self, batch: Batch, weights: Mapping[str, float]) -> bool:
        """Whether a batch is of the recorded kind."""
        return self.key == self._key(batch, weights)

    def compile(self, batch: Batch, weights: Mapping[str, float]) -> None:
        """Compile; neither the pair nor the random stream is touched. May run in a thread of its own."""
        inputs: list[Any] = [*self._inputs(batch, weights, copy=True)]
        # what the compiler calls of torch that torch deprecates; not undone, as that is not safe in a thread
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\._inductor")
        with torch.no_grad(), _draws_left_alone():  # the random stream is to be the one that Pyro would use
            self.run = torch._inductor.compile(self.graph, inputs, options={"fallback_random": True})

    def capture(self, batch: Batch, weights: Mapping[str, float]) -> None:
        """Let a GPU start all kernels at once; nothing else may use it meanwhile."""
        n_state = len(list(self.program.parameters())) + len(list(self.program.buffers()))
        with torch.no_grad(), torch.random.fork_rng(devices=_cuda(batch)):
            for _ in range(WARM_RUNS):  # kernels are chosen and memory is taken now: neither can be replayed
                self.run(*self._inputs(batch, weights, copy=True))
            self.run = _Replay(self.run, self._inputs(batch, weights), n_state)

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
            lambda: EagerStep(self.pair, self.n_particles)(batch, weights),
            lambda: self(batch, weights),
        ]
        found = []
        buffers = [b.clone() for b in self.program.buffers()]
        for step in steps:
            self.program.zero_grad(set_to_none=True)
            with torch.random.fork_rng(devices=_cuda(batch)):
                terms = step()
            # without targets some sites have no elements
            gradients = [p.grad for p in self.parameters if p.grad is not None and p.numel()]
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
            learned = [p for p, wanted in zip(parameters, learn, strict=True) if wanted]
            with _RefuseValues():  # type: ignore[no-untyped-call]
                terms = torch.func.functional_call(self.program, state, (here, weight))
                gradients = torch.autograd.grad(_loss(terms, batch), learned, allow_unused=True)
            self.names, self.used = list(terms), [g is not None for g in gradients]
            return [*(t.detach() for t in terms.values()), *(g for g in gradients if g is not None)]

        try:
            with torch.random.fork_rng(devices=_cuda(batch)), pyro.validation_enabled(False):
                return make_fx(step)(*self._inputs(batch, weights, copy=True))
        except Exception as error:  # whatever a user's model may do that cannot be recorded
            raise NotTraceableError(f"{_why(error)}{_place(error, self.pair)}") from error

    def _inputs(self, batch: Batch, weights: Mapping[str, float], copy: bool = False) -> list[Tensor]:
        state = [*self.program.parameters(), *self.program.buffers()]
        if copy:
            state = [t.detach().clone().requires_grad_(t.requires_grad) for t in state]
        device = batch.u_np.device
        weight = [torch.full((), float(w), device=device) for w in weights.values()]  # no copy to wait for
        return [*state, *weight, *(leaf for leaf in tree_flatten(batch)[0] if isinstance(leaf, Tensor))]

    def _key(self, batch: Batch, weights: Mapping[str, float]) -> Any:
        leaves, spec = tree_flatten(batch)
        kinds = [
            (leaf.shape, leaf.dtype, leaf.device) if isinstance(leaf, Tensor) else leaf for leaf in leaves
        ]
        learn = [p.requires_grad for p in self.program.parameters()]
        modes = [module.training for module in self.program.modules()][1:]
        return kinds, str(spec), list(weights), learn, modes


class _Replay:
    """A step as a CUDA graph.

    Parameters and buffers are read where they lie, so they must stay there; all else is copied to places of
    its own. What it returns is overwritten by the next step.

    Args:
        run: The compiled step.
        inputs: What it takes.
        n_state: How many of them are parameters and buffers; they come first.
    """

    def __init__(self, run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], n_state: int):
        self.n_state, self.places = n_state, [t.clone() for t in inputs[n_state:]]
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = run(*inputs[:n_state], *self.places)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        torch._foreach_copy_(self.places, list(inputs[self.n_state :]))
        self.graph.replay()
        return self.outputs


def _filled(leaves: list[Any], spec: TreeSpec, tensors: tuple[Tensor, ...]) -> Batch:
    """The batch with other tensors."""
    left = iter(tensors)
    batch: Batch = tree_unflatten([next(left) if isinstance(f, Tensor) else f for f in leaves], spec)
    return batch


def _cuda(batch: Batch) -> list[torch.device]:
    return [batch.u_np.device] if batch.u_np.device.type == "cuda" else []


@contextmanager
def _draws_left_alone() -> Iterator[None]:
    """Keep the compiler from putting the random stream back to where it found it.

    It draws nothing itself, but training draws meanwhile, and would draw the same again.
    """
    keepers = [
        importlib.import_module(name) for name in ("torch._dynamo.utils", "torch._functorch.aot_autograd")
    ]
    usual = [keeper.preserve_rng_state for keeper in keepers]
    for keeper in keepers:
        keeper.preserve_rng_state = nullcontext  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for keeper, preserve in zip(keepers, usual, strict=True):
            keeper.preserve_rng_state = preserve  # type: ignore[attr-defined]


class _RefuseValues(TorchDispatchMode):
    """Stop where a result's shape, or what Python goes on with, depends on values.

    A recording would be right for the recorded values alone.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        reads = torch.Tag.data_dependent_output in func.tags
        reads = reads and func is not torch.ops.aten._local_scalar_dense.default  # make_fx knows constants
        shapes = torch.Tag.dynamic_output_shape in func.tags
        if func is torch.ops.aten.index.Tensor:  # whole numbers choose as many as they are, masks do not
            shapes = any(index is not None and not index.dtype.is_signed for index in args[1])
        if reads or shapes:
            raise NotTraceableError(f"the result of {func} depends on values")
        return func(*args, **(kwargs or {}))


def _why(error: BaseException) -> str:
    """The first line of an error's message, or else its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _place(error: BaseException, pair: Pair) -> str:
    """The line of the pair, or else of what it calls, at which an error arose."""
    own = {type(side).forward.__code__.co_filename for side in (pair.model, pair.guide)}
    library = [Path(inspect.getfile(m)).parent for m in (torch, pyro)] + [Path(__file__).parent]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    called = [f for f in frames if not any(Path(f.filename).is_relative_to(at) for at in library)]
    chosen = [f for f in called if f.filename in own] or called
    return f", at {chosen[-1].filename}:{chosen[-1].lineno}: {chosen[-1].line}" if chosen else ""


@torch.library.impl(_OPERATORS, "product", "CPU")
def _product(left_nk: Tensor, right_kg: Tensor, bias_g: Tensor | None) -> Tensor:
    """left @ right + bias by oneDNN, which is very slow where the matrix on the right has gaps.

    It copies a left matrix that is the transpose of one in memory: where the right one is smaller, that is
    put on the left instead.
    """
    turned = left_nk.shape[0] > right_kg.shape[1] and left_nk.t().is_contiguous() and bias_g is None
    if turned and right_kg.is_contiguous():
        return _product(right_kg.t(), left_nk.t(), None).t().contiguous()
    if not (right_kg.is_contiguous() or right_kg.t().is_contiguous()):
        right_kg = right_kg.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left_nk, right_kg.t(), bias_g, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """x @ weight.T + bias by oneDNN, and so its gradients."""

    @staticmethod
    def forward(ctx, x_ni: Tensor, weight_oi: Tensor, bias_o: Tensor | None) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: ANN001
        ctx.save_for_backward(x_ni, weight_oi)
        return _product(x_ni, weight_oi.t(), bias_o)

    @staticmethod
    def backward(ctx, grad_no: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]  # noqa: ANN001
        x_ni, weight_oi = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # oneDNN's product has no gradient: where second derivatives are asked for, torch's
        multiply = torch.mm if torch.is_grad_enabled() else partial(_product, bias_g=None)
        by_x = multiply(grad_no, weight_oi) if wanted[0] else None
        by_weight = multiply(grad_no.t(), x_ni) if wanted[1] else None
        return by_x, by_weight, grad_no.sum(0) if wanted[2] else None


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """``nn.Linear``; a large product in single precision is oneDNN's."""
    weight, bias = module.weight, module.bias
    plain = x.dtype == weight.dtype == torch.float32 and x.is_cpu and weight.is_cpu
    special = torch.is_autocast_enabled("cpu") or torch._C._are_functorch_transforms_active()
    if not plain or special or x.numel() * len(weight) < LARGE_PRODUCT:
        return nn.functional.linear(x, weight, bias)
    flat = x.reshape(-1, x.shape[-1])
    product: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    return product.view(*x.shape[:-1], len(weight))


@torch.library.register_fake("pyro_causalcell::product")  # type: ignore[untyped-decorator]
def _product_shape(left_nk: Tensor, right_kg: Tensor, bias_g: Tensor | None) -> Tensor:
    return left_nk.new_empty(left_nk.shape[0], right_kg.shape[1])


def _keep_draws(graph: GraphModule) -> None:
    """Give out all that is drawn: what nothing uses would be left out, and the random stream be another."""
    (output,) = graph.graph.find_nodes(op="output")
    calls = (node for node in graph.graph.nodes if node.op == "call_function")
    seeded = (c for c in calls if torch.Tag.nondeterministic_seeded in getattr(c.target, "tags", ()))
    output.args = ([*output.args[0], *(c for c in seeded if isinstance(c.meta["val"], Tensor))],)
    graph.recompile()


def _choose_library(graph: GraphModule) -> None:
    """Give large matrix products in single precision to oneDNN."""
    aten = torch.ops.aten
    for target in (aten.mm.default, aten.addmm.default):
        for node in graph.graph.find_nodes(op="call_function", target=target):
            *bias, left, right = node.args
            if not _is_large(node, left, bias):
                continue
            with graph.graph.inserting_before(node):
                operator = torch.ops.pyro_causalcell.product.default
                product = graph.graph.call_function(operator, (left, right, bias[0] if bias else None))
            product.meta = node.meta
            node.replace_all_uses_with(product)
            graph.graph.erase_node(node)
    graph.recompile()


def _is_large(product: Node, left: Node, bias: Sequence[Node]) -> bool:
    kind = product.meta["tensor_meta"]
    one_row = all(b.meta["tensor_meta"].shape == kind.shape[-1:] for b in bias) and not product.kwargs
    size = math.prod(kind.shape) * left.meta["tensor_meta"].shape[1]
    return one_row and kind.dtype == torch.float32 and size >= LARGE_PRODUCT


class _Graph:
    """A recorded step that is being compiled beside the training."""

    def __init__(self, traced: TracedStep, batch: Batch, weights: Mapping[str, float], switch: int):
        self.traced, self.switch, self.checked = traced, switch, False
        self.problem: str | None = None
        self.thread = threading.Thread(target=self._compile, args=(batch, dict(weights)), daemon=True)
        self.thread.start()

    def _compile(self, batch: Batch, weights: Mapping[str, float]) -> None:
        try:
            with _COMPILER:
                self.traced.compile(batch, weights)
        except Exception as error:  # told in the training's own thread
            self.problem = f"{type(error).__name__}: {error}"

    def check(self, batch: Batch, weights: Mapping[str, float]) -> str | None:
        """Wait for it, and compare it with Pyro; returns what is wrong."""
        self.thread.join()
        self.checked = True
        if batch.u_np.is_cuda and self.problem is None:
            self._capture(batch, weights)
        difference = 0.0 if self.problem else self.traced.difference(batch, weights)
        if difference > TOLERANCE[torch.get_float32_matmul_precision()]:
            self.problem = f"its gradients differ from Pyro's by {difference:.2g} of their size"
        return self.problem

    def _capture(self, batch: Batch, weights: Mapping[str, float]) -> None:
        try:
            self.traced.capture(batch, weights)
        except Exception as error:  # a kernel that waits for the processor, memory that is short
            warnings.warn(f"the compiled step is not replayed as a CUDA graph: {_why(error)}", stacklevel=2)


class Engine:
    """Takes the steps of one stage of training: eagerly, then by a :class:`TracedStep`.

    The graph is recorded at the first step and compiled beside the training. Minibatches of an epoch differ
    by one cell: once the first graph is in use, one is made for those of the other size. Before a graph takes
    over, its gradients are compared with Pyro's on a batch it has not seen. Where it cannot be made, or
    differs, a warning says why, and training goes on eagerly.

    Args:
        pair: The pair.
        compile: True switches after the first step; False never; None when compiling is about done, where
            the stage is long enough to repay it (``REPAYS_SECONDS``).
        n_steps: Expected length of the stage.
        age: Steps of the stage that were taken before (a resumed run).
        n_particles: Draws of each cell's latents.
    """

    def __init__(self, pair: Pair, compile: bool | None, n_steps: int, age: int = 0, n_particles: int = 1):
        self.pair, self.age, self.n_particles = pair, age, n_particles
        self.compile, self.n_steps = compile, n_steps
        self.wanted = compile is not False
        self.graphs: list[_Graph] = []
        self.eager = EagerStep(pair, n_particles)

    def gradients(self, batch: Batch, weights: Mapping[str, float]) -> Terms:
        """Set the parameters' gradients (they were cleared); returns the terms."""
        traced = self._traced(batch, weights) if self.wanted else None
        self.age += 1
        if traced is not None:
            return traced(batch, weights)
        return self.eager(batch, weights)

    def _traced(self, batch: Batch, weights: Mapping[str, float]) -> TracedStep | None:
        """The compiled step for such a batch, once it is its turn."""
        graph = next((g for g in self.graphs if g.traced.fits(batch, weights)), None)
        if graph is None and len(self.graphs) < MOST_GRAPHS and all(g.checked for g in self.graphs):
            graph = self._start(batch, weights)
        if graph is None or self.age < graph.switch:
            return None
        problem = None if graph.checked else graph.check(batch, weights)
        if problem is not None:
            self._give_up(problem)
            return None
        return graph.traced

    def _start(self, batch: Batch, weights: Mapping[str, float]) -> _Graph | None:
        """Record a graph, unless the stage is too short to repay it."""
        values = batch.n_cells * (1 if batch.x_ng is None else batch.x_ng[0].numel()) * self.n_particles
        seconds = STEP_SECONDS + VALUE_SECONDS * values
        if self.compile is None and self.n_steps * seconds < REPAYS_SECONDS:
            self.wanted = False
            return None
        try:
            with _COMPILER:
                traced = TracedStep(self.pair, batch, weights, self.n_particles)
        except NotTraceableError as error:
            self._give_up(str(error))
            return None
        with warnings.catch_warnings():  # torch's compiler imports what torch deprecates
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._inductor.compile_fx")
        compiled = 1 if self.compile else math.ceil(COMPILE_SECONDS / seconds)
        self.graphs.append(_Graph(traced, batch, weights, compiled * (1 + len(self.graphs))))
        return self.graphs[-1]

    def _give_up(self, why: str) -> None:
        self.wanted, self.graphs = False, []
        warnings.warn(
            f"training goes on without a compiled step: {why.splitlines()[0]}. The result is the same, the "
            "training slower; pass compile=False to leave this out",
            stacklevel=2,
        )
