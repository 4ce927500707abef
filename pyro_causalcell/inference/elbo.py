"""The ELBO of a pair, with one light effect handler.

Stock ``TraceMeanField_ELBO`` traces the guide, replays and traces the model, and walks both traces. Here
one handler sees each site as it passes and adds its term: the same number and the same gradient, at a
fraction of the dispatch cost. Analytic KL where one is registered, log p − log q where none is.
"""

from collections.abc import Callable, Mapping

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import kl_divergence

from pyro_causalcell.batch import Batch
from pyro_causalcell.errors import PairError

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

    def __init__(self) -> None:
        super().__init__()
        self.sites: dict[str, Message] = {}
        self.factors: Terms = {}

    def _pyro_post_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if msg["is_observed"]:
            self.factors[name] = -_scaled(msg, msg["fn"].log_prob(msg["value"]))
        elif type(msg["fn"]).__name__ != "_Subsample":
            self.sites[name] = msg


class _ModelPass(Messenger):
    """Give the guide's draws to the model and add up the terms."""

    def __init__(self, guide_sites: dict[str, Message]) -> None:
        super().__init__()
        self.guide_sites = guide_sites
        self.terms: Terms = {}

    def _pyro_sample(self, msg: Message) -> None:
        site = self.guide_sites.get(str(msg["name"]))
        if site is not None and not msg["is_observed"]:
            msg["value"], msg["done"] = site["value"], True

    def _pyro_post_sample(self, msg: Message) -> None:
        name, fn = str(msg["name"]), msg["fn"]
        if type(fn).__name__ == "_Subsample":
            return
        if msg["is_observed"]:
            self.terms[name] = _scaled(msg, fn.log_prob(msg["value"]))
            return
        if name not in self.guide_sites:
            raise PairError(f"the model draws {name!r}, which the guide does not; run check_pair for details")
        site, value = self.guide_sites[name], msg["value"]
        try:
            self.terms[name] = -_scaled(site, _kl(site["fn"], fn))
        except NotImplementedError:
            log_p = _scaled(msg, fn.log_prob(value))
            self.terms[name] = log_p - _scaled(site, site["fn"].log_prob(value))


def _kl(q: object, p: object) -> Tensor:
    """KL(q ‖ p), seeing through ``to_event`` where both sides reinterpret the same dimensions."""
    n_q, n_p = getattr(q, "reinterpreted_batch_ndims", 0), getattr(p, "reinterpreted_batch_ndims", 0)
    if n_q != n_p or not n_q:
        return kl_divergence(q, p)  # type: ignore[arg-type]
    inner = _kl(q.base_dist, p.base_dist)  # type: ignore[attr-defined]
    return inner.sum(tuple(range(-n_q, 0)))


def _scaled(msg: Message, term: Tensor) -> Tensor:
    if msg["mask"] is False:
        return term.new_zeros(())
    if isinstance(msg["mask"], Tensor):
        term = torch.where(msg["mask"], term, 0.0)
    return (msg["scale"] * term).sum()


def elbo_terms(
    model: Program, guide: Program, batch: Batch, weights: Mapping[str, Tensor | float] | None = None
) -> Terms:
    """One-draw estimate of the ELBO, split by site.

    Args:
        model: The generative process.
        guide: Its guide; every latent must have a pathwise gradient (``has_rsample``).
        batch: One minibatch; plates scale it to the whole screen.
        weights: Multipliers of named sites' terms.

    Returns:
        Site name -> scalar tensor: observed sites and factors give log-probabilities, latent sites
        −KL. Their sum is the ELBO in nats of the whole screen.

    Raises:
        PairError: The model draws a site that the guide does not.
    """
    with SiteWeights(weights or {}):
        with _GuidePass() as guide_pass:
            guide(batch)
        with _ModelPass(guide_pass.sites) as model_pass:
            model(batch)
    alone = {n: s for n, s in guide_pass.sites.items() if n not in model_pass.terms}  # auxiliary latents
    extra = {n: -_scaled(s, s["fn"].log_prob(s["value"])) for n, s in alone.items()}
    return {**guide_pass.factors, **extra, **model_pass.terms}
