"""The ELBO of a pair, with one light effect handler.

Stock ``TraceMeanField_ELBO`` traces the guide, replays and traces the model, and walks both traces. Here
one handler sees each site as it passes and adds its term: the same number and the same gradient, at a
fraction of the dispatch cost. Analytic KL where one is registered, log p − log q where none is.

With several draws of each cell's latents the bound is the importance-weighted one: closer to the
likelihood, so that the decoder is trained against a better posterior than the guide's.

Source: Burda et al., Importance weighted autoencoders, ICLR 2016, equation 8.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_causalcell.batch import Batch
from pyro_causalcell.errors import PairError
from pyro_causalcell.inference.pair import CELLS
from pyro_causalcell.inference.posterior import is_local

__all__ = ["SiteWeights", "Terms", "elbo_terms"]

Terms = dict[str, Tensor]
"""Each site's contribution to the ELBO, in nats of the whole screen."""

Program = Callable[[Batch], object]


class SiteWeights(Messenger):
    """Scale the terms of named sites: KL and gate annealing, β > 1 on z for a β-VAE.

    Works around model and guide of any pair, under any Pyro ELBO.
    """

    def __init__(self, weights: Mapping[str, Tensor | float]):
        super().__init__()
        self.weights = weights

    def _pyro_sample(self, msg: Message) -> None:
        weight = self.weights.get(msg["name"])
        if weight is not None:
            msg["scale"] = msg["scale"] * weight


class _GuidePass(Messenger):
    """Keep the guide's draws and distributions."""

    def __init__(self, n_particles: int) -> None:
        super().__init__()
        self.n_particles = n_particles
        self.sites: dict[str, Message] = {}
        self.factors: Terms = {}

    def _pyro_sample(self, msg: Message) -> None:
        fn = msg["fn"]
        if self.n_particles > 1 and is_local(msg) and not msg["is_observed"] and len(fn.batch_shape) == 1:
            msg["fn"] = fn.expand((self.n_particles, *fn.batch_shape))

    def _pyro_post_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if msg["is_observed"]:
            self.factors[name] = -_scaled(msg, *_log_prob(msg["fn"], msg["value"]))
        elif type(msg["fn"]).__name__ != "_Subsample":
            self.sites[name] = msg


class _ModelPass(Messenger):
    """Give the guide's draws to the model and add up the terms."""

    def __init__(self, guide_sites: dict[str, Message], n_particles: int) -> None:
        super().__init__()
        self.guide_sites, self.n_particles = guide_sites, n_particles
        self.terms: Terms = {}
        self.log_weights: list[Tensor] = []
        self.cells_scale: Tensor | float = 1.0
        self.seen: set[str] = set()

    def _pyro_sample(self, msg: Message) -> None:
        site = self.guide_sites.get(str(msg["name"]))
        if site is not None and not msg["is_observed"]:
            msg["value"], msg["done"] = site["value"], True

    def _pyro_post_sample(self, msg: Message) -> None:
        name, fn = str(msg["name"]), msg["fn"]
        if type(fn).__name__ == "_Subsample":
            return
        self.seen.add(name)
        if not msg["is_observed"] and name not in self.guide_sites:
            raise PairError(f"the model draws {name!r}, which the guide does not; run check_pair for details")
        if self.n_particles > 1 and is_local(msg):
            self._weigh(msg)
            return
        if msg["is_observed"]:
            self.terms[name] = _scaled(msg, *_log_prob(fn, msg["value"]))
            return
        site, value = self.guide_sites[name], msg["value"]
        try:
            self.terms[name] = -_scaled(site, *_kl(site["fn"], fn))
        except NotImplementedError:
            log_p = _scaled(msg, *_log_prob(fn, value))
            self.terms[name] = log_p - _scaled(site, *_log_prob(site["fn"], value))

    def _weigh(self, msg: Message) -> None:
        """Add a site of the cells to their log importance weights, shape s, n."""
        name, value = str(msg["name"]), msg["value"]
        log_weight = msg["fn"].log_prob(value)
        if not msg["is_observed"]:
            log_weight = log_weight - self.guide_sites[name]["fn"].log_prob(value)
        if type(msg["fn"]).__name__ == "Unit":  # a penalty is no part of the posterior: its mean counts
            self.terms[name] = _scaled(msg, log_weight.mean(0) if log_weight.dim() > 1 else log_weight)
            return
        self.log_weights.append(log_weight)
        self.cells_scale = msg["scale"]

    def cells(self) -> Tensor:
        """The importance-weighted bound of the cells."""
        log_weight_sn = torch.stack(torch.broadcast_tensors(*self.log_weights)).sum(0)
        bound_n = log_weight_sn.logsumexp(0) - math.log(self.n_particles)
        return (self.cells_scale * bound_n).sum()


def _kl(q: object, p: object) -> tuple[Tensor, int]:
    """KL(q ‖ p), and how many of its last dimensions are still to be summed.

    It sees through ``to_event`` where both sides reinterpret the same dimensions.
    """
    n_q, n_p = getattr(q, "reinterpreted_batch_ndims", 0), getattr(p, "reinterpreted_batch_ndims", 0)
    if n_q != n_p or not n_q:
        return kl_divergence(q, p), 0  # type: ignore[arg-type]
    inner, n_inner = _kl(q.base_dist, p.base_dist)  # type: ignore[attr-defined]
    return inner, n_inner + n_q


def _log_prob(fn: Any, value: Tensor) -> tuple[Tensor, int]:
    """log p(value), and how many of its last dimensions are still to be summed."""
    if type(fn) is not dist.Independent:
        return fn.log_prob(value), 0
    inner, n_inner = _log_prob(fn.base_dist, value)
    return inner, n_inner + fn.reinterpreted_batch_ndims


def _scaled(msg: Message, term: Tensor, n_left: int = 0) -> Tensor:
    """A site's term, masked, scaled and summed; its last ``n_left`` dimensions are those of one event."""
    mask, scale = msg["mask"], msg["scale"]
    if mask is False:
        return term.new_zeros(())
    if n_left and (isinstance(mask, Tensor) or isinstance(scale, Tensor)):
        term = term.sum(tuple(range(-n_left, 0)))
    if isinstance(mask, Tensor):
        term = torch.where(mask, term, 0.0)
    if isinstance(scale, Tensor):  # may differ between the elements
        return (scale * term).sum()
    total = term.sum() if term.dim() else term
    return total if scale == 1.0 else scale * total


def elbo_terms(
    model: Program,
    guide: Program,
    batch: Batch,
    weights: Mapping[str, Tensor | float] | None = None,
    n_particles: int = 1,
) -> Terms:
    """Estimate of the ELBO from one draw, or of the importance-weighted bound from several, split by site.

    Args:
        model: The generative process.
        guide: Its guide; every latent must have a pathwise gradient (``has_rsample``).
        batch: One minibatch; plates scale it to the whole screen.
        weights: Multipliers of named sites' terms.
        n_particles: Draws of each cell's latents; global latents are drawn once. More than one needs the
            plate over cells to be the only plate around the cells' sites.

    Returns:
        Site name -> scalar tensor: observed sites and factors give log-probabilities, latent sites
        −KL. With several particles all sites of the cells are one term, ``"cells"``. The sum is the bound
        in nats of the whole screen.

    Raises:
        PairError: The model draws a site that the guide does not.
    """
    with _GuidePass(n_particles) as guide_pass:
        guide(batch)
    with _ModelPass(guide_pass.sites, n_particles) as model_pass:
        model(batch)
    extra: Terms = {}
    for name, site in guide_pass.sites.items():  # auxiliary latents, which the model does not have
        if name not in model_pass.seen:
            log_q = site["fn"].log_prob(site["value"])
            if n_particles > 1 and is_local(site):
                model_pass.log_weights.append(-log_q)
            else:
                extra[name] = -_scaled(site, log_q)
    if model_pass.log_weights:
        extra[CELLS] = model_pass.cells()
    terms, weights = {**guide_pass.factors, **extra, **model_pass.terms}, weights or {}
    return {name: weights[name] * term if name in weights else term for name, term in terms.items()}
