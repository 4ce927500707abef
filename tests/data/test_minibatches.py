import numpy as np
import pytest
import torch

from pyro_causalcell.data import Minibatches, Screen, read
from pyro_causalcell.data import minibatches as minibatches_module
from pyro_causalcell.errors import DataError

ROWS = np.arange(5, 400, 3)


def test_an_epoch_holds_every_cell_once(tiny_screen):
    minibatches = Minibatches(tiny_screen, ROWS, 32)
    batches = list(minibatches.epoch(2))
    assert len(batches) == len(minibatches) == 5
    index = torch.cat([b.index_n for b in batches])
    assert sorted(index.tolist()) == list(range(len(ROWS)))
    sizes = [b.n_cells for b in batches]
    assert max(sizes) <= 32 and max(sizes) - min(sizes) <= 1
    assert {b.n_total for b in batches} == {len(ROWS)}


def test_the_fields_of_a_batch_belong_to_its_cells(tiny_adata):
    tiny_adata.obs["hour"] = np.arange(400)
    screen = Screen(tiny_adata, batch="batch", time="hour")
    for batch in Minibatches(screen, ROWS, 50, seed=1):
        rows = ROWS[batch.index_n.numpy()]
        np.testing.assert_array_equal(batch.x_ng, screen.x(rows))
        np.testing.assert_array_equal(batch.u_np, screen.u_np[rows])
        np.testing.assert_array_equal(batch.library_n1[:, 0], screen.library_n[rows])
        np.testing.assert_array_equal(batch.batch_nb, screen.batch_nb[rows])
        np.testing.assert_array_equal(batch.condition_n, screen.condition_n[rows])
        np.testing.assert_array_equal(batch.time_n, rows)
        for field in (batch.x_ng, batch.u_np, batch.library_n1, batch.batch_nb, batch.time_n):
            assert field.dtype == torch.float32
        assert batch.condition_n.dtype == batch.index_n.dtype == torch.long
        assert batch.library_n1.shape == (len(rows), 1)
        assert batch.control is None


@pytest.mark.parametrize("budget", [4.0, 0.0])
@pytest.mark.parametrize("anchors", [None, "random"])
def test_a_part_of_every_minibatch_is_made(tiny_screen, anchors, budget, monkeypatch):
    """As for the last of three processes: its cells and anchors are the same, and no others are read."""
    settings = {"anchors": anchors, "memory_budget_gb": budget, "seed": 3}
    taken, take = [], type(tiny_screen.matrix).take
    whole = list(Minibatches(tiny_screen, ROWS, 32, **settings).epoch(1))
    part = Minibatches(tiny_screen, ROWS, 32, part=lambda n: slice(2 * n // 3, n), **settings)
    assert part.sizes == [batch.n_cells for batch in whole]
    monkeypatch.setattr(
        type(tiny_screen.matrix), "take", lambda self, rows: taken.append(len(rows)) or take(self, rows)
    )
    for own, batch in zip(part.epoch(1), whole, strict=True):
        rows = slice(2 * batch.n_cells // 3, batch.n_cells)
        for name in ("x_ng", "u_np", "library_n1", "condition_n", "index_n"):
            assert torch.equal(getattr(own, name), getattr(batch, name)[rows])
            if anchors:
                assert torch.equal(getattr(own.control, name), getattr(batch.control, name)[rows])
        assert own.n_total == batch.n_total
    assert max(taken, default=0) <= 11


def test_order_depends_on_seed_and_epoch_only(tiny_screen):
    def order(seed, epoch, **settings):
        batches = Minibatches(tiny_screen, ROWS, 32, seed=seed, **settings).epoch(epoch)
        return torch.cat([b.index_n for b in batches]).tolist()

    first = Minibatches(tiny_screen, ROWS, 32, seed=0)
    list(first.epoch(0)), list(first.epoch(1))
    assert torch.cat([b.index_n for b in first.epoch(7)]).tolist() == order(0, 7)
    assert order(0, 7) != order(0, 8) and order(0, 7) != order(1, 7)
    assert order(0, 3, memory_budget_gb=0) == order(0, 3)
    assert order(0, 3, shuffle=False) == list(range(len(ROWS)))


def test_designs_come_back_from_the_targets_that_they_hold(tiny_adata):
    """Doses of single targets, combinations and control, which are kept as lists of targets."""
    label_n = tiny_adata.obs["target"].to_numpy()
    tiny_adata.obs["dose"] = np.where(label_n == "A+B", "3+0.5", "2")
    screen = Screen(tiny_adata, dose="dose")
    for batch in Minibatches(screen, ROWS, 50):
        rows = ROWS[batch.index_n.numpy()]
        expected_np = np.zeros((len(rows), 4), np.float32)
        for n, label in enumerate(label_n[rows]):
            for target in [] if label == "non-targeting" else label.split("+"):
                expected_np[n, "ABCD".index(target)] = {"A": 3, "B": 0.5}[target] if label == "A+B" else 2
        np.testing.assert_array_equal(batch.u_np, expected_np)


def test_what_cells_and_anchors_leave_of_the_budget(tiny_screen):
    n_controls = int((tiny_screen.condition_n[ROWS] == 0).sum())
    bytes_each = 2 * tiny_screen.n_genes  # int16
    budget = (len(ROWS) + n_controls + 7) * bytes_each / 2**30
    both = Minibatches(tiny_screen, ROWS, 50, anchors="random", memory_budget_gb=budget)
    assert both.memory_left_gb * 2**30 == pytest.approx(7 * bytes_each)
    reading = Minibatches(tiny_screen, ROWS, 50, memory_budget_gb=1e-9)
    assert not reading.is_resident and reading.memory_left_gb == pytest.approx(1e-9)


def test_counts_are_held_in_the_smallest_safe_type(tiny_adata):
    def resident_type(largest, scale=1.0):
        x_ng = tiny_adata.X.toarray() * scale
        x_ng[0, 0] = largest
        tiny_adata.layers["x"] = x_ng
        screen = Screen(tiny_adata, layer="x")
        minibatches = Minibatches(screen, np.arange(400), 400, shuffle=False)
        np.testing.assert_array_equal(next(iter(minibatches)).x_ng, x_ng)
        return minibatches._cells._x_ng.dtype

    assert resident_type(32767) == torch.int16
    assert resident_type(32768) == torch.int32
    assert resident_type(2.0**31) == torch.float32
    assert resident_type(0.5, scale=0.5) == torch.float32


def test_rows_are_read_where_they_do_not_fit(tiny_adata, tmp_path):
    tiny_adata.write_h5ad(tmp_path / "a.h5ad")
    backed = read(tmp_path / "a.h5ad", backed=True)
    resident = Minibatches(Screen(tiny_adata), ROWS, 32)
    assert resident.is_resident
    for adata in (tiny_adata, backed):
        reading = Minibatches(Screen(adata), ROWS, 32, memory_budget_gb=1e-6)
        assert not reading.is_resident
        for a, b in zip(resident.epoch(1), reading.epoch(1), strict=True):
            torch.testing.assert_close(a.x_ng, b.x_ng, rtol=0, atol=0)
            torch.testing.assert_close(a.u_np, b.u_np, rtol=0, atol=0)


def test_a_device_without_room_halves_the_budget(tiny_screen, monkeypatch):
    def full(cells, dtype):
        raise torch.OutOfMemoryError("CUDA out of memory")

    expected = list(Minibatches(tiny_screen, ROWS, 32).epoch(1))
    filled = minibatches_module._Cells._filled
    with monkeypatch.context() as patch:
        patch.setattr(minibatches_module._Cells, "_filled", full)
        with pytest.warns(UserWarning, match="cpu has no room for .* reads the cells batch by batch"):
            reading = Minibatches(tiny_screen, ROWS, 32)
    assert not reading.is_resident and reading._cells.bytes_left == len(ROWS) * 20 * 2 / 2
    for a, b in zip(expected, reading.epoch(1), strict=True):
        torch.testing.assert_close(a.x_ng, b.x_ng, rtol=0, atol=0)

    # Half of what the cells took is enough for the anchors.
    attempts = []
    monkeypatch.setattr(
        minibatches_module._Cells,
        "_filled",
        lambda cells, dtype: filled(cells, dtype) if attempts else attempts.append(1) or full(cells, dtype),
    )
    with pytest.warns(UserWarning, match="no room"):
        reading = Minibatches(tiny_screen, ROWS, 32, anchors="random")
    assert not reading.is_resident and reading._anchors.is_resident


def test_only_a_lack_of_memory_is_met_by_reading(tiny_screen, monkeypatch):
    with pytest.raises(RuntimeError) as no_room:
        torch.empty(2**55)
    assert minibatches_module._is_out_of_memory(no_room.value)

    def broken(cells, dtype):
        raise RuntimeError("device-side assert triggered")

    monkeypatch.setattr(minibatches_module._Cells, "_filled", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        Minibatches(tiny_screen, ROWS, 32)


def test_mistakes_are_named(tiny_screen):
    with pytest.raises(DataError, match="rows between 0 and 399"):
        Minibatches(tiny_screen, np.array([400]), 10)
    with pytest.raises(DataError, match="rows between 0 and 399"):
        Minibatches(tiny_screen, np.array([], dtype=int), 10)
    with pytest.raises(DataError, match="batch size"):
        Minibatches(tiny_screen, ROWS, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_batches_on_a_gpu(tiny_screen):
    on_cpu = Minibatches(tiny_screen, ROWS, 32, seed=2)
    for budget in (4.0, 0.0):
        on_gpu = Minibatches(tiny_screen, ROWS, 32, seed=2, device="cuda", memory_budget_gb=budget)
        for a, b in zip(on_cpu.epoch(1), on_gpu.epoch(1), strict=True):
            assert b.x_ng.is_cuda and b.u_np.is_cuda and b.index_n.is_cuda
            torch.testing.assert_close(a.x_ng, b.x_ng.cpu(), rtol=0, atol=0)


@pytest.fixture
def twinned(tiny_adata):
    tiny_adata.layers["twin"] = tiny_adata.X.toarray()[::-1] + 1.0
    return Screen(tiny_adata, batch="batch", twin="twin")


@pytest.mark.parametrize("budget", [4.0, 1e-6])
def test_anchors_are_control_cells_of_the_same_batch(twinned, budget):
    batches = Minibatches(twinned, ROWS, 32, anchors="batch", memory_budget_gb=budget)
    seen = []
    for batch in batches.epoch(1):
        anchor = batch.control
        assert anchor is not None and anchor.n_cells == batch.n_cells
        np.testing.assert_array_equal(anchor.batch_nb, batch.batch_nb)
        assert not anchor.u_np.any() and not anchor.condition_n.any()
        controls = ROWS[twinned.condition_n[ROWS] == 0]
        rows = controls[anchor.index_n.numpy()]
        np.testing.assert_array_equal(anchor.x_ng, twinned.x(rows))
        np.testing.assert_array_equal(anchor.library_n1[:, 0], twinned.library_n[rows])
        seen += rows.tolist()
    assert len(set(seen)) > 0.8 * len(controls)  # drawn, not one for all


def test_anchors_depend_on_seed_and_epoch_only(tiny_screen):
    def drawn(epoch, **settings):
        batches = Minibatches(tiny_screen, ROWS, 32, anchors="random", **settings).epoch(epoch)
        return torch.cat([b.control.index_n for b in batches]).tolist()

    assert drawn(2) == drawn(2) != drawn(3)
    assert drawn(2, seed=1) != drawn(2)


def test_twins_come_with_their_cells(twinned):
    for batch in Minibatches(twinned, ROWS, 32, anchors="twin").epoch(0):
        rows = ROWS[batch.index_n.numpy()]
        np.testing.assert_array_equal(batch.control.x_ng, twinned.twin_x(rows))
        np.testing.assert_allclose(batch.control.library_n1[:, 0], twinned.twin_x(rows).sum(1))
        assert not batch.control.u_np.any() and not batch.control.condition_n.any()


def test_cells_without_an_anchor_are_named(tiny_adata, tiny_screen):
    perturbed = np.flatnonzero(tiny_screen.condition_n)
    with pytest.raises(DataError, match="none among the training cells; pass control="):
        Minibatches(tiny_screen, perturbed, 32, anchors="random")
    with pytest.raises(DataError, match="open the screen with twin="):
        Minibatches(tiny_screen, ROWS, 32, anchors="twin")
    tiny_adata.obs["lane"] = np.where(np.arange(400) == perturbed[0], "lonely", "full")
    with pytest.raises(DataError, match="found none in lane=lonely.*anchors='random'"):
        Minibatches(Screen(tiny_adata, batch="lane"), np.arange(400), 32, anchors="batch")


def test_twins_of_another_kind_are_refused(tiny_adata):
    tiny_adata.layers["twin"] = np.log1p(tiny_adata.X.toarray())
    with pytest.raises(DataError, match="expected counts in the twins'"):
        Screen(tiny_adata, twin="twin")
