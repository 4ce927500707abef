"""A tiny screen on disk, a run fitted to it, and a way to run commands in this process."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import pytest

from pyro_causalcell.cli import main

TINY = ["--latents", "3", "--settings.n_hidden", "16", "--warm-start", "0", "--quiet"]
COLUMNS = ["--perturbation", "target", "--control", "non-targeting"]


class Result(NamedTuple):
    """What a command left: exit code and the lines it printed."""

    code: int
    out: list[str]
    err: list[str]


Cli = Callable[..., Result]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cli:
    """Run a command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        capfd.readouterr()
        code = main([str(word) for word in words])
        captured = capfd.readouterr()
        return Result(code, captured.out.splitlines(), captured.err.splitlines())

    return run


@pytest.fixture(scope="session")
def data(_tiny: ad.AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny screen as a file."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5ad"
    _tiny.write_h5ad(path)
    return path


@pytest.fixture(scope="session")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run folder with a fit of three epochs. Tests read it and leave it alone."""
    path = tmp_path_factory.mktemp("runs") / "run"
    assert (
        main(["fit", str(data), *COLUMNS, "--batch", "batch", "--epochs", "3", *TINY, "--out", str(path)])
        == 0
    )
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    yield path
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


FitWords = Callable[..., list[str]]


@pytest.fixture(scope="session")
def fit_words(data: Path) -> FitWords:
    """The words of a command that fits the tiny screen to ``out``; more words may follow."""

    def words(out: object, *more: object) -> list[str]:
        return ["fit", str(data), *COLUMNS, *TINY, "--epochs", "2", "--out", str(out), *map(str, more)]

    return words


@pytest.fixture
def own_model(tmp_path: Path) -> Path:
    """A user's own pair, which knows nothing of latents, likelihoods or gates."""
    path = tmp_path / "mine.py"
    path.write_text(OWN_MODEL)
    return path


OWN_MODEL = """
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn


class Mine(PyroModule):
    def __init__(self, n_genes, n_targets, width=2):
        super().__init__()
        self.move = PyroParam(torch.zeros(n_targets, width))
        self.decode = PyroModule[nn.Linear](width, n_genes)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z = pyro.sample("z", dist.Normal(batch.u_np @ self.move, 1.0).to_event(1))
            rate = batch.library_n1 * self.decode(z).softmax(-1)
            return pyro.sample("x", dist.Poisson(rate).to_event(1), obs=batch.x_ng)


class MineGuide(PyroModule):
    def __init__(self, n_genes, width=2):
        super().__init__()
        self.encode = PyroModule[nn.Linear](n_genes, width)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc = self.encode(batch.x_ng.log1p())
            pyro.sample("z", dist.Normal(loc, 0.5).to_event(1))
"""
