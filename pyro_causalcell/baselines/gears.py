"""GEARS as a predictor, by the package cell-gears (extra "peers")."""

import contextlib
import io
import pickle
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from pyro_causalcell.baselines.means import expression
from pyro_causalcell.data import Screen
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["GEARS"]

_CONTROL = "ctrl"  # what cell-gears calls it


class GEARS:
    """GEARS: a graph network over a co-expression graph of genes and a graph of perturbations.

    cell-gears trains on log1p CP10k of the training cells, with its own defaults where nothing is passed. Its
    co-expression graph is computed from the training cells. The graph of perturbations is yours, so nothing
    is fetched; a held-out target is predicted from its neighbours there.

    Args:
        screen: A screen with control cells, single perturbations and pairs at most.
        train: Training cells.
        graph: Directed edges between targets: columns source, target, importance.
        validation: Share of the training perturbations by which the best epoch is chosen.
        epochs: Epochs.
        hidden_size: Width of the embeddings.
        batch_size: Cells in a minibatch.
        seed: Seed of the validation perturbations, the initialisation and the minibatches.
        device: ``"cpu"`` or ``"cuda"``.

    Raises:
        DataError: cell-gears is not installed, the graph lacks a column or names an unknown target, there
            are no training controls, or fewer than two perturbed training conditions.

    Source: Roohani, Huang and Leskovec, Nature Biotechnology 2024.
    """

    name = "GEARS"

    def __init__(
        self,
        screen: Screen,
        train: NDArray[np.int64],
        graph: pd.DataFrame,
        *,
        validation: float = 0.1,
        epochs: int = 20,
        hidden_size: int = 64,
        batch_size: int = 32,
        seed: int = 0,
        device: str = "cpu",
    ):
        gears = _package()
        self.screen = screen
        edges = _checked_graph(graph, screen)
        codes = np.unique(screen.condition_n[train])
        seen = [screen.conditions[c] for c in codes if c > 0]
        if len(seen) < 2 or codes[0] != 0:
            raise DataError(
                f"GEARS needs control cells and two perturbed training conditions; found {len(seen)} "
                f"conditions {'with' if codes[0] == 0 else 'without'} control cells."
            )
        rng = np.random.default_rng(seed)
        n_held = max(1, round(validation * len(seen)))
        held = set(rng.choice(seen, n_held, replace=False).tolist())
        groups = {
            "train": [_CONTROL, *[self._name(c) for c in seen if c not in held]],
            "val": [self._name(c) for c in sorted(held)],
        }
        adata = self._adata(train)
        self.seed = seed
        with tempfile.TemporaryDirectory() as folder, _apart(seed):
            data = _load(gears, adata, screen, groups, Path(folder), batch_size, seed)
            # Its constructor takes the mean of dense controls (sparse rows by a pandas mask fail in today's
            # scipy); all that follows wants sparse cells.
            sparse, data.adata.X = data.adata.X, data.adata.X.toarray()
            self._model = gears.GEARS(data, device=device)
            data.adata.X = sparse
            places = {name: i for i, name in enumerate(data.pert_names)}
            index = torch.tensor(
                [[places[s], places[t]] for s, t in edges[["source", "target"]].to_numpy()]
            ).T
            weight = torch.tensor(edges["importance"].to_numpy(), dtype=torch.float32)
            self._model.model_initialize(
                hidden_size=hidden_size, G_go=index.to(device), G_go_weight=weight.to(device)
            )
            self._model.train(epochs=epochs)

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k; control is the control mean."""
        self.screen.design(conditions)
        means = []
        for name in conditions:
            targets = self.screen.describe().split(self.screen.canonical(name))
            means.append(self._one(targets))
        return np.stack(means)

    def _one(self, targets: list[str]) -> NDArray[np.float64]:
        if not targets:
            return np.asarray(self._model.ctrl_expression.cpu(), dtype=np.float64)
        with _apart(self.seed):
            found = self._model.predict([targets])
        return np.asarray(found["_".join(targets)], dtype=np.float64)

    def _name(self, condition: str) -> str:
        targets = self.screen.describe().split(condition)
        if len(targets) > 2:
            raise DataError(f"GEARS knows singles and pairs, found {condition!r}; leave it out.")
        return "+".join(targets) if len(targets) == 2 else f"{targets[0]}+{_CONTROL}"

    def _adata(self, train: NDArray[np.int64]) -> ad.AnnData:
        code_n = self.screen.condition_n[train]
        names = {0: _CONTROL} | {c: self._name(self.screen.conditions[c]) for c in set(code_n) - {0}}
        obs = pd.DataFrame(
            {"condition": [names[c] for c in code_n], "cell_type": "cells"},
            index=[f"cell{n}" for n in range(len(train))],
        )
        var = pd.DataFrame({"gene_name": self.screen.genes}, index=self.screen.genes)
        x_ng = sp.csr_matrix(expression(self.screen, train).astype(np.float32))
        return ad.AnnData(x_ng, obs.astype("category"), var)


@contextlib.contextmanager
def _apart(seed: int) -> Iterator[None]:
    """cell-gears prints, and draws from the global generators: both end with the block."""
    drawn = np.random.get_state()
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
        torch.random.fork_rng(),
    ):
        warnings.simplefilter("ignore")  # of what newer libraries changed, once a cell
        torch.manual_seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(drawn)


def _package() -> ModuleType:
    try:
        with warnings.catch_warnings():  # it silences all warnings as it is imported
            import gears
    except ImportError as error:
        raise DataError(
            "GEARS needs cell-gears, which is not installed: pip install 'pyro-causalcell[peers]'"
        ) from error
    package: ModuleType = gears
    return package


def _checked_graph(graph: pd.DataFrame, screen: Screen) -> pd.DataFrame:
    missing = {"source", "target", "importance"} - set(graph)
    if missing:
        raise DataError(f"the graph lacks the columns {sorted(missing)}; it has {list(graph)}.")
    unknown = sorted({*graph["source"], *graph["target"]} - set(screen.targets))
    if unknown:
        raise DataError(f"the graph names {shown(unknown, 5)}, which are no targets of the screen.")
    return graph


def _load(
    gears: Any,
    adata: ad.AnnData,
    screen: Screen,
    groups: dict[str, list[str]],
    folder: Path,
    batch_size: int,
    seed: int,
) -> Any:
    """The cells as cell-gears wants them. What it would fetch is put in place first."""
    files = {"gene2go_all.pkl": {name: set() for name in screen.targets}, "targets.pkl": screen.targets}
    files["groups.pkl"] = groups
    for name, content in files.items():
        (folder / name).write_bytes(pickle.dumps(content))
    data = gears.PertData(str(folder), gene_set_path=str(folder / "targets.pkl"), default_pert_graph=False)
    data.new_data_process("screen", adata)
    data.prepare_split("custom", seed=seed, split_dict_path=str(folder / "groups.pkl"))
    data.split = "no_test"  # the test cells are not its to see
    data.get_dataloader(batch_size)
    return data
