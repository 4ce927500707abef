"""Importance-weighted likelihood of held-out cells, with the diagnostics that say whether to trust it."""

import math
import warnings
from collections.abc import Mapping

import arviz as az
import numpy as np
import pyro
import torch
import xarray as xr
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from tqdm import tqdm

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import is_local, sample_sites
from pyro_causalcell.predict import global_means

__all__ = ["iw_nll", "log_weights"]


def iw_nll(
    fit: Fit,
    screen: Screen,
    rows: np.ndarray | None = None,
    *,
    n_particles: int = 1000,
    memory_budget_gb: float = 0.5,
    seed: int = 0,
    progress: bool = False,
) -> xr.Dataset:
    """Importance-weighted negative log-likelihood of each cell.

    −log 1/T Σ_t p(x, z_t | u) / q(z_t | x, u), with the global latents at their posterior means (gates
    rounded). Particles are drawn in chunks that fit the memory budget and streamed into log-sum-exp; the
    weights alone are kept, for Pareto smoothing.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells; None is all.
        n_particles: Particles T.
        memory_budget_gb: Memory that a chunk of particles × cells × genes may take, in GiB.
        seed: Seed of the particles. Results do not depend on the budget beyond rounding and draws.
        progress: Show a progress bar.

    Returns:
        Variables over ``cell``: ``nll`` (nats), ``pareto_k`` (below 0.7 the estimate can be trusted),
        ``ess`` (effective particles), ``mc_se`` (standard error of nll, nats).

    Source: Burda et al., ICLR 2016; Vehtari et al., JMLR 2024 (Pareto smoothing).
    """
    rows = np.arange(screen.n_cells) if rows is None else np.asarray(rows)
    fixed = global_means(fit)
    n_chunk = _cells_per_chunk(screen.n_genes, n_particles, memory_budget_gb)
    batches = Minibatches(screen, rows, n_chunk, shuffle=False, device=fit.device)
    parts = []
    with torch.random.fork_rng(devices=[fit.device] if fit.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for batch in tqdm(batches, disable=not progress, unit="batch"):
            log_weight_sn = log_weights(fit, batch, n_particles, memory_budget_gb, fixed)
            parts.append(_summary(log_weight_sn.double().cpu().numpy()))
    columns = np.concatenate(parts, 1)
    names = ["nll", "pareto_k", "ess", "mc_se"]
    cells = screen.adata.obs_names.to_numpy()[rows].astype(str)
    return xr.Dataset(
        {name: ("cell", column) for name, column in zip(names, columns, strict=True)},
        coords={"cell": cells, "condition": ("cell", _condition_names(screen, rows))},
        attrs={"n_particles": n_particles, "units": "nats per cell", "seed": seed},
    )


def log_weights(
    fit: Fit,
    batch: Batch,
    n_particles: int,
    memory_budget_gb: float = 0.5,
    fixed: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """log p(x, z_s | u) − log q(z_s | x, u) of each particle and cell, shape s, n.

    Args:
        fit: The fit.
        batch: The cells.
        n_particles: Particles s.
        memory_budget_gb: Memory that particles × cells × genes may take at once, in GiB.
        fixed: Values of the global latents; None takes their posterior means.
    """
    fixed = global_means(fit) if fixed is None else fixed
    per_particle = 4 * 6 * batch.n_cells * (batch.x_ng.shape[-1] if batch.x_ng is not None else 1)
    step = max(1, min(n_particles, int(memory_budget_gb * 2**30 / per_particle)))
    sizes = [step] * (n_particles // step) + [n_particles % step] * (n_particles % step > 0)
    with torch.inference_mode(), pyro.validation_enabled(False):
        return torch.cat([_particles(fit, batch, size, fixed) for size in sizes])


def _particles(fit: Fit, batch: Batch, n: int, fixed: Mapping[str, Tensor]) -> Tensor:
    plate = pyro.plate("particles", n, dim=-2)
    guide = plate(poutine.condition(fit.guide, data=dict(fixed)))
    guide_trace = poutine.trace(guide).get_trace(batch)
    drawn = {n: s["value"] for n, s in sample_sites(guide_trace).items() if is_local(s)}
    model = plate(poutine.condition(fit.model, data={**fixed, **drawn}))
    model_trace = poutine.trace(model).get_trace(batch)
    return _local_log_prob(model_trace) - _local_log_prob(guide_trace)


def _local_log_prob(trace: Trace) -> Tensor:
    """Sum over sites of the cells plate, shape s, n, without plate scales."""
    terms = [s["fn"].log_prob(s["value"]) for s in sample_sites(trace).values() if is_local(s)]
    return torch.stack(torch.broadcast_tensors(*terms)).sum(0)


def _summary(log_weight_sn: np.ndarray) -> np.ndarray:
    """NLL, Pareto k, effective sample size and standard error of each cell, shape 4, n."""
    n_particles = len(log_weight_sn)
    top_n = log_weight_sn.max(0)
    weight_sn = np.exp(log_weight_sn - top_n)
    nll_n = -(np.log(weight_sn.mean(0)) + top_n)
    ess_n = weight_sn.sum(0) ** 2 / (weight_sn**2).sum(0)
    se_n = weight_sn.std(0) / weight_sn.mean(0) / math.sqrt(n_particles)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # high k is returned, and judged by the caller
        _, k_n = az.psislw(log_weight_sn.T.copy())
    return np.stack([nll_n, np.asarray(k_n), ess_n, se_n])


def _cells_per_chunk(n_genes: int, n_particles: int, memory_budget_gb: float) -> int:
    """Cells whose full set of weights and one slab of particles fit the budget."""
    cells = int(memory_budget_gb * 2**30 / (4 * 6 * n_genes * min(n_particles, 250)))
    return max(1, min(cells, 4096))


def _condition_names(screen: Screen, rows: np.ndarray) -> list[str]:
    index = screen.condition_n[rows]
    return [screen.conditions[i] if i >= 0 else "unknown" for i in index]
