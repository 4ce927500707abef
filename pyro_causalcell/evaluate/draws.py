"""Draws that checks and calibration compare with measured cells, one replicate or a few cells at a time."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pyro import poutine
from torch import Tensor

from pyro_causalcell.batch import Batch
from pyro_causalcell.data import Minibatches, Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.inference import Fit
from pyro_causalcell.inference.posterior import is_local, sample_sites
from pyro_causalcell.predict import global_draws
from pyro_causalcell.predict.cells import cell_trace, seeded
from pyro_causalcell.predict.globals import stub_batch

__all__ = ["Source", "cell_chunks", "draw_globals", "replicates"]

Source = Literal["posterior", "prior"]
Draws = Mapping[str, Tensor]
CHUNK_BYTES = 2**26
"""Memory of one array of draws of some cells."""
CELLS_AT_ONCE = 4096
"""Cells of a replicate that are drawn together."""


def draw_globals(fit: Fit, n_samples: int, seed: int, source: Source = "posterior") -> dict[str, Tensor]:
    """Draws of the global latents, shape s, ...

    Args:
        fit: The fit.
        n_samples: Draws s.
        seed: Their seed.
        source: ``"posterior"`` draws from the guide. ``"prior"`` draws from the model, whose learned
            parameters (decoder, dispersions) stay; factors of the model do not enter.

    Raises:
        DataError: No draws are asked for.
    """
    if n_samples < 1:
        raise DataError(f"expected at least one draw, found n_samples={n_samples}; 50 is a good start")
    if source == "posterior":
        return global_draws(fit, n_samples, seed)
    batch = stub_batch(fit, torch.zeros(1, fit.dims.n_targets))._replace(x_ng=None)
    fit.pair.train(False)
    with seeded(fit, seed):
        draws = [global_values(fit.model, batch) for _ in range(n_samples)]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def global_values(model: Any, batch: Batch) -> dict[str, Tensor]:
    """One prior draw of the latents outside the cells plate."""
    sites = sample_sites(poutine.trace(model).get_trace(batch))
    return {n: s["value"] for n, s in sites.items() if not is_local(s) and not s["is_observed"]}


def replicates(
    fit: Fit, screen: Screen, rows: NDArray[Any], draws: Draws, n_samples: int, seed: int
) -> Iterator[NDArray[np.float32]]:
    """Copies of all cells, one at a time: same design, library and batch, new latents of the cells.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names.
        rows: Which cells.
        draws: What :func:`draw_globals` gave; empty for a pair without global latents.
        n_samples: How many copies; one for each draw.
        seed: Seed of the cells' latents and values.

    Yields:
        float32 [n, g].
    """
    batches = Minibatches(screen, rows, CELLS_AT_ONCE, shuffle=False, device=fit.device)
    for s in range(n_samples):
        with seeded(fit, seed + s):
            x_ng = np.concatenate([_drawn(fit, batch, draws, s) for batch in batches])
        yield x_ng


def cell_chunks(
    fit: Fit, screen: Screen, rows: NDArray[Any], draws: Draws, n_samples: int, seed: int
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Copies of a few cells at a time, so that memory does not grow with the cells.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names.
        rows: Which cells.
        draws: As for :func:`replicates`.
        n_samples: Copies of each cell; one for each draw.
        seed: Seed of the cells' latents and values.

    Yields:
        The place of the cells among ``rows``, and their draws, float32 [s, n, g].
    """
    size = max(1, CHUNK_BYTES // (4 * n_samples * screen.n_genes))
    batches = Minibatches(screen, rows, size, shuffle=False, device=fit.device)
    start = 0
    for i, batch in enumerate(batches):
        with seeded(fit, seed + i):
            x_sng = np.stack([_drawn(fit, batch, draws, s) for s in range(n_samples)])
        yield slice(start, start + batch.n_cells), x_sng
        start += batch.n_cells


def _drawn(fit: Fit, batch: Batch, draws: Draws, s: int) -> NDArray[np.float32]:
    draw = {name: values[s] for name, values in draws.items()}
    x_ng: NDArray[np.float32] = cell_trace(fit, batch, draw).nodes["x"]["value"].cpu().numpy()
    return x_ng
