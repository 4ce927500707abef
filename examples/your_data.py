# %% [markdown]
"""
# Bring your own data

Your screen is an AnnData with counts and a column that says what was done to each cell. This page starts
from one that is as untidy as real ones are, meets the usual errors, mends each, and ends with a saved run.
To have something to mend, we rename the columns of real cells (Papalexi et al. 2021); nothing here is
simulated.

Set `PYRO_CAUSALCELL_QUICK=1` for a run of a few seconds that only shows that the code works.
"""

# %%
import os
import tempfile
from pathlib import Path

import scanpy as sc

from pyro_causalcell import datasets, predict
from pyro_causalcell.data import Screen, read
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate import audit
from pyro_causalcell.inference import Fit, fit

QUICK = os.environ.get("PYRO_CAUSALCELL_QUICK") == "1"
if QUICK:
    print("Quick run: its numbers mean nothing.")
folder = Path(tempfile.mkdtemp())

# %% [markdown]
"""
## A file as it comes

Counts lie in a layer, X is normalised, control cells have two spellings, and the column has a name of its
own.
"""

# %%
adata = datasets.papalexi2021()[:: 10 if QUICK else 3].copy()
adata = adata[adata.X.sum(1) > 0].copy()
sc.pp.filter_genes(adata, min_cells=1)
adata.layers["counts"] = adata.X.copy()
sc.pp.normalize_total(adata, target_sum=1e4)
sc.pp.log1p(adata)
guide = adata.obs["guide"].astype(str)
adata.obs["gRNA_target"] = adata.obs["target"].astype(str)
adata.obs.loc[(adata.obs["target"] == "non-targeting") & guide.isin(["NTg1", "NTg2"]), "gRNA_target"] = "NT"
del adata.obs["target"]
adata.write_h5ad(folder / "mine.h5ad")

# %% [markdown]
"""
## Errors are short, and say what to do

`read` opens the file, `Screen` says what its columns mean.
"""

# %%
cells = read(folder / "mine.h5ad")


def try_screen(*names: str, **settings: object) -> None:
    """Print the screen, or what is wrong with it."""
    try:
        screen = Screen(cells, *names, **settings)
        screen.require_counts()
        print(screen)
    except DataError as error:
        print(f"DataError: {error}")


try_screen("target")
try_screen("gRNA_target", "control")
try_screen("gRNA_target", "non-targeting")

# %% [markdown]
"""
The last one was accepted as a screen, but its values are not counts, which the default model needs: they
are in a layer. And one mistake is not an error for anybody but you: `NT` would be a perturbation of its
own. So look at the conditions.
"""

# %%
screen = Screen(cells, "gRNA_target", "non-targeting", layer="counts", batch="bio_rep")
print(screen.conditions)

# %%
screen = Screen(cells, "gRNA_target", ["non-targeting", "NT"], layer="counts", batch="bio_rep")
print(screen)
print("NT" in screen.conditions)

# %% [markdown]
"""
Pairs are written `A+B`; if your file writes `A_B`, pass `separator="_"`. Log-normalised values without
counts can be fitted with `likelihood="gaussian"`. Time, dose, guides and descriptions of perturbations have
arguments of their own.

## What can this design show?

Before anything is trained, `audit` says which guarantees of the theory the design supports. Ask it for the
number of programmes that you mean to fit.
"""

# %%
checked = audit(screen, n_latents=7)
print(checked.to_frame()[["name", "status"]].to_string(index=False))

# %% [markdown]
"""
Lines about processes that you do not use may fail. *Directions of effect* is the one to heed: this third of
the cells shows fewer than seven of them above noise, so some programmes will be background, in arbitrary
axes.

## Fit, save, load

A run folder holds everything that prediction needs, also without the AnnData. A run that was stopped goes
on with `resume=True`.
"""

# %%
run = fit(
    "sparse-shift",
    None,
    screen,
    n_latents=7,
    epochs=3 if QUICK else 60,
    out=folder / "run",
    progress=False,
)
again = Fit.load(folder / "run")
found = predict.graph(again).query("probability > 0.9")
print(found.round(3).to_string(index=False))

# %% [markdown]
"""
The interferon-γ pathway shares one programme. The edges of size .5 (BRD4, MYC, SPI1, IRF1) lie at the
smallest shift that the model counts, and come and go with seed and cells: candidates, no findings.

## New cells through the same names

Other cells, such as the next batch of the experiment, are read by the names of the fit: genes are put in
order, unknown targets are named in an error.
"""

# %%
new_cells = read(folder / "mine.h5ad")[:200].copy()
programmes = predict.latents(again, Screen.from_spec(again.screen, new_cells))
print(programmes)

# %% [markdown]
"""
On the command line the same steps are

```bash
SCREEN="mine.h5ad --perturbation gRNA_target --control non-targeting --control NT"
SCREEN="$SCREEN --layer counts --batch bio_rep"
pyro-causalcell audit $SCREEN --latents 7
pyro-causalcell fit $SCREEN --latents 7 --out run
pyro-causalcell report run mine.h5ad --out report.html
```
"""
