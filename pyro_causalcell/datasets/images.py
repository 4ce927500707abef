"""Readers of public image sequences with known factors."""

from pathlib import Path

import numpy as np
import xarray as xr

from pyro_causalcell.errors import DataError

__all__ = ["read_causal3dident"]

# Columns of raw_latents followed by those of shape_latents; interventions has the same columns.
_COLUMNS = (
    *("pos_x", "pos_y", "pos_z", "rot_alpha", "rot_beta", "rot_gamma", "rot_spot"),
    *("hue_object", "hue_spot", "hue_back", "shape", "material"),
)
_UNUSED = ("rot_gamma", "material")


def read_causal3dident(path: str | Path, *, length: int | None = None) -> xr.Dataset:
    """Reads a split of Temporal Causal3DIdent (``train.npz``, ``test.npz``, ...).

    The result has the form of ``simulate.scenes``. The file is one long sequence: ``imgs`` (n, y, x, 3 or 4),
    ``raw_latents`` (n, 10), ``shape_latents`` (n, 2) and ``interventions`` (n - 1 or n, 12), whose row i
    tells what was set on the way from scene i to scene i + 1.

    Args:
        path: The file.
        length: Scenes of a sequence; None keeps all in one. Scenes left over at the end are left out, and
            counted in attrs["left_out"].

    Returns:
        Dataset with ``image`` (sequence, time, y, x, rgb), ``factors`` and ``target`` (sequence, time,
        factor). The first scene of the file has no targets; the first of a later sequence keeps its own,
        though what it came from is in the sequence before.

    Raises:
        DataError: The file is not of this form, or has fewer scenes than ``length``.

    Source: Lippe et al. 2022, CITRIS, ICML; Zenodo 6637749. The names of the arrays are those that the
    authors' data loader reads.
    """
    try:
        with np.load(path) as file:
            arrays = dict(file)
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected an npz file of Temporal Causal3DIdent at {path}, found none: {error}"
        ) from error
    names = ("imgs", "raw_latents", "shape_latents", "interventions")
    missing = [name for name in names if name not in arrays]
    if missing:
        raise DataError(
            f"expected arrays {list(names)} in {path}, found {sorted(arrays)}: {missing} missing. "
            "Files of triplets and other data sets of the same authors have another form."
        )
    image, set_nf = arrays["imgs"], arrays["interventions"]
    n = len(image)
    latent_nf = [arrays["raw_latents"], arrays["shape_latents"]]
    widths = [part.shape for part in latent_nf] == [(n, 10), (n, 2)]
    if image.ndim != 4 or not widths or set_nf.shape not in ((n - 1, 12), (n, 12)):
        raise DataError(
            f"expected imgs (n, y, x, 3), raw_latents (n, 10), shape_latents (n, 2) and interventions "
            f"(n - 1, 12) in {path}, found {[arrays[name].shape for name in names]}. Is this one sequence?"
        )
    factors_nf = np.concatenate(latent_nf, axis=1, dtype=np.float64)
    target_nf = np.concatenate([np.zeros((1, 12), dtype=bool), set_nf[: n - 1].astype(bool)])
    varying = [name for name in _UNUSED if np.ptp(factors_nf[:, _COLUMNS.index(name)]) > 0]
    if varying:
        raise DataError(
            f"expected {list(_UNUSED)} to be constant, found {varying} to vary in {path}. "
            "Only the published variant without them can be read."
        )
    length = n if length is None else length
    if not 1 <= length <= n:
        raise DataError(f"expected a length between 1 and the {n} scenes of {path}, found {length}.")
    kept = n // length * length
    columns = [i for i, name in enumerate(_COLUMNS) if name not in _UNUSED]

    def cut(array: np.ndarray) -> np.ndarray:
        return array[:kept].reshape(kept // length, length, *array.shape[1:])

    return xr.Dataset(
        {
            "image": (("sequence", "time", "y", "x", "rgb"), cut(image[..., :3])),
            "factors": (("sequence", "time", "factor"), cut(factors_nf[:, columns])),
            "target": (("sequence", "time", "factor"), cut(target_nf[:, columns])),
        },
        coords={"time": np.arange(length), "factor": [_COLUMNS[i] for i in columns]},
        attrs={"source": "Temporal Causal3DIdent, Lippe et al. 2022", "left_out": n - kept},
    )
