"""Two processes, started by torchrun, train one pair as one process does."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

from pyro_causalcell.cli import main
from pyro_causalcell.data import Screen
from pyro_causalcell.errors import TrainingError
from pyro_causalcell.inference import fit
from pyro_causalcell.inference.distributed import Ranks, is_first_process, join, local_device

PAIR = """
    import os
    import signal

    import pyro
    import pyro.distributions as dist
    import torch
    from pyro.nn import PyroModule, PyroParam
    from torch import nn


    class Sure(PyroModule):
        '''Latents of the cells and one of the screen. Its guide knows them, so that nothing is drawn.'''

        def __init__(self, n_genes, n_targets, width=3, fault=""):
            super().__init__()
            self.fault, self.calls = fault, 0
            self.move_pk = PyroParam(torch.zeros(n_targets, width))
            self.decode = PyroModule[nn.Linear](width, n_genes)

        def forward(self, batch):
            tilt_g = pyro.sample("tilt", dist.Normal(torch.zeros(self.decode.out_features), 0.5).to_event(1))
            with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
                z_nk = pyro.sample("z", dist.Normal(batch.u_np @ self.move_pk, 1.0).to_event(1))
                rate_ng = batch.library_n1 * (self.decode(z_nk) + tilt_g).softmax(-1)
                if self.training:
                    rate_ng = rate_ng + self.trouble(batch)
                return pyro.sample("x", dist.Poisson(rate_ng).to_event(1), obs=batch.x_ng)

        def trouble(self, batch):
            self.calls += 1
            if self.fault == "nan":  # in the slice of one process only
                return torch.where(batch.index_n == 7, float("nan"), 0.0)[:, None]
            if self.fault == "interrupt" and self.calls == 20 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGINT)
            return 0.0


    class SureGuide(PyroModule):
        def __init__(self, n_genes, width=3):
            super().__init__()
            self.tilt_g = PyroParam(torch.full((n_genes,), 0.1))
            self.encode = PyroModule[nn.Linear](n_genes, width)

        def forward(self, batch):
            pyro.sample("tilt", dist.Delta(self.tilt_g).to_event(1))
            with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
                pyro.sample("z", dist.Delta(self.encode(batch.x_ng.log1p())).to_event(1))
"""

TOGETHER = """
    import json
    import sys

    import anndata as ad
    import torch.distributed as dist

    from pyro_causalcell.data import Screen
    from pyro_causalcell.inference import fit

    data, kept = sys.argv[1], json.loads(sys.argv[2])
    screen = Screen(ad.read_h5ad(data), batch="batch", guide="guide")
    said = {}


    def history(model, **settings):
        fitted = fit(model, None, screen, progress=False, device="cpu", **settings)
        return fitted.history[["train_loss", "validation_loss"]].to_numpy().tolist()


    def failed(fault, batch_size=50, **settings):
        try:
            history("pair.py:Sure", fault=fault, batch_size=batch_size, **settings)
        except (Exception, KeyboardInterrupt) as error:
            return f"{type(error).__name__}: {error}"


    said["default"] = history("sparse-shift", **kept)
    history("sparse-shift", **kept | {"max_epochs": 5, "refine": 0}, out="resumed")
    said["resumed"] = history("sparse-shift", **kept, out="resumed", resume=True)
    said["nan"] = failed("nan", epochs=3, out="nan")
    said["interrupt"] = failed("interrupt", epochs=9, out="interrupt")
    said["small"] = failed("", epochs=1, batch_size=1)
    with open(f"said{dist.get_rank()}.json", "w") as file:
        json.dump(said, file)
"""

KEPT: dict[str, Any] = {
    "max_epochs": 8,
    "warm_start": 3,
    "refine": 1,
    "n_latents": 3,
    "batch_size": 64,
    "lr": 1e-2,
}
"""A fit of the default pair: with BatchNorm, draws, gates, a turn of the axes and several particles."""


def torchrun(*words: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Start two processes, and wait for them."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def here(_tiny: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny screen and the pair."""
    here = tmp_path_factory.mktemp("distributed")
    _tiny.write_h5ad(here / "tiny.h5ad")
    (here / "pair.py").write_text(textwrap.dedent(PAIR))
    (here / "together.py").write_text(textwrap.dedent(TOGETHER))
    return here


@pytest.fixture(scope="module")
def said(here: Path) -> list[dict[str, Any]]:
    """What each of two processes saw of the same fits."""
    result = torchrun("together.py", "tiny.h5ad", json.dumps(KEPT), cwd=here)
    assert result.returncode == 0, result.stderr
    return [json.loads((here / f"said{rank}.json").read_text()) for rank in range(2)]


def test_the_command_line_trains_the_same_pair(here: Path) -> None:
    words = ["fit", here / "tiny.h5ad", "--perturbation", "target", "--control", "non-targeting"]
    words += ["--model", here / "pair.py:Sure", "--epochs", 6, "--batch-size", 50, "--lr", 0.01]
    words += ["--device", "cpu", "--out"]
    assert main([*map(str, words), str(here / "one")]) == 0
    result = torchrun("-m", "pyro_causalcell", *words, here / "two", cwd=here)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("run: ") == 1  # told once
    one, two = (pd.read_csv(here / run / "history.csv", index_col="epoch") for run in ("one", "two"))
    pd.testing.assert_frame_equal(
        one.drop(columns="seconds"), two.drop(columns="seconds"), rtol=1e-5, check_exact=False
    )
    states = [torch.load(here / run / "weights.pt", weights_only=True) for run in ("one", "two")]
    for kind in ("model", "guide"):
        for name, value in states[0][kind].items():
            torch.testing.assert_close(states[1][kind][name], value, rtol=1e-4, atol=1e-5)


def test_the_default_pair_learns_alike(here: Path, said: list[dict[str, Any]]) -> None:
    assert said[0]["default"] == said[1]["default"]  # what is decided from it is decided alike
    screen = Screen(ad.read_h5ad(here / "tiny.h5ad"), batch="batch", guide="guide")
    alone = fit("sparse-shift", None, screen, progress=False, device="cpu", **KEPT).history
    train, validation = np.array(said[0]["default"]).T  # other draws, other BatchNorm statistics
    np.testing.assert_allclose(train, alone["train_loss"], rtol=0.015)
    np.testing.assert_allclose(validation, alone["validation_loss"], rtol=0.06)


def test_a_resumed_run_is_the_same_run(said: list[dict[str, Any]]) -> None:
    assert said[0]["resumed"] == said[0]["default"] == said[1]["resumed"]


def test_what_stops_one_process_stops_all(here: Path, said: list[dict[str, Any]]) -> None:
    assert said[0]["nan"] == said[1]["nan"]
    assert said[0]["nan"].startswith("TrainingError: the term of site 'x' is not finite at epoch 0, batch ")
    assert said[0]["small"] == said[1]["small"]
    assert "expected at least 2 cells in a minibatch" in said[0]["small"]
    assert said[0]["interrupt"] == said[1]["interrupt"] == "KeyboardInterrupt: "
    record = json.loads((here / "interrupt" / "fit.json").read_text())
    assert not record["finished"] and 0 < len(pd.read_csv(here / "interrupt" / "history.csv")) < 9


def test_slices_make_up_the_minibatch() -> None:
    cells = np.arange(12)
    parts = [cells[Ranks(index, 5).part(12)] for index in range(5)]
    assert [len(part) for part in parts] == [2, 2, 3, 2, 3]
    assert np.concatenate(parts).tolist() == cells.tolist()
    assert cells[Ranks().part(12)].tolist() == cells.tolist()
    with pytest.raises(TrainingError, match="at least 13 cells in a minibatch, .*, found 12"):
        Ranks(0, 13).part(12)


def test_a_process_alone_exchanges_nothing() -> None:
    ranks = join()
    assert ranks == Ranks(0, 1) and is_first_process() and local_device("auto") == "auto"
    terms = {"x": torch.tensor(1.0)}
    assert ranks.average([], terms, 1.0) is terms
    assert ranks.from_first(lambda: 2.5) == 2.5 and ranks.any(True) and not ranks.any(False)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [local_device(device) for device in ("auto", "cuda", "cpu", "cuda:5")] == [
        *("cuda:1", "cuda:1", "cpu", "cuda:5")
    ]


def test_a_process_that_is_gone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(torch.distributed, "all_reduce", closed)
    with pytest.raises(TrainingError, match=r"has ended, .* go on from it with resume=True"):
        Ranks(0, 2).any(False)


def test_only_the_first_process_keeps_the_stream() -> None:
    def after(index: int, epoch: int) -> list[float]:
        torch.manual_seed(0)
        Ranks(index, 3).own_draws(5, epoch)
        drawn: list[float] = torch.rand(2).tolist()
        return drawn

    torch.manual_seed(0)
    alone = torch.rand(2).tolist()
    assert after(0, 0) == after(0, 1) == alone
    drawn = [after(index, epoch) for index in range(3) for epoch in range(2)]
    assert len({tuple(pair) for pair in drawn}) == 5  # the first goes on where it was
    assert drawn[2:] == [after(index, epoch) for index in (1, 2) for epoch in range(2)]
