r"""Targets that mask what other targets of the same cell do.

What a target p does to a programme k counts in a cell n as far as the cell's other targets leave it:

.. math::
    \kappa_{pk} \sim \mathrm{Beta}(1, 3), \qquad
    d_{npk} = u_{np} \prod_{q \ne p,\, u_{nq} \ne 0} (1 - \kappa_{qk})

d takes the place of the design u. Only cells with several targets tell of κ: what masks in one combination is
expected to mask in others, as what cuts a pathway cuts it for whoever acts through it. In genetics this is
masking epistasis.

A model samples :func:`masking` and takes :func:`combined` or :func:`masked_doses`; a guide owns a
:class:`MaskingGuide`, whose q(κ) is a point: where no combination tells, the mode of the prior, 0.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

__all__ = ["MaskingGuide", "combined", "masked_doses", "masking"]

SITE = "epistasis"
RARE = 3.0
"""Second shape of the Beta prior: masking nine tenths of an effect costs 5 nats."""
STEP = 10.0
"""What a step of the guide's parameter means for the logit of κ. Adam moves all parameters alike, and a logit
has far to go."""
LEAST_LEFT = 1e-3
"""Smallest share of an effect that is left, to divide by."""


def masking(like_pk: Tensor) -> Tensor:
    """p(κ) in a model.

    Args:
        like_pk: Any tensor of the shape of κ, p, k.
    """
    rarely = dist.Beta(torch.ones_like(like_pk), RARE)
    masked_pk: Tensor = pyro.sample(SITE, rarely.to_event(2))
    return masked_pk


class MaskingGuide(PyroModule):
    """q(κ), a point.

    Args:
        n_targets, n_programmes: Shape of κ.
    """

    def __init__(self, n_targets: int, n_programmes: int):
        super().__init__()
        self.logit = PyroParam(torch.full((n_targets, n_programmes), -3.0 / STEP))

    def forward(self) -> Tensor:
        """Samples q(κ), shape p, k."""
        masked_pk: Tensor = pyro.sample(SITE, dist.Delta(torch.sigmoid(STEP * self.logit)).to_event(2))
        return masked_pk


def combined(
    u_np: Tensor, gate_pk: Tensor, shift_pk: Tensor, masked_pk: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the targets of each cell do to the programmes, each n, k: Σ_p d γ μ.

    Args:
        u_np: Design.
        gate_pk: Gates γ, or their probabilities: the variance is that of open or closed, 0 for binary ones.
        shift_pk: Shifts μ where gates are open.
        masked_pk: κ; None is 0.
    """
    if masked_pk is None:
        return u_np @ (gate_pk * shift_pk), u_np**2 @ (gate_pk * (1 - gate_pk) * shift_pk**2)
    left_pk = (1 - masked_pk).clamp(min=LEAST_LEFT)
    left_nk = ((u_np != 0).to(u_np) @ left_pk.log()).exp()  # by all targets of the cell
    loc_nk, var_nk = combined(u_np, gate_pk, shift_pk / left_pk)  # but not by itself
    return left_nk * loc_nk, left_nk**2 * var_nk


def masked_doses(dose_nm1: Tensor, masked_nmk: Tensor) -> Tensor:
    """The doses d of the targets m that each cell carries, n, m, k.

    Args:
        dose_nm1: Their doses as given (see ``batch.carried``).
        masked_nmk: Their κ.
    """
    left_nmk = (1 - (dose_nm1 != 0) * masked_nmk).clamp(min=LEAST_LEFT).log()
    return dose_nm1 * (left_nmk.sum(1, keepdim=True) - left_nmk).exp()
