"""Change an assumption: a model of your own in one file, checked, fitted, and compared with the stock one.

Here the shifts of perturbed cells are heavy-tailed: some cells of a perturbation respond much more than
others (Student t around the shift, not Normal). Set PYRO_CAUSALCELL_QUICK=1 for a short run.
"""

import os

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule, PyroParam
from torch import Tensor
from torch.distributions import constraints

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen, random_cells
from pyro_causalcell.datasets import papalexi2021
from pyro_causalcell.distributions import NegativeBinomial
from pyro_causalcell.evaluate import iw_nll
from pyro_causalcell.inference import build_pair, check_pair, fit
from pyro_causalcell.nets import Decoder, Encoder

QUICK = os.environ.get("PYRO_CAUSALCELL_QUICK") == "1"
EPOCHS, PARTICLES = (3, 50) if QUICK else (40, 500)


class HeavyTails(PyroModule):
    """z ~ StudentT(4, Σ u μ, 1), x ~ NB(library × softmax f(z, batch), θ): see models/sparse_shift.py."""

    def __init__(
        self, n_genes: int, n_targets: int, n_batches: int, *, n_latents: int = 10, n_hidden: int = 64
    ):
        super().__init__()
        self.needs, self.n_latents = {"counts"}, n_latents
        self.shift_pk = PyroParam(0.1 * torch.randn(n_targets, n_latents))
        self.theta_g = PyroParam(torch.full((n_genes,), 5.0), constraint=constraints.positive)
        self.decoder = Decoder(n_latents, n_genes, n_batches, n_hidden=n_hidden, norm="batch")

    def forward(self, batch: Batch) -> Tensor:
        """The generative story."""
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk = batch.u_np @ self.shift_pk
            z_nk = pyro.sample("z", dist.StudentT(4.0, loc_nk, 1.0).to_event(1))  # the changed assumption
            log_mean_ng = batch.library_n1.log() + self.decoder(z_nk, batch.batch_nb).log_softmax(-1)
            x = NegativeBinomial(inverse_dispersion=self.theta_g, log_mean=log_mean_ng)
            return pyro.sample("x", x.to_event(1), obs=batch.x_ng)


class HeavyTailsGuide(PyroModule):
    """q(z | x, batch): no KL to a Student t is known, so its term is estimated by the draws."""

    def __init__(self, n_genes: int, n_batches: int, *, n_latents: int = 10, n_hidden: int = 64):
        super().__init__()
        self.encoder = Encoder(n_genes, n_latents, n_batches, n_hidden=n_hidden, norm="batch")

    def forward(self, batch: Batch) -> None:
        """q(z | x, batch)."""
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            loc_nk, scale_nk = self.encoder(batch.x_ng, batch.batch_nb)
            pyro.sample("z", dist.Normal(loc_nk, scale_nk).to_event(1))


def main() -> None:
    adata = papalexi2021()
    screen = Screen(adata[:: 10 if QUICK else 4].copy(), batch="bio_rep", allow_empty=True)
    split = random_cells(screen, validation=0.1, test=0.1, seed=0)

    # What does not fit is said before any training, with the site's name and the shapes.
    pair = build_pair(HeavyTails, HeavyTailsGuide, screen.dims(split.train), {"n_latents": 5})
    check_pair(pair.model, pair.guide, next(iter(Minibatches(screen, split.train, 64))))

    settings = {"split": split, "n_latents": 5, "n_hidden": 64, "epochs": EPOCHS, "progress": False}
    fits = {
        "heavy tails": fit(HeavyTails, HeavyTailsGuide, screen, **settings),
        "normal, all edges open": fit("sparse-shift", None, screen, gates="open", **settings),
    }
    rows = split.test[:200]
    nll = {name: iw_nll(f, screen, rows, n_particles=PARTICLES) for name, f in fits.items()}
    for name, result in nll.items():
        trusted = float((result["pareto_k"] < 0.7).mean())
        mean = float(result["nll"].mean())
        print(f"{name}: {mean:.2f} nats per cell, Pareto k fine for {trusted:.0%} of the cells")
    gap = (nll["heavy tails"]["nll"] - nll["normal, all edges open"]["nll"]).values
    print(f"heavy tails cost {gap.mean():+.2f} ± {gap.std() / np.sqrt(len(gap)):.2f} nats per cell")


if __name__ == "__main__":
    main()
