"""What a fit believes about its global latents: means, draws, the graph."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.direct import DIRECT
from pyro_causalcell.epistasis import MASKING, SATURATION
from pyro_causalcell.errors import PredictionError
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import encode, global_sites

__all__ = [
    "design",
    "direct_effects",
    "edge_names",
    "global_draws",
    "global_means",
    "graph",
    "lagged_graph",
    "mechanism_graph",
    "programme_names",
    "stub_batch",
]


OF_OTHERS = {"cut": "cut", "masks": MASKING}
"""Columns of ``graph`` that some models add -> their sites."""


def design(fit: Fit, conditions: Sequence[str]) -> Tensor:
    """The design of conditions that are to be predicted, shape c, p.

    Warns of targets without training cells that nothing describes: what a fit says of them is its prior.

    Raises:
        DataError: A target is unknown.
    """
    u_cp = torch.from_numpy(fit.screen.design(conditions))
    cells_p = torch.tensor(fit.dims.target_cells)
    blank = [fit.screen.targets[p] for p in (u_cp.any(0) & (cells_p == 0)).nonzero().flatten().tolist()]
    if blank and not hasattr(fit.guide, "embedding_pe"):
        warnings.warn(
            f"no training cell carries {', '.join(blank)}, and the fit has no embeddings of targets: what it "
            "predicts there is its prior. Fit with embeddings=",
            stacklevel=3,
        )
    return u_cp


def stub_batch(fit: Fit, u_np: Tensor, library: float = 1.0, batch_nb: Tensor | None = None) -> Batch:
    """Cells that carry a design and nothing else; of the last snapshot, where the screen has times.

    Args:
        fit: The fit.
        u_np: Their design.
        library: Their total counts.
        batch_nb: Their batch columns; None is zeros.
    """
    n, device = len(u_np), fit.device
    x_ng = torch.zeros(n, fit.dims.n_genes, device=device)
    if batch_nb is None:
        batch_nb = torch.zeros(n, fit.dims.n_batches, device=device)
    return Batch(
        x_ng=x_ng,
        u_np=u_np.to(device),
        library_n1=torch.full((n, 1), library, device=device),
        batch_nb=batch_nb.to(device),
        condition_n=torch.zeros(n, dtype=torch.long, device=device),
        index_n=torch.arange(n, device=device),
        n_total=n,
        time_n=torch.full((n,), fit.dims.times[-1], device=device) if fit.dims.times else None,
    )


def global_means(fit: Fit) -> dict[str, Tensor]:
    """Posterior mean of each global latent; Bernoulli gates are rounded to 0 or 1."""
    sites = _global_distributions(fit)
    return {name: fn.mean.round() if _is_gate(fn) else fn.mean for name, fn in sites.items()}


def global_draws(fit: Fit, n_samples: int, seed: int = 0) -> dict[str, Tensor]:
    """Posterior draws of each global latent, shape s, ...

    Args:
        fit: The fit.
        n_samples: Draws s.
        seed: Their seed.
    """
    batch = stub_batch(fit, torch.zeros(1, fit.dims.n_targets))
    fit.pair.train(False)
    with torch.random.fork_rng(devices=[fit.device] if fit.device.type == "cuda" else []):
        torch.manual_seed(seed)
        draws = [global_sites(fit.pair, batch) for _ in range(n_samples)]
    names = draws[0] if draws else {}
    return {name: torch.stack([draw[name]["value"] for draw in draws]) for name in names}


def graph(fit: Fit) -> pd.DataFrame:
    """Which perturbation hits which programme, how sure that is, and how strongly.

    Returns:
        One row per edge: ``perturbation``, ``programme``, ``probability`` that the edge is there,
        ``effect`` (posterior mean of the shift where it is, in standard deviations of a control
        programme) and ``effect_sd``. Models in which a perturbation may cut a programme off its parents add
        ``cut``, the probability that it does; their shift is that of one step. With ``epistasis`` there is
        ``masks``: the share of what other targets of a cell do to the programme that this one takes away; and
        ``attrs["saturation"]`` is s of ``pyro_causalcell.epistasis``: two equal shifts make 2^(1 / (1 + s)).
        Programmes that no perturbation may act on have no rows.

    Raises:
        PredictionError: The model has no ``shift``: with closed gates perturbations have no effect.
    """
    sites = _global_distributions(fit)
    model: Any = fit.model
    if "shift" in sites:
        effect_pk, sd_pk = sites["shift"].mean, sites["shift"].variance.sqrt()
        probability_pk = sites["gate"].mean if "gate" in sites else torch.ones_like(effect_pk)
    elif hasattr(model, "gate_logit"):
        effect_pk, probability_pk = model.shift, torch.sigmoid(model.gate_logit)
        sd_pk = torch.full_like(effect_pk, torch.nan)
    else:
        raise PredictionError(
            "this model has no perturbation shifts (no global latent 'shift'), so there is no graph"
        )
    targets, programmes = edge_names(fit, len(effect_pk)), programme_names(fit)[-effect_pk.shape[1] :]
    columns = {"probability": probability_pk, "effect": effect_pk, "effect_sd": sd_pk}
    columns |= {name: sites[site].mean for name, site in OF_OTHERS.items() if site in sites}
    table = _long({"perturbation": targets, "programme": programmes}, columns)
    if SATURATION in sites:
        table.attrs[SATURATION] = float(sites[SATURATION].mean)
    return table


def direct_effects(fit: Fit) -> pd.DataFrame:
    """What perturbations do to single genes beside all programmes, for fits with ``direct=True``.

    Returns:
        One row per perturbation and gene: ``perturbation``, ``gene``, ``effect`` (posterior mean, in natural
        logarithms of the share of counts, or in the units of normalised values) and ``effect_sd``. A constant
        of all genes of a perturbation says nothing of counts: their effects have a median of zero.

    Raises:
        PredictionError: The model has no direct effects.
    """
    sites = _global_distributions(fit)
    if DIRECT not in sites:
        raise PredictionError("this model has no direct effects on genes; fit with direct=True")
    effect_pg, sd_pg = sites[DIRECT].mean, sites[DIRECT].variance.sqrt()
    if fit.screen.is_counts:
        effect_pg = effect_pg - effect_pg.median(-1, keepdim=True).values
    axes = {"perturbation": fit.screen.targets, "gene": fit.screen.genes}
    return _long(axes, {"effect": effect_pg, "effect_sd": sd_pg})


def mechanism_graph(fit: Fit) -> pd.DataFrame:
    """Which programmes act on which under each perturbation, for models whose perturbations set weights.

    Returns:
        One row per possible edge: ``perturbation``, ``parent``, ``programme``, ``probability`` that the
        perturbation switches the edge on (it changes the programme's mechanism, and the edge exists),
        ``weight`` (posterior mean where it does; standard deviations of the programme in control for one
        of the parent) and ``weight_sd``.

    Raises:
        PredictionError: The model has no free weights of edges under each perturbation.
    """
    return _weights(fit, by_perturbation=True)


def lagged_graph(fit: Fit) -> pd.DataFrame:
    """Which programmes act on which a step later, for models that follow cells over time.

    Returns:
        One row per possible edge: ``parent``, ``programme``, ``probability`` that the edge is there,
        ``weight`` (posterior mean of the linear part of its effect, in standard deviations of control
        programmes) and ``weight_sd``.

    Raises:
        PredictionError: The model has no lagged edges.
    """
    return _weights(fit, by_perturbation=False)


def _weights(fit: Fit, by_perturbation: bool) -> pd.DataFrame:
    """Possible edges of a model with a global latent ``weight``, of each perturbation or of all."""
    sites, model = _global_distributions(fit), fit.model
    weight = sites["weight"].mean if "weight" in sites and hasattr(model, "allowed_vk") else None
    if weight is None or weight.dim() != 2 + by_perturbation:
        kinds = {True: "weights between programmes under each perturbation", False: "lagged weights"}
        raise PredictionError(f"this model has no {kinds[by_perturbation]}, so there is no graph of them")
    sd, probability = sites["weight"].variance.sqrt(), torch.ones_like(weight)
    if by_perturbation and "gate" in sites:
        probability = probability * sites["gate"].mean.unsqueeze(-1)
    if "edge" in sites:
        own_vk = getattr(model, "own_vk", torch.zeros_like(sites["edge"].mean))
        probability = probability * (sites["edge"].mean * (1 - own_vk) + own_vk)
    names, n_v = programme_names(fit), weight.shape[-2]
    axes = {"programme": names[-n_v:], "parent": names}
    if by_perturbation:
        axes = {"perturbation": edge_names(fit, len(weight)), **axes}
    columns = {"probability": probability, "weight": weight, "weight_sd": sd}
    possible = torch.as_tensor(model.allowed_vk).bool().expand_as(weight).cpu().numpy().ravel()
    table = _long(axes, columns)[possible].reset_index(drop=True)
    return table[[*list(axes)[:-2], "parent", "programme", *columns]]


def _long(axes: Mapping[str, Sequence[str]], columns: Mapping[str, Tensor]) -> pd.DataFrame:
    """A row for each entry of some tensors with these axes, all of one shape."""
    rows = pd.MultiIndex.from_product(list(axes.values()), names=list(axes))
    values = {name: value.detach().cpu().numpy().ravel() for name, value in columns.items()}
    return pd.DataFrame(values, index=rows).reset_index()


def edge_names(fit: Fit, n_edges: int) -> list[str]:
    """Names of the rows of γ and μ: the targets, then the interactions ``A:B``."""
    targets = fit.screen.targets
    pairs = getattr(fit.model, "interactions", ())
    return [*targets, *(f"{targets[i]}:{targets[j]}" for i, j in pairs)][:n_edges]


def programme_names(fit: Fit) -> list[str]:
    """``programme_1``, ... in the order of the latents; models with blocks name their own."""
    named = getattr(fit.model, "programme_names", None)
    return named() if named else [f"programme_{i + 1}" for i in range(_n_latents(fit))]


def _n_latents(fit: Fit) -> int:
    """Numbers that the guide gives to each cell; a user's own model need not tell."""
    fit.pair.train(False)
    with torch.random.fork_rng():
        moments = encode(fit.guide, [stub_batch(fit, torch.zeros(1, fit.dims.n_targets))])
    return sum(loc.shape[-1] for loc, _ in moments.values())


def _global_distributions(fit: Fit) -> dict[str, torch.distributions.Distribution]:
    fit.pair.train(False)
    batch = stub_batch(fit, torch.zeros(1, fit.dims.n_targets))
    with torch.random.fork_rng(devices=[fit.device] if fit.device.type == "cuda" else []):
        torch.manual_seed(fit.seed)
        sites = global_sites(fit.pair, batch)
    return {name: _unwrapped(site["fn"]) for name, site in sites.items()}


def _unwrapped(fn: torch.distributions.Distribution) -> torch.distributions.Distribution:
    return _unwrapped(fn.base_dist) if hasattr(fn, "base_dist") else fn


def _is_gate(fn: torch.distributions.Distribution) -> bool:
    return isinstance(fn, torch.distributions.Bernoulli)
