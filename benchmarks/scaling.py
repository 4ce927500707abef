"""How time and memory of training grow with cells, genes, targets and programmes.

One size grows at a time; the others stay at a base. A simulated screen of counts is written to an h5ad file.
Every point is a process of its own, which opens the file and fits the pair from it, without a budget for
resident counts: one epoch of warm start, the turn of the axes, and a second epoch. So the whole of ``fit`` is
in the peak of memory. Then the time of a step is measured on minibatches that are read from the same file.

* seconds per epoch: median CPU time of a step, with its minibatch, times the steps of an epoch. It is
  extrapolated: a fixed number of steps is measured;
* peak memory: largest resident set of the process, above that of the libraries alone.

The exponent of a size is the slope of the last two points on logarithmic axes: 1 is linear growth. For more
cells than ``FITTED``, the fit trains on that many of them: the peak still holds everything that is kept of
each cell.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import anndata as ad
import h5py
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pyro
import torch
from scipy import sparse

from pyro_causalcell.data import Minibatches, Screen, Split, read
from pyro_causalcell.inference import fit
from pyro_causalcell.inference.engine import EagerStep
from pyro_causalcell.inference.pair import Pair

FAMILIES = ("sparse-shift", "weight-variant-scm")
COUNTS_PER_CELL = 100
"""Drawn with replacement: the number of values other than zero does not grow with the genes."""
FITTED = 8_000
"""Training cells of a fit, at most: epochs of all of them would take hours."""
BATCH = 256
FREQUENT = 10
"""Targets that half of the perturbed cells carry, so that some have enough cells to turn the axes by."""
RESPONSIVE = 5
"""Responsive programmes of the weight-variant pair; the others are background."""
MOST_TURNED = 50
"""Programmes up to which the axes are turned: the search for sparse axes grows with their third power."""


@dataclass(frozen=True)
class Point:
    """Sizes of one measurement."""

    cells: int = 10_000
    genes: int = 500
    targets: int = 100
    programmes: int = 15


SWEEPS: dict[str, tuple[int, ...]] = {
    "cells": (10_000, 30_000, 100_000),
    "genes": (500, 2_000, 10_000),
    "targets": (100, 1_000, 10_000),
    "programmes": (15, 50, 200),
}
BASES = {"targets": Point(cells=30_000)}
"""Where it is not ``Point()``: each target has a cell of its own."""
LARGE = 1_000_000


# ---------------------------------------------------------------- one point


def write(path: Path, point: Point, seed: int = 0) -> None:
    """A screen with a tenth of control cells; each target doubles a gene of its own."""
    rng = np.random.default_rng(seed)
    share_g = rng.lognormal(0.0, 1.5, point.genes)
    target_n = np.arange(point.cells) % point.targets
    own_n = (np.arange(point.cells) < point.targets) & (target_n >= FREQUENT)  # each target has a cell
    target_n = np.where(rng.random(point.cells) < 0.5, target_n % FREQUENT, target_n)
    target_n[rng.random(point.cells) < 0.1] = -1
    target_n = rng.permutation(np.where(own_n, np.arange(point.cells), target_n))
    names = np.array(["non-targeting", *(f"T{p:05d}" for p in range(point.targets))])
    obs = pd.DataFrame(
        {"target": pd.Categorical(names[target_n + 1])}, index=[f"c{n}" for n in range(point.cells)]
    )
    var = pd.DataFrame(index=[f"g{g}" for g in range(point.genes)])
    with h5py.File(path, "w") as file:
        for start in range(0, point.cells, 20_000):
            part_n = target_n[start : start + 20_000]
            drawn = rng.choice(point.genes, (len(part_n), COUNTS_PER_CELL), p=share_g / share_g.sum())
            own = np.repeat((part_n % point.genes)[:, None], 5, 1)  # for control: the last gene
            gene_m = np.concatenate([drawn, own], 1).ravel()
            cell_m = np.repeat(np.arange(len(part_n)), COUNTS_PER_CELL + 5)
            x_ng = sparse.coo_matrix(
                (np.ones(len(gene_m), np.float32), (cell_m, gene_m)), shape=(len(part_n), point.genes)
            ).tocsr()
            if start:
                ad.io.sparse_dataset(file["X"]).append(x_ng)
            else:
                ad.io.write_elem(file, "/", ad.AnnData(x_ng, obs[:20_000], var))
        ad.io.write_elem(file, "obs", obs)


def measure(path: Path, family: str, point: Point, steps: int) -> dict[str, float]:
    """Seconds per epoch and peak memory of one point."""
    base = _peak_gb()
    screen = Screen(read(path, backed=True), allow_empty=True)
    rows = np.random.default_rng(0).permutation(point.cells)
    n_train = min(FITTED, point.cells * 9 // 10)
    train, validation, test = np.split(rows, [n_train, n_train + 1000])
    split = Split("random_cells", np.sort(train), np.sort(validation), np.sort(test), seed=0)
    sizes = (
        {"n_latents": point.programmes}
        if family == "sparse-shift"
        else {"n_invariant": point.programmes - RESPONSIVE, "n_responsive": RESPONSIVE}
    )
    run = fit(
        family,
        None,
        screen,
        split=split,
        epochs=2,
        warm_start=int(point.programmes <= MOST_TURNED),
        batch_size=BATCH,
        compile=False,
        memory_budget_gb=0.0,
        progress=False,
        **sizes,
    )
    fitted_gb = _peak_gb() - base
    step_s = _step_seconds(Pair(run.model, run.guide), screen, steps)
    return {"epoch_s": step_s * point.cells / BATCH, "step_ms": 1e3 * step_s, "peak_gb": fitted_gb}


def _step_seconds(pair: Pair, screen: Screen, steps: int) -> float:
    """Median CPU time of an eager step with its minibatch, which is read from the file."""
    for side in (pair.model, pair.guide):
        side.train()
    parameters = [*pair.model.parameters(), *pair.guide.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)
    anchors = "random" if "control" in getattr(pair.guide, "needs", set()) else None
    batches = Minibatches(screen, np.arange(screen.n_cells), BATCH, memory_budget_gb=0.0, anchors=anchors)
    eager_step, times = EagerStep(pair), []
    start = time.process_time()
    for batch in batches.epoch(0):
        optimizer.zero_grad(set_to_none=True)
        eager_step(batch, {})
        optimizer.step()
        now = time.process_time()
        times.append(now - start)
        start = now
        if len(times) == steps:
            break
    return float(np.median(times[2:]))


def _peak_gb() -> float:
    status = Path("/proc/self/status").read_text()  # getrusage's peak would count the parent's, too
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


# ---------------------------------------------------------------- all points


def sweep(families: list[str], large: bool, steps: int, folder: Path | None) -> list[dict[str, float | str]]:
    """One row for each point of each family; the base is measured once."""
    found: list[dict[str, float | str]] = []
    measured: dict[tuple[str, Point], dict[str, float]] = {}
    for size, values in SWEEPS.items():
        for value in (*values, *([LARGE] if large and size == "cells" else [])):
            point = replace(BASES.get(size, Point()), **{size: value})
            if (families[0], point) not in measured:
                measured |= _run(families, point, steps, folder)
            found += [{"model": f, "size": size, "value": value, **measured[f, point]} for f in families]
    return found


def _run(
    families: list[str], point: Point, steps: int, folder: Path | None
) -> dict[tuple[str, Point], dict[str, float]]:
    """One point, each family in a process of its own."""
    found = {}
    with tempfile.TemporaryDirectory(dir=folder) as here:
        path = Path(here) / "simulated.h5ad"
        write(path, point)
        for family in families:
            given = [path, family, json.dumps(asdict(point)), steps]
            command = [sys.executable, __file__, "--point", *map(str, given)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = found[family, point] = json.loads(done.stdout.splitlines()[-1])
            print(f"{family}, {point}: {row['epoch_s']:.2f} s an epoch", end=", ")
            print(f"{row['step_ms']:.1f} ms a step, {row['peak_gb']:.2f} GB", flush=True)
    return found


def report(table: pd.DataFrame) -> None:
    """Print each size's growth as ratios to its first point, and exponents."""
    for (family, size), rows in table.groupby(["model", "size"], sort=False):
        first, last = rows.iloc[0], rows.iloc[-1]
        times = last["value"] / first["value"]
        print(f"\n{family}: {size} from {first['value']} to {last['value']} (x {times:.3g})")
        for what in ("epoch_s", "peak_gb"):
            ratios = ", ".join(f"{value / first[what]:.2f}" for value in rows[what])
            ends = rows.iloc[-2:]
            slope = np.diff(np.log(ends[what])) / np.diff(np.log(ends["value"].astype(float)))
            print(f"  {what:<8} ratios {ratios}; exponent at the end {slope[0]:.2f}")


def draw(table: pd.DataFrame, path: Path) -> None:
    """Log-log: seconds per epoch above, peak memory below; a line of slope 1 for the eye."""
    colours = dict(zip(FAMILIES, ("#0072B2", "#D55E00"), strict=True))
    labels = {"epoch_s": "CPU seconds per epoch", "peak_gb": "peak memory (GB)\nabove libraries"}
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(11, 5), sharey="row", layout="constrained")
    for column, size in enumerate(SWEEPS):
        for axis, (what, label) in zip(axes[:, column], labels.items(), strict=True):
            for family, rows in table[table["size"] == size].groupby("model", sort=False):
                marker = "os"[FAMILIES.index(family)]
                axis.plot(rows["value"], rows[what], marker=marker, color=colours[family], label=family)
            value = np.sort(table.loc[table["size"] == size, "value"].unique()).astype(float)
            low = table.loc[table["size"] == size, what].min()
            axis.plot(value, low * value / value[0], ":", color="0.5", label="linear growth")
            axis.set(xscale="log", yscale="log", xlabel=size if what == "peak_gb" else "")
            axis.set_xticks(value, [f"{v:,.0f}" for v in value], fontsize=8)
            axis.minorticks_off()
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_ylabel(label if column == 0 else "")
    axes[0, 0].set_ylim(table["epoch_s"].min() / 2, table["epoch_s"].max() * 2)
    axes[1, 0].set_ylim(table["peak_gb"].min() / 2, table["peak_gb"].max() * 2)
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--large", action="store_true", help=f"{LARGE:,} cells, too")
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a point")
    parser.add_argument("--folder", type=Path, help="where files of cells are written; they are deleted")
    parser.add_argument("--csv", type=Path, help="where to write the table")
    parser.add_argument("--figure", type=Path, help="where to write the figure")
    parser.add_argument("--point", nargs=4, help=argparse.SUPPRESS)  # what another process does
    given = parser.parse_args()

    torch.set_num_threads(1)
    torch.set_flush_denormal(True)  # as fit does
    pyro.enable_validation(False)  # as fit does
    if given.point is not None:
        path, family, point, steps = given.point
        print(json.dumps(measure(Path(path), family, Point(**json.loads(point)), int(steps))))
        return
    table = pd.DataFrame(sweep(given.models, given.large, given.steps, given.folder))
    report(table)
    if given.csv is not None:
        table.round(4).to_csv(given.csv, index=False, quoting=csv.QUOTE_MINIMAL)
    if given.figure is not None:
        draw(table, given.figure)


if __name__ == "__main__":
    main()
