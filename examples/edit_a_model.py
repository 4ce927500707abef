# %% [markdown]
"""
# Edit a model

A knock-out does not work in every cell that carries the guide: in some, an allele stays functional. Such
cells *escape*, and look like control cells. The stock model has all cells of a perturbation shift alike.
Here we change that assumption in a few lines, and then ask the data twice whether the change was right: by
predictive checks, and by the likelihood of cells that were not trained on.

Set `PYRO_CAUSALCELL_QUICK=1` for a run of a few seconds that only shows that the code works.
"""

# %%
# %matplotlib inline
import os

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell import datasets, plot
from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen, random_cells
from pyro_causalcell.distributions import NegativeBinomial
from pyro_causalcell.evaluate import compare_likelihoods, iw_nll, posterior_predictive_checks
from pyro_causalcell.inference import build_pair, check_pair, fit
from pyro_causalcell.nets import Decoder, Encoder

QUICK = os.environ.get("PYRO_CAUSALCELL_QUICK") == "1"
if QUICK:
    print("Quick run: its numbers mean nothing.")

# %% [markdown]
"""
## The model

Read `forward` from top to bottom: it is the story of a cell. The setting `escape` chooses between the two
assumptions, so that nothing else differs. Where cells may escape, the prior of a cell's programmes is a
mixture: with probability 1 − e the perturbation works, with probability e the cell is like a control cell.
e is learned, one number for each target.
"""


# %%
class Escaping(PyroModule):
    """z ~ (1 − e) Normal(Σ u μ, 1) + e Normal(0, 1), x ~ NB(library × softmax f(z, batch), θ)."""

    def __init__(
        self, n_genes: int, n_targets: int, n_batches: int, *, n_latents: int = 5, escape: bool = True
    ):
        super().__init__()
        self.needs, self.n_latents, self.escape = {"counts"}, n_latents, escape
        self.shift_pk = PyroParam(0.1 * torch.randn(n_targets, n_latents))
        if escape:
            self.escape_p = PyroParam(torch.full((n_targets,), 0.1), constraint=constraints.unit_interval)
        self.theta_g = PyroParam(torch.full((n_genes,), 5.0), constraint=constraints.positive)
        self.decoder = Decoder(n_latents, n_genes, n_batches, n_hidden=64, norm="batch")

    def forward(self, batch: Batch) -> Tensor:
        """The generative story."""
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z_nk = pyro.sample("z", self.programmes(batch.u_np))
            log_mean_ng = batch.library_n1.log() + self.decoder(z_nk, batch.batch_nb).log_softmax(-1)
            x = NegativeBinomial(inverse_dispersion=self.theta_g, log_mean=log_mean_ng)
            return pyro.sample("x", x.to_event(1), obs=batch.x_ng)

    def programmes(self, u_np: Tensor) -> dist.TorchDistribution:
        """p(z | u), the changed assumption; every cell of this screen has one target at most."""
        loc_nk = u_np @ self.shift_pk
        if not self.escape:
            return dist.Normal(loc_nk, 1.0).to_event(1)
        escape_n = (u_np @ self.escape_p).clamp(1e-4, 1 - 1e-4)
        works = dist.Categorical(torch.stack([1 - escape_n, escape_n], -1))
        either = dist.Normal(torch.stack([loc_nk, torch.zeros_like(loc_nk)], -2), 1.0).to_event(1)
        return dist.MixtureSameFamily(works, either)


class EscapingGuide(PyroModule):
    """q(z | x, batch, u): the encoder sees the perturbation too, so that it can tell who has escaped."""

    def __init__(self, n_genes: int, n_targets: int, n_batches: int, *, n_latents: int = 5):
        super().__init__()
        self.encoder = Encoder(n_genes, n_latents, n_batches + n_targets, n_hidden=64, norm="batch")

    def forward(self, batch: Batch) -> None:
        """q(z | x, batch, u)."""
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk, scale_nk = self.encoder(batch.x_ng, batch.batch_nb, batch.u_np)
            pyro.sample("z", dist.Normal(loc_nk, scale_nk).to_event(1))


# %% [markdown]
"""
## Does the pair fit together?

`fit` checks this before it trains. What does not fit is said with the name of the site and the shapes.
"""

# %%
TARGETS = ["IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4", "CUL3"]
adata = datasets.papalexi2021()
adata = adata[adata.obs["target"].isin(["non-targeting", *TARGETS])]
screen = Screen(adata[:: 6 if QUICK else 1].copy(), batch="bio_rep", allow_empty=True)
split = random_cells(screen, validation=0.1, test=0.2, seed=0)
pair = build_pair(Escaping, EscapingGuide, screen.dims(split.train), {})
check_pair(pair.model, pair.guide, next(iter(Minibatches(screen, split.train, 64))))
print(screen)

# %%
settings = {
    "split": split,
    "epochs": 3 if QUICK else 40,
    "lr": 1e-2,
    "batch_size": 128,
    "seed": 0,
    "progress": False,
}
runs = {
    "all cells respond": fit(Escaping, EscapingGuide, screen, escape=False, **settings),
    "some escape": fit(Escaping, EscapingGuide, screen, escape=True, **settings),
}
for name, run in runs.items():
    print(f"{name}: validation loss {run.history['validation_loss'].min():.2f} nats per cell")
shares = zip(screen.targets, runs["some escape"].model.escape_p.tolist(), strict=True)
print("share of cells that escape:", ", ".join(f"{target} {share:.2f}" for target, share in shares))

# %% [markdown]
"""
These shares are parameters of *this* model: the share of cells that its control state explains better. A
weak knock-out and a few cells with a wrong guide look the same to it.

## Predictive checks

If cells escape, the cells of a strong perturbation differ from each other more than one shift allows. So we
need a statistic of that. The signature of a cell is the share of its counts in three genes that
interferon-γ induces (PSMB9, STAT1, UBE2L6), on a log scale. Of these we take, within each condition, the
standard deviation, and how far the upper tail reaches. The genes were chosen beforehand, from what is known
of the pathway. Mind that STAT1 is also one of the targets.
"""

# %%
INDUCED = [screen.genes.index(gene) for gene in ("PSMB9", "STAT1", "UBE2L6")]


def signature(x_ng: np.ndarray) -> np.ndarray:
    """log share of the counts of each cell in interferon-induced genes, shape n."""
    return np.log1p(1e4 * x_ng[:, INDUCED].sum(1) / np.maximum(x_ng.sum(1), 1))


def spread(x_ng: np.ndarray) -> float:
    """Standard deviation of the signature over cells."""
    return float(signature(x_ng).std())


def upper_tail(x_ng: np.ndarray) -> float:
    """90th percentile of the signature less its median: cells that respond little stand out upwards."""
    low, high = np.quantile(signature(x_ng), [0.5, 0.9])
    return float(high - low)


tables = {}
for name, run in runs.items():
    checks = posterior_predictive_checks(
        run, screen, split.test, statistic=[spread, upper_tail], n_samples=10 if QUICK else 100
    )
    tables[name] = checks.table()
    print(name)
    print(tables[name].drop(columns="n_cells").round(2).to_string(index=False))

# %%
plot.predictive_statistics(tables["all cells respond"])

# %%
plot.predictive_statistics(tables["some escape"])

# %% [markdown]
"""
`observed` is the statistic of the test cells; `low` and `high` hold nine tenths of the values in cells that
the model draws. A p-value near 0 or 1 says that the model gets this statistic wrong.

The change moves the tails the right way. For IFNGR1 the tail is now in the middle of what the model draws
(p from .13 to .39). For STAT1 the model's tail grows from 1.05 to 1.56, and still does not reach the 1.91
of the cells. IFNGR2 and JAK2 hardly move. Both models spread control cells a little too much, which this
change does not touch.

## Likelihood of cells that were not trained on

−log p(x) of each test cell, by importance weighting, in nats. Pareto k tells for each cell whether its
number can be trusted; a model with bad cells is not ranked.
"""

# %%
rows = split.test[:60] if QUICK else split.test
scores = {name: iw_nll(run, screen, rows, n_particles=100 if QUICK else 1000) for name, run in runs.items()}
compared = compare_likelihoods(scores)
print(compared.drop(columns=["se", "ranked"]).round(3).to_string())

# %% [markdown]
"""
`elpd_diff` is the sum over the test cells of how much worse a model is than the best one, in nats. Compare
it with the larger of its two standard errors: `dse` is over cells, `dse_clusters` over perturbations, whose
cells share their errors.

Here the edited model is ahead by 115 nats over 1,468 cells. That is three standard errors over cells, and
less than two over the seven conditions. So: a change for the better in what it was made for, likely but not
proven by the likelihood. What would decide is more perturbations, not more cells of these, and other seeds.

The parameters that came with the change can be read, with care: the share of escaped cells is .22 for
STAT1, and .04 for SMAD4. CUL3's .29 rests on 274 cells and a weak shift; a model with a weak shift cannot
tell who escaped it.
"""
