"""The screen: an AnnData and the names of its columns, checked once and never changed."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from pyro_causalcell.batch import MOST_COLUMNS, Dims
from pyro_causalcell.data.matrix import Matrix, Scan, looks_like_counts
from pyro_causalcell.data.spec import CONTROL, ScreenSpec, shown
from pyro_causalcell.errors import DataError

__all__ = ["Screen", "read", "read_embeddings"]

_TIME = (
    r"^(?:(?P<before>d|days?|h|hours?|min|minutes?|w|weeks?)[ _]?)?(?P<number>\d+(?:\.\d+)?)"
    r"(?:[ _]?(?P<after>d|days?|h|hrs?|hours?|min|minutes?|w|weeks?))?$"
)
"""A time as text: "D2", "day_2", "72h", "72 hours"."""


class Screen:
    """An AnnData of a perturbation screen, with the names of its columns, validated once.

    The AnnData may be dense, sparse or backed, and is never changed. x stays as it is stored; rows are
    made dense when they are asked for.

    Args:
        adata: Cells × genes.
        perturbation: obs column with the perturbation of each cell, such as ``"A"`` or ``"A+B"``.
        control: How control cells are named in that column: one spelling or several; None for a screen
            without control cells.
        layer: Layer that holds x; None is ``adata.X``.
        batch: obs column or columns of batches and other categorical covariates.
        time: obs column of times: a number per cell, or text with one unit for all, such as ``"D2"``,
            ``"day 2"`` or ``"72h"``. A screen with times may have control cells only.
        dose: obs column of doses: a positive number per cell, or one per target joined by the separator
            in the order of the targets. It takes the place of 1 in the design.
        library: obs column of total counts; None sums x over genes.
        guide: obs column of guides, for splits by guide.
        track: obs column that tells which cells are one and the same at several times, such as the frames of
            a film. Each track has one condition and begins at the first time.
        embeddings: Table with one row per target (index: target names), for models that take descriptions
            of perturbations: they can then predict targets without training cells.
        unseen: Further targets to predict, which no cell carries; each needs a row of ``embeddings``.
        gene_symbols: var column of gene names; None is ``adata.var_names``.
        twin: Layer that holds, for each cell, a control cell with the same background: simulations know
            it, and experiments that measure a cell twice. For models that compare cells with control.
        separator: What joins the targets of a combination. Their order is free.
        min_cells: Cells each condition must have.
        allow_empty: Accept cells and genes with zeros only. A cell without counts then has a library
            of 1, so that its expected counts stay positive.

    Attributes:
        adata: The AnnData.
        conditions: Canonical names of the conditions: ``"control"`` first, then sorted.
        targets: Perturbation targets, sorted: the columns of the design.
        genes: Gene names: the columns of x.
        batch_names: ``"column=value"``: the columns of ``batch_nb``.
        condition_n: int64 [n], index into ``conditions``; -1 for a condition marked as unknown.
        library_n: float32 [n], total counts.
        batch_nb: float32 [n, b], one-hot batch and covariate columns side by side.
        time_n: float32 [n], or None.
        guide_n: Text [n], or None.
        track_n: int64 [n], number of the track, or None.
        previous_n: int64 [n], row of the same cell at the time before, -1 at the first; or None.
        embedding_pe: float32 [p, e], or None.
        is_counts: Whether x holds non-negative integers only.
        max_value: Largest value of x.

    Raises:
        DataError: A column is missing or has missing values, there are no control cells or no perturbed
            cells, a condition has too few cells, x is not finite, cells or genes have zeros only, or
            names repeat. The message names the fix.
    """

    def __init__(
        self,
        adata: ad.AnnData,
        perturbation: str = "target",
        control: str | Sequence[str] | None = "non-targeting",
        *,
        layer: str | None = None,
        batch: str | Sequence[str] | None = None,
        time: str | None = None,
        dose: str | None = None,
        library: str | None = None,
        guide: str | None = None,
        track: str | None = None,
        embeddings: pd.DataFrame | None = None,
        unseen: str | Sequence[str] | None = None,
        gene_symbols: str | None = None,
        twin: str | None = None,
        separator: str = "+",
        min_cells: int = 1,
        allow_empty: bool = False,
    ) -> None:
        if not separator:
            raise DataError("expected a separator of at least one character, found ''; pass separator='+'")
        settings = ScreenSpec(
            perturbation=perturbation,
            control=_listed(control),
            separator=separator,
            layer=layer,
            batch=_listed(batch),
            time=time,
            dose=dose,
            library=library,
            guide=guide,
            gene_symbols=gene_symbols,
            min_cells=min_cells,
            allow_empty=allow_empty,
        )
        _check_names(adata, gene_symbols)
        spec = _with_unseen(_learn_names(settings, adata), _listed(unseen), embeddings)
        self._load(spec, adata, unknown="error")
        self.guide_n = None if guide is None else np.array(_text(adata, guide, "guide"), dtype=str)
        if track is not None:
            self._load_tracks(track)
        if not allow_empty:
            _check_empty_genes(self._scan.seen_g, self._matrix.where)
        self.embedding_pe = None if embeddings is None else _embedding(embeddings, self.targets)
        if twin is not None:
            self._load_twins(twin, spec)

    @classmethod
    def from_spec(
        cls, spec: ScreenSpec, adata: ad.AnnData, *, unknown: Literal["error", "mark"] = "error"
    ) -> "Screen":
        """Other cells seen through the settings and names of a fitted screen.

        Genes are put in the fitted order by name; the design and the batch columns have the fitted
        width. An unseen combination of known targets is appended to ``conditions``. Neither control
        cells nor ``min_cells`` nor guides are asked for, and genes may be zero in all of these cells.

        Args:
            spec: What ``describe()`` of the fitted screen gave.
            adata: Cells to look at.
            unknown: What to do with cells of unknown targets: ``"error"``, or ``"mark"`` them with
                ``condition_n`` -1 and a zero design.

        Raises:
            DataError: A fitted gene is missing, a target or batch is unknown, or as for ``Screen``.
        """
        _check_names(adata, spec.gene_symbols)
        screen = cls.__new__(cls)
        screen._load(spec, adata, unknown)
        screen.guide_n = None
        screen.embedding_pe = None
        return screen

    def _load(self, spec: ScreenSpec, adata: ad.AnnData, unknown: Literal["error", "mark"]) -> None:
        """Fills the arrays of the cells of adata, with the names of spec."""
        self.adata = adata
        self.track_n: np.ndarray | None = None
        self.previous_n: np.ndarray | None = None
        self._twins: tuple[Matrix, np.ndarray] | None = None  # with their total counts
        self.targets, self.genes, self.batch_names = spec.targets, spec.genes, spec.batch_names
        labels = _text(adata, spec.perturbation, "perturbation")
        code_n, names = pd.factorize(labels)
        known = _known_labels(spec, list(names), unknown)
        self.conditions = spec.conditions + sorted({c for c in known if c} - set(spec.conditions))
        index = {c: i for i, c in enumerate(self.conditions)}
        self.condition_n = np.array([index[c] if c else -1 for c in known], dtype=np.int64)[code_n]
        self._u_dp, self._design_n = _designs(spec, adata, labels, self.condition_n >= 0)
        self.batch_nb = _one_hot(spec, adata)
        self.time_n = None if spec.time is None else _times(adata, spec.time)
        self._matrix = _matrix(spec, adata)
        self._scan = self._matrix.scan(adata.obs_names.to_numpy(), self.genes)
        if not spec.allow_empty:
            _check_empty_cells(self._scan.empty_n, self._matrix.where)
        self.library_n = _library(spec, adata, self._scan)
        self.is_counts = self._scan.is_counts
        self.max_value = self._scan.max_value
        cells = np.bincount(self.condition_n[self.condition_n >= 0], minlength=len(self.conditions))
        self._spec = dataclasses.replace(
            spec,
            conditions=self.conditions,
            is_counts=self.is_counts,
            condition_cells=dict(zip(self.conditions, cells.tolist(), strict=True)),
            times=spec.times or self._times(None),
        )

    def __repr__(self) -> str:
        what = "counts" if self.is_counts else "normalised values"
        return (
            f"Screen({self.n_cells} cells x {self.n_genes} genes of {what}; "
            f"{len(self.conditions)} conditions, {len(self.targets)} targets, "
            f"{len(self.batch_names)} batch columns)"
        )

    @property
    def n_cells(self) -> int:
        """Cells."""
        return int(self._matrix.shape[0])

    @property
    def n_genes(self) -> int:
        """Genes."""
        return int(self._matrix.shape[1])

    @property
    def u_np(self) -> np.ndarray:
        """float32 [n, p]: the design of every cell, 1 or the dose for each target, zeros for control."""
        return self.u(np.arange(self.n_cells))

    def u(self, rows: np.ndarray) -> np.ndarray:
        """The design of some cells, float32 [len(rows), p]."""
        u_np: np.ndarray = self._u_dp[self._design_n[rows]].toarray()
        return u_np

    @property
    def designs(self) -> tuple[sparse.csr_matrix, np.ndarray]:
        """The distinct rows of the design, float32 [d, p], and which of them each cell has, int64 [n].

        The rows are sparse: with thousands of targets most of them hold a single dose.
        """
        return self._u_dp, self._design_n

    @property
    def matrix(self) -> Matrix:
        """The values of all cells, in memory or on disk."""
        return self._matrix

    def x(self, rows: np.ndarray) -> np.ndarray:
        """Values of some cells, float32 [len(rows), g], dense, in the order of rows."""
        return self._matrix.dense(np.asarray(rows, dtype=np.int64))

    @property
    def has_twins(self) -> bool:
        """Whether each cell comes with a control cell of the same background."""
        return self._twins is not None

    def twin_x(self, rows: np.ndarray) -> np.ndarray:
        """Values of the control twins of some cells, float32 [len(rows), g]."""
        return self.twin_matrix.dense(np.asarray(rows, dtype=np.int64))

    @property
    def twin_library_n(self) -> np.ndarray:
        """Total counts of the twins, float32 [n]."""
        return self._known_twins()[1]

    @property
    def twin_matrix(self) -> Matrix:
        """The values of all cells' control twins.

        Raises:
            DataError: The screen was opened without twins.
        """
        return self._known_twins()[0]

    def _known_twins(self) -> tuple[Matrix, np.ndarray]:
        if self._twins is None:
            raise DataError("expected a layer of control twins; open the screen with twin=")
        return self._twins

    def _load_tracks(self, track: str) -> None:
        labels = np.array(_text(self.adata, track, "track"))
        self.track_n = pd.factorize(labels)[0].astype(np.int64)
        self.previous_n = _previous(labels, self.time_n, self.condition_n)

    def _load_twins(self, layer: str, spec: ScreenSpec) -> None:
        twins = _matrix(dataclasses.replace(spec, layer=layer), self.adata)
        scan = twins.scan(self.adata.obs_names.to_numpy(), self.genes)
        if scan.is_counts != self.is_counts:
            kinds = ["normalised values", "counts"]
            raise DataError(
                f"expected {kinds[self.is_counts]} in the twins' layers[{layer!r}] as in "
                f"{self._matrix.where}, found {kinds[scan.is_counts]}; pass layer= and twin= of one kind"
            )
        self._twins = twins, np.where(scan.empty_n, 1.0, scan.totals_n).astype(np.float32)
        self.max_value = max(self.max_value, scan.max_value)

    def canonical(self, condition: str) -> str:
        """The one name of a condition, as ``ScreenSpec.canonical``."""
        return self._spec.canonical(condition)

    def design(self, conditions: Sequence[str]) -> np.ndarray:
        """The design of conditions, float32 [c, p], as ``ScreenSpec.design``."""
        return self._spec.design(conditions)

    def dims(self, rows: np.ndarray | None = None) -> Dims:
        """Sizes, for models and guides.

        Args:
            rows: The cells that are fitted; None is all.
        """
        design_n = self._design_n if rows is None else self._design_n[rows]
        cells_d = np.bincount(design_n, minlength=self._u_dp.shape[0]).astype(np.float64)
        target_cells = self._u_dp.astype(np.float64).power(2).T @ cells_d
        longest_gap, latest_start = self._gaps(rows)
        return Dims(
            n_cells=len(design_n),
            n_genes=self.n_genes,
            n_targets=len(self.targets),
            n_batches=len(self.batch_names),
            target_cells=tuple(target_cells.tolist()),
            n_conditions=len(self.conditions),
            times=tuple(self._times(rows)),
            n_embedding=0 if self.embedding_pe is None else min(self.embedding_pe.shape[1], MOST_COLUMNS),
            longest_gap=longest_gap,
            latest_start=latest_start,
            doses_vary=self._spec.dose is not None,
        )

    def _gaps(self, rows: np.ndarray | None) -> tuple[float | None, float | None]:
        """The longest time between snapshots of a condition, or a track, and the latest first one of any."""
        if self.time_n is None:
            return None, None
        followed_n = self.condition_n if self.track_n is None else self.track_n
        cells = pd.DataFrame({"followed": followed_n, "time": self.time_n})
        cells = (cells if rows is None else cells.iloc[rows]).drop_duplicates().sort_values("time")
        times = cells.groupby("followed")["time"]
        return float(times.diff().fillna(0.0).max()), float(times.min().max())

    def _times(self, rows: np.ndarray | None) -> list[float]:
        """Times of the snapshots of some cells."""
        if self.time_n is None:
            return []
        times: list[float] = np.unique(self.time_n if rows is None else self.time_n[rows]).tolist()
        return times

    def describe(self) -> ScreenSpec:
        """Settings, names and sizes, without the cells."""
        return self._spec

    def counts_hint(self) -> str | None:
        """Where counts seem to be: ``"X"``, a layer's name, ``"adata.raw"``, or None."""
        places: dict[str, Any] = {"X": self.adata.X, **self.adata.layers}
        if self.adata.raw is not None:
            places["adata.raw"] = self.adata.raw.X
        hits = [name for name, values in places.items() if values is not None and looks_like_counts(values)]
        return hits[0] if hits else None

    def require_counts(self) -> None:
        """Checks that x holds non-negative integers, as count likelihoods need.

        Raises:
            DataError: It does not; the message names a layer that looks like counts.
        """
        if self.is_counts:
            return
        hint = self.counts_hint()
        fixes = {
            None: "no layer looks like counts",
            "X": "adata.X looks like counts: pass layer=None",
            "adata.raw": "adata.raw looks like counts: use adata.raw.to_adata()",
        }
        fix = fixes.get(hint, f"layers[{hint!r}] looks like counts: pass layer={hint!r}")
        raise DataError(
            f"a count likelihood needs non-negative integers; {self._matrix.where} holds "
            f"{self._scan.odd_value:g}. {fix}, or use the Gaussian likelihood for normalised values"
        )

    def require_normalised(self) -> None:
        """Checks that x does not look like raw counts, as the Gaussian likelihood needs.

        Raises:
            DataError: All values are non-negative integers.
        """
        if self.is_counts:
            raise DataError(
                f"the Gaussian likelihood needs normalised values; {self._matrix.where} holds integers "
                f"only, up to {self.max_value:g}. Put normalised values in a layer "
                "(scanpy.pp.normalize_total, then scanpy.pp.log1p) and pass layer=, or use a count likelihood"
            )


def read(path: str | Path, backed: bool = False) -> ad.AnnData:
    """Reads an h5ad file, or a zarr folder.

    Args:
        path: The file, or a folder whose name ends in ``.zarr``.
        backed: Leave X and layers on disk and read their rows when they are needed.

    Raises:
        DataError: The file is missing, cut short, or holds no AnnData.
    """
    path = Path(path)
    is_zarr = path.suffix == ".zarr"
    if not (path.is_dir() if is_zarr else path.is_file()):
        raise DataError(f"expected {_kind(is_zarr)} at {path}, found none; check the path")
    store = _opened(path, is_zarr)
    missing = {"obs", "var"} - set(store)
    if missing:
        raise DataError(f"expected {_kind(is_zarr)} with obs and var, found {path} without {sorted(missing)}")
    try:
        if backed:
            return ad.AnnData(**{name: _left_on_disk(name, store[name]) for name in store})
        return ad.read_zarr(path) if is_zarr else ad.read_h5ad(path)
    except Exception as error:  # anndata, h5py and zarr raise many kinds here; all mean: it cannot be used
        raise DataError(
            f"{path} opens as {'zarr' if is_zarr else 'HDF5'}, but anndata cannot read it: {error}; write "
            "it again"
        ) from error


def _kind(is_zarr: bool) -> str:
    return "a zarr folder" if is_zarr else "an h5ad file"


def _opened(path: Path, is_zarr: bool) -> Any:
    """The group of everything in an h5ad file or a zarr folder."""
    try:
        if not is_zarr:
            return h5py.File(path, "r")
        import zarr

        return zarr.open_group(path, mode="r")
    except (OSError, ValueError) as error:
        raise DataError(
            f"expected {_kind(is_zarr)}, found {path} that {'zarr' if is_zarr else 'HDF5'} cannot open: it "
            f"is cut short or of another format ({error}); fetch or write it again"
        ) from error


def _left_on_disk(name: str, stored: Any) -> Any:
    """One part of an AnnData, in memory but for its cells × genes matrices."""
    is_group = hasattr(stored, "keys")
    if is_group and name == "layers":
        return {layer: _left_on_disk("X", stored[layer]) for layer in stored}
    if is_group and name == "raw":
        return {part: _left_on_disk(part, stored[part]) for part in stored}
    if is_group and name == "X":
        return ad.io.sparse_dataset(stored)
    is_dense = name == "X" and len(stored.shape or ()) == 2  # an AnnData may also have None here
    return stored if is_dense else ad.io.read_elem(stored)


def read_embeddings(path: str | Path) -> pd.DataFrame:
    """Reads a table of embeddings: a CSV file whose first column holds target names.

    Args:
        path: The file.

    Raises:
        DataError: The file is missing or no such table.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"expected a CSV file of embeddings at {path}, found none; check the path")
    try:
        table = pd.read_csv(path, index_col=0)
    except (ValueError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        raise DataError(
            f"expected a CSV file with target names in its first column and numbers in the others; {path} "
            f"cannot be read: {error}"
        ) from error
    table.index = table.index.astype(str)
    return table


def _listed(names: str | Sequence[str] | None) -> list[str]:
    if names is None:
        return []
    return [names] if isinstance(names, str) else [str(name) for name in names]


def _check_names(adata: ad.AnnData, gene_symbols: str | None) -> None:
    if adata.n_obs == 0 or adata.n_vars == 0:
        raise DataError(f"expected cells and genes, found an AnnData of {adata.n_obs} x {adata.n_vars}")
    fixes = {"cell": "adata.obs_names_make_unique()", "gene": "adata.var_names_make_unique()"}
    if gene_symbols is not None:
        fixes["gene"] = "gene_symbols=None, or make that column unique"
    for kind, names in (("cell", adata.obs_names), ("gene", pd.Index(_gene_names(adata, gene_symbols)))):
        repeated = names[names.duplicated()].unique()
        if len(repeated):
            raise DataError(
                f"expected unique {kind} names, found {len(repeated)} that repeat: "
                f"{shown(list(repeated), 5)}; use {fixes[kind]}"
            )


def _gene_names(adata: ad.AnnData, gene_symbols: str | None) -> list[str]:
    if gene_symbols is None:
        return [str(name) for name in adata.var_names]
    if gene_symbols not in adata.var:
        raise DataError(
            f"var[{gene_symbols!r}] not found; columns are {list(adata.var.columns)}. Pass gene_symbols="
        )
    return [str(name) for name in adata.var[gene_symbols]]


def _column(adata: ad.AnnData, name: str, argument: str) -> pd.Series:
    if name not in adata.obs:
        raise DataError(f"obs[{name!r}] not found; columns are {list(adata.obs.columns)}. Pass {argument}=")
    return adata.obs[name]


def _text(adata: ad.AnnData, name: str, argument: str) -> np.ndarray:
    """An obs column as text [n], without missing values."""
    column = _column(adata, name, argument)
    missing = int(column.isna().sum())
    if missing:
        raise DataError(
            f"expected a value in obs[{name!r}] for every cell, found {missing} missing of {len(column)}; "
            f"fill them or remove the cells: adata[adata.obs[{name!r}].notna()]"
        )
    return np.asarray(column.astype(str), dtype=object)


def _numbers(adata: ad.AnnData, name: str, argument: str) -> np.ndarray:
    """An obs column as float64 [n], all finite."""
    column = _column(adata, name, argument)
    values = np.asarray(pd.to_numeric(column.astype(object), errors="coerce"), dtype=np.float64)
    bad = ~np.isfinite(values)
    if bad.any():
        raise DataError(
            f"expected a finite number in obs[{name!r}] for every cell ({argument}=), found "
            f"{int(bad.sum())} others, such as {column[bad].iloc[0]!r}; convert the column to numbers"
        )
    return values


def _times(adata: ad.AnnData, name: str) -> np.ndarray:
    """An obs column of times as float32 [n]: numbers, or text with one unit for all."""
    labels = pd.Series(_text(adata, name, "time")).str.strip()
    if pd.to_numeric(labels, errors="coerce").notna().all():
        return _numbers(adata, name, "time").astype(np.float32)
    parts = labels.str.extract(_TIME, flags=re.IGNORECASE)
    units = parts["before"].where(parts["before"].notna(), parts["after"]).str.lower().str[0]
    bad = parts["number"].isna() | units.isna()
    if bad.any() or units.nunique() > 1:
        found = labels[bad].iloc[0] if bad.any() else f"{labels[units == units.iloc[0]].iloc[0]!r} and others"
        raise DataError(
            f"expected times in obs[{name!r}] as numbers, or as text with one unit for all such as 'D2' or "
            f"'72h' (time=), found {found!r}; convert the column to numbers"
        )
    return parts["number"].astype(np.float32).to_numpy()


def _previous(track_n: np.ndarray, time_n: np.ndarray | None, condition_n: np.ndarray) -> np.ndarray:
    """Row of the same track at the time before, -1 at the first, int64 [n]."""
    if time_n is None:
        raise DataError("expected times of the cells that track= names; pass the column of times as time=")
    cells = pd.DataFrame({"track": track_n, "time": time_n, "condition": condition_n})
    by_track = cells.groupby("track", sort=False)
    faults = {
        "one cell at a time": cells.duplicated(["track", "time"]),
        "one condition": by_track["condition"].transform("nunique") > 1,
        "a cell at the first time": by_track["time"].transform("min") > time_n.min(),
    }
    for rule, bad in faults.items():
        if bad.any():
            names = shown(cells["track"][bad].unique().tolist(), 5)
            raise DataError(f"expected each track to have {rule} (track=), found others: {names}; mend them")
    rows = cells.sort_values(["track", "time"]).index.to_series()
    before = rows.groupby(cells["track"].loc[rows.index], sort=False).shift(fill_value=-1)
    return before.sort_index().to_numpy(dtype=np.int64)


def _learn_names(settings: ScreenSpec, adata: ad.AnnData) -> ScreenSpec:
    """The settings with the names found in adata, after checks that need no look at x."""
    labels = pd.Series(_text(adata, settings.perturbation, "perturbation"))
    cells = labels.value_counts()
    by_condition = cells.groupby([settings.canonical(label) for label in cells.index]).sum()
    if settings.control and CONTROL not in by_condition.index:
        frequent = [f"{label} ({n} cells)" for label, n in cells.head(10).items()]
        raise DataError(
            f"no control cells: no value of obs[{settings.perturbation!r}] is one of {settings.control}; "
            f"the most frequent values are {shown(frequent)}. Pass control="
        )
    targets = sorted({target for label in cells.index for target in settings.split(label)})
    if not targets and settings.time is None:
        raise DataError(
            f"no perturbed cells: every value of obs[{settings.perturbation!r}] is a spelling of control"
        )
    few = by_condition[by_condition < settings.min_cells]
    if len(few):
        listed = shown([f"{condition} ({n})" for condition, n in few.items()])
        raise DataError(
            f"expected at least {settings.min_cells} cells in each condition (min_cells=), found fewer in "
            f"{len(few)}: {listed}; remove those cells or lower min_cells"
        )
    return dataclasses.replace(
        settings,
        conditions=[CONTROL, *sorted(c for c in by_condition.index if c != CONTROL)],
        targets=targets,
        genes=_gene_names(adata, settings.gene_symbols),
        batch_names=[
            f"{name}={value}" for name in settings.batch for value in sorted(set(_text(adata, name, "batch")))
        ],
    )


def _with_unseen(spec: ScreenSpec, unseen: list[str], embeddings: pd.DataFrame | None) -> ScreenSpec:
    """The spec with targets that no cell carries."""
    if unseen and embeddings is None:
        raise DataError(
            f"expected embeddings= for the unseen targets {shown(unseen)}: nothing else says what they do; "
            "pass a table with a row for each target"
        )
    strange = [name for name in unseen if spec.split(name) != [name]]
    if strange:
        raise DataError(f"expected names of single targets in unseen=, found {shown(strange)}")
    return dataclasses.replace(spec, targets=sorted({*spec.targets, *unseen}))


def _known_labels(spec: ScreenSpec, labels: list[str], unknown: str) -> list[str | None]:
    """The canonical condition of each label, None for those with unknown targets."""
    targets = set(spec.targets)
    strange = {label for label in labels if not set(spec.split(label)) <= targets}
    if strange and unknown == "error":
        raise DataError(
            f"obs[{spec.perturbation!r}] has {len(strange)} conditions with targets that were not fitted: "
            f"{shown(sorted(strange))}; the targets are {shown(spec.targets)}. Remove those cells, "
            "or pass unknown='mark'"
        )
    return [None if label in strange else spec.canonical(label) for label in labels]


def _designs(
    spec: ScreenSpec, adata: ad.AnnData, labels: np.ndarray, known_n: np.ndarray
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """The distinct design rows [d, p], and the row of each cell [n]."""
    dose = 1.0 if spec.dose is None else _column(adata, spec.dose, "dose").to_numpy(dtype=object)
    frame = pd.DataFrame({"label": labels, "dose": dose, "known": known_n})
    design_n = frame.groupby(["label", "dose"], sort=False, dropna=False).ngroup().to_numpy(dtype=np.int64)
    first = frame.iloc[np.unique(design_n, return_index=True)[1]]
    column = {target: i for i, target in enumerate(spec.targets)}
    amounts = [
        _amounts(spec, label, value) if known and spec.split(label) else {}
        for label, value, known in first.itertuples(index=False)
    ]
    dose_m = np.array([dose for row in amounts for dose in row.values()], dtype=np.float32)
    target_m = np.array([column[target] for row in amounts for target in row], dtype=np.int64)
    end_d = np.cumsum([0, *(len(row) for row in amounts)])
    return sparse.csr_matrix((dose_m, target_m, end_d), shape=(len(first), len(spec.targets))), design_n


def _amounts(spec: ScreenSpec, label: str, dose: Any) -> dict[str, float]:
    """The dose of each target of a condition: one number for all, or one for each in the order written."""
    targets = spec.split(label)
    if spec.dose is None:
        return dict.fromkeys(targets, 1.0)
    parts = dose.split(spec.separator) if isinstance(dose, str) else [dose]
    try:
        amounts = [float(part) for part in parts]
    except (TypeError, ValueError):
        amounts = []
    if len(amounts) == 1:
        amounts = amounts * len(targets)
    if len(amounts) != len(targets) or not all(np.isfinite(a) and a > 0 for a in amounts):
        raise DataError(
            f"expected in obs[{spec.dose!r}] (dose=) one positive number, or one for each target joined by "
            f"{spec.separator!r}; found {dose!r} for condition {label!r}. Doses multiply effects, so give "
            "them on a scale where zero is no treatment, and label untreated cells as control"
        )
    return dict(zip(targets, amounts, strict=True))


def _one_hot(spec: ScreenSpec, adata: ad.AnnData) -> np.ndarray:
    """Batch columns, float32 [n, b]."""
    batch_nb = np.zeros((adata.n_obs, len(spec.batch_names)), dtype=np.float32)
    index = pd.Index(spec.batch_names)
    for name in spec.batch:
        codes = index.get_indexer([f"{name}={value}" for value in _text(adata, name, "batch")])
        if (codes < 0).any():
            strange = sorted(set(adata.obs[name][codes < 0].astype(str)))
            known = [b.removeprefix(f"{name}=") for b in spec.batch_names if b.startswith(f"{name}=")]
            raise DataError(
                f"obs[{name!r}] has values that were not fitted: {shown(strange)}; the fitted ones are "
                f"{shown(known)}. Remove those cells, or give them the fitted batch they resemble"
            )
        batch_nb[np.arange(adata.n_obs), codes] = 1.0
    return batch_nb


def _matrix(spec: ScreenSpec, adata: ad.AnnData) -> Matrix:
    """Values of the fitted genes in their order."""
    if spec.layer is not None and spec.layer not in adata.layers:
        raise DataError(f"layers[{spec.layer!r}] not found; layers are {list(adata.layers)}. Pass layer=")
    where = "adata.X" if spec.layer is None else f"layers[{spec.layer!r}]"
    values = adata.X if spec.layer is None else adata.layers[spec.layer]
    if values is None:
        raise DataError(f"adata.X is empty; layers are {list(adata.layers)}. Pass layer=")
    names = _gene_names(adata, spec.gene_symbols)
    if names == spec.genes:
        return Matrix(values, None, where)
    columns = pd.Index(names).get_indexer(pd.Index(spec.genes))
    missing = [gene for gene, column in zip(spec.genes, columns, strict=True) if column < 0]
    if missing:
        raise DataError(
            f"expected the {len(spec.genes)} fitted genes, found {len(missing)} missing: {shown(missing)}; "
            "give the cells with all genes, named as in the fitted screen (gene_symbols= was "
            f"{spec.gene_symbols!r})"
        )
    return Matrix(values, columns, where)


def _library(spec: ScreenSpec, adata: ad.AnnData, scan: Scan) -> np.ndarray:
    """Total counts, float32 [n]."""
    if spec.library is None:
        return np.where(scan.empty_n, 1.0, scan.totals_n).astype(np.float32)
    library_n = _numbers(adata, spec.library, "library")
    bad = int((library_n <= 0).sum())
    if bad:
        raise DataError(
            f"expected positive totals in obs[{spec.library!r}] (library=), found {bad} cells at or below 0"
        )
    return library_n.astype(np.float32)


def _check_empty_cells(empty_n: np.ndarray, where: str) -> None:
    if empty_n.any():
        raise DataError(
            f"{int(empty_n.sum())} of {len(empty_n)} cells have zeros only in {where}; remove them "
            "(scanpy.pp.filter_cells(adata, min_counts=1)) or pass allow_empty=True"
        )


def _check_empty_genes(seen_g: np.ndarray, where: str) -> None:
    if not seen_g.all():
        raise DataError(
            f"{int((~seen_g).sum())} of {len(seen_g)} genes are zero in every cell of {where}; remove them "
            "(scanpy.pp.filter_genes(adata, min_cells=1)) or pass allow_empty=True"
        )


def _embedding(table: pd.DataFrame, targets: list[str]) -> np.ndarray:
    """Rows of a table in the order of targets, float32 [p, e]."""
    twice = table.index[table.index.duplicated()].unique().tolist()
    if twice:
        raise DataError(f"expected one row of embeddings for each target, found several for {shown(twice)}")
    words = [name for name, kind in table.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if words or not table.shape[1]:
        raise DataError(f"expected columns of numbers as embeddings, found {shown(words) or 'no column'}")
    missing = [target for target in targets if target not in table.index]
    if missing:
        raise DataError(
            f"expected a row of embeddings for each target, found none for {len(missing)}: {shown(missing)}; "
            "the index must hold target names. Add those rows, or leave the targets out"
        )
    embedding_pe = np.asarray(table.loc[targets], dtype=np.float32)
    if not np.isfinite(embedding_pe).all():
        raise DataError("expected finite embeddings, found NaN or infinity; fill them")
    return embedding_pe
