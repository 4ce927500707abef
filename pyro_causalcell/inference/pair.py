"""A pair: a model and a guide, found by name or file, built from the sizes of a screen, and checked."""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from pyro import poutine
from torch import nn

from pyro_causalcell.batch import Batch, Dims
from pyro_causalcell.errors import PairError

__all__ = ["CELLS", "Pair", "Source", "build_pair", "check_pair", "find_class"]

CELLS = "cells"
"""Name of the plate over cells. Latents inside it are one per cell; all others are global."""

Source = str | type[nn.Module] | nn.Module
"""A name (``"sparse-shift"``), ``"file.py:Class"``, a class, or an instance."""


@dataclass
class Pair:
    """A model and its guide, with what is needed to build them again.

    Attributes:
        model, guide: The modules.
        model_source, guide_source: How to find their classes again, ``"package.module:Class"`` or
            ``"file.py:Class"``; None for instances, which only the user can build again.
        model_settings, guide_settings: Keyword arguments they were built with.
        files: Text of the files of the sources when the pair was built, by path.
    """

    model: nn.Module
    guide: nn.Module
    model_source: str | None = None
    guide_source: str | None = None
    model_settings: Mapping[str, Any] | None = None
    guide_settings: Mapping[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of both, each once."""
        yield from nn.ModuleList([self.model, self.guide]).parameters()

    def state_dict(self) -> dict[str, dict[str, torch.Tensor]]:
        """States of both."""
        return {"model": self.model.state_dict(), "guide": self.guide.state_dict()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Load what ``state_dict`` gave."""
        self.model.load_state_dict(state["model"])
        self.guide.load_state_dict(state["guide"])

    def train(self, mode: bool = True) -> None:
        """Set both to training or evaluation mode."""
        self.model.train(mode)
        self.guide.train(mode)


def build_pair(model: Source, guide: Source | None, dims: Dims, settings: Mapping[str, Any]) -> Pair:
    """Build a model and a guide for a screen of these sizes.

    Each setting goes to whichever of the two has an argument of that name, or to both;
    ``"model.norm"`` and ``"guide.norm"`` go to one.

    Args:
        model: Name of a model of this package, ``"file.py:Class"``, a class, or an instance.
        guide: Likewise. None takes the guide of the same name, or the only guide of the model's file.
        dims: Sizes of the screen.
        settings: Keyword arguments of the model's and the guide's constructors.

    Raises:
        PairError: A class is not found, or a setting is not known to either.
    """
    if guide is None:
        guide = _matching_guide(model)
    model_class, model_source = find_class(model, "models")
    guide_class, guide_source = find_class(guide, "guides")
    arguments = {"model": _arguments(model_class), "guide": _arguments(guide_class)}
    known = (arguments["model"] | arguments["guide"]) - set(Dims._fields)
    for name in settings:
        kind, dot, argument = name.partition(".")
        if name not in known and not (dot and argument in known & arguments.get(kind, set())):
            near = difflib.get_close_matches(name, sorted(known), 3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"they take {sorted(known)}"
            raise PairError(
                f"neither {model_class.__name__} nor {guide_class.__name__} has a setting {name!r}; {hint}"
            )
    built: list[tuple[nn.Module, dict[str, Any] | None]] = []
    for kind, source, cls in (("model", model, model_class), ("guide", guide, guide_class)):
        if isinstance(source, nn.Module):
            built.append((source, None))
            continue
        own = {
            name.removeprefix(f"{kind}."): v for name, v in settings.items() if name.startswith(f"{kind}.")
        }
        available = {**dims._asdict(), **settings, **own}
        given = {name: value for name, value in available.items() if name in arguments[kind]}
        _check_choices(cls, given)
        try:
            built.append((cls(**given), given))
        except (TypeError, ValueError, RuntimeError) as error:  # torch refuses sizes with RuntimeError
            raise PairError(f"{cls.__name__} could not be built: {error}") from error
    (model_module, model_settings), (guide_module, guide_settings) = built
    files = {
        str(file): file.read_text()
        for source in (model_source, guide_source)
        if source is not None and (file := Path(source.rpartition(":")[0])).suffix == ".py"
    }
    return Pair(model_module, guide_module, model_source, guide_source, model_settings, guide_settings, files)


def find_class(source: Source, room: str) -> tuple[type[nn.Module], str | None]:
    """The class a source means, and how to find it again (None for an instance).

    Args:
        source: As in :func:`build_pair`, or ``"package.module:Class"``.
        room: ``"models"`` or ``"guides"``: where plain names are looked up.

    Raises:
        PairError: The file, module or class does not exist, or the file has several candidates.
    """
    if isinstance(source, nn.Module):
        return type(source), None
    if isinstance(source, type):
        return source, _class_source(source)
    location, _, name = source.partition(":")
    module = _module(location, room)
    classes = {
        key: value
        for key, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, nn.Module) and value.__module__ == module.__name__
    }
    if not name:
        kind = {k: v for k, v in classes.items() if k.endswith("Guide") == (room == "guides")}
        if len(kind) != 1:
            raise PairError(
                f"{source!r} holds {len(kind)} candidates ({sorted(classes)}); write {location}:Class"
            )
        name = next(iter(kind))
    if name not in classes:
        raise PairError(f"{location} has no module class {name!r}; it has {sorted(classes)}")
    where = str(Path(location).resolve()) if location.endswith(".py") else module.__name__
    return classes[name], f"{where}:{name}"


def _class_source(cls: type[nn.Module]) -> str | None:
    """How to find a class again: in its package, or in its file (a script's, for example)."""
    if "." in cls.__qualname__:
        return None  # made inside a function or another class
    if "." in cls.__module__:
        return f"{cls.__module__}:{cls.__qualname__}"
    try:
        file = inspect.getsourcefile(cls)
    except (TypeError, OSError):
        return None  # a notebook's or a prompt's
    return f"{Path(file).resolve()}:{cls.__qualname__}" if file and Path(file).is_file() else None


def _module(location: str, room: str) -> Any:
    if location.endswith(".py"):
        path = Path(location)
        if not path.exists():
            raise PairError(f"model file {location} not found (in {os.getcwd()})")
        content = hashlib.sha256(bytes(path.resolve()) + path.read_bytes())  # an edited file is a new module
        name = f"pyro_causalcell_user_{path.stem}_{content.hexdigest()[:12]}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, path)
            assert spec is not None and spec.loader is not None  # a .py path always has a loader
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module
            try:
                spec.loader.exec_module(module)
            except Exception as error:
                del sys.modules[name]
                raise PairError(f"{location} could not be imported: {error!r}") from error
        return sys.modules[name]
    dotted = location if "." in location else f"pyro_causalcell.{room}.{location.replace('-', '_')}"
    try:
        return importlib.import_module(dotted)
    except ModuleNotFoundError as error:
        package = importlib.import_module(f"pyro_causalcell.{room}")
        files = Path(next(iter(package.__path__))).glob("[a-z]*.py")
        names = sorted(f.stem.replace("_", "-") for f in files)
        raise PairError(
            f"no {room[:-1]} named {location!r}; known are {names}, or pass file.py:Class"
        ) from error


def _matching_guide(model: Source) -> Source:
    if isinstance(model, str):
        return model.partition(":")[0].replace("pyro_causalcell.models.", "pyro_causalcell.guides.")
    module = model.__module__
    if module.startswith("pyro_causalcell.models."):
        return module.replace("pyro_causalcell.models.", "pyro_causalcell.guides.")
    raise PairError("a guide is needed beside this model; pass guide=, for example guides/template.py")


def _arguments(cls: type[nn.Module]) -> set[str]:
    return {name for name in inspect.signature(cls.__init__).parameters if name != "self"}


def _check_choices(cls: type, given: Mapping[str, Any]) -> None:
    """Refuse words that an argument annotated as Literal does not list, and words for true or false."""
    try:
        hints = get_type_hints(cls.__init__)  # type: ignore[misc]
    except (NameError, TypeError):  # a user's class may name types that exist for a checker only
        return
    for name, value in given.items():
        hint = Literal[False, True] if hints.get(name) is bool else hints.get(name)
        known = get_args(hint)
        if get_origin(hint) is Literal and value not in known:
            raise PairError(f"{cls.__name__} takes {name}= one of {list(known)}, found {value!r}")


def check_pair(model: Callable[[Batch], object], guide: Callable[[Batch], object], batch: Batch) -> None:
    """Run a pair once and say in plain words what does not fit.

    Args:
        model: The generative process.
        guide: Its guide.
        batch: Any minibatch.

    Raises:
        PairError: A latent is missing from the guide, the guide has a site the model lacks, shapes or
            plates differ, the cells plate is missing, a guide's factor does not say ``has_rsample``, or
            a log-probability is not finite. The message names site, shapes and file.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        guide_trace = _trace(guide, batch, "guide")
        model_trace = _trace(poutine.replay(model, trace=guide_trace), batch, "model", model)
    guided = {n: s for n, s in guide_trace.nodes.items() if _is_sample(s) and not s["is_observed"]}
    for name, site in guide_trace.nodes.items():
        if _is_sample(site) and site["is_observed"] and not site["fn"].has_rsample:
            raise PairError(
                f"factor {name!r} in the guide ({_where(guide)}) must say has_rsample=True: "
                "pyro.factor(name, value, has_rsample=True)"
            )
    sites = {n: s for n, s in model_trace.nodes.items() if _is_sample(s)}
    latents = {n: s for n, s in sites.items() if not s["is_observed"]}
    missing, extra = sorted(set(latents) - set(guided)), sorted(set(guided) - set(latents))
    if missing or extra:
        raise PairError(
            f"the sites of model ({_where(model)}) and guide ({_where(guide)}) differ: the guide lacks "
            f"{missing or 'nothing'} and has {extra or 'nothing'} beyond the model. Every latent of the "
            "model needs a pyro.sample of the same name in the guide"
        )
    for name, site in latents.items():
        _check_site(name, site, guided[name], model, guide)
    if not any(_in_cells(s) for s in sites.values()):
        raise PairError(
            f"the model ({_where(model)}) has no plate {CELLS!r}; write "
            f'pyro.plate("{CELLS}", batch.n_total, subsample=batch.index_n) around what is one per cell'
        )
    for name, site in sites.items():
        try:
            log_prob = site["fn"].log_prob(site["value"])
        except ValueError as error:
            raise PairError(
                f"site {name!r}: the distribution of the model ({_where(model)}) has shape {_shape(site)} "
                f"(batch shape | event shape), its value has shape {tuple(site['value'].shape)}: {error}"
            ) from error
        if not torch.isfinite(log_prob).all():
            raise PairError(
                f"log p({name}) is not finite before any training; model: {_where(model)}. Look at its "
                "parameters' starting values and at the range of the data"
            )


def _check_site(name: str, site: Any, guided: Any, model: object, guide: object) -> None:
    if site["fn"].event_dim != guided["fn"].event_dim or site["fn"].shape() != guided["fn"].shape():
        raise PairError(
            f"site {name!r}: the model ({_where(model)}) has shape {_shape(site)}, the guide "
            f"({_where(guide)}) has {_shape(guided)} (batch shape | event shape)"
        )
    plates = [frame.name for frame in site["cond_indep_stack"]]
    guide_plates = [frame.name for frame in guided["cond_indep_stack"]]
    if plates != guide_plates:
        raise PairError(
            f"site {name!r} lies in plates {plates} of the model ({_where(model)}) but in {guide_plates} "
            f"of the guide ({_where(guide)}); the scale of its term would be wrong"
        )


def _trace(program: Callable[[Batch], object], batch: Batch, kind: str, named: object = None) -> Any:
    try:
        return poutine.trace(program).get_trace(batch)
    except PairError:
        raise
    except Exception as error:
        where = _where(named or program)
        said = textwrap.shorten(str(error).partition("Trace Shapes:")[0], 400)  # Pyro appends every shape
        raise PairError(
            f"the {kind} ({where}) fails on a minibatch: {type(error).__name__}: {said}"
        ) from error


def _is_sample(site: Any) -> bool:
    return bool(site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample")


def _in_cells(site: Any) -> bool:
    return any(frame.name == CELLS for frame in site["cond_indep_stack"])


def _shape(site: Any) -> str:
    return f"{tuple(site['fn'].batch_shape)} | {tuple(site['fn'].event_shape)}"


def _where(program: object) -> str:
    cls = program if inspect.isclass(program) or inspect.isfunction(program) else type(program)
    try:
        return f"{cls.__name__} in {inspect.getsourcefile(cls)}"
    except (TypeError, OSError):
        return cls.__name__
