import shutil
import threading
import time
import warnings

import anndata as ad
import h5py
import numpy as np
import pytest
import zarr
from scipy import sparse

from pyro_causalcell.data import Minibatches, Screen, disk, read
from pyro_causalcell.data.disk import DiskRows, ahead
from pyro_causalcell.data.minibatches import _dealt
from pyro_causalcell.errors import DataError


def stored(adata, path, **settings):
    """The AnnData left on disk, as h5ad or as zarr."""
    if path.suffix == ".h5ad":
        adata.write_h5ad(path, **settings)
    else:
        with warnings.catch_warnings(action="ignore"):  # about formats to come
            adata.write_zarr(path)
    return read(path, backed=True)


@pytest.fixture
def small_buffers(monkeypatch):
    """Buffers of 64 rows in blocks of 2, portions of 32 rows, gaps of a row, for 20 genes without zeros."""
    monkeypatch.setattr(disk, "BUFFER_BYTES", 160 * 64)
    monkeypatch.setattr(disk, "PORTION_BYTES", 160 * 32)
    monkeypatch.setattr(disk, "GAP_BYTES", 160)
    monkeypatch.setattr(disk, "BLOCK_ROWS", 2)


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_rows_in_any_order_are_read_as_stored(tiny_adata, tmp_path, name, form, small_buffers):
    x_ng = tiny_adata.X.toarray()
    tiny_adata.X = form(x_ng)
    rows = DiskRows(stored(tiny_adata, tmp_path / name).X, "adata.X")
    rng = np.random.default_rng(0)
    for wanted in (np.arange(400), rng.permutation(400), rng.integers(400, size=90), np.array([], dtype=int)):
        found = rows.take(wanted)
        assert found.dtype == np.float32 and sparse.issparse(found) == sparse.issparse(tiny_adata.X)
        np.testing.assert_array_equal(found.toarray() if sparse.issparse(found) else found, x_ng[wanted])


def test_neighbours_and_small_gaps_are_one_read(tiny_adata, tmp_path, monkeypatch, small_buffers):
    rows = DiskRows(stored(tiny_adata, tmp_path / "a.h5ad").X, "adata.X")
    monkeypatch.setattr(rows, "_n_gap", 2)
    monkeypatch.setattr(rows, "_n_portion", 32)
    reads = []
    read_one = rows._read
    monkeypatch.setattr(rows, "_read", lambda *place: reads.append(place) or read_one(*place))
    rows.take(np.array([9, 3, 4, 6, 3, 40, 30, 31, 32]))
    assert reads == [(3, 7), (9, 10), (30, 32), (32, 33), (40, 41)]  # a gap of one row; 32 ends a portion


@pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
def test_layers_and_raw_stay_on_disk(tiny_adata, tmp_path, name):
    tiny_adata.raw = tiny_adata.copy()
    tiny_adata.layers["counts"] = tiny_adata.X.copy()
    tiny_adata.layers["twin"] = tiny_adata.X.toarray()[::-1] + 1.0
    counts_ng, twin_ng = tiny_adata.X.toarray(), tiny_adata.layers["twin"].copy()
    tiny_adata.X = np.log1p(counts_ng)
    adata = stored(tiny_adata, tmp_path / name)
    for values in (adata.X, *adata.layers.values(), adata.raw.X):
        assert disk.is_on_disk(values)
    assert Screen(adata).counts_hint() == "counts"
    screen = Screen(adata, layer="counts", twin="twin")
    rows = np.array([5, 0, 5])
    np.testing.assert_array_equal(screen.x(rows), counts_ng[rows])
    np.testing.assert_array_equal(screen.twin_x(rows), twin_ng[rows])
    for batch in Minibatches(screen, np.arange(400), 64, anchors="twin", memory_budget_gb=0).epoch(1):
        np.testing.assert_array_equal(batch.x_ng, counts_ng[batch.index_n])
        np.testing.assert_array_equal(batch.control.x_ng, twin_ng[batch.index_n])


def test_an_anndata_without_x_may_stay_on_disk(tiny_adata, tmp_path):
    tiny_adata.layers["counts"], tiny_adata.X = tiny_adata.X, None
    adata = stored(tiny_adata, tmp_path / "a.h5ad")
    assert adata.X is None and Screen(adata, layer="counts").n_cells == 400


# ---------------------------------------------------------------- buffers


def epoch(minibatches, number):
    return [batch.index_n.numpy() for batch in minibatches.epoch(number)]


@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_from_disk_holds_every_cell_once(tiny_adata, tmp_path, small_buffers, shuffle):
    adata = stored(tiny_adata, tmp_path / "a.h5ad")
    rows = np.random.default_rng(0).permutation(400)[:350]

    def minibatches(seed=0):
        return Minibatches(Screen(adata), rows, 16, shuffle=shuffle, seed=seed, memory_budget_gb=0)

    one = minibatches()
    x_ng = tiny_adata.X.toarray()
    for batch in one.epoch(3):
        np.testing.assert_array_equal(batch.x_ng, x_ng[rows[batch.index_n]])
    order = np.concatenate(epoch(one, 3))
    assert sorted(order) == list(range(350))
    assert {len(part) for part in epoch(one, 3)} <= {15, 16}
    np.testing.assert_array_equal(order, np.concatenate(epoch(minibatches(), 3)))  # resume is exact
    if shuffle:
        assert (order != np.concatenate(epoch(one, 4))).any()
        assert (order != np.concatenate(epoch(minibatches(seed=1), 3))).any()
    else:
        np.testing.assert_array_equal(order, np.arange(350))


def test_a_file_of_one_buffer_is_shuffled_as_a_whole(tiny_adata, tmp_path):
    adata = stored(tiny_adata, tmp_path / "a.h5ad")
    reading = Minibatches(Screen(adata), np.arange(400), 32, memory_budget_gb=0)
    for a, b in zip(epoch(reading, 1), epoch(Minibatches(Screen(adata), np.arange(400), 32), 1), strict=True):
        np.testing.assert_array_equal(a, b)


def test_blocks_are_dealt_from_every_stretch_of_the_file():
    rng = np.random.default_rng(0)
    order = _dealt(rng, 1000, 10, 5)
    assert sorted(order) == list(range(1000))
    buffer_of = np.empty(1000, dtype=int)
    buffer_of[order] = np.arange(1000) // 200
    for stretch in buffer_of.reshape(20, 50):  # five blocks of ten: one for each buffer
        assert sorted(stretch[::10]) == [0, 1, 2, 3, 4]
        assert (stretch.reshape(5, 10) == stretch[::10, None]).all()
    assert sorted(_dealt(rng, 1003, 10, 5)) == list(range(1003))


def sorted_by_condition(n_conditions, n_cells):
    """Cells of a file that is sorted by condition; x says which condition."""
    label_n = np.repeat(["non-targeting", *(f"T{c:02d}" for c in range(1, n_conditions))], n_cells)
    x_ng = np.repeat(np.arange(n_conditions), n_cells)[:, None] + np.ones((1, 2))
    adata = ad.AnnData(x_ng.astype(np.float32))
    adata.obs_names = [f"c{n}" for n in range(len(label_n))]
    adata.obs["target"] = label_n
    return adata


@pytest.mark.parametrize("batches_at_once", [32, 100])  # the epoch is eight buffers, or two and a half
def test_sorted_cells_mix_as_well_as_in_a_full_shuffle(tmp_path, monkeypatch, batches_at_once):
    # The number of cells of a condition in one batch, and in ten successive ones, varies from batch to batch
    # no more than when any cell may come next. Reading in order, it would vary 64 / 4 times as much.
    monkeypatch.setattr(disk, "BUFFER_BYTES", 8 * 64 * batches_at_once)
    monkeypatch.setattr(disk, "BLOCK_ROWS", 16)
    screen = Screen(stored(sorted_by_condition(16, 1024), tmp_path / "a.h5ad"))
    rows = np.arange(screen.n_cells)
    spreads = {}
    for name, budget in (("full", 1.0), ("disk", 0.0)):
        minibatches = Minibatches(screen, rows, 64, memory_budget_gb=budget)
        assert minibatches.is_resident == (name == "full")
        count_tc = np.array(
            [
                np.bincount(batch.condition_n, minlength=16)
                for number in range(4)
                for batch in minibatches.epoch(number)
            ]
        )
        ten_wc = count_tc[:1020].reshape(-1, 10, 16).sum(1)
        spreads[name] = np.array([count_tc.var(0).mean(), ten_wc.var(0).mean()])
    assert minibatches._per_buffer == batches_at_once and minibatches._n_block == 16
    assert (spreads["disk"] / spreads["full"] < 1.1).all()


def test_anchors_from_disk_are_control_cells_and_each_as_likely(tiny_adata, tmp_path, small_buffers):
    screen = Screen(stored(tiny_adata, tmp_path / "a.h5ad"), batch="batch")
    rows = np.arange(400)
    reading = Minibatches(screen, rows, 16, anchors="batch", memory_budget_gb=0)
    assert not reading._anchors.is_resident and reading._anchors.n_block == 2
    controls = np.flatnonzero(screen.condition_n == 0)
    drawn = np.zeros(len(controls))
    for number in range(20):
        for batch in reading.epoch(number):
            index = batch.control.index_n.numpy()
            np.testing.assert_array_equal(batch.control.x_ng, screen.x(controls[index]))
            np.testing.assert_array_equal(batch.control.batch_nb, batch.batch_nb)
            drawn += np.bincount(index, minlength=len(controls))
    for column in screen.batch_nb[controls].T > 0:  # a pool: 80 times, give or take 13
        assert (abs(drawn[column] / drawn[column].mean() - 1) < 0.6).all()


def test_anchors_stay_resident_where_cells_do_not_fit(tiny_adata, tmp_path):
    screen = Screen(stored(tiny_adata, tmp_path / "a.h5ad"))
    for_controls = 100 * 20 * 2 / 2**30
    reading = Minibatches(screen, np.arange(400), 16, anchors="random", memory_budget_gb=for_controls)
    assert not reading.is_resident and reading._anchors.is_resident
    controls = np.flatnonzero(screen.condition_n == 0)
    for batch in reading.epoch(0):
        np.testing.assert_array_equal(batch.control.x_ng, screen.x(controls[batch.control.index_n]))


def test_memory_does_not_grow_with_the_cells(tmp_path, monkeypatch):
    # The rows held at a time, by a reader that is asked for a whole epoch.
    monkeypatch.setattr(disk, "BUFFER_BYTES", 8 * 128)
    monkeypatch.setattr(disk, "PORTION_BYTES", 8 * 64)

    def most_rows(n_cells):
        screen = Screen(stored(sorted_by_condition(4, n_cells), tmp_path / f"{n_cells}.h5ad"))
        minibatches = Minibatches(screen, np.arange(4 * n_cells), 32, memory_budget_gb=0)
        taken, take = [], screen.matrix.disk.take
        monkeypatch.setattr(screen.matrix.disk, "take", lambda rows: taken.append(len(rows)) or take(rows))
        assert sum(batch.n_cells for batch in minibatches) == sum(taken) == 4 * n_cells
        return max(taken)

    assert most_rows(512) == most_rows(4096) == 128


# ---------------------------------------------------------------- damage


def damaged(tmp_path, tiny_adata, how):
    """A file that opens, with damage in the values of row 200 and after."""
    path = tmp_path / "a.h5ad"
    tiny_adata.write_h5ad(path, compression="gzip")
    with h5py.File(path, "a") as file:
        x = file["X"]
        data, indices = x["data"][:], x["indices"][:]
        del x["data"], x["indices"]
        if how == "column":
            indices[x["indptr"][200]] = 77
        if how == "short":
            data, indices = data[:-5], indices[:-5]
        x.create_dataset("data", data=data, chunks=(500,), compression="gzip")
        x.create_dataset("indices", data=indices)
        if how == "chunk":
            x["data"].id.write_direct_chunk((500 * (x["indptr"][200] // 500),), b"no gzip")
    return read(path, backed=True)


@pytest.mark.parametrize("how", ["chunk", "column", "short"])
def test_damage_names_file_and_rows(tiny_adata, tmp_path, how, monkeypatch):
    from pyro_causalcell.data import matrix

    monkeypatch.setattr(matrix, "CHUNK_VALUES", 20 * 50)
    adata = damaged(tmp_path, tiny_adata, how)
    places = {
        "chunk": "rows (150 to 199|200 to 249) of adata.X of .*a.h5ad",
        "column": "columns below 20 in rows 200 to 249 of adata.X of .*a.h5ad",
        "short": "400 successive rows in adata.X of .*a.h5ad, found .* cannot be read: there are .* values",
    }
    with pytest.raises(DataError, match=places[how] + "(.|\n)*fetch or write it again"):
        Screen(adata)


def test_damage_while_training_reaches_who_trains(tiny_adata, tmp_path, small_buffers):
    path = tmp_path / "a.zarr"
    screen = Screen(stored(tiny_adata, path))
    minibatches = Minibatches(screen, np.arange(400), 16, memory_budget_gb=0)
    assert len(list(minibatches)) == 25
    for chunk in (path / "X" / "data").glob("[0-9]*"):
        chunk.write_bytes(b"damage" * 100)
    with pytest.raises(DataError, match="rows .* of adata.X of .*a.zarr"):
        list(minibatches)
    shutil.rmtree(path)


# ---------------------------------------------------------------- ahead


def counted(made, stop=100, error_at=None):
    try:
        for i in range(stop):
            if i == error_at:
                raise DataError("damaged")
            made.append(i)
            yield i
    finally:
        made.append("closed")


def test_items_come_in_order_and_are_made_ahead():
    made = []
    items = ahead(counted(made, 10), 3)
    assert next(items) == 0
    limit = time.monotonic() + 10
    while len(made) < 4 and time.monotonic() < limit:
        time.sleep(0.001)
    time.sleep(0.02)
    assert made == [0, 1, 2, 3]  # the one in use and three more
    assert list(items) == list(range(1, 10))
    assert made[-1] == "closed"


def test_an_error_is_raised_where_its_item_is_asked_for():
    made = []
    items = ahead(counted(made, error_at=2), 5)
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(DataError, match="damaged"):
        next(items)
    assert made == [0, 1, "closed"]


def test_stopping_early_ends_the_threads(tiny_adata, tmp_path, small_buffers):
    before = threading.active_count()
    made = []
    items = ahead(ahead(counted(made), 1), 2)
    next(items)
    assert threading.active_count() == before + 2
    del items
    assert threading.active_count() == before and made[-1] == "closed" and len(made) < 10

    screen = Screen(stored(tiny_adata, tmp_path / "a.h5ad"))
    batches = Minibatches(screen, np.arange(400), 16, memory_budget_gb=0).epoch(0)
    next(batches)
    assert threading.active_count() == before + 2
    del batches
    assert threading.active_count() == before


def test_a_file_of_no_group_is_named(tmp_path):
    (tmp_path / "empty.zarr").mkdir()
    with pytest.raises(DataError, match="zarr cannot open"):
        read(tmp_path / "empty.zarr")
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(DataError, match=r"a zarr folder with obs and var, found .* without \['obs', 'var'\]"):
        read(tmp_path / "other.zarr")
    with pytest.raises(DataError, match="expected a zarr folder at"):
        read(tmp_path / "none.zarr")
