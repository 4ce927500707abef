"""Effects of perturbations on genes and programmes, with intervals."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict.cells import asked_times, cell_latents, cell_trace, prior_cells, seeded, situated
from pyro_causalcell.predict.globals import design, global_draws, programme_names

__all__ = ["effects"]


def effects(
    fit: Fit,
    conditions: Sequence[str] | None = None,
    *,
    n_samples: int = 100,
    n_cells: int = 128,
    interval: float = 0.9,
    time: float | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Effect of each perturbation against control, as posterior mean and interval.

    For each draw of the global latents the same simulated cells (latent noise, library, batch) are seen
    under control and under the perturbation; the effect is the change of their mean.

    Args:
        fit: The fit.
        conditions: Names, known or new combinations; None takes every perturbed condition of the screen.
        n_samples: Draws of the global latents.
        n_cells: Simulated cells for each draw.
        interval: Mass of the equal-tailed intervals.
        time: Time at which effects are seen, for models that follow cells over time; None is the last
            snapshot.
        seed: Seed of the draws.

    Returns:
        Over ``condition`` and ``gene``: ``gene_effect``, ``gene_low``, ``gene_high``: log2 fold change of
        the expected value (for models of normalised values: their difference). Over ``condition`` and
        ``programme``: ``programme_effect``, ``programme_low``, ``programme_high``, in standard deviations
        of a control programme.

    Raises:
        PredictionError: ``n_samples``, ``n_cells`` or ``interval`` are out of range.
        DataError: A target is unknown.
    """
    if n_samples < 1 or n_cells < 1 or not 0 < interval < 1:
        raise PredictionError("expected n_samples and n_cells of at least 1, and interval between 0 and 1")
    perturbed = [c for c in fit.screen.conditions if not fit.screen.is_control(c)]
    names = [fit.screen.canonical(c) for c in conditions] if conditions else perturbed
    u_cp = design(fit, ["control", *names]).to(fit.device)
    at = asked_times(fit, None if time is None else [time])[-1]
    draws = global_draws(fit, n_samples, seed)
    gene_scg, programme_sck = [], []
    with seeded(fit, seed):
        cells = prior_cells(fit, u_cp[:1].expand(n_cells, -1), seed)
        for s in range(n_samples):
            draw = {site: values[s] for site, values in draws.items()}
            means = [
                _condition_mean(
                    fit, situated(fit, cells._replace(u_np=u.expand(n_cells, -1)), name, at), draw, seed + s
                )
                for name, u in zip(["control", *names], u_cp, strict=True)
            ]
            x_cg = torch.stack([x for x, _ in means])
            z_ck = torch.stack([z for _, z in means])
            gene_scg.append(_change(fit, x_cg).cpu().numpy())
            programme_sck.append((z_ck[1:] - z_ck[0]).cpu().numpy())
    variables = {}
    for kind, axis, values in (("gene", "gene", gene_scg), ("programme", "programme", programme_sck)):
        stacked = np.stack(values)
        low, high = np.quantile(stacked, [(1 - interval) / 2, (1 + interval) / 2], axis=0)
        for name, array in (("effect", stacked.mean(0)), ("low", low), ("high", high)):
            variables[f"{kind}_{name}"] = (("condition", axis), array.astype(np.float32))
    return xr.Dataset(
        variables,
        coords={"condition": names, "gene": fit.screen.genes, "programme": programme_names(fit)},
        attrs={
            "interval": interval,
            "n_samples": n_samples,
            "gene_units": "log2 fold change" if _is_counts(fit) else "difference of normalised values",
            "programme_units": "standard deviations of a control programme",
        },
    )


def _condition_mean(fit: Fit, cells: Batch, draw: Mapping[str, Tensor], seed: int) -> tuple[Tensor, Tensor]:
    """Mean of x and of the latents over simulated cells; one seed gives all conditions the same noise."""
    torch.manual_seed(seed)
    trace = cell_trace(fit, cells, draw)
    x_ng = trace.nodes["x"]["fn"].mean
    if _is_counts(fit):
        x_ng = x_ng / cells.library_n1
    return x_ng.mean(0), cell_latents(trace).mean(0)


def _change(fit: Fit, x_cg: Tensor) -> Tensor:
    """Change of each condition's mean against the first, control."""
    if _is_counts(fit):
        x_cg = torch.log2(x_cg.clamp(min=1e-12))
    return x_cg[1:] - x_cg[0]


def _is_counts(fit: Fit) -> bool:
    return "counts" in getattr(fit.model, "needs", {"counts"})
