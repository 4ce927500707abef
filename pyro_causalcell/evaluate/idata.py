"""ArviZ: prior, posterior, predictive draws, observed data and log-likelihood with named coordinates."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import arviz as az
import h5netcdf
import numpy as np
import xarray as xr
from numpy.typing import NDArray
from torch import Tensor

from pyro_causalcell.data import Screen
from pyro_causalcell.errors import DataError
from pyro_causalcell.evaluate.draws import cell_chunks, draw_globals
from pyro_causalcell.evaluate.likelihood import iw_nll
from pyro_causalcell.inference import Fit
from pyro_causalcell.predict import edge_names, latents, programme_names

__all__ = ["container", "to_inference_data"]

EDGE_DIMS = ["perturbation", "programme"]
PREDICTIVE_DIMS = ("chain", "draw", "cell", "gene")
STREAMED = {
    "posterior_predictive": PREDICTIVE_DIMS,
    "prior_predictive": PREDICTIVE_DIMS,
    "observed_data": ("cell", "gene"),
}
"""Groups whose ``x`` grows with cells × genes: they are written a few cells at a time."""

Chunk = dict[str, NDArray[Any]]


def to_inference_data(
    fit: Fit,
    screen: Screen,
    rows: np.ndarray | None = None,
    *,
    n_samples: int = 100,
    seed: int = 0,
    out: str | Path | None = None,
) -> Any:
    """What ArviZ needs: draws of the global latents, replicated cells, observed cells, log-likelihood.

    Args:
        fit: The fit.
        screen: The cells, through the fit's names (``Screen.from_spec(fit.screen, adata)``).
        rows: Which cells; None takes the validation cells, at most 500 of them.
        n_samples: Draws of the posterior and of the prior.
        seed: Seed of the draws.
        out: File (``.nc``) or folder (``.zarr``) to write to, a few cells at a time, so that memory does not
            grow with the cells. What is returned then reads from there. None keeps all in memory.

    Returns:
        InferenceData (ArviZ < 1) or DataTree (ArviZ ≥ 1) with the groups ``posterior`` and ``prior`` (gate,
        shift, ... over perturbation and programme, or over what the model's ``site_dims`` says; left out
        where a pair has no global latents),
        ``posterior_predictive``, ``prior_predictive`` and ``observed_data`` (``x`` over cell and gene),
        ``log_likelihood`` (one importance-weighted value a cell) and ``constant_data`` (``z_mean``: each
        cell's posterior mean; ``library``). Cells carry their ``condition``, and ``time`` where the screen
        has times.

    Raises:
        DataError: ``out`` exists or ends in something else.
    """
    rows = fit.split.validation[:500] if rows is None else np.asarray(rows)
    path = None if out is None else _free(Path(out))
    draws = {source: draw_globals(fit, n_samples, seed, source) for source in ("posterior", "prior")}
    coords = _coords(fit, screen, rows, n_samples, draws["posterior"])
    nll_n = iw_nll(fit, screen, rows, n_particles=200, seed=seed)["nll"].to_numpy()
    constant = {
        "z_mean": (["cell", "programme"], latents(fit, screen).obsm["X_causalcell"][rows]),
        "library": (["cell"], screen.library_n[rows]),
    }
    groups: dict[str, xr.Dataset] = {
        **{source: _latents(fit, values) for source, values in draws.items() if values},
        "log_likelihood": xr.Dataset({"x": (["chain", "draw", "cell"], -nll_n[None, None])}),
        "constant_data": xr.Dataset(constant),
    }
    groups = {name: _with_coords(group, coords) for name, group in groups.items()}
    sizes = {"chain": 1, "draw": n_samples, "cell": len(rows), "gene": screen.n_genes}
    chunks = _chunks(fit, screen, rows, draws, n_samples, seed)
    if path is None:
        parts = list(chunks)
        for name, dims in STREAMED.items():
            x = np.concatenate([part[name] for part in parts], dims.index("cell"))
            groups[name] = _with_coords(xr.Dataset({"x": (dims, x)}), coords)
        return container(groups)
    for name, dims in STREAMED.items():
        empty = xr.Dataset(coords={dim: np.arange(sizes[dim]) for dim in dims})
        groups[name] = _with_coords(empty, coords)
    write = _write_netcdf if path.suffix == ".nc" else _write_zarr
    write(path, groups, chunks)
    return container(_open(path, groups))


def container(groups: Mapping[str, Any]) -> Any:
    """Groups in the container of the ArviZ that is installed: InferenceData below 1, DataTree from 1 on."""
    if hasattr(az, "InferenceData"):
        return az.InferenceData(**groups)
    return xr.DataTree.from_dict(dict(groups))


def _chunks(
    fit: Fit,
    screen: Screen,
    rows: NDArray[Any],
    draws: Mapping[str, Mapping[str, Tensor]],
    n_samples: int,
    seed: int,
) -> Iterator[Chunk]:
    """``x`` of the streamed groups, a few cells at a time."""
    posterior, prior = (
        cell_chunks(fit, screen, rows, draws[source], n_samples, seed) for source in ("posterior", "prior")
    )
    for (part, x_sng), (_, prior_sng) in zip(posterior, prior, strict=True):
        yield {
            "posterior_predictive": x_sng[None],
            "prior_predictive": prior_sng[None],
            "observed_data": screen.x(rows[part]),
        }


def _latents(fit: Fit, draws: Mapping[str, Tensor]) -> xr.Dataset:
    """Global latents with named axes."""
    return xr.Dataset(
        {
            name: (["chain", "draw", *_site_dims(fit, name, value)], value.cpu().numpy()[None])
            for name, value in draws.items()
        }
    )


def _site_dims(fit: Fit, name: str, value: Tensor) -> Sequence[str]:
    """What the model says; otherwise latents of three axes are over perturbation and programme."""
    said: Mapping[str, Sequence[str]] = getattr(fit.model, "site_dims", {})
    plain = EDGE_DIMS if value.dim() == 3 else [f"{name}_dim_{i}" for i in range(value.dim() - 1)]
    return said.get(name, plain)


def _coords(
    fit: Fit, screen: Screen, rows: NDArray[Any], n_samples: int, draws: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Names of every dimension, and what is known of each cell."""
    names = np.array([*screen.conditions, "unknown"], dtype=object)  # -1 is the last
    programmes = np.array(programme_names(fit), dtype=object)
    sizes: dict[str, int] = {}
    for name, value in draws.items():
        sizes |= zip(_site_dims(fit, name, value), value.shape[1:], strict=True)
    coords: dict[str, Any] = {
        "chain": [0],
        "draw": np.arange(n_samples),
        "cell": screen.adata.obs_names.to_numpy()[rows].astype(str).astype(object),
        "gene": np.array(fit.screen.genes, dtype=object),
        "programme": programmes,
        "responsive": programmes[len(programmes) - sizes.get("responsive", 0) :],
        "perturbation": np.array(edge_names(fit, sizes.get("perturbation", 0)), dtype=object),
        "condition": ("cell", names[screen.condition_n[rows]]),
    }
    if screen.time_n is not None:
        coords["time"] = ("cell", screen.time_n[rows])
    return coords


def _with_coords(group: xr.Dataset, coords: dict[str, Any]) -> xr.Dataset:
    """Only the coordinates that a group uses; the log-likelihood has a single draw."""
    used = {}
    for name, values in coords.items():
        dim, labels = values if isinstance(values, tuple) else (name, values)
        if dim in group.sizes and len(labels) == group.sizes[dim]:
            used[name] = values
    return group.assign_coords(used)


# ---------------------------------------------------------------------- files


def _free(path: Path) -> Path:
    if path.suffix not in (".nc", ".zarr"):
        raise DataError(f"expected out= to end in .nc (netCDF) or .zarr, found {path.name!r}; rename it")
    if path.exists():
        raise DataError(f"expected a new file as out=, found {path}; remove it or choose another name")
    return path


def _write_netcdf(path: Path, groups: Mapping[str, xr.Dataset], chunks: Iterator[Chunk]) -> None:
    for name, group in groups.items():
        group.to_netcdf(path, mode="a" if path.exists() else "w", group=name, engine="h5netcdf")
    with h5netcdf.File(path, "a") as file:
        variables = {}
        start = 0
        for chunk in chunks:
            size = chunk["observed_data"].shape[0]
            for name, dims in STREAMED.items():
                x = chunk[name]
                if name not in variables:
                    variables[name] = file[name].create_variable(
                        "x", dims, x.dtype, chunks=x.shape, compression="gzip", compression_opts=1
                    )
                place = tuple(slice(start, start + size) if d == "cell" else slice(None) for d in dims)
                variables[name][place] = x
            start += size


def _write_zarr(path: Path, groups: Mapping[str, xr.Dataset], chunks: Iterator[Chunk]) -> None:
    for chunk in chunks:
        for name, dims in STREAMED.items():
            part = xr.Dataset({"x": (dims, chunk[name])})
            how: dict[str, Any] = {"append_dim": "cell"} if (path / name).exists() else {"mode": "w"}
            part.to_zarr(path, group=name, consolidated=False, **how)
    for name, group in groups.items():
        group.to_zarr(path, group=name, mode="a", consolidated=False)


def _open(path: Path, groups: Iterable[str]) -> dict[str, xr.Dataset]:
    """The groups of a file, whose values are read when they are needed."""
    kinds: dict[str, dict[str, Any]] = {
        ".nc": {"engine": "h5netcdf"},
        ".zarr": {"engine": "zarr", "consolidated": False},
    }
    return {name: xr.open_dataset(path, group=name, **kinds[path.suffix]) for name in groups}
