"""What reading cells costs beside training, how well they are shuffled, and how much memory it takes.

A simulated screen is written to an h5ad file in pieces, its cells sorted by condition: the common case, and
the hardest for reading in blocks. Then, with ``SparseShift`` and its defaults:

* cost: CPU time of the loader alone for a minibatch, over CPU time of a compiled training step;
* throughput: cells trained per second from disk, over the same with x resident, in turns;
* shuffling: variance over minibatches, and over the means of successive ones, of the gradient and of the
  number of cells of a condition, each over that under full shuffling;
* memory: the largest resident set of another process that opens the file and fits one epoch.

CPU time is that of all threads, so reading ahead does not hide work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyro
import torch
from scipy import sparse
from scipy.optimize import brentq
from torch import Tensor

from pyro_causalcell.data import Minibatches, Screen, read
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.inference import elbo_terms, fit
from pyro_causalcell.inference.engine import TracedStep, keep_freed_memory
from pyro_causalcell.inference.pair import Pair
from pyro_causalcell.models.sparse_shift import SparseShift

BATCH = 512
BUDGETS = {"resident": 64.0, "disk": 0.0}
WINDOW = 20
"""Successive minibatches whose mean gradient is compared: about what Adam averages over."""


# ---------------------------------------------------------------- file


def write(path: Path, n_cells: int, n_genes: int, n_targets: int, filled: float, seed: int = 0) -> None:
    """A screen of Poisson counts, sorted by condition; a tenth of the cells is control."""
    rng = np.random.default_rng(seed)
    share_g = rng.lognormal(0.0, 1.5, n_genes)
    rate_g = share_g * brentq(lambda s: 1 - np.exp(-s * share_g).mean() - filled, 1e-6, 1e3)
    sizes = np.full(n_targets, int(0.9 * n_cells) // n_targets)
    names = [f"T{target:04d}" for target in range(n_targets)]
    label_n = np.repeat(["non-targeting", *names], [n_cells - sizes.sum(), *sizes])
    obs = pd.DataFrame({"target": pd.Categorical(label_n)}, index=[f"c{n}" for n in range(n_cells)])
    var = pd.DataFrame(index=[f"g{g}" for g in range(n_genes)])
    effect_pg = rng.normal(0.0, 1.0, (n_targets, n_genes)) * (rng.random((n_targets, n_genes)) < 0.05)
    with h5py.File(path, "w") as file:
        for start in range(0, n_cells, 10_000):
            part_n = label_n[start : start + 10_000]
            effect_ng = np.zeros((len(part_n), n_genes))
            for name in set(part_n) - {"non-targeting"}:
                effect_ng[part_n == name] = effect_pg[int(name[1:])]
            depth_n1 = rng.lognormal(0.0, 0.3, (len(part_n), 1))
            counts_ng = rng.poisson(rate_g * depth_n1 * np.exp(effect_ng))
            x_ng = sparse.csr_matrix(counts_ng.astype(np.float32))
            if start:
                ad.io.sparse_dataset(file["X"]).append(x_ng)
            else:
                ad.io.write_elem(file, "/", ad.AnnData(x_ng, obs[:10_000], var))
        ad.io.write_elem(file, "obs", obs)


# ---------------------------------------------------------------- cost and throughput


def loader_ms(minibatches: Minibatches) -> float:
    """CPU time of a minibatch without any training, in ms."""
    start = time.process_time()
    for _ in minibatches.epoch(1):
        pass
    return (time.process_time() - start) / len(minibatches) * 1e3


def train(traced: TracedStep, minibatches: Minibatches, epoch: int) -> tuple[float, float]:
    """CPU time and wall time of a step with its minibatch, in ms."""
    parameters = [*traced.pair.model.parameters(), *traced.pair.guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    cpu, wall = time.process_time(), time.perf_counter()
    for batch in minibatches.epoch(epoch):
        optimizer.zero_grad(set_to_none=True)
        traced(batch, {})
        optimizer.step()
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return cpu / len(minibatches) * 1e3, wall / len(minibatches) * 1e3


# ---------------------------------------------------------------- shuffling


def gradient_variances(pair: Pair, minibatches: Minibatches) -> tuple[float, float]:
    """Total variance of the gradient over minibatches, and over means of ``WINDOW`` successive ones."""
    parameters = [*pair.model.parameters(), *pair.guide.parameters()]
    kept = []
    torch.manual_seed(0)
    for batch in minibatches.epoch(1):
        loss = -torch.stack(list(elbo_terms(pair.model, pair.guide, batch).values())).sum() / batch.n_total
        kept.append(torch.cat([g.flatten() for g in _gradients(loss, parameters)])[::10])
    gradient_tm = torch.stack(kept)
    window_wm = gradient_tm[: len(kept) // WINDOW * WINDOW].unflatten(0, (-1, WINDOW)).mean(1)
    return float(gradient_tm.var(0).sum()), float(window_wm.var(0).sum())


def _gradients(loss: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)


def composition_variances(minibatches: Minibatches, n_conditions: int) -> tuple[float, float]:
    """Variance of how many cells of a condition are in a minibatch, and in ``WINDOW`` successive ones."""
    batches = (batch for epoch in range(5) for batch in minibatches.epoch(epoch))
    count_tc = np.array([np.bincount(batch.condition_n, minlength=n_conditions) for batch in batches])
    window_wc = count_tc[: len(count_tc) // WINDOW * WINDOW].reshape(-1, WINDOW, n_conditions).sum(1)
    return float(count_tc.var(0).mean()), float(window_wc.var(0).mean())


# ---------------------------------------------------------------- memory


def peak(path: Path, budget_gb: float) -> None:
    """Open the screen, fit one epoch, and print what it took, as JSON."""
    found = {"libraries": _peak_gb()}
    start = time.perf_counter()
    screen = Screen(read(path, backed=True))
    found |= {"screen": _peak_gb(), "open_s": time.perf_counter() - start}
    start = time.perf_counter()
    fit(
        "sparse-shift",
        None,
        screen,
        epochs=1,
        batch_size=BATCH,
        compile=False,
        memory_budget_gb=budget_gb,
        progress=False,
    )
    print(json.dumps(found | {"fit": _peak_gb(), "epoch_s": time.perf_counter() - start}))


def _peak_gb() -> float:
    status = Path("/proc/self/status").read_text()  # getrusage's peak would count the parent's, too
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


# ---------------------------------------------------------------- all


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", type=int, default=100_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--targets", type=int, default=100)
    parser.add_argument("--filled", type=float, default=0.1, help="share of values other than zero")
    parser.add_argument("--batches", type=int, default=195, help="minibatches of a measured epoch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the file is written; it is deleted afterwards")
    parser.add_argument("--only", choices=["throughput", "memory"], help="measure this alone")
    parser.add_argument("--peak", type=Path, help=argparse.SUPPRESS)  # what the other process does
    given = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as fit does
    keep_freed_memory()  # as fit does
    if given.peak is not None:
        peak(given.peak, budget_gb=0.5)
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        path = Path(folder) / "simulated.h5ad"
        write(path, given.cells, given.genes, given.targets, given.filled)
        size_gb = path.stat().st_size / 1e9
        print(f"{given.cells} cells x {given.genes} genes, simulated, {size_gb:.2f} GB on disk", flush=True)
        if given.only != "memory":
            measure(path, given.batches, given.rounds, shuffling=given.only is None)
        if given.only == "throughput":
            return
        command = [sys.executable, __file__, "--peak", str(path)]
        found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        print(f"peak memory: libraries {found['libraries']:.2f} GB", end=", ")
        print(f"with the screen open {found['screen']:.2f} GB ({found['open_s']:.0f} s)", end=", ")
        print(f"with an epoch of fit {found['fit']:.2f} GB ({found['epoch_s']:.0f} s)")


def measure(path: Path, n_batches: int, rounds: int, shuffling: bool) -> None:
    """Print cost, throughput and, if asked for, shuffling."""
    pyro.enable_validation(False)  # as fit does
    screen = Screen(read(path, backed=True))
    n = min(screen.n_cells // BATCH, n_batches) * BATCH  # a recorded step takes batches of one size
    rows = np.arange(n)
    ways = {name: Minibatches(screen, rows, BATCH, memory_budget_gb=gb) for name, gb in BUDGETS.items()}
    first = next(ways["resident"].epoch(0))
    pair = _pair(screen)
    traced = TracedStep(pair, first, {})
    traced.compile(first, {})
    train(traced, ways["resident"], 0)  # the first steps are slower
    times = np.array([[train(traced, m, r) for m in ways.values()] for r in range(rounds)])
    alone = np.array([[loader_ms(m) for m in ways.values()] for _ in range(rounds)])
    step_ms = np.median(times[:, 0, 0] - alone[:, 0])
    print(f"compiled step of {BATCH} cells: {step_ms:.1f} ms of CPU time", flush=True)
    for i, name in enumerate(ways):
        ms = np.median(alone[:, i])
        print(f"loader, {name:<9} {ms:6.2f} ms a minibatch, {ms / step_ms:6.1%} of a step")
    for i, kind in enumerate(["CPU", "wall"]):
        ratio_r = times[:, 0, i] / times[:, 1, i]
        each = ", ".join(f"{ratio:.2f}" for ratio in ratio_r)
        print(f"throughput from disk over resident, {kind} time: {np.median(ratio_r):.2f} ({each})")
    if not shuffling:
        return
    ways["not shuffled"] = Minibatches(screen, rows, BATCH, shuffle=False, memory_budget_gb=0)
    ways["resident, other seed"] = Minibatches(screen, rows, BATCH, seed=1, memory_budget_gb=64)
    n_conditions = len(screen.conditions)
    for what, found in (
        ("gradient", {name: gradient_variances(pair, m) for name, m in ways.items()}),
        ("cells of a condition", {name: composition_variances(m, n_conditions) for name, m in ways.items()}),
    ):
        print(f"variance over full shuffling, {what}:")
        for name, (one, window) in found.items():
            full_one, full_window = found["resident"]
            print(f"  {name:<21} {one / full_one:6.3f} for a minibatch", end=", ")
            print(f"{window / full_window:6.3f} for {WINDOW} together", flush=True)


def _pair(screen: Screen) -> Pair:
    dims = screen.dims()
    torch.manual_seed(0)
    model = SparseShift(n_genes=dims.n_genes, n_targets=dims.n_targets, target_cells=dims.target_cells)
    return Pair(model, SparseShiftGuide(n_genes=dims.n_genes, n_targets=dims.n_targets))


if __name__ == "__main__":
    main()
