"""Predictions of any other program, read from a file and checked before they are scored."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
from numpy.typing import NDArray

from pyro_causalcell.baselines.means import expression, log_cp10k
from pyro_causalcell.data import Screen, read
from pyro_causalcell.data.spec import shown
from pyro_causalcell.errors import DataError

__all__ = ["PredictionsFile", "TimePredictionsFile"]

Units = Literal["counts", "lognorm"]
Kind = Literal["cells", "means"]

_CEILING = float(np.log1p(1e4))  # all counts of a cell in one gene
_LEVEL = 3.0  # times the screen's own level: no method is so wrong, other units are
_LEVEL_CELLS = 2000


class PredictionsFile:
    """Predictions made elsewhere: cells or means of conditions, as an AnnData or a table.

    The AnnData has ``obs["condition"]`` and gene names in ``var_names``; a table has a column ``condition``
    and one column per gene. Conditions are written as in the screen; the order of targets is free. Genes that
    the screen does not have are not used and are listed in ``extra_genes``.

    Args:
        source: A file (.h5ad, .parquet or .csv), an AnnData, or a table.
        screen: The screen that is predicted.
        name: What tables and figures call the method; the file's name if None.
        units: ``"lognorm"`` for log(1 + counts per 10,000), or ``"counts"``. None takes
            ``uns["units"]`` or ``uns["causalcell"]["units"]`` of the AnnData. For a screen of normalised
            values, ``"lognorm"`` stands for the screen's own units.
        kind: Whether a row is a cell or the mean of a condition. None tells by whether conditions repeat.
        column: Column of the conditions.

    Attributes:
        name: What tables and figures call the method.
        conditions: Predicted conditions, by their canonical names.
        extra_genes: Genes of the file that the screen does not have.
        kind: ``"cells"`` or ``"means"``.
        cells: Where the rows are cells: draws at most ``n_cells`` of each condition, as ``CellPredictor``.

    Raises:
        DataError: The file cannot be read, a gene of the screen is missing, a condition repeats or has an
            unknown target, a value is not finite, units are not stated, or values look like other units.
    """

    def __init__(
        self,
        source: str | Path | ad.AnnData | pd.DataFrame,
        screen: Screen,
        *,
        name: str | None = None,
        units: Units | None = None,
        kind: Kind | None = None,
        column: str = "condition",
    ):
        of_file = Path(source).stem if isinstance(source, (str, Path)) else "predictions"
        self.name = of_file if name is None else name
        adata = _as_adata(source, column)
        if column not in adata.obs:
            raise DataError(
                f"{self.name}: obs[{column!r}] not found; columns are {list(adata.obs.columns)}. Pass column="
            )
        labels = adata.obs[column]
        if labels.isna().any():
            raise DataError(f"{self.name}: {int(labels.isna().sum())} rows have no {column}; fill them.")
        given = self._stated_units(adata, units)
        written_n = labels.astype(str).to_numpy(dtype=str)
        names_n = np.array([screen.canonical(label) for label in written_n], dtype=str)
        self.conditions = sorted(set(names_n.tolist()))
        self._screen = screen
        screen.design(self.conditions)  # an unknown target is told by name
        self.kind = self._kind(written_n, names_n, kind)
        x_ng = self._genes(adata, screen)
        self._check(x_ng, names_n, given)
        if given == "counts":
            x_ng = self._normalised(x_ng, adata)
        self._check_level(x_ng)
        self._cells = {name: x_ng[names_n == name] for name in self.conditions}
        if self.kind == "cells":
            self.cells = self._draw  # distribution metrics ask for cells only where this is

    def predict(self, conditions: Sequence[str]) -> NDArray[np.float64]:
        """Mean expression of each condition, shape (c, g), in log1p CP10k.

        Raises:
            DataError: The file lacks some of these conditions; they are named.
        """
        return np.stack([cells.mean(0) for cells in self._of(conditions)])

    def _of(self, conditions: Sequence[str]) -> list[NDArray[np.float64]]:
        names = [self._screen.canonical(name) for name in conditions]
        missing = [name for name in names if name not in self._cells]
        if missing:
            raise DataError(
                f"{self.name} lacks {len(missing)} of the {len(names)} conditions to be scored: "
                f"{shown(missing)}; predict these too."
            )
        return [self._cells[name] for name in names]

    def _draw(self, conditions: Sequence[str], n_cells: int, seed: int = 0) -> list[NDArray[np.float64]]:
        """At most ``n_cells`` predicted cells of each condition."""
        rng = np.random.default_rng(seed)
        return [x_ng[rng.permutation(len(x_ng))[:n_cells]] for x_ng in self._of(conditions)]

    def _stated_units(self, adata: ad.AnnData, units: str | None) -> str:
        inside = adata.uns.get("units", adata.uns.get("causalcell", {}).get("units"))
        given = units or ("lognorm" if inside == "as trained" else inside)
        if given not in ("counts", "lognorm"):
            raise DataError(
                f"{self.name}: expected units 'counts' or 'lognorm' (log(1 + counts per 10,000)), found "
                f"{given!r}; pass units= or set uns['units']."
            )
        return str(given)

    def _kind(self, written_n: NDArray[np.str_], names_n: NDArray[np.str_], kind: Kind | None) -> Kind:
        rows = pd.Series(names_n).value_counts()
        if kind is None:
            repeats = pd.Series(written_n).value_counts() > 1
            if repeats.any() and not repeats.all():
                alone, several = list(repeats.index[~repeats]), list(repeats.index[repeats])
                raise DataError(
                    f"{self.name}: some conditions have one row ({shown(alone, 5)}) and others several "
                    f"({shown(several, 5)}); pass kind='cells', or kind='means' with one row each."
                )
            kind = "cells" if repeats.all() else "means"
        twice = sorted(rows.index[rows > 1])
        if kind == "means" and twice:
            raise DataError(
                f"{self.name}: expected one mean per condition, found several for {shown(twice)} (the order "
                "of targets does not matter); keep one."
            )
        return kind

    def _genes(self, adata: ad.AnnData, screen: Screen) -> NDArray[np.float64]:
        found = pd.Index([str(gene) for gene in adata.var_names])
        missing = [gene for gene in screen.genes if gene not in found]
        if missing:
            raise DataError(
                f"{self.name} lacks {len(missing)} of the screen's {screen.n_genes} genes: {shown(missing)}; "
                "predict all of them, named as in the screen."
            )
        twice = found[found.duplicated()].unique()
        if len(twice):
            raise DataError(f"{self.name}: expected each gene once, found several of {shown(list(twice))}.")
        self.extra_genes = [gene for gene in found if gene not in set(screen.genes)]
        x: Any = adata.X[:, found.get_indexer(screen.genes)]
        return np.asarray(x.toarray() if sp.issparse(x) else x, dtype=np.float64)

    def _check(self, x_ng: NDArray[np.float64], names_n: NDArray[np.str_], units: str) -> None:
        wrong_ng = ~np.isfinite(x_ng)
        if wrong_ng.any():
            genes = [self._screen.genes[g] for g in np.flatnonzero(wrong_ng.sum(0))]
            raise DataError(
                f"{self.name}: {int(wrong_ng.sum())} values are NaN or infinite, of the conditions "
                f"{shown(sorted(set(names_n[wrong_ng.any(1)].tolist())), 5)} and the genes {shown(genes, 5)}."
            )
        whole = bool((x_ng == np.round(x_ng)).all()) and x_ng.max() > 1
        if units == "counts":
            if self.kind == "means":
                raise DataError(
                    f"{self.name}: the mean of counts is not the mean of log(1 + counts per 10,000); give "
                    "cells, or means of normalised values with units='lognorm'."
                )
            if x_ng.min() < 0 or not (whole or x_ng.max() > _CEILING):
                raise DataError(
                    f"{self.name}: expected counts, found values from {x_ng.min():.3g} to {x_ng.max():.3g} "
                    "that look normalised; pass units='lognorm'."
                )
        elif self._screen.is_counts:
            if whole or x_ng.max() > _CEILING:
                raise DataError(
                    f"{self.name}: expected log(1 + counts per 10,000), at most {_CEILING:.2f}, found values "
                    f"up to {x_ng.max():.4g} that look like counts or another scale; pass units='counts' or "
                    "convert them."
                )
            if x_ng.min() < -1:
                raise DataError(
                    f"{self.name}: expected log(1 + counts per 10,000), at least 0, found {x_ng.min():.3g}: "
                    "effects or scaled values? Add the mean they were taken from."
                )

    def _normalised(self, x_ng: NDArray[np.float64], adata: ad.AnnData) -> NDArray[np.float64]:
        if not self._screen.is_counts:
            raise DataError(
                f"{self.name} holds counts, and the screen normalised values; give predictions in the units "
                "of the screen with units='lognorm', or compare on a screen of counts (layer=)."
            )
        if self._screen.describe().library is None:
            return log_cp10k(x_ng, x_ng.sum(1))
        if "library" not in adata.obs:
            raise DataError(
                f"{self.name}: counts of some genes need the total over all genes, as the screen has it "
                "(library=); give obs['library'], or normalised values with units='lognorm'."
            )
        return log_cp10k(x_ng, adata.obs["library"].to_numpy(dtype=np.float64))

    def _check_level(self, x_ng: NDArray[np.float64]) -> None:
        """Effects, other logarithms and other totals show as another overall level."""
        n_cells = self._screen.n_cells
        rows = np.random.default_rng(0).permutation(n_cells)[:_LEVEL_CELLS]
        own, found = float(expression(self._screen, rows).mean()), float(x_ng.mean())
        if own > 0 and not own / _LEVEL < found < own * _LEVEL:
            raise DataError(
                f"{self.name}: the average over cells and genes is {found:.3g}, and {own:.3g} in the screen; "
                "these are other units (effects, counts per million?). Give log(1 + counts per 10,000)."
            )


class TimePredictionsFile:
    """Predictions over time made elsewhere: as ``PredictionsFile``, with one more column for the time.

    Args:
        source: A file (.h5ad, .parquet or .csv), an AnnData, or a table.
        screen: The screen that is predicted.
        time: Column of the times, numbers in the units of the screen's.
        name: What tables and figures call the method; the file's name if None.
        units: As for ``PredictionsFile``.
        kind: Whether a row is a cell or a mean. None tells by whether conditions repeat at a time.
        column: Column of the conditions.

    Attributes:
        name: What tables and figures call the method.
        times: Predicted times, rising.
        cells: Where the rows are cells: draws at most ``n_cells`` of each, as ``TimeCellPredictor``.

    Raises:
        DataError: The column of times is missing or holds no numbers, or as for ``PredictionsFile``.
    """

    def __init__(
        self,
        source: str | Path | ad.AnnData | pd.DataFrame,
        screen: Screen,
        *,
        time: str = "time",
        name: str | None = None,
        units: Units | None = None,
        kind: Kind | None = None,
        column: str = "condition",
    ):
        of_file = Path(source).stem if isinstance(source, (str, Path)) else "predictions"
        self.name = of_file if name is None else name
        adata = _as_adata(source, column, time)
        if time not in adata.obs:
            raise DataError(
                f"{self.name}: obs[{time!r}] not found; columns are {list(adata.obs.columns)}. Pass time="
            )
        time_n = pd.to_numeric(adata.obs[time], errors="coerce").to_numpy(dtype=np.float32)
        if not np.isfinite(time_n).all():
            raise DataError(
                f"{self.name}: expected a number in {time!r} for every row, found "
                f"{int((~np.isfinite(time_n)).sum())} others; convert them."
            )
        self._files = {
            float(t): PredictionsFile(
                adata[time_n == t],
                screen,
                name=f"{self.name} at {t:g}",
                units=units,
                kind=kind,
                column=column,
            )
            for t in np.unique(time_n)
        }
        self.times = list(self._files)
        if all(file.kind == "cells" for file in self._files.values()):
            self.cells = self._draw  # distribution metrics ask for cells only where this is

    def predict(self, conditions: Sequence[str], times: Sequence[float]) -> NDArray[np.float64]:
        """Mean expression of each condition at each time, shape (c, t, g), in log1p CP10k.

        Raises:
            DataError: The file lacks some of these times, or of these conditions at a time.
        """
        return np.stack([file.predict(conditions) for file in self._at(times)], axis=1)

    def _at(self, times: Sequence[float]) -> list[PredictionsFile]:
        asked = np.asarray(times, dtype=np.float32).tolist()
        missing = [time for time in asked if time not in self._files]
        if missing:
            raise DataError(f"{self.name} lacks the times {missing}; it has {shown(self.times)}.")
        return [self._files[time] for time in asked]

    def _draw(
        self, conditions: Sequence[str], times: Sequence[float], n_cells: int, seed: int = 0
    ) -> list[list[NDArray[np.float64]]]:
        """At most ``n_cells`` predicted cells of each condition at each time."""
        drawn = [file.cells(conditions, n_cells, seed) for file in self._at(times)]
        return [list(of_condition) for of_condition in zip(*drawn, strict=True)]


def _as_adata(source: str | Path | ad.AnnData | pd.DataFrame, *columns: str) -> ad.AnnData:
    if isinstance(source, ad.AnnData):
        return source
    if isinstance(source, pd.DataFrame):
        return _of_table(source, columns)
    path = Path(source)
    readers: dict[str, Any] = {".parquet": _read_parquet, ".csv": pd.read_csv}
    if path.suffix not in readers:
        return read(path)
    try:
        return _of_table(readers[path.suffix](path), columns)
    except (OSError, ValueError) as error:  # pyarrow and pandas tell of damaged files by ValueErrors
        raise DataError(f"expected a table of predictions, cannot read {path}: {error}") from error


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path)
    except ImportError as error:
        raise DataError(
            f"{path} needs pyarrow, which is not installed: pip install 'pyro-causalcell[parquet]', or give "
            "an .h5ad or .csv file"
        ) from error


def _of_table(table: pd.DataFrame, columns: Sequence[str]) -> ad.AnnData:
    missing = [column for column in columns if column not in table]
    if missing:
        raise DataError(f"column {missing[0]!r} not found; the first columns are {shown(list(table), 5)}.")
    labels = [*columns, "library"]
    values = table.drop(columns=labels, errors="ignore")
    words = [name for name in values if not pd.api.types.is_numeric_dtype(values[name])]
    if words:
        raise DataError(f"expected one column of numbers per gene, found text in {shown(words)}; drop them.")
    obs = table[[name for name in labels if name in table]]
    obs = obs.set_axis([str(i) for i in range(len(obs))])
    return ad.AnnData(values.to_numpy(dtype=np.float64), obs, pd.DataFrame(index=values.columns.astype(str)))
