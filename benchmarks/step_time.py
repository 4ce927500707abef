"""Step time of the engines of ``fit`` and of stock Pyro, as a share of a step written by hand in torch.

One training step is the loss, its gradients, clipping and one fused Adam step. Six engines take it on
the same pair, with its defaults, and the same minibatch. ``--model`` takes another pair than sparse shift:

* hand-written: eager torch, analytic KLs, the exact expectation over gates, the likelihood by ``lgamma``;
* by-torch: the same by ``torch.compile``, with the likelihood of a recorded step;
* eager: ``EagerStep``, with which ``fit`` starts;
* compiled: ``TracedStep``, to which ``fit`` switches where training is long enough;
* stock: Pyro's ``TraceMeanField_ELBO``, on the same model with its table of counts;
* svi: Pyro's ``SVI`` and ``Adam``, and torch's (zero-inflated: Pyro's) negative binomial: what Pyro alone
  gives.

First they must agree in loss and gradients. Then they take turns; every round gives one ratio.
Times are CPU time of this process on one thread, so that other work on the machine matters little.
"""

import argparse
import copy
import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from handwritten import plain_layers, sparse_shift, temporal_scm, weight_variant_scm
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor, nn

from pyro_causalcell.batch import Batch
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.guides.temporal_scm import TemporalSCMGuide
from pyro_causalcell.guides.weight_variant_scm import WeightVariantSCMGuide
from pyro_causalcell.inference import elbo_terms
from pyro_causalcell.inference.engine import (
    TOLERANCE,
    EagerStep,
    NotTraceableError,
    TracedStep,
    keep_freed_memory,
)
from pyro_causalcell.inference.pair import Pair
from pyro_causalcell.models.sparse_shift import SparseShift
from pyro_causalcell.models.temporal_scm import TemporalSCM
from pyro_causalcell.models.weight_variant_scm import WeightVariantSCM

SIZES = ["128x1000", "512x2000", "128x5000"]
CLIP = 100.0
"""Largest gradient norm: the default of ``fit``."""
ROUNDING = 1e-8
"""Largest difference of loss and gradients in double precision, as a share of the largest gradient."""

TIMES = (0.0, 1.0, 2.0, 3.0)
"""Snapshots, for pairs that follow cells over time."""

Loss = Callable[[nn.Module, nn.Module, Batch], Tensor]


@dataclass(frozen=True)
class Setting:
    """One row of the table."""

    family: str
    n_cells: int
    n_genes: int
    likelihood: str
    n_targets: int
    n_latents: int
    n_hidden: int
    seed: int


# ---------------------------------------------------------------- the engines


def eager(model: nn.Module, guide: nn.Module, batch: Batch) -> Tensor:
    """The same by the handler with which ``fit`` starts."""
    return -torch.stack(list(elbo_terms(model, guide, batch).values())).sum() / batch.n_total


def stock(model: nn.Module, guide: nn.Module, batch: Batch) -> Tensor:
    """The same by stock Pyro."""
    loss: Tensor = TraceMeanField_ELBO().differentiable_loss(model, guide, batch)
    return loss / batch.n_total


FAMILIES: dict[str, tuple[type[nn.Module], type[nn.Module], Callable[..., Tensor]]] = {
    "sparse-shift": (SparseShift, SparseShiftGuide, sparse_shift),
    "weight-variant-scm": (WeightVariantSCM, WeightVariantSCMGuide, weight_variant_scm),
    "temporal-scm": (TemporalSCM, TemporalSCMGuide, temporal_scm),
}
"""Model, guide, and the loss written by hand."""


# ---------------------------------------------------------------- pair and data


def build(setting: Setting, **settings: str) -> tuple[nn.Module, nn.Module, Batch]:
    """The pair with its defaults, or some other settings, and one minibatch of 100 as many cells in all."""
    torch.manual_seed(setting.seed)
    rng = np.random.default_rng(setting.seed)
    batch = _batch(setting, rng)
    over_time = setting.family == "temporal-scm"
    if setting.family != "sparse-shift":
        batch = batch._replace(control=_batch(setting, rng, control=True))
    shared: dict[str, Any] = {
        "n_genes": setting.n_genes,
        "n_targets": setting.n_targets,
        "target_cells": (batch.n_total / (setting.n_targets + 1),) * setting.n_targets,
        "n_hidden": setting.n_hidden,
        "likelihood": setting.likelihood,
        **({"times": TIMES} if over_time else {}),
        **settings,
    }
    if setting.family == "sparse-shift":
        shared["n_latents"] = setting.n_latents
    sizes: dict[str, Any] = {}
    if over_time:
        sizes = {"n_cells": batch.n_total, "n_conditions": setting.n_targets + 1}
        sizes |= {"longest_gap": 1.0, "doses_vary": False}
    model_class, guide_class, _ = FAMILIES[setting.family]
    model, guide = model_class(**shared, **sizes), guide_class(**shared)
    if over_time:  # as after the first steps: every snapshot is known
        model.filled_ct.fill_(True)
        model.memory_ctmk.normal_()
    return model, guide, batch


def _batch(setting: Setting, rng: np.random.Generator, control: bool = False) -> Batch:
    """Counts as in a screen: most are zero, a few genes reach hundreds; log1p of them for the Gaussian."""
    n, g, p = setting.n_cells, setting.n_genes, setting.n_targets
    share_g = rng.lognormal(0.0, 2.0, g)
    depth_n1 = g * rng.lognormal(0.0, 0.4, (n, 1))  # one count per gene on average
    rate_ng = depth_n1 * share_g / share_g.sum() * rng.gamma(2.0, 0.5, (n, g))
    x_ng = torch.from_numpy(rng.poisson(rate_ng)).float()
    library_n1 = x_ng.sum(1, keepdim=True)
    condition_n = torch.from_numpy(rng.integers(0, 1 if control else p + 1, n))
    time_n = torch.arange(n) % len(TIMES)  # control cells of a row have the time of its cell
    return Batch(
        x_ng=x_ng.log1p() if setting.likelihood == "gaussian" else x_ng,
        u_np=torch.eye(p + 1)[condition_n, 1:],
        library_n1=library_n1,
        batch_nb=torch.zeros(n, 0),
        condition_n=condition_n,
        index_n=torch.arange(n),
        n_total=100 * n,
        time_n=time_n.float() if setting.family == "temporal-scm" else None,
        most=1,
    )


# ---------------------------------------------------------------- agreement


def check(engines: dict[str, Loss], model: nn.Module, guide: nn.Module, batch: Batch) -> None:
    """All engines must give one loss and one set of gradients under one seed.

    Raises:
        SystemExit: They do not.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, engine in engines.items():  # a memory of the model changes with every step: take copies
        modules = nn.ModuleDict({"model": copy.deepcopy(model), "guide": copy.deepcopy(guide)}).double()
        torch.manual_seed(1)
        loss = engine(modules["model"], modules["guide"], _wide(batch))
        loss.backward()
        grads = {n: p.grad for n, p in modules.named_parameters() if p.grad is not None}
        found[name] = {"loss": loss.detach(), **grads}
    expected = found.pop("hand-written")
    allowed = ROUNDING * max(float(value.abs().max()) for value in expected.values())
    for name, values in found.items():
        if values.keys() != expected.keys():
            raise SystemExit(f"{name} has gradients of other parameters: {values.keys() ^ expected.keys()}")
        errors = {n: float((values[n] - expected[n]).abs().max()) for n in expected}
        error, worst = max((error, n) for n, error in errors.items())
        if not error <= allowed:
            raise SystemExit(
                f"{name} differs from hand-written by {error:.2g} in {worst} (allowed {allowed:.2g})"
            )


def _wide(batch: Batch) -> Batch:
    """The minibatch in double precision."""
    fields: dict[str, Any] = {n: f for n, f in batch._asdict().items() if isinstance(f, Tensor)}
    wide = {n: f.double() for n, f in fields.items() if f.is_floating_point()}
    return batch._replace(**wide, control=None if batch.control is None else _wide(batch.control))


# ---------------------------------------------------------------- time


def stepper(engine: Loss, model: nn.Module, guide: nn.Module, batch: Batch) -> Callable[[], None]:
    """One training step on copies of the pair."""
    model, guide = copy.deepcopy(model), copy.deepcopy(guide)
    return _step(model, guide, lambda: engine(model, guide, batch).backward())


def by_torch_stepper(
    loss: Callable[..., Tensor], model: nn.Module, guide: nn.Module, batch: Batch
) -> Callable[[], None]:
    """The loss written by hand, with the fast likelihood, by ``torch.compile``."""
    return stepper(torch.compile(partial(loss, fast=True)), model, guide, batch)


def eager_stepper(model: nn.Module, guide: nn.Module, batch: Batch) -> Callable[[], None]:
    """The same by the engine with which ``fit`` starts."""
    model, guide = copy.deepcopy(model), copy.deepcopy(guide)
    eager_step = EagerStep(Pair(model, guide))
    return _step(model, guide, lambda: eager_step(batch, {}))


def svi_stepper(model: nn.Module, guide: nn.Module, batch: Batch) -> Callable[[], None]:
    """One step of stock SVI, without clipping."""
    model, guide = copy.deepcopy(model), copy.deepcopy(guide)
    if getattr(model, "likelihood", None) in ("nb", "zinb"):
        model.measurement = partial(_by_torch, model)  # type: ignore[method-assign]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-4}), TraceMeanField_ELBO())
    return lambda: svi.step(batch)


def _by_torch(model: nn.Module, z_nk: Tensor, batch: Batch) -> dist.TorchDistribution:
    """p(x | z) by the distributions of torch and Pyro."""
    log_mean_ng = batch.library_n1.log() + model.decoder(z_nk, batch.batch_nb).log_softmax(-1)
    logits_ng, gate_logit_g = log_mean_ng - model.theta_g.log(), model.zero_logit_g
    if gate_logit_g is None:
        return dist.NegativeBinomial(model.theta_g, logits=logits_ng)
    logits_ng = logits_ng - nn.functional.logsigmoid(-gate_logit_g)
    return dist.ZeroInflatedNegativeBinomial(model.theta_g, logits=logits_ng, gate_logits=gate_logit_g)


def compiled_stepper(model: nn.Module, guide: nn.Module, batch: Batch) -> Callable[[], None]:
    """The same by the compiled graph; it must agree with Pyro.

    Raises:
        SystemExit: It does not.
    """
    model, guide = copy.deepcopy(model), copy.deepcopy(guide)
    start = time.perf_counter()
    traced = TracedStep(Pair(model, guide), batch, {})
    traced.compile(batch, {})
    print(f"recorded and compiled in {time.perf_counter() - start:.0f} s")
    difference = traced.difference(batch, {})
    if not difference <= TOLERANCE[torch.get_float32_matmul_precision()]:
        raise SystemExit(f"compiled gradients differ from Pyro's by {difference:.2g} of their size")
    return _step(model, guide, lambda: traced(batch, {}))


def _step(model: SparseShift, guide: SparseShiftGuide, gradients: Callable[[], object]) -> Callable[[], None]:
    parameters = [*model.parameters(), *guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients()
        nn.utils.clip_grad_norm_(parameters, CLIP, foreach=True)
        optimizer.step()

    return step


def measure(steppers: Sequence[Callable[[], None]], rounds: int, steps: int) -> np.ndarray:
    """Milliseconds of CPU time a step, shape rounds x engines.

    In training a step follows many of the same engine: as many are taken before the clock starts. Each round
    has an order of its own, so that no engine always follows the same other one.
    """
    rng = np.random.default_rng(0)
    for step in steppers:
        for _ in range(5):
            step()
    times = np.zeros((rounds, len(steppers)))
    for r in range(rounds):
        for i in rng.permutation(len(steppers)).tolist():
            for _ in range(steps):
                steppers[i]()
            start = time.process_time()
            for _ in range(steps):
                steppers[i]()
            times[r, i] = (time.process_time() - start) / steps * 1e3
    return times


def report(setting: Setting, batch: Batch, names: Sequence[str], times: np.ndarray) -> None:
    """Print one row per engine: median of the rounds' ratios and their quartiles."""
    assert batch.x_ng is not None
    ratios = times / times[:, :1]
    low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75], axis=0)
    size = f"{setting.n_cells}x{setting.n_genes}"
    print(f"\n{size}, {setting.likelihood}: {float((batch.x_ng > 0).float().mean()):.0%} non-zero, ", end="")
    print(f"largest value {float(batch.x_ng.max()):.0f}, {len(times)} rounds")
    for i, name in enumerate(names):
        ms = np.median(times[:, i])
        print(f"  {name:<13} {middle[i]:5.2f}  [{low[i]:.2f}, {high[i]:.2f}]  {ms:8.2f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, help="cells x genes")
    parser.add_argument("--model", choices=list(FAMILIES), default="sparse-shift")
    parser.add_argument("--likelihood", choices=["nb", "zinb", "poisson", "gaussian"], default="nb")
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--latents", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=10, help="steps of each engine in a round")
    parser.add_argument("--precision", choices=list(TOLERANCE), default="highest", help="of matrix products")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(given.precision)
    torch.set_flush_denormal(True)  # as fit does
    pyro.enable_validation(False)  # as fit does
    keep_freed_memory()  # as fit does
    print("CPU time of a step as a share of hand-written torch: median [quartiles] of the rounds' ratios")
    for size in given.sizes:
        n, g = (int(number) for number in size.split("x"))
        sizes = given.targets, given.latents, given.hidden, given.seed
        setting = Setting(given.model, n, g, given.likelihood, *sizes)
        model, guide, batch = build(setting)
        by_hand = FAMILIES[given.model][2]
        engines: dict[str, Loss] = {"hand-written": by_hand, "eager": eager, "stock": stock}
        check(engines, model, guide, batch)
        steppers = {name: stepper(engine, model, guide, batch) for name, engine in engines.items()}
        plain_guide = plain_layers(guide)
        steppers["hand-written"] = stepper(by_hand, model, plain_guide, batch)
        steppers["eager"] = eager_stepper(model, guide, batch)
        if given.model == "sparse-shift":
            steppers["svi"] = svi_stepper(model, guide, batch)
        try:
            steppers["compiled"] = compiled_stepper(model, guide, batch)
        except NotTraceableError as error:
            print(f"no compiled step: {error}")
        else:
            steppers["by-torch"] = by_torch_stepper(by_hand, model, plain_guide, batch)
        gc.collect()
        gc.freeze()  # a process that does not compile has no objects of a compiler to walk through
        times = measure(list(steppers.values()), given.rounds, given.steps)
        report(setting, batch, list(steppers), times)


if __name__ == "__main__":
    main()
