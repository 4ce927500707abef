"""A user's own pair in one file; tests copy it and edit it as text."""

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule


class MyModel(PyroModule):
    def __init__(self, n_genes, n_targets, n_latents=2):
        super().__init__()
        self.n_latents = n_latents
        self.decoder = torch.nn.Linear(n_latents, n_genes)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            z = pyro.sample("z", dist.Normal(batch.u_np.new_zeros(self.n_latents), 1.0).to_event(1))
            return pyro.sample("x", dist.Poisson(self.decoder(z).exp()).to_event(1), obs=batch.x_ng)


class MyGuide(PyroModule):
    def __init__(self, n_genes, n_latents=2):
        super().__init__()
        self.loc = torch.nn.Linear(n_genes, n_latents)

    def forward(self, batch):
        with pyro.plate("cells", batch.n_total, subsample=batch.index_n):
            pyro.sample("z", dist.Normal(self.loc(batch.x_ng.log1p()), 0.5).to_event(1))
