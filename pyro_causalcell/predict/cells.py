"""Cells nobody measured: posterior predictive and counterfactual cells, as AnnData."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import encode, is_local, sample_sites
from pyro_causalcell.predict.globals import design, global_draws, global_means, programme_names, stub_batch

__all__ = [
    "asked_times",
    "cell_latents",
    "cell_trace",
    "latents",
    "predict",
    "prior_cells",
    "replicate",
    "seeded",
    "situated",
]

Units = Literal["counts", "lognorm"]
MAX_DRAWS = 50
"""Draws of the global latents that the cells of one condition are spread over."""
TARGET_SUM = 1e4
"""Total to which counts are scaled before log(1 + x)."""


def predict(
    fit: Fit,
    conditions: Sequence[str],
    n_cells: int = 500,
    *,
    basal: Screen | None = None,
    times: Sequence[float] | None = None,
    units: Units | None = None,
    library: float | None = None,
    seed: int = 0,
) -> ad.AnnData:
    """Draw cells under any known perturbation, or any combination of known ones.

    Known are also targets without training cells, where the fit has embeddings of them (``Screen(embeddings=,
    unseen=)``); without embeddings a warning says that they are predicted by the prior.

    Cells are spread over draws of the global latents (gates and shifts), so together they carry what
    the posterior does not know. From the prior, latents are drawn afresh. From ``basal`` cells, each
    predicted cell is the counterfactual of a chosen one: its latents' noise is kept (abduction), the
    perturbation is exchanged (action), and the measurement is drawn again (prediction). All conditions
    then show the same cells with the same noise.

    A model that follows cells over time predicts any later time. ``basal`` cells, control cells usually, then
    set out at their own time and evolve under the perturbation from there, each with innovations of its own.

    Args:
        fit: The fit.
        conditions: Names such as ``"A"``, ``"A+B"`` or ``"control"``.
        n_cells: Cells for each condition.
        basal: Cells to start from, drawn with replacement; control cells usually. They also give library
            sizes and batches.
        times: Times to predict, for models that follow cells over time; None is every snapshot of the fit.
        units: ``"counts"``, or ``"lognorm"``: log(1 + counts per 10,000). A model of normalised values
            predicts in the units of its training data, and takes neither.
        library: Total counts of the predicted cells; None keeps those of ``basal``, or draws from the
            training cells', of the snapshots around the time where there are times.
        seed: Seed of the draws.

    Returns:
        AnnData of cells × genes with ``obs["condition"]``, ``obs["library"]``; ``obs["time"]`` where times
        matter; ``obs["basal_cell"]`` where cells were chosen; ``obsm["X_causalcell"]`` with their latents;
        units and settings in ``uns["causalcell"]``.

    Raises:
        PredictionError: No cells or conditions were asked for, units do not fit the likelihood, or times do
            not fit the model or lie before the basal cells.
        DataError: A target is unknown; the nearest names are listed.
    """
    if n_cells < 1 or not conditions:
        raise PredictionError(f"expected conditions and n_cells of at least 1, found {conditions}, {n_cells}")
    given = _units(fit, units)
    names = [fit.screen.canonical(c) for c in conditions]
    u_cp = design(fit, names)
    rng = np.random.default_rng(seed)
    rows = None if basal is None else rng.integers(basal.n_cells, size=n_cells)
    noise_seed = int(rng.integers(2**31))
    blocks = []
    with seeded(fit, seed):
        for (name, u_p), time in product(zip(names, u_cp, strict=True), asked_times(fit, times)):
            u_np = u_p.expand(n_cells, -1).to(fit.device)
            cells, factual = None, None
            if basal is None or rows is None:
                noise_seed = int(rng.integers(2**31))
                batch = prior_cells(fit, u_np, seed=int(rng.integers(2**31)), time=time)
            else:
                cells = basal.adata.obs_names.to_numpy()[rows].astype(str).tolist()
                factual = next(iter(Minibatches(basal, rows, n_cells, shuffle=False, device=fit.device)))
                batch = factual._replace(u_np=u_np)
            if library is not None:
                batch = batch._replace(library_n1=torch.full_like(batch.library_n1, library))
            batch = situated(fit, batch, name, time)
            blocks.append(_draw_condition(fit, name, batch, cells, factual, noise_seed))
    x_ng = np.concatenate([b["x"] for b in blocks])
    obs = pd.concat([b["obs"] for b in blocks], ignore_index=True)
    obs.index = [f"predicted_{i}" for i in range(len(obs))]
    obs["condition"] = pd.Categorical(obs["condition"], categories=list(dict.fromkeys(names)))
    if given == "lognorm":
        totals = np.maximum(x_ng.sum(1, keepdims=True), 1.0)
        x_ng = np.log1p(x_ng / totals * TARGET_SUM)
    result = ad.AnnData(x_ng.astype(np.float32), obs, pd.DataFrame(index=fit.screen.genes))
    result.obsm["X_causalcell"] = np.concatenate([b["z"] for b in blocks])
    result.uns["causalcell"] = {
        "units": given,
        "programmes": programme_names(fit),
        "seed": seed,
        "basal": "prior" if basal is None else "cells",
        "predicted": True,
    }
    return result


def asked_times(fit: Fit, times: Sequence[float] | None) -> list[float | None]:
    """Times to predict; ``[None]`` for models without time.

    Raises:
        PredictionError: Times were given for such a model, or are none.
    """
    if "time" not in getattr(fit.model, "needs", set()):
        if times is not None:
            raise PredictionError(
                f"this model does not follow cells over time; leave out times= (found {times})"
            )
        return [None]
    asked: list[float | None] = [float(time) for time in (fit.dims.times if times is None else times)]
    if not asked or not np.isfinite(np.array(asked, dtype=float)).all():
        raise PredictionError(f"expected numbers as times, found {times}; the snapshots are {fit.dims.times}")
    return asked


def situated(fit: Fit, batch: Batch, condition: str, time: float | None) -> Batch:
    """The same cells in a condition (its canonical name) and at a time."""
    known = fit.screen.conditions
    index = known.index(condition) if condition in known else -1
    return batch._replace(
        condition_n=torch.full_like(batch.condition_n, index),
        time_n=None if time is None else torch.full_like(batch.library_n1.squeeze(-1), time),
    )


def _units(fit: Fit, units: Units | None) -> str:
    counts = "counts" in getattr(fit.model, "needs", {"counts"})
    if not counts:
        if units is not None:
            raise PredictionError(
                f"this model was trained on normalised values and predicts in their units; leave out "
                f"units= (found {units!r})"
            )
        return "as trained"
    if units not in (None, "counts", "lognorm"):
        raise PredictionError(f"units are 'counts' or 'lognorm', found {units!r}")
    return units or "counts"


def _draw_condition(
    fit: Fit, name: str, batch: Batch, cells: list[str] | None, factual: Batch | None, seed: int
) -> dict[str, Any]:
    """Cells of one condition, spread over draws of the global latents."""
    n = batch.n_cells
    draws = global_draws(fit, min(n, MAX_DRAWS), seed=seed)
    x_ng, z_nk = [], []
    for s, index in enumerate(torch.arange(n, device=fit.device).tensor_split(min(n, MAX_DRAWS))):
        draw = {site: values[s] for site, values in draws.items()}
        torch.manual_seed(seed + s)  # whatever the draws of counts before it have used up
        trace = cell_trace(fit, take(batch, index), draw, None if factual is None else take(factual, index))
        x_ng.append(trace.nodes["x"]["value"])
        z_nk.append(cell_latents(trace))
    obs = pd.DataFrame({"condition": [name] * n, "library": batch.library_n1.squeeze(-1).cpu().numpy()})
    if batch.time_n is not None:
        obs["time"] = batch.time_n.cpu().numpy()
    if cells is not None:
        obs["basal_cell"] = cells
    return {"x": torch.cat(x_ng).cpu().numpy(), "z": torch.cat(z_nk).cpu().numpy(), "obs": obs}


def cell_trace(
    fit: Fit, batch: Batch, draw: Mapping[str, Tensor], factual: Batch | None = None
) -> poutine.Trace:
    """Run the model on cells that are to be drawn, at one draw of the global latents.

    Args:
        fit: The fit.
        batch: Design, library and batches of the cells; their x is drawn.
        draw: Values of the global latents.
        factual: The cells as they were measured; their noise is kept. None draws latents from the prior.
    """
    model = poutine.condition(fit.model, data=dict(draw))
    if factual is not None and batch.time_n is not None:
        model = Given(_evolved(fit, batch, draw, factual))(model)
    elif factual is not None:
        kept = _noise(fit, factual, draw).items()
        model = Given({name: partial(_from_noise, noise=noise) for name, noise in kept})(model)
    return poutine.trace(model).get_trace(batch._replace(x_ng=None))


def _evolved(fit: Fit, batch: Batch, draw: Mapping[str, Tensor], factual: Batch) -> dict[str, Tensor]:
    """Programmes of measured cells when they have evolved to the batch's perturbations and times."""
    if factual.time_n is None or batch.time_n is None or bool((factual.time_n > batch.time_n).any()):
        raise PredictionError(
            "expected times after those of the basal cells (opened with the fit's column of times); choose "
            "basal cells of an earlier snapshot"
        )
    guide_trace = poutine.trace(poutine.condition(fit.guide, data=dict(draw))).get_trace(factual)
    start = {site["name"]: site["value"] for site in _latent_sites(guide_trace)}
    rolled = poutine.condition(fit.model.roll_out, data=dict(draw))
    z_nk = rolled(torch.cat(list(start.values()), -1), batch, factual.time_n)
    parts = z_nk.split([value.shape[-1] for value in start.values()], -1)
    return dict(zip(start, parts, strict=True))


class Given(Messenger):
    """Give latents their values, as draws: what depends on them is drawn, and they count as latents.

    Args:
        values: Site name -> value, or what makes it of the site's distribution.
    """

    def __init__(self, values: Mapping[str, Tensor | Callable[[Any], Tensor]]):
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(msg["name"])
        if value is not None and not msg["is_observed"]:
            msg["value"] = value if isinstance(value, Tensor) else value(msg["fn"])
            msg["done"] = True


def _noise(fit: Fit, factual: Batch, draw: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Standardised residual of each cell's latents, drawn from the guide, under its own perturbation."""
    guide_trace = poutine.trace(poutine.condition(fit.guide, data=dict(draw))).get_trace(factual)
    drawn = {site["name"]: site["value"] for site in _latent_sites(guide_trace)}
    model_trace = poutine.trace(poutine.condition(fit.model, data={**draw, **drawn})).get_trace(factual)
    sites = (model_trace.nodes[name] for name in drawn)
    return {s["name"]: _noise_of(s["fn"], s["value"]) for s in sites}


def _noise_of(fn: Any, value: Tensor) -> Tensor:
    """Standard noise of a value: a structural distribution says it, others are loc + scale · noise."""
    if hasattr(fn, "noise_of"):
        noise: Tensor = fn.noise_of(value)
        return noise
    return (value - fn.mean) / fn.variance.sqrt()


def _from_noise(fn: Any, noise: Tensor) -> Tensor:
    """The value that arises from standard noise."""
    if hasattr(fn, "from_noise"):
        value: Tensor = fn.from_noise(noise)
        return value
    return fn.mean + fn.variance.sqrt() * noise


def cell_latents(trace: poutine.Trace) -> Tensor:
    """The latents of the cells of a trace, side by side, shape n, k."""
    return torch.cat([site["value"] for site in _latent_sites(trace)], -1)


def _latent_sites(trace: poutine.Trace) -> list[dict[str, Any]]:
    sites = sample_sites(trace).values()
    return [s for s in sites if is_local(s) and not s["is_observed"] and s["name"] != "x"]


def take(batch: Batch, index: Tensor) -> Batch:
    """Some cells of a minibatch, as a minibatch of their own."""
    fields = batch._asdict().items()
    parts: dict[str, Any] = {name: f[index] for name, f in fields if isinstance(f, Tensor)}
    parts |= {"index_n": torch.arange(len(index), device=index.device), "n_total": len(index)}
    return batch._replace(**parts)


def prior_cells(fit: Fit, u_np: Tensor, seed: int, time: float | None = None) -> Batch:
    """Cells with a design, and libraries (as around a time) and batches drawn as in the training cells."""
    rng, cells = np.random.default_rng(seed), fit.cells
    n = len(u_np)
    library = cells.libraries(rng.random(n), time)
    row = rng.choice(len(cells.batch_share), size=n, p=cells.batch_share)
    batch_nb = torch.tensor(cells.batch_rows, dtype=torch.float32).reshape(len(cells.batch_share), -1)[row]
    library_n1 = torch.tensor(library, dtype=torch.float32, device=fit.device).unsqueeze(-1)
    return stub_batch(fit, u_np, batch_nb=batch_nb)._replace(library_n1=library_n1)


def replicate(fit: Fit, screen: Screen, rows: np.ndarray, n_samples: int = 20, seed: int = 0) -> np.ndarray:
    """Posterior predictive copies of measured cells: same perturbation, library and batch, new latents.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names.
        rows: Which cells.
        n_samples: Copies s, each with its own draw of the global latents.
        seed: Seed of the draws.

    Returns:
        float32, shape s, n, g.
    """
    draws = global_draws(fit, n_samples, seed)
    copies = []
    with seeded(fit, seed):
        for s in range(n_samples):
            draw = {site: values[s] for site, values in draws.items()}
            batches = Minibatches(screen, rows, 4096, shuffle=False, device=fit.device)
            parts = [cell_trace(fit, b, draw).nodes["x"]["value"].cpu() for b in batches]
            copies.append(torch.cat(parts).numpy())
    return np.stack(copies)


def latents(fit: Fit, screen: Screen) -> ad.AnnData:
    """Posterior mean and standard deviation of each cell's programmes, at the posterior means of the edges.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).

    Returns:
        AnnData without x: the cells' obs, ``obsm["X_causalcell"]``, ``obsm["X_causalcell_sd"]``, and the
        programmes' names in ``uns["causalcell"]["programmes"]``.
    """
    guide = poutine.condition(fit.guide, data=global_means(fit))
    batches = Minibatches(screen, np.arange(screen.n_cells), 4096, shuffle=False, device=fit.device)
    with seeded(fit, fit.seed):
        moments = encode(guide, batches)
    result = ad.AnnData(obs=screen.adata.obs.copy())
    result.obsm["X_causalcell"] = torch.cat([m for m, _ in moments.values()], -1).numpy()
    result.obsm["X_causalcell_sd"] = torch.cat([s for _, s in moments.values()], -1).numpy()
    result.uns["causalcell"] = {"programmes": programme_names(fit)}
    return result


@contextmanager
def seeded(fit: Fit, seed: int) -> Iterator[None]:
    """Draws that depend on the seed alone; no gradients, no argument checks."""
    cuda = [fit.device] if fit.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cuda), torch.no_grad(), pyro.validation_enabled(False):
        torch.manual_seed(seed)
        yield
