"""The recorded step: Pyro's numbers and gradients, live weights, refusals, the switch."""

import copy
import importlib
import inspect
from contextlib import contextmanager

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.messenger import Messenger
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyro_causalcell.batch import Batch
from pyro_causalcell.errors import TrainingError
from pyro_causalcell.inference import engine, fit
from pyro_causalcell.inference.engine import EagerStep, Engine, NotTraceableError, TracedStep
from pyro_causalcell.inference.pair import Pair


def _batches(batch: Batch, n: int) -> list[Batch]:
    """Batches of one shape with other counts, in double precision."""
    wide = [f.double() if isinstance(f, torch.Tensor) and f.is_floating_point() else f for f in batch]
    base, generator = Batch(*wide), torch.Generator().manual_seed(1)
    return [
        base._replace(x_ng=torch.poisson(base.x_ng + i, generator=generator)) for i in range(n)
    ]  # the library stays: only its logarithm enters


def _pair(model, guide) -> Pair:
    modules = torch.nn.ModuleDict({"model": copy.deepcopy(model), "guide": copy.deepcopy(guide)}).double()
    pair = Pair(modules["model"], modules["guide"])
    pair.train(True)
    return pair


def _train(pair: Pair, batches: list[Batch], traced: bool) -> list[dict[str, float]]:
    """Adam with weights that change; the recorded graph is run uncompiled."""
    optimizer = torch.optim.Adam(list(pair.parameters()), lr=1e-2)
    torch.manual_seed(3)
    step, found = None, []
    for i, batch in enumerate(batches):
        weights = {"z": i / len(batches)}
        optimizer.zero_grad(set_to_none=True)
        if traced:
            if step is None:
                step = TracedStep(pair, batch, weights)
            assert step.fits(batch, weights)
            terms = step(batch, weights)
        else:
            terms = EagerStep(pair)(batch, weights)
        optimizer.step()
        found.append({name: float(term) for name, term in terms.items()})
    return found


@pytest.mark.parametrize(
    "settings",
    [{}, {"norm": "batch"}, {"gates": "open"}, {"likelihood": "poisson"}, {"likelihood": "zinb"}],
)
def test_recorded_steps_are_pyros(build, batch, settings):
    with pyro.validation_enabled(False):
        model, guide = build(guide={"dropout": 0.3}, **settings)
        eager, traced = _pair(model, guide), _pair(model, guide)
        batches = _batches(batch, 6)
        expected, found = (_train(p, batches, t) for p, t in ((eager, False), (traced, True)))
    for a, b in zip(expected, found, strict=True):
        assert a == pytest.approx(b, rel=1e-5)  # the likelihood's series against its table
    for kind, state in eager.state_dict().items():  # BatchNorm's statistics too
        for name, value in state.items():
            torch.testing.assert_close(traced.state_dict()[kind][name], value, rtol=1e-3, atol=1e-5)


def test_a_recording_knows_its_batches(build, batch):
    pair = _pair(*build())
    first = _batches(batch, 1)[0]
    with pyro.validation_enabled(False):
        step = TracedStep(pair, first, {"z": 0.5})
    assert step.fits(first._replace(x_ng=first.x_ng + 1), {"z": 0.1})
    assert not step.fits(first, {})
    assert not step.fits(first._replace(n_total=61), {"z": 0.5})
    short = [f[:5] if isinstance(f, torch.Tensor) else f for f in first]
    assert not step.fits(Batch(*short), {"z": 0.5})
    pair.train(False)
    assert not step.fits(first, {"z": 0.5})


def _losses(pair: Pair, batches: list[Batch], how: str) -> list[float]:
    """50 steps of Adam in single precision; the recorded graph is run uncompiled."""
    optimizer = torch.optim.Adam(list(pair.parameters()), lr=1e-3)
    torch.manual_seed(3)
    step, losses = None, []
    for i in range(50):
        batch = batches[i % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        if how == "stock":
            loss = TraceMeanField_ELBO().differentiable_loss(pair.model, pair.guide, batch) / batch.n_total
            loss.backward()
        else:
            step = step or (TracedStep(pair, batch, {}) if how == "traced" else None)
            terms = step(batch, {}) if step else EagerStep(pair)(batch, {})
            loss = -sum(terms.values()) / batch.n_total
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_fifty_steps_are_the_same_by_every_engine(build, batch, monkeypatch):
    """Eager, recorded (its matrix products by oneDNN) and stock Pyro under one random stream."""
    monkeypatch.setattr(engine, "LARGE_PRODUCT", 0)
    monkeypatch.setattr(engine, "TAKES_ONEDNN", True)
    found = {}
    for how in ("eager", "traced", "stock"):
        pair = Pair(*build(guide={"dropout": 0.2}))
        pair.train(True)
        batches = [b._replace(x_ng=b.x_ng.float()) for b in (batch, batch._replace(x_ng=batch.x_ng + 1))]
        with pyro.validation_enabled(False):
            found[how] = _losses(pair, batches, how)
    assert found["traced"] == pytest.approx(found["eager"], rel=1e-5)
    assert found["stock"] == pytest.approx(found["eager"], rel=1e-5)
    assert found["eager"][-1] < found["eager"][0]


def test_products_are_taken_where_they_are_looked_at_alone(build, batch):
    """The encoder sees 6 genes, 2 batch columns and 4 programmes, of which the programmes alone learn."""
    pair = _pair(*build())
    with pyro.validation_enabled(False):
        step = TracedStep(pair, _batches(batch, 1)[0], {})
        products = step.graph.graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default)
        assert not any(user.target is torch.ops.aten.slice.Tensor for p in products for user in p.users)
        assert step.difference(_batches(batch, 2)[1], {}) < 1e-4


@pytest.mark.parametrize("layout", ["rows", "columns", "apart"])
def test_onednn_products_are_torchs(layout):
    torch.manual_seed(0)
    left, right, bias = torch.randn(5, 7), torch.randn(7, 4), torch.randn(4)
    right = {"rows": right, "columns": right.t().contiguous().t(), "apart": torch.randn(7, 9)[:, :4]}[layout]
    product = torch.ops.pyro_causalcell.product
    torch.testing.assert_close(product(left, right, None), left @ right)
    torch.testing.assert_close(product(left.t().contiguous().t(), right, bias), left @ right + bias)


@pytest.mark.parametrize("shape", [(5,), (3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_eager_layers_are_torchs(shape, bias, monkeypatch):
    """Values, gradients, and gradients of gradients."""
    monkeypatch.setattr(engine, "LARGE_PRODUCT", 0)
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(7, 4, bias), torch.randn(*shape, 7, requires_grad=True)
    found = []
    for value in (engine._linear(layer, x), layer(x)):
        inputs = [x, *layer.parameters()]
        first = torch.autograd.grad(value.square().sum(), inputs, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), inputs[:2])
        found.append([value, *first, *second])
    torch.testing.assert_close(*found)
    half = torch.autocast("cpu", torch.bfloat16)
    with half:
        assert engine._linear(layer, x).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("cpu", "mkl", "takes"),
    [("GenuineIntel", True, False), ("GenuineIntel", False, True), ("AuthenticAMD", True, True)],
)
def test_onednn_is_left_out_where_mkl_is_at_home(cpu, mkl, takes, monkeypatch):
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.setattr(engine.Path, "exists", lambda self: False)
    monkeypatch.setattr(engine.platform, "processor", lambda: cpu)
    assert engine._mkl_is_fast() is not takes


def test_an_eager_step_leaves_the_modules_as_they_are(build, batch, monkeypatch):
    monkeypatch.setattr(engine, "TAKES_ONEDNN", True)
    pair = Pair(*build())
    modules = [m for side in (pair.model, pair.guide) for m in side.modules()]
    before = [set(m.__dict__) for m in modules]
    step = EagerStep(pair)
    assert step.layers and len(step.holders) == 2
    step(batch, {})
    assert [set(m.__dict__) for m in modules] == before
    with pytest.raises(AttributeError):
        step(None, {})
    assert [set(m.__dict__) for m in modules] == before


def test_an_eager_step_runs_what_the_pair_holds_now(build, batch):
    """A decoder that was exchanged, and a layer with a way of its own."""
    pair, seen = Pair(*build()), []
    step = EagerStep(pair)
    step(batch, {})
    pair.model.decoder = decoder = copy.deepcopy(pair.model.decoder)
    layer = decoder.output
    layer.forward = lambda x: seen.append(len(x)) or torch.nn.functional.linear(x, layer.weight, layer.bias)
    step(batch, {})
    assert seen == [batch.n_cells] and "forward" in layer.__dict__
    assert layer.weight.grad is not None


class Doubles(Messenger):
    """Doubles all parameters that are read under it."""

    def _pyro_param(self, msg):
        msg["value"], msg["done"] = 2 * msg["fn"](*msg["args"], **msg["kwargs"]), True


class Scales(PyroModule):
    """x ~ Normal(0, width · some): one parameter is as it is, one altered by a handler, one taken by rows."""

    def __init__(self):
        super().__init__()
        self.plain = PyroParam(torch.tensor(3.0), constraint=dist.constraints.positive)
        self.altered = PyroParam(torch.tensor(0.5))
        self.rows = PyroParam(torch.arange(1.0, 7.0), event_dim=0)

    def forward(self, batch: Batch) -> None:
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n), Doubles():
            altered = self.altered
        with pyro.plate("rows", 6, subsample=batch.index_n):
            scale_n = self.plain * altered * self.rows
            pyro.sample("x", dist.Normal(0.0, scale_n.unsqueeze(-1)).to_event(1), obs=batch.x_ng)


class NoLatents(PyroModule):
    def forward(self, batch: Batch) -> None:
        pass


def test_parameters_are_read_past_handlers_where_no_handler_minds():
    x_ng = torch.randn(3, 4)
    zero = torch.zeros(3, 0)
    batch = Batch(x_ng, zero, zero, zero, torch.zeros(3, dtype=torch.long), torch.tensor([1, 3, 5]), 6)
    expected = 2 * torch.distributions.Normal(0.0, torch.tensor([[6.0], [12.0], [18.0]])).log_prob(x_ng).sum()
    pair = Pair(Scales(), NoLatents())
    step, grads = EagerStep(pair), []
    for _ in range(2):
        pair.model.zero_grad()
        torch.testing.assert_close(step(batch, {})["x"], expected)
        grads.append([p.grad.clone() for p in pair.model.parameters()])
    torch.testing.assert_close(*grads)
    assert step.unaltered == {pair.model.plain_unconstrained}


class Reads(PyroModule):
    """A model that looks at values: what it does depends on them."""

    def __init__(self, how: str):
        super().__init__()
        self.how, self.loc = how, torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> None:
        scale = 1.0
        if self.how == "value":
            scale = 2.0 if float(batch.x_ng.sum()) > 0 else 1.0  # value
        if self.how == "shape":
            scale = 1.0 + batch.x_ng[batch.x_ng > 2].mean()  # shape
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_n = pyro.sample("z", dist.Normal(self.loc, scale))
            pyro.sample("x", dist.Normal(z_n.unsqueeze(-1), 1.0).to_event(1), obs=batch.x_ng)


class Guide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(()))

    def forward(self, batch: Batch) -> None:
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            pyro.sample("z", dist.Normal(self.loc, 1.0))


@pytest.mark.parametrize("how", ["value", "shape"])
def test_a_pair_that_looks_at_values_is_refused_and_trains_on(batch, how):
    pair = Pair(Reads(how), Guide())
    with pyro.validation_enabled(False):
        with pytest.raises(NotTraceableError):
            TracedStep(pair, batch, {})
        steps = Engine(pair, compile=True, n_steps=10)
        lines, first = inspect.getsourcelines(Reads.forward)
        at = first + next(i for i, line in enumerate(lines) if line.strip().endswith(f"# {how}"))
        with pytest.warns(UserWarning, match=f"without a compiled step: .*, at .*test_engine.py:{at}: scale"):
            terms = steps.gradients(batch, {})
    assert set(terms) == {"z", "x"} and pair.guide.loc.grad is not None


def test_a_wrong_graph_is_found_before_it_is_used(build, batch, monkeypatch):
    """A multiplier that Python froze: right for the recorded batch, wrong for the next."""
    pair = Pair(*build())
    pair.train(True)
    monkeypatch.setattr(TracedStep, "compile", lambda self, *_: None)
    steps = Engine(pair, compile=True, n_steps=10)
    with pyro.validation_enabled(False):
        steps.gradients(batch, {})
        frozen = batch.x_ng.clone()
        traced = steps.graphs[0].traced
        traced.run = lambda *inputs: traced.graph(*(frozen if i is later.x_ng else i for i in inputs))
        later = batch._replace(x_ng=batch.x_ng + 3)
        with pytest.warns(UserWarning, match="gradients differ"):
            steps.gradients(later, {})
        pair.model.zero_grad()
        assert steps.gradients(later, {})["x"] == pytest.approx(
            float(EagerStep(pair)(later, {})["x"]), rel=0.2
        )


def test_stages_too_short_to_repay_are_left_alone(build, batch, monkeypatch):
    monkeypatch.setattr(engine, "TracedStep", None)
    monkeypatch.setattr(engine, "STEP_SECONDS", 0.1)  # 0.1 + 12 cells x 6 genes x 0.01 = 0.82 s a step
    monkeypatch.setattr(engine, "VALUE_SECONDS", 0.01)
    monkeypatch.setattr(engine, "REPAYS_SECONDS", 82.01)
    pair = Pair(*build())
    with pytest.raises(TypeError):
        Engine(pair, None, 101).gradients(batch, {})
    for asked, n_steps in ((None, 100), (False, 10**9)):
        assert Engine(pair, asked, n_steps).gradients(batch, {}).keys() >= {"x", "z"}


@pytest.mark.parametrize(("age", "first"), [(0, 3), (3, 3), (10, 10)])
def test_the_graph_takes_over_at_its_step(build, batch, monkeypatch, age, first):
    """A resumed run has steps behind it."""
    monkeypatch.setattr(engine, "STEP_SECONDS", 8.0)
    monkeypatch.setattr(engine, "COMPILE_SECONDS", 24.0)
    monkeypatch.setattr(TracedStep, "compile", lambda self, *_: None)
    taken: list[int] = []
    call = TracedStep.__call__
    monkeypatch.setattr(TracedStep, "__call__", lambda self, *a: taken.append(steps.age) or call(self, *a))
    pair = Pair(*build())
    pair.train(True)
    steps = Engine(pair, None, 10, age=age)
    with pyro.validation_enabled(False):
        for _ in range(6):
            steps.gradients(batch, {})
    assert sorted(set(taken)) == list(range(first, age + 7))


def test_minibatches_of_two_sizes_are_both_compiled(build, batch, monkeypatch):
    """Those of an epoch differ by one cell; a third size is taken eagerly."""
    monkeypatch.setattr(TracedStep, "compile", lambda self, *_: None)
    taken: list[int] = []
    call = TracedStep.__call__
    monkeypatch.setattr(
        TracedStep, "__call__", lambda self, b, w: taken.append(b.n_cells) or call(self, b, w)
    )
    pair = Pair(*build())
    pair.train(True)
    steps = Engine(pair, compile=True, n_steps=10)
    sizes = [Batch(*(f[:n] if isinstance(f, torch.Tensor) else f for f in batch)) for n in (12, 11, 5)]
    with pyro.validation_enabled(False):
        for _ in range(3):
            for some in sizes:
                steps.gradients(some, {})
    assert set(taken) == {12, 11}


def test_compiled_training_is_the_eager_training(tiny_screen, quick):
    """The one test that compiles."""
    settings = quick | {"epochs": 2, "n_latents": 2, "n_hidden": 4, "gates": "open", "batch_size": 90}
    eager, compiled = (fit("sparse-shift", None, tiny_screen, compile=c, **settings) for c in (False, True))
    found, expected = compiled.history["train_loss"], eager.history["train_loss"]
    assert found.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-3)
    again = fit("sparse-shift", None, tiny_screen, compile=True, **settings)
    assert again.history["train_loss"].tolist() == found.tolist()


@pytest.mark.parametrize("keeper", ["torch._dynamo.utils", "torch._functorch.aot_autograd"])
def test_what_is_drawn_while_the_graph_is_compiled_stays_drawn(build, batch, monkeypatch, keeper):
    module, drawn = importlib.import_module(keeper), []
    usual = module.preserve_rng_state

    def slow(graph, inputs, options):
        with module.preserve_rng_state():
            drawn.append(torch.rand(()))  # by a step that training takes meanwhile
        return graph

    monkeypatch.setattr(torch._inductor, "compile", slow)
    TracedStep(Pair(*build()), batch, {}).compile(batch, {})
    assert torch.rand(()) != drawn[0]
    assert module.preserve_rng_state is usual


def test_several_particles_are_recorded_too(build, batch):
    pair = _pair(*build())
    first, later = _batches(batch, 2)
    with pyro.validation_enabled(False):
        step = TracedStep(pair, first, {"gate": 0.5}, n_particles=3)
        assert step.difference(later, {"gate": 0.25}) < 1e-5
        assert "cells" in step(later, {"gate": 1.0})


class Tape(TorchDispatchMode):
    """A CUDA graph on a processor: the same operations on the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found

    def replay(self):
        for func, args, kwargs, before in self.calls:
            now = func(*args, **kwargs)
            for place, value in zip(tree_leaves(before), tree_leaves(now), strict=True):
                if isinstance(place, torch.Tensor) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


@contextmanager
def _recorded(tape):
    with tape:
        yield


def test_a_replayed_step_is_the_step(build, batch, monkeypatch):
    """Counts and weights are new in every step, parameters and BatchNorm's statistics are where they were."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Tape)
    monkeypatch.setattr(torch.cuda, "graph", _recorded)
    model, guide = build(norm="batch")
    plain, replayed = _pair(model, guide), _pair(model, guide)
    first, *later = _batches(batch, 4)
    with pyro.validation_enabled(False):
        steps = [TracedStep(p, first, {"z": 0.5}) for p in (plain, replayed)]
        before = copy.deepcopy(replayed.state_dict())
        torch.manual_seed(3)
        steps[1].capture(first, {"z": 0.5})
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(3))
        replayed.load_state_dict(before)  # a GPU only records meanwhile
        for i, here in enumerate(later):
            terms, gradients = [], []
            for step in steps:
                torch.manual_seed(i)
                terms.append({n: float(t) for n, t in step(here, {"z": i / 2}).items()})
                learned = [p for p in step.parameters if p.grad is not None]
                gradients.append([p.grad for p in learned])
                with torch.no_grad():
                    for p in learned:
                        p.sub_(1e-3 * p.grad)
            assert terms[0] == pytest.approx(terms[1], rel=1e-12)
            torch.testing.assert_close(*gradients)
    for kind, state in plain.state_dict().items():
        torch.testing.assert_close(dict(replayed.state_dict()[kind]), dict(state))


def test_a_step_that_cannot_be_captured_is_used_as_it_is(build, batch):
    """There is no GPU to capture it on."""
    if torch.cuda.is_available():
        pytest.skip("a GPU captures it")
    pair = _pair(*build())
    first = _batches(batch, 1)[0]
    with pyro.validation_enabled(False):
        graph = engine._Graph.__new__(engine._Graph)
        graph.traced = TracedStep(pair, first, {})
        run = graph.traced.run
        with pytest.warns(UserWarning, match="not replayed as a CUDA graph: "):
            graph._capture(first, {})
        assert graph.traced.run is run


@pytest.mark.gpu
def test_a_gpu_replays_the_step(tiny_screen, quick):
    """The same history as by eager steps, through a CUDA graph."""
    settings = quick | {"epochs": 2, "gates": "open", "device": "cuda"}
    captured = []
    replay, call = engine._Replay, engine._Replay.__call__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "__call__", lambda self, *a: captured.append(1) or call(self, *a))
        compiled = fit("sparse-shift", None, tiny_screen, compile=True, **settings)
    eager = fit("sparse-shift", None, tiny_screen, compile=False, **settings)
    assert captured
    assert compiled.history["train_loss"].to_numpy() == pytest.approx(
        eager.history["train_loss"].to_numpy(), rel=1e-3
    )


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_matrix_products_have_the_precision_that_was_asked_for(tiny_screen, quick, monkeypatch, precision):
    seen, gradients = set(), Engine.gradients

    def look(self, batch, weights):
        seen.add(torch.get_float32_matmul_precision())
        return gradients(self, batch, weights)

    monkeypatch.setattr(Engine, "gradients", look)
    fit("sparse-shift", None, tiny_screen, matmul_precision=precision, **quick | {"epochs": 1})
    assert seen == {precision}
    assert torch.get_float32_matmul_precision() == "highest"


def test_an_unknown_precision_is_told(tiny_screen, quick):
    with pytest.raises(TrainingError, match="'highest', 'high', 'medium'.*'tf32'"):
        fit("sparse-shift", None, tiny_screen, matmul_precision="tf32", **quick)
