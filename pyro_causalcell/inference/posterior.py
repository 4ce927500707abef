"""Posterior means and draws of a pair's latents, for any pair."""

from collections.abc import Callable, Iterable

import torch
from pyro import poutine
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.inference.pair import CELLS, Pair

__all__ = ["encode", "global_sites", "is_local", "sample_sites"]


def sample_sites(trace: poutine.Trace) -> dict[str, dict]:  # type: ignore[type-arg]
    """The sample sites of a trace, without the bookkeeping of plates."""
    nodes = trace.nodes.items()
    return {n: s for n, s in nodes if s["type"] == "sample" and type(s["fn"]).__name__ != "_Subsample"}


def is_local(site: dict) -> bool:  # type: ignore[type-arg]
    """Whether a site is one per cell."""
    return any(frame.name == CELLS for frame in site["cond_indep_stack"])


@torch.no_grad()
def encode(guide: Callable[[Batch], object], batches: Iterable[Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Posterior mean and standard deviation of each latent that is one per cell.

    Args:
        guide: The guide; condition it on its global latents where draws of them must not matter.
        batches: Cells, in order.

    Returns:
        Site name -> (mean, standard deviation), each n, ... on the CPU.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        trace = poutine.trace(guide).get_trace(batch)
        for name, site in sample_sites(trace).items():
            if is_local(site) and not site["is_observed"]:
                fn = site["fn"]
                moments = (fn.mean.cpu(), fn.variance.sqrt().cpu())
                parts.setdefault(name, []).append(moments)
    return {
        name: (torch.cat([m for m, _ in moments]), torch.cat([s for _, s in moments]))
        for name, moments in parts.items()
    }


def global_sites(pair: Pair, batch: Batch) -> dict[str, dict]:  # type: ignore[type-arg]
    """One draw of the guide's global latents with their distributions: the trace's site records."""
    with torch.no_grad():
        trace = poutine.trace(pair.guide).get_trace(batch)
    return {n: s for n, s in sample_sites(trace).items() if not is_local(s) and not s["is_observed"]}
