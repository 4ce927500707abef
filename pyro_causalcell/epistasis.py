r"""What targets of the same cell do to each other's effects: masking and saturation.

**Masking.** What a target p does to a programme k counts in a cell n as far as the cell's other targets leave
it:

.. math::
    \kappa_{pk} \sim \mathrm{Beta}(1, 3), \qquad
    d_{npk} = u_{np} \prod_{q \ne p,\, u_{nq} \ne 0} (1 - \kappa_{qk})

d takes the place of the design u. What masks in one combination is expected to mask in others, as what cuts a
pathway cuts it for whoever acts through it. In genetics this is masking epistasis.

**Saturation.** Shifts of one direction do not add, but their powers do:

.. math::
    s \sim \mathrm{Gamma}(2, 1), \qquad
    m_{nk} = \Big(\sum_p (d_{npk} \mu_{pk})_+^{1+s}\Big)^{\frac{1}{1+s}}
           - \Big(\sum_p (-d_{npk} \mu_{pk})_+^{1+s}\Big)^{\frac{1}{1+s}}

At s = 0 this is the sum, and far above it the largest shift alone counts. The shift of a single target stays
as it is. One s for all programmes, so that what saturates in some combinations is expected to do so in
others.

Only cells with several targets tell of κ and s. A model takes :func:`sample_epistasis`, and :func:`combined`
or :func:`masked_doses` and :func:`pooled`; a guide owns an :class:`EpistasisGuide`, whose q is a point: where
no combination tells, the mode of the prior. That is 0 for κ and 1 for s: of two equal shifts in one programme
1.4 times one is expected then, and the sum of shifts in different programmes.
"""

import math
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor

__all__ = [
    "MASKING",
    "SATURATION",
    "Epistasis",
    "EpistasisGuide",
    "combined",
    "masked_doses",
    "pooled",
    "sample_epistasis",
]

MASKING, SATURATION = "epistasis", "saturation"
"""Names of the sites of κ and s."""
RARE = 3.0
"""Second shape of the Beta prior: masking nine tenths of an effect costs 5 nats."""
STEP = 10.0
"""What a step of the guide's parameters means for the logit of κ, and for s. Adam moves all parameters alike,
and these have far to go."""
LEAST_LEFT = 1e-3
"""Smallest share of an effect that is left, to divide by."""
LEAST_SHIFT = 1e-4
"""Added to shifts, and once more to their sums, so that roots have gradients at 0."""
MOST = 7.0
"""Largest s of the guide: two equal shifts make 1.09 of one. Above it powers leave single precision."""


class Epistasis(NamedTuple):
    """What targets do to each other's effects.

    Attributes:
        masked_pk: κ.
        power: 1 + s, a scalar.
    """

    masked_pk: Tensor
    power: Tensor


def sample_epistasis(like_pk: Tensor) -> Epistasis:
    """p(κ) and p(s) in a model.

    Args:
        like_pk: Any tensor of the shape of κ, p, k.
    """
    rarely = dist.Beta(torch.ones_like(like_pk), RARE)
    masked_pk = pyro.sample(MASKING, rarely.to_event(2))
    return Epistasis(masked_pk, 1 + pyro.sample(SATURATION, dist.Gamma(like_pk.new_tensor(2.0), 1.0)))


class EpistasisGuide(PyroModule):
    """q(κ) and q(s), points.

    Args:
        n_targets, n_programmes: Shape of κ.
    """

    def __init__(self, n_targets: int, n_programmes: int):
        super().__init__()
        self.masked_logit = PyroParam(torch.full((n_targets, n_programmes), -3.0 / STEP))
        self.saturation_logit = PyroParam(torch.tensor(-math.log(MOST - 1.0) / STEP))  # s = 1

    def forward(self) -> Epistasis:
        """Samples q(κ), shape p, k, and q(s)."""
        masked_pk = pyro.sample(MASKING, dist.Delta(torch.sigmoid(STEP * self.masked_logit)).to_event(2))
        saturation = MOST * torch.sigmoid(STEP * self.saturation_logit)
        return Epistasis(masked_pk, 1 + pyro.sample(SATURATION, dist.Delta(saturation)))


def combined(
    u_np: Tensor, gate_pk: Tensor, shift_pk: Tensor, epistasis: Epistasis | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and variance of what the targets of each cell do to the programmes, each n, k: Σ_p d γ μ, or m.

    Args:
        u_np: Design.
        gate_pk: Gates γ, or their probabilities: the variance is that of open or closed, 0 for binary ones.
            It leaves saturation out.
        shift_pk: Shifts μ where gates are open.
        epistasis: κ and s; None takes the sum.
    """
    if epistasis is None:
        return u_np @ (gate_pk * shift_pk), _variance(u_np, gate_pk, shift_pk)
    left_pk = (1 - epistasis.masked_pk).clamp(min=LEAST_LEFT)
    left_nk = ((u_np != 0).to(u_np) @ left_pk.log()).exp()  # by all targets of the cell
    shift_pk = shift_pk / left_pk  # but not by itself
    up_pk, down_pk = _powers(gate_pk * shift_pk, epistasis.power)
    dose_np = u_np**epistasis.power
    loc_nk = _between(dose_np @ up_pk, dose_np @ down_pk, epistasis.power)
    return left_nk * loc_nk, left_nk**2 * _variance(u_np, gate_pk, shift_pk)


def _variance(u_np: Tensor, gate_pk: Tensor, shift_pk: Tensor) -> Tensor:
    return u_np**2 @ (gate_pk * (1 - gate_pk) * shift_pk**2)


def masked_doses(dose_nm1: Tensor, masked_nmk: Tensor) -> Tensor:
    """The doses d of the targets m that each cell carries, n, m, k.

    Args:
        dose_nm1: Their doses as given (see ``batch.carried``).
        masked_nmk: Their κ.
    """
    left_nmk = (1 - (dose_nm1 != 0) * masked_nmk).clamp(min=LEAST_LEFT).log()
    return dose_nm1 * (left_nmk.sum(1, keepdim=True) - left_nmk).exp()


def pooled(shift_nmk: Tensor, power: Tensor) -> Tensor:
    """m of the shifts d μ of the targets m that each cell carries, n, k.

    Args:
        shift_nmk: The shifts, with doses.
        power: 1 + s.
    """
    up_nmk, down_nmk = _powers(shift_nmk, power)
    return _between(up_nmk.sum(1), down_nmk.sum(1), power)


def _powers(shift: Tensor, power: Tensor) -> tuple[Tensor, Tensor]:
    """Powers of the positive part, and of the negative one."""
    up, down = ((part.clamp(min=0) + LEAST_SHIFT) ** power for part in (shift, -shift))
    return up, down


def _between(up: Tensor, down: Tensor, power: Tensor) -> Tensor:
    """Difference of the roots of two sums of powers."""
    least = LEAST_SHIFT**power
    return (up + least) ** (1 / power) - (down + least) ** (1 / power)
