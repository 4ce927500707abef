# %% [markdown]
"""
# A pair is plain Pyro

Nothing of this package is needed to train a model: a pair of model and guide is ordinary Pyro. Here it
trains with stock `SVI`, and goes through `Predictive`, `trace` and `condition`.

Set `PYRO_CAUSALCELL_QUICK=1` for a run of a few seconds that only shows that the code works.
"""

# %%
import os

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, TraceMeanField_ELBO
from pyro.infer.inspect import get_model_relations

from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.datasets import papalexi2021
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.models.sparse_shift import SparseShift

QUICK = os.environ.get("PYRO_CAUSALCELL_QUICK") == "1"
if QUICK:
    print("Quick run: its numbers mean nothing.")

# %%
torch.set_num_threads(1)
pyro.set_rng_seed(0)
screen = Screen(papalexi2021(), batch="bio_rep")
dims = screen.dims()
model = SparseShift(dims.n_genes, dims.n_targets, dims.n_batches, dims.target_cells, n_latents=5)
guide = SparseShiftGuide(dims.n_genes, dims.n_targets, dims.n_batches, n_latents=5)
batches = Minibatches(screen, np.arange(screen.n_cells), batch_size=256)

# %% [markdown]
"""
## Five lines of stock Pyro train it
"""

# %%
svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 2e-3}), TraceMeanField_ELBO())
for epoch in range(1 if QUICK else 10):
    losses = [svi.step(batch) for batch in batches.epoch(epoch)]
    print(f"epoch {epoch}: {np.mean(losses) / screen.n_cells:.1f} nats per cell")

# %% [markdown]
"""
## Which latents does one run of the guide draw?

In evaluation mode gates are drawn; in training they are averaged.
"""

# %%
model.eval()
guide.eval()
cells = next(batches.epoch(0))
for name, site in poutine.trace(guide).get_trace(cells).nodes.items():
    if site["type"] == "sample" and name != "cells":
        fn = site["fn"]
        print(f"q({name}): batch shape {tuple(fn.batch_shape)}, event shape {tuple(fn.event_shape)}")

# %% [markdown]
"""
## Posterior predictive counts of the same cells
"""

# %%
unseen = cells._replace(x_ng=None)
fixed = {name: site for name, site in Predictive(guide, num_samples=1)(cells).items() if name != "z"}
draws = [Predictive(model, posterior_samples=fixed)(unseen)["x"] for _ in range(5)]
print(f"mean count: measured {cells.x_ng.mean():.2f}, predicted {torch.stack(draws).mean():.2f}")

# %% [markdown]
"""
## What if no perturbation hit anything?

Condition the gates, as in any Pyro program.
"""

# %%
closed = poutine.condition(model, data={"gate": torch.zeros(dims.n_targets, 5)})
print(f"with all gates closed: {closed(unseen).mean():.2f}")

# %% [markdown]
"""
## The graph of the model

`pyro.render_model(model, (cells,), filename="model.pdf")` draws it with graphviz.
"""

# %%
for site, parents in get_model_relations(model, (cells,))["sample_sample"].items():
    print(f"{site} <- {', '.join(parent for parent in parents if parent != site) or 'nothing'}")
