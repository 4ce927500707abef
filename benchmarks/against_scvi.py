"""Cells a second end to end against scvi-tools: the same network, genes, minibatches and likelihood.

``fit`` trains the VAE of the family (no gates) and scvi-tools its SCVI: two hidden layers of 128 units with
BatchNorm on both sides, 15 latents, negative binomial counts, minibatches of 128, a tenth of the cells for
validation after every epoch. They take turns, each in a process of its own on one thread. An epoch is
measured in CPU time, from the first one in which the compiled step is used.

scvi-tools is no dependency of this project; give an interpreter that has it:

    python benchmarks/against_scvi.py --scvi-python ~/scvi/bin/python
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import anndata as ad
import numpy as np
import pandas as pd
import torch

BATCH_SIZE, N_LATENTS, N_HIDDEN, N_LAYERS = 128, 15, 128, 2


def simulated(n_cells: int, n_genes: int) -> ad.AnnData:
    """Simulated counts, of which most are zero."""
    rng = np.random.default_rng(0)
    share_g = rng.lognormal(0.0, 2.0, n_genes)
    rate_ng = n_genes * rng.lognormal(0.0, 0.4, (n_cells, 1)) * share_g / share_g.sum()
    counts_ng = rng.poisson(rate_ng * rng.gamma(2.0, 0.5, rate_ng.shape)).astype(np.float32)
    labels = np.where(rng.random(n_cells) < 0.5, "non-targeting", "A")
    obs = pd.DataFrame({"target": labels}, index=[f"cell{n}" for n in range(n_cells)])
    return ad.AnnData(counts_ng, obs, pd.DataFrame(index=[f"gene{g}" for g in range(n_genes)]))


def ours(adata: ad.AnnData, epochs: int) -> list[float]:
    """CPU seconds of each epoch by ``fit``."""
    from pyro_causalcell.data import Screen
    from pyro_causalcell.inference import fit, training

    with mock.patch.object(training, "time", SimpleNamespace(perf_counter=time.process_time)):
        found = fit(
            "sparse-shift",
            None,
            Screen(adata, allow_empty=True),
            gates="closed",
            n_latents=N_LATENTS,
            n_hidden=N_HIDDEN,
            n_layers=N_LAYERS,
            epochs=epochs,
            warm_start=0,
            batch_size=BATCH_SIZE,
            compile=True,
            progress=False,
            device="cpu",
            **{"guide.intervention": "ignored"},
        )
    seconds: list[float] = found.history["seconds"].tolist()
    return seconds


def theirs(adata: ad.AnnData, epochs: int) -> list[float]:
    """CPU seconds of each epoch by scvi-tools' own trainer."""
    import scvi
    from lightning.pytorch.callbacks import Callback

    class Clock(Callback):  # type: ignore[misc]
        marks: list[float] = []

        def on_train_epoch_start(self, *_: Any) -> None:
            self.marks.append(time.process_time())

        def on_fit_end(self, *_: Any) -> None:
            self.marks.append(time.process_time())

    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(
        adata,
        n_hidden=N_HIDDEN,
        n_latent=N_LATENTS,
        n_layers=N_LAYERS,
        dropout_rate=0.0,
        gene_likelihood="nb",
    )
    clock = Clock()
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        train_size=0.9,
        batch_size=BATCH_SIZE,
        check_val_every_n_epoch=1,
        enable_progress_bar=False,
        callbacks=[clock],
    )
    return np.diff(clock.marks).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scvi-python", help="interpreter that has scvi-tools")
    parser.add_argument("--cells", type=int, default=4000)
    parser.add_argument("--genes", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", choices=["ours", "theirs"], help="one side alone; prints its epochs as JSON")
    parser.add_argument("--data", help="the counts, for --run")
    given = parser.parse_args()
    if given.run:
        torch.set_num_threads(1)
        side = ours if given.run == "ours" else theirs
        print(json.dumps(side(ad.read_h5ad(given.data), given.epochs)))
        return
    if not given.scvi_python:
        parser.error("--scvi-python= an interpreter with scvi-tools is needed")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "counts.h5ad"
        simulated(given.cells, given.genes).write_h5ad(file)
        rates: dict[str, list[float]] = {"ours": [], "theirs": []}
        for _ in range(given.rounds):
            for side, python in (("ours", sys.executable), ("theirs", given.scvi_python)):
                command = [python, "-W", "ignore", __file__, "--run", side, "--data", str(file)]
                command += ["--epochs", str(given.epochs)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                epochs = json.loads(output.splitlines()[-1])
                rates[side].append(0.9 * given.cells / float(np.median(epochs[len(epochs) // 2 :])))
    for side, found in rates.items():
        print(f"{side:<7} {np.median(found):8.0f} cells/s  {[round(rate) for rate in found]}")
    ratios = np.array(rates["ours"]) / np.array(rates["theirs"])
    print(f"ratio   {np.median(ratios):8.2f}  [{ratios.min():.2f}, {ratios.max():.2f}]")


if __name__ == "__main__":
    main()
