r"""Direct effects: what a target does to single genes, beside what programmes carry.

.. math::
    \delta_{pg} \sim \mathrm{Normal}(0, \tau), \qquad
    x_n \sim p\left(x \mid f(z_n, b_n) + \textstyle\sum_p u_{np} \delta_p\right)

A few programmes never say all that a perturbation does: some genes answer to one target alone. δ adds to the
decoder's output (logits of genes for counts, means for normalised values), in combinations as well. An effect
that many genes share costs less as a shift of a programme, so δ takes what is left; the less the cells say of
it, the nearer to zero it stays. τ is learnt, one for all.

A model owns :class:`DirectEffects`, its guide a :class:`DirectGuide`. In the guide a target without training
cells keeps the prior: predictions of it are as uncertain as direct effects are large.
"""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

__all__ = ["DIRECT", "DirectEffects", "DirectGuide"]

DIRECT = "direct"
"""Name of the site of δ."""
START = {"prior": 0.1, "posterior": 0.03}
"""Standard deviations before training."""


class DirectEffects(PyroModule):
    """p(δ), and what it adds to a decoder's output.

    Args:
        n_targets, n_genes: Shape of δ.
    """

    dims = {DIRECT: ("perturbation", "gene")}
    """Axes of δ, for a model's ``site_dims``."""

    def __init__(self, n_targets: int, n_genes: int):
        super().__init__()
        self.shape = (n_targets, n_genes)
        self.scale = PyroParam(torch.tensor(START["prior"]), constraint=constraints.positive)

    def forward(self, u_np: Tensor) -> Tensor:
        """Σ_p u δ of each cell, shape n, g."""
        prior = dist.Normal(torch.zeros_like(self.scale), self.scale).expand(self.shape)
        delta_pg: Tensor = pyro.sample(DIRECT, prior.to_event(2))
        return u_np @ delta_pg


class DirectGuide(PyroModule):
    """q(δ), independent normal distributions.

    Args:
        n_targets, n_genes: Shape of δ.
    """

    def __init__(self, n_targets: int, n_genes: int):
        super().__init__()
        self.loc = PyroParam(torch.zeros(n_targets, n_genes))
        start = torch.full((n_targets, n_genes), START["posterior"])
        self.scale = PyroParam(start, constraint=constraints.positive)

    def forward(self) -> None:
        """Samples q(δ)."""
        pyro.sample(DIRECT, dist.Normal(self.loc, self.scale).to_event(2))
