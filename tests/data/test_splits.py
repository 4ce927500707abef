import numpy as np
import pytest

from pyro_causalcell.data import (
    Screen,
    Split,
    held_out_batches,
    held_out_combinations,
    held_out_guides,
    held_out_perturbations,
    held_out_times,
    random_cells,
)
from pyro_causalcell.errors import DataError


def check_whole(split, n_cells):
    rows = np.concatenate([split.train, split.validation, split.test])
    assert sorted(rows) == list(range(n_cells))
    for part in (split.train, split.validation, split.test):
        assert part.dtype == np.int64 and (np.diff(part) > 0).all()


def conditions_of(screen, rows):
    return {screen.conditions[c] for c in screen.condition_n[rows]}


def test_random_cells_are_stratified(tiny_screen):
    split = random_cells(tiny_screen, validation=0.1, test=0.2, seed=3)
    check_whole(split, 400)
    assert abs(len(split.validation) - 40) <= 1 and abs(len(split.test) - 80) <= 1
    for c, n in enumerate([100, 60, 60, 60, 60, 60]):
        assert abs((tiny_screen.condition_n[split.test] == c).sum() - 0.2 * n) <= 1
        assert abs((tiny_screen.condition_n[split.validation] == c).sum() - 0.1 * n) <= 2


def test_seeds_repeat_and_differ(tiny_screen):
    first, same, other = (random_cells(tiny_screen, seed=s) for s in (0, 0, 1))
    np.testing.assert_array_equal(first.validation, same.validation)
    assert not np.array_equal(first.validation, other.validation)


@pytest.mark.parametrize("seed", range(5))
def test_every_condition_keeps_a_training_cell(tiny_adata, seed):
    label_n = tiny_adata.obs["target"].to_numpy()
    keep = np.concatenate(
        [np.flatnonzero(label_n == label)[:n] for label, n in (("non-targeting", 9), ("A", 2), ("B", 1))]
    )
    screen = Screen(tiny_adata[keep], allow_empty=True)
    split = random_cells(screen, validation=0.45, test=0.5, seed=seed)
    check_whole(split, 12)
    assert conditions_of(screen, split.train) == {"control", "A", "B"}


def test_held_out_perturbations_take_their_combinations_along(tiny_screen):
    split = held_out_perturbations(tiny_screen, ["A"])
    check_whole(split, 400)
    assert conditions_of(tiny_screen, split.test) == {"A", "A+B"}
    assert conditions_of(tiny_screen, split.train) == {"control", "B", "C", "D"}
    assert len(split.test) == 120 and split.settings["held_out"] == ["A"]
    drawn = held_out_perturbations(tiny_screen, 0.5, seed=4)
    assert len(drawn.settings["held_out"]) == 2


def test_held_out_combinations_keep_the_singles(tiny_screen):
    for conditions in (["B+A"], 0.5):
        split = held_out_combinations(tiny_screen, conditions)
        check_whole(split, 400)
        assert conditions_of(tiny_screen, split.test) == {"A+B"}
        assert conditions_of(tiny_screen, split.train) == {"control", "A", "B", "C", "D"}


def test_held_out_guides(tiny_screen):
    split = held_out_guides(tiny_screen, ["C_g1"])
    check_whole(split, 400)
    assert set(tiny_screen.guide_n[split.test]) == {"C_g1"}
    assert "C_g1" not in tiny_screen.guide_n[np.r_[split.train, split.validation]]
    drawn = held_out_guides(tiny_screen, 0.9, seed=1)
    assert conditions_of(tiny_screen, drawn.train) == set(tiny_screen.conditions)
    assert conditions_of(tiny_screen, drawn.test) == set(tiny_screen.conditions) - {"control"}


def test_held_out_batches(tiny_screen):
    split = held_out_batches(tiny_screen, "batch", ["b2"], validation=0.0)
    check_whole(split, 400)
    assert len(split.validation) == 0
    assert set(tiny_screen.adata.obs["batch"].iloc[split.test]) == {"b2"}
    assert set(tiny_screen.adata.obs["batch"].iloc[split.train]) == {"b1"}
    assert split.settings["column"] == "batch"


def test_save_load_print(tiny_screen, tmp_path):
    split = held_out_perturbations(tiny_screen, ["B"], seed=7)
    path = tmp_path / "split.npz"
    split.save(path)
    again = Split.load(path)
    assert (again.name, again.seed, again.settings) == (split.name, 7, split.settings)
    for part in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(again, part), getattr(split, part))
    assert repr(again) == repr(split)
    assert "held_out_perturbations: 252 training, 28 validation, 120 test" in repr(split)
    assert [p.name for p in tmp_path.iterdir()] == ["split.npz"]


def test_split_files_that_cannot_be_read(tiny_screen, tmp_path):
    path = tmp_path / "split.npz"
    with pytest.raises(DataError, match="cannot read"):
        Split.load(path)
    random_cells(tiny_screen).save(path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match="cannot read"):
        Split.load(path)
    np.savez(path, train=np.arange(3))
    with pytest.raises(DataError, match="cannot read"):
        Split.load(path)
    path.write_text("no archive")
    with pytest.raises(DataError, match="cannot read"):
        Split.load(path)


def test_mistakes_are_named(tiny_adata, tiny_screen):
    with pytest.raises(DataError, match="sum below 1"):
        random_cells(tiny_screen, 0.5, 0.5)
    with pytest.raises(DataError, match="unknown target 'E'"):
        held_out_perturbations(tiny_screen, ["E"])
    with pytest.raises(DataError, match="fraction between 0 and 1"):
        held_out_perturbations(tiny_screen, 1.5)
    with pytest.raises(DataError, match="empty list"):
        held_out_perturbations(tiny_screen, [])
    with pytest.raises(DataError, match="validation between"):
        held_out_perturbations(tiny_screen, ["A"], validation=1.0)
    with pytest.raises(DataError, match="unknown combination 'C'"):
        held_out_combinations(tiny_screen, ["C"])
    with pytest.raises(DataError, match="only single ones"):
        held_out_combinations(Screen(tiny_adata[tiny_adata.obs["target"] != "A+B"]), 0.5)
    with pytest.raises(DataError, match="pass guide="):
        held_out_guides(Screen(tiny_adata), 0.5)
    with pytest.raises(DataError, match="more than one guide"):
        held_out_guides(Screen(tiny_adata[tiny_adata.obs["guide"].str.endswith("g1")], guide="guide"), 0.5)
    with pytest.raises(DataError, match=r"obs\['lane'\] not found; columns are \['target'"):
        held_out_batches(tiny_screen, "lane", ["x"])
    with pytest.raises(DataError, match="nothing is left"):
        held_out_batches(tiny_screen, "batch", ["b1", "b2"])


def test_held_out_times(tiny_adata):
    tiny_adata.obs["hour"] = np.arange(tiny_adata.n_obs) % 4 / 10
    screen = Screen(tiny_adata, time="hour")
    split = held_out_times(screen, [0.1, 0.3], validation=0.1, seed=1)
    check_whole(split, 400)
    assert set(np.round(screen.time_n[split.test], 1).tolist()) == {np.float32(0.1), np.float32(0.3)}
    assert len(split.test) == 200 and len(split.validation) == 20
    assert held_out_times(screen, 0.2, validation=0.0).settings["held_out"] == [0.2]
    with pytest.raises(DataError, match=r"found \[5.0\]; the screen has 0.0, 0.1"):
        held_out_times(screen, [0.1, 5])
    with pytest.raises(DataError, match="nothing is left"):
        held_out_times(screen, [0, 0.1, 0.2, 0.3])
    with pytest.raises(DataError, match="pass time="):
        held_out_times(Screen(tiny_adata), 0.1)
