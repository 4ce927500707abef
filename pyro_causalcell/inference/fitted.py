"""What training leaves behind: the trained pair, its history and settings, on disk as JSON and tensors."""

import hashlib
import inspect
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from pyro_causalcell.batch import Dims
from pyro_causalcell.data import Screen, ScreenSpec, Split
from pyro_causalcell.errors import CheckpointError, PairError
from pyro_causalcell.inference.pair import Pair, Source, build_pair

__all__ = ["FORMAT", "Fit", "atomic_torch_save", "atomic_write", "load_tensors", "settings_hash"]

FORMAT = 1
"""Version of the run folder. Newer folders are refused, older ones are read."""


@dataclass(frozen=True)
class CellSummary:
    """Libraries and batches of the training cells, so that new cells can be drawn without them.

    Attributes:
        library: 101 quantiles of the total counts.
        batch_rows: Distinct rows of the one-hot batch matrix.
        batch_share: Share of the cells in each.
        times: Snapshots, where the screen has times.
        library_t: 101 quantiles of the total counts in each of them.
    """

    library: list[float]
    batch_rows: list[list[float]]
    batch_share: list[float]
    times: list[float] = field(default_factory=list)
    library_t: list[list[float]] = field(default_factory=list)

    @classmethod
    def of(cls, screen: Screen, rows: np.ndarray) -> "CellSummary":
        """Summary of some cells of a screen."""
        batch_rows, n = np.unique(screen.batch_nb[rows], axis=0, return_counts=True)
        library_n, time_n = screen.library_n[rows], None if screen.time_n is None else screen.time_n[rows]
        times = [] if time_n is None else np.unique(time_n).tolist()
        library_t = [_quantiles(library_n[time_n == np.float32(time)]) for time in times]
        share = (n / n.sum()).tolist()
        return cls(_quantiles(library_n), batch_rows.tolist(), share, times, library_t)

    def libraries(self, rank_n: np.ndarray, time: float | None = None) -> np.ndarray:
        """Total counts of the cells of these ranks (0 to 1), shape (n,).

        At a time they are those of its snapshot, or of the nearest one, or between those of the two snapshots
        around it: each quantile on a line in its inverse hyperbolic sine, almost its logarithm.
        """
        grid = np.linspace(0, 1, 101)
        if time is None or not self.times:
            return np.interp(rank_n, grid, self.library)
        # cells grow by factors; empty cells, and sums of normalised values, have no logarithm
        between = [np.interp(time, self.times, q_t) for q_t in np.arcsinh(self.library_t).T]
        return np.interp(rank_n, grid, np.sinh(between))


def _quantiles(library_n: np.ndarray) -> list[float]:
    found: list[float] = np.quantile(library_n, np.linspace(0, 1, 101)).tolist()
    return found


@dataclass
class Fit:
    """A trained pair.

    Attributes:
        pair: Model and guide, in evaluation mode.
        dims: Sizes they were built with.
        screen: Names and settings of the screen, without the cells.
        cells: Libraries and batches of the training cells.
        split: Which cells trained, validated and were held out.
        history: One row per epoch: ``stage``, ``train_loss`` and ``validation_loss`` (negative ELBO in
            nats per training cell), ``lr``, ``seconds``, and ``term_<site>`` (nats per training cell).
        training: Training settings.
        seed: The one seed of the split's default, initialisation, minibatches and draws.
        finished: Whether training ran to its end; False after Ctrl-C.
        path: Run folder, if there is one.
    """

    pair: Pair
    dims: Dims
    screen: ScreenSpec
    cells: CellSummary
    split: Split
    history: pd.DataFrame
    training: dict[str, Any]
    seed: int
    finished: bool = True
    path: Path | None = field(default=None, repr=False)

    @property
    def model(self) -> nn.Module:
        """The generative process."""
        return self.pair.model

    @property
    def guide(self) -> nn.Module:
        """Its guide."""
        return self.pair.guide

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.pair.parameters()).device

    @property
    def interruption(self) -> str:
        """What to say of a fit whose training did not finish; empty if it did."""
        said = f"training was interrupted after {len(self.history)} epochs; go on with --resume"
        return "" if self.finished else said

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that was chosen: sources, constructor arguments, training settings, seed."""
        return {
            "model": {"source": self.pair.model_source, "settings": _plain(self.pair.model_settings)},
            "guide": {"source": self.pair.guide_source, "settings": _plain(self.pair.guide_settings)},
            "training": self.training,
            "seed": self.seed,
        }

    def save(self, path: str | Path) -> Path:
        """Write a run folder: ``fit.json``, ``weights.pt``, ``history.csv``, ``split.npz``.

        Files of the user's own model and guide are copied in. Each file is replaced at once or not at
        all, so a full disk leaves the last good state.

        Args:
            path: The folder; created if needed.

        Raises:
            CheckpointError: The folder cannot be written.
        """
        path = Path(path)
        check_plain(self.pair)
        try:
            path.mkdir(parents=True, exist_ok=True)
            sources = keep_sources(self.pair, path)
            atomic_torch_save(self.pair.state_dict(), path / "weights.pt")
            atomic_write(path / "history.csv", self.history.to_csv())
            self.split.save(path / "split.npz")
            record = {
                "format": FORMAT,
                **self.settings,
                "finished": self.finished,
                "dims": self.dims._asdict(),
                "screen": json.loads(self.screen.to_json()),
                "cells": asdict(self.cells),
            }
            for kind, source in sources.items():
                record[kind]["source"] = source
            atomic_write(path / "fit.json", json.dumps(record, indent=1))
        except OSError as error:
            raise CheckpointError(
                f"the run could not be written to {path}: {error}. Free space or choose another folder; "
                "what was saved before is untouched"
            ) from error
        self.path = path
        return path

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        model: Source | None = None,
        guide: Source | None = None,
        device: str | torch.device = "cpu",
    ) -> "Fit":
        """Read a run folder. No AnnData is needed.

        Args:
            path: The folder.
            model: Needed only if an instance was trained: an instance built the same way.
            guide: Likewise.
            device: Where the parameters go.

        Raises:
            CheckpointError: The folder is missing, incomplete, damaged, or of a newer version.
        """
        path = Path(path)
        record = _read_record(path)
        pair = _rebuild(record, path, model, guide)
        state = load_tensors(path / "weights.pt", device)
        try:
            pair.load_state_dict(state)
        except (RuntimeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path / 'weights.pt'} does not fit the model in fit.json: {error}. It belongs to another "
                "run, or the model's file was changed"
            ) from error
        for module in (pair.model, pair.guide):
            module.to(device)
        pair.train(False)
        try:
            history = pd.read_csv(path / "history.csv", index_col=0)
            split = Split.load(path / "split.npz")
        except Exception as error:  # pandas and numpy raise many kinds; all mean a damaged file
            raise CheckpointError(f"{path} is damaged: {error}") from error
        return cls(
            pair=pair,
            dims=_dims(record["dims"]),
            screen=ScreenSpec.from_json(json.dumps(record["screen"])),
            cells=CellSummary(**record["cells"]),
            split=split,
            history=history,
            training=record["training"],
            seed=record["seed"],
            finished=record.get("finished", True),  # runs of the first versions do not say
            path=path,
        )


def _read_record(path: Path) -> dict[str, Any]:
    file = path / "fit.json"
    if not file.exists():
        hint = "it holds a checkpoint of an unfinished run" if (path / "checkpoint.pt").exists() else ""
        raise CheckpointError(f"no fit at {path} ({file.name} not found){': ' + hint if hint else ''}")
    try:
        record = json.loads(file.read_text())
        version = record["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a fit's record: {error!r}") from error
    if version > FORMAT:
        raise CheckpointError(
            f"{path} has format {version}, this version reads up to {FORMAT}; update pyro_causalcell"
        )
    return record


def _rebuild(record: Mapping[str, Any], path: Path, model: Source | None, guide: Source | None) -> Pair:
    sources: dict[str, Source] = {}
    settings: dict[str, Any] = {}
    for kind, given in (("model", model), ("guide", guide)):
        source = given if given is not None else record[kind]["source"]
        if source is None:
            raise CheckpointError(
                f"the {kind} of {path} was trained as an instance; pass {kind}= built the same way"
            )
        if isinstance(source, str) and source.partition(":")[0].endswith(".py"):
            source = str(path / source)
        sources[kind] = source
        settings |= record[kind]["settings"] or {}
    try:
        pair = build_pair(sources["model"], sources["guide"], _dims(record["dims"]), _without_dims(settings))
    except PairError as error:
        raise CheckpointError(f"the model of {path} cannot be built again: {error}") from error
    pair.model_source, pair.guide_source = record["model"]["source"], record["guide"]["source"]
    for kind, given in (("model", model), ("guide", guide)):
        if given is None and ".py:" in record[kind]["source"]:
            setattr(pair, f"{kind}_source", str(path / record[kind]["source"]))
    return pair


def _dims(record: Mapping[str, Any]) -> Dims:
    lists: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in record.items()}
    return Dims(**lists)


def _without_dims(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in Dims._fields}


def _plain(settings: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if settings is None else dict(settings)


def check_plain(pair: Pair) -> None:
    """Whether JSON can hold the settings of a pair.

    Raises:
        PairError: A setting is an array or another object.
    """
    for settings in (pair.model_settings, pair.guide_settings):
        for name, value in (settings or {}).items():
            try:
                json.dumps(value)
            except (TypeError, ValueError) as error:
                raise PairError(
                    f"setting {name!r} is a {type(value).__name__}, which a run folder cannot hold: it takes "
                    "numbers, text, lists and dicts. Build the model yourself and pass the instance"
                ) from error


def keep_sources(pair: Pair, path: Path) -> dict[str, str | None]:
    """Copy files of the user's own model and guide into the run; it can be read after they have changed.

    Returns:
        Where to find each side again; files by their name in the run.
    """
    kept: dict[str, Path] = {}
    sources = {"model": pair.model_source, "guide": pair.guide_source}
    for kind, source in sources.items():
        if source is None or ".py:" not in source:
            continue
        file, _, name = source.rpartition(":")
        origin = Path(file).resolve()
        target = path / origin.name
        if kept.get(target.name, origin) != origin:  # another file of the same name
            target = path / f"{kind}_{origin.name}"
        kept[target.name] = origin
        if origin != target.resolve():
            atomic_write(target, pair.files[str(origin)])  # what trained, not what it was edited to since
        sources[kind] = f"{target.name}:{name}"
    return sources


def settings_hash(settings: Mapping[str, Any], pair: Pair, dims: Dims) -> str:
    """A hash of settings, sizes and the source code of model and guide."""
    code = [_code(type(m)) for m in (pair.model, pair.guide)]
    text = json.dumps([settings, dims, code], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _code(cls: type) -> str:
    """Source of the module of a class; of the class alone in a notebook; its name where there is neither."""
    for thing in (inspect.getmodule(cls), cls):
        try:
            return inspect.getsource(thing)  # type: ignore[arg-type]
        except (OSError, TypeError):
            continue
    return cls.__qualname__


def atomic_write(path: Path, text: str) -> None:
    """Replace a text file at once or not at all."""
    _replace(path, lambda file: Path(file).write_text(text))


def atomic_torch_save(state: Mapping[str, Any], path: Path) -> None:
    """Replace a file of tensors at once or not at all."""
    _replace(path, lambda file: torch.save(state, file))


def _replace(path: Path, write: Any) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files private; a run is shared like any other output
        os.replace(temporary, path)
    except RuntimeError as error:  # torch's writer hides a full disk in a RuntimeError
        free = shutil.disk_usage(path.parent).free / 2**20
        raise OSError(f"writing failed with {free:,.1f} MiB free there ({error})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def load_tensors(path: Path, device: str | torch.device) -> dict[str, Any]:
    """Read a file of tensors and plain values; no code in it is run.

    Raises:
        CheckpointError: The file is missing, cut short, or holds something else.
    """
    if not path.exists():
        raise CheckpointError(f"{path} not found")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch raises many kinds here; all mean the file cannot be used
        raise CheckpointError(
            f"{path} cannot be read: it is cut short or no file of this package "
            f"({type(error).__name__}). Restore it or train again"
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not the state of a fit")
    return state
