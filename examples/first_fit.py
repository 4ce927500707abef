# %% [markdown]
"""
# A first fit: papalexi2021

20,729 THP-1 cells, in each of which one of 25 genes was knocked out, or none (Papalexi et al. 2021). The
cells come with the package, as raw counts of 299 genes. We fit the sparse-shift model: *each perturbation
moves a few latent programmes*. Then we ask which perturbation moves what, and how sure that is.

Set `PYRO_CAUSALCELL_QUICK=1` for a run of a few seconds that only shows that the code works.
"""

# %%
# %matplotlib inline
import os

from pyro_causalcell import datasets, plot, predict
from pyro_causalcell.data import Screen, random_cells
from pyro_causalcell.inference import fit

QUICK = os.environ.get("PYRO_CAUSALCELL_QUICK") == "1"
if QUICK:
    print("Quick run: its numbers mean nothing.")

# %% [markdown]
"""
## The cells

`Screen` says what the columns of the AnnData mean, and checks them once. The replicate is a batch: the
model may explain differences between replicates without calling them effects.
"""

# %%
adata = datasets.papalexi2021()
screen = Screen(
    adata[::5].copy() if QUICK else adata, "target", "non-targeting", batch="bio_rep", allow_empty=QUICK
)
print(screen)

# %% [markdown]
"""
## The fit

A tenth of the cells decides when to keep the weights (*validation*), and another tenth is never looked at
(*test*).
"""

# %%
split = random_cells(screen, validation=0.1, test=0.1, seed=0)
run = fit("sparse-shift", None, screen, split=split, n_latents=10, epochs=3 if QUICK else 60, progress=False)
plot.training_curve(run.history)

# %% [markdown]
"""
The step in the curve is the end of the warm start: until then all edges are open, and then each has to earn
its place.

## Which perturbation moves what?

One row for each perturbation and programme. `probability` is that the edge is there. `effect` is how far
the programme moves, in standard deviations of the programme in control cells.
"""

# %%
graph = predict.graph(run)
found = graph[graph["probability"] > 0.9].sort_values(["programme", "perturbation"])
print(found.round(3).to_string(index=False))

# %%
plot.graph_heatmap(graph)

# %% [markdown]
"""
Nobody told the model any biology. Receptor (IFNGR1, IFNGR2), kinase (JAK2) and transcription factor (STAT1)
of one pathway sit on one programme.

What these numbers do not say:

- The sign and the number of a programme are arbitrary. Another seed gives the same groups under other
  numbers.
- The probabilities hold *if this model is right*. It counts only shifts above half a standard deviation
  (`min_effect`).
- A perturbation without an edge has no effect that these cells can tell from control. That is no proof of
  none: MYC, for one, has only 109 cells here.

## What it does to genes

Change of expected expression against control, with 90 % intervals.
"""

# %%
effects = predict.effects(run, ["IFNGR2", "SMAD4"], n_samples=20 if QUICK else 100)
plot.effect_intervals(effects, "IFNGR2")

# %% [markdown]
"""
The intervals are those of the mean effect over cells, and the fit understates them: uncertainty of the
decoder is not in them. That IFNGR2 itself is lower is the knock-out, and no discovery.

The same fit with all checks and baselines beside it is one page: `report.write_report(run, screen,
"report.html")`, or `pyro-causalcell report` on the command line.
"""
