import json
import shutil

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pyro_causalcell.data import Screen, ScreenSpec, read
from pyro_causalcell.data import matrix as matrix_module
from pyro_causalcell.errors import DataError


def dense(adata):
    return adata.X.toarray()


def test_names_and_design(tiny_adata):
    screen = Screen(tiny_adata, batch="batch", guide="guide")
    assert screen.conditions == ["control", "A", "A+B", "B", "C", "D"]
    assert screen.targets == ["A", "B", "C", "D"]
    assert screen.batch_names == ["batch=b1", "batch=b2"]
    assert (screen.n_cells, screen.n_genes) == (400, 20)
    label_n = tiny_adata.obs["target"].astype(str).to_numpy()
    for target, column in zip("ABCD", screen.u_np.T, strict=True):
        np.testing.assert_array_equal(column, [float(target in label.split("+")) for label in label_n])
    assert screen.u_np.dtype == np.float32
    np.testing.assert_array_equal(
        np.array(screen.conditions)[screen.condition_n],
        np.where(label_n == "non-targeting", "control", label_n),
    )
    np.testing.assert_array_equal(screen.batch_nb[:, 1], tiny_adata.obs["batch"] == "b2")
    np.testing.assert_array_equal(screen.batch_nb.sum(1), 1)
    np.testing.assert_array_equal(screen.library_n, dense(tiny_adata).sum(1))
    assert screen.library_n.dtype == np.float32 and screen.condition_n.dtype == np.int64
    assert screen.guide_n.tolist() == tiny_adata.obs["guide"].tolist()


def test_order_of_targets_and_spellings_of_control_do_not_matter(tiny_adata):
    label_n = tiny_adata.obs["target"].astype(str).to_numpy(dtype=object)
    pairs = np.flatnonzero(label_n == "A+B")
    label_n[pairs[::2]] = "B+A"
    controls = np.flatnonzero(label_n == "non-targeting")
    label_n[controls[::2]] = "ctrl"
    label_n[np.flatnonzero(label_n == "C")] = "C+ctrl"
    plain = Screen(tiny_adata)
    tiny_adata.obs["mixed"] = label_n
    mixed = Screen(tiny_adata, "mixed", ["non-targeting", "ctrl"])
    assert mixed.conditions == plain.conditions
    np.testing.assert_array_equal(mixed.u_np, plain.u_np)
    np.testing.assert_array_equal(mixed.condition_n, plain.condition_n)


def test_design_of_unseen_conditions(tiny_screen):
    u_cp = tiny_screen.design(["D+B", "B+D", "control", "non-targeting", "A"])
    np.testing.assert_array_equal(u_cp, [[0, 1, 0, 1], [0, 1, 0, 1], [0] * 4, [0] * 4, [1, 0, 0, 0]])
    assert tiny_screen.canonical("D + B") == "B+D"
    assert tiny_screen.canonical("non-targeting") == "control"


def test_unknown_target_suggests_names():
    adata = ad.AnnData(
        np.ones((3, 2), dtype=np.float32),
        obs=pd.DataFrame({"target": ["IFNGR1", "STAT1", "NT"]}, index=list("abc")),
    )
    screen = Screen(adata, control="NT")
    with pytest.raises(DataError, match="'ifngr2': did you mean IFNGR1"):
        screen.design(["ifngr2"])
    with pytest.raises(DataError, match="the targets are IFNGR1, STAT1"):
        screen.design(["xyz"])
    with pytest.raises(DataError, match="pass \\['STAT1'\\]"):
        screen.design("STAT1")
    with pytest.raises(DataError, match="empty part"):
        screen.design(["STAT1+"])


@pytest.mark.parametrize(
    "kind", ["dense", "csr", "csc", "csr_array", "int", "uint", "backed-dense", "backed-csr", "backed-csc"]
)
def test_every_storage_gives_the_same_values(tiny_adata, tmp_path, kind, monkeypatch):
    monkeypatch.setattr(matrix_module, "CHUNK_VALUES", 20 * 64)  # several chunks
    x_ng = dense(tiny_adata)
    forms = {
        "dense": lambda x: x,
        "csr": sparse.csr_matrix,
        "csc": sparse.csc_matrix,
        "csr_array": sparse.csr_array,
        "int": lambda x: sparse.csr_matrix(x.astype(np.int32)),
        "uint": lambda x: x.astype(np.uint16),
    }
    tiny_adata.X = forms[kind.removeprefix("backed-")](x_ng)
    adata = tiny_adata
    if kind.startswith("backed"):
        tiny_adata.write_h5ad(tmp_path / "a.h5ad")
        adata = read(tmp_path / "a.h5ad", backed=True)
        assert not isinstance(adata.X, np.ndarray) and not sparse.issparse(adata.X)
    screen = Screen(adata)
    rows = np.array([7, 3, 399, 3, 0])
    np.testing.assert_array_equal(screen.x(rows), x_ng[rows])
    assert screen.x(rows).dtype == np.float32
    np.testing.assert_array_equal(screen.library_n, x_ng.sum(1))
    assert screen.is_counts and screen.max_value == x_ng.max()


def test_a_view_of_a_backed_file(tiny_adata, tmp_path):
    tiny_adata.write_h5ad(tmp_path / "a.h5ad")
    backed = read(tmp_path / "a.h5ad", backed=True)
    keep_n = (tiny_adata.obs["batch"] == "b1").to_numpy()
    part = Screen(backed[keep_n], batch="batch")
    np.testing.assert_array_equal(part.x(np.arange(part.n_cells)), dense(tiny_adata)[keep_n])
    again = Screen.from_spec(part.describe(), backed[keep_n, ::-1])
    np.testing.assert_array_equal(again.x(np.array([4, 2])), part.x(np.array([4, 2])))


def test_the_anndata_is_not_changed(tiny_adata):
    before = tiny_adata.copy()
    x = tiny_adata.X
    screen = Screen(tiny_adata, batch="batch", guide="guide")
    screen.x(np.arange(5))
    Screen.from_spec(screen.describe(), tiny_adata)
    assert tiny_adata.X is x
    np.testing.assert_array_equal(dense(tiny_adata), dense(before))
    pd.testing.assert_frame_equal(tiny_adata.obs, before.obs)
    pd.testing.assert_frame_equal(tiny_adata.var, before.var)


def test_dims_know_how_long_a_condition_goes_without_a_snapshot(tiny_adata):
    adata = tiny_adata[:6].copy()
    adata.obs["target"] = ["control", "control", "control", "A", "A", "A"]
    adata.obs["time"] = [1.0, 2.0, 4.0, 1.0, 4.0, 4.0]
    adata.obs["dose"] = 1.0
    screen = Screen(adata, "target", "control", time="time", allow_empty=True)
    assert screen.dims().longest_gap == 3.0 and not screen.dims().doses_vary
    assert screen.dims(np.arange(3)).longest_gap == 2.0
    seen = screen.dims(np.array([0, 1, 5]))
    assert seen.longest_gap == 1.0 and seen.latest_start == 4.0  # A is first seen long after the start
    assert Screen(adata, "target", "control", dose="dose", allow_empty=True).dims().doses_vary


def test_dims_count_the_fitted_cells(tiny_screen):
    dims = tiny_screen.dims()
    assert dims[:4] == (400, 20, 4, 2)
    assert dims.target_cells == (120.0, 120.0, 60.0, 60.0)
    rows = np.flatnonzero(tiny_screen.condition_n == tiny_screen.conditions.index("A+B"))
    assert tiny_screen.dims(rows).target_cells == (60.0, 60.0, 0.0, 0.0)
    assert tiny_screen.dims(rows).n_cells == 60


def test_doses_take_the_place_of_one(tiny_adata):
    label_n = tiny_adata.obs["target"].astype(str)
    tiny_adata.obs["dose"] = np.where(label_n == "A", 0.5, 2.0)
    screen = Screen(tiny_adata, dose="dose")
    u_np = screen.u_np
    np.testing.assert_array_equal(u_np[label_n == "A"][:, 0], 0.5)
    np.testing.assert_array_equal(u_np[label_n == "A+B"][:, :2], 2.0)
    np.testing.assert_array_equal(u_np[label_n == "non-targeting"], 0.0)
    assert screen.dims().target_cells[0] == 60 * 0.25 + 60 * 4
    tiny_adata.obs["dose"] = np.where(label_n == "A+B", "3+0.5", "1")
    u_np = Screen(tiny_adata, dose="dose").u_np
    np.testing.assert_array_equal(u_np[label_n == "A+B"][:, :2], np.tile([3, 0.5], (60, 1)))


@pytest.mark.parametrize("dose", [-1.0, 0.0, np.nan, "high", "1+2"])
def test_doses_that_cannot_be_used(tiny_adata, dose):
    tiny_adata.obs["dose"] = pd.Series([dose] * 400, index=tiny_adata.obs_names, dtype=object)
    with pytest.raises(DataError, match="one positive number"):
        Screen(tiny_adata, dose="dose")


def test_time_library_embeddings_gene_symbols(tiny_adata):
    tiny_adata.obs["hour"] = np.linspace(0, 48, 400)
    tiny_adata.obs["total"] = np.arange(1, 401)
    tiny_adata.var["symbol"] = [f"S{g}" for g in range(20)]
    table = pd.DataFrame({"e1": [1.0, 2, 3, 4, 5], "e2": 0.0}, index=["D", "C", "B", "A", "other"])
    screen = Screen(
        tiny_adata,
        time="hour",
        library="total",
        embeddings=table,
        gene_symbols="symbol",
        batch=["batch", "guide"],
    )
    np.testing.assert_allclose(screen.time_n, np.linspace(0, 48, 400), rtol=1e-6)
    np.testing.assert_array_equal(screen.library_n, np.arange(1, 401))
    np.testing.assert_array_equal(screen.embedding_pe[:, 0], [4, 3, 2, 1])
    assert screen.genes[0] == "S0"
    np.testing.assert_array_equal(screen.batch_nb.sum(1), 2)
    with pytest.raises(DataError, match="none for 1: A"):
        Screen(tiny_adata, embeddings=table.drop("A"))
    with pytest.raises(DataError, match="finite embeddings"):
        Screen(tiny_adata, embeddings=table.replace(0.0, np.nan))


def test_spec_survives_json(tiny_screen):
    spec = tiny_screen.describe()
    again = ScreenSpec.from_json(spec.to_json())
    assert again == spec
    assert again.condition_cells == {"control": 100, "A": 60, "A+B": 60, "B": 60, "C": 60, "D": 60}
    np.testing.assert_array_equal(again.design(["B+A"]), [[1, 1, 0, 0]])
    with pytest.raises(DataError, match="JSON"):
        ScreenSpec.from_json(spec.to_json()[:40])
    short = json.loads(spec.to_json())
    del short["genes"]
    with pytest.raises(DataError, match="with the fields"):
        ScreenSpec.from_json(json.dumps(short))


def test_from_spec_reorders_genes_and_keeps_the_fitted_width(tiny_adata, tiny_screen):
    other = tiny_adata[(tiny_adata.obs["target"] == "A") & (tiny_adata.obs["batch"] == "b1")].copy()
    other = other[:, ::-1].copy()
    screen = Screen.from_spec(tiny_screen.describe(), other)
    rows = np.flatnonzero(tiny_adata.obs_names.isin(other.obs_names))
    np.testing.assert_array_equal(screen.x(np.arange(len(rows))), tiny_screen.x(rows))
    np.testing.assert_array_equal(screen.library_n, tiny_screen.library_n[rows])
    assert screen.u_np.shape == (len(rows), 4) and screen.batch_nb.shape == (len(rows), 2)
    assert screen.conditions == tiny_screen.conditions
    assert (screen.condition_n == 1).all()


def test_from_spec_names_what_does_not_fit(tiny_adata, tiny_screen):
    spec = tiny_screen.describe()
    with pytest.raises(DataError, match="2 missing: gene0, gene1"):
        Screen.from_spec(spec, tiny_adata[:, 2:].copy())
    strange = tiny_adata.copy()
    strange.obs["batch"] = strange.obs["batch"].astype(str).replace("b2", "b9")
    with pytest.raises(DataError, match="not fitted: b9; the fitted ones are b1, b2"):
        Screen.from_spec(spec, strange)
    strange = tiny_adata.copy()
    strange.obs["target"] = strange.obs["target"].astype(str).replace({"D": "E", "C": "C+A"})
    with pytest.raises(DataError, match="not fitted: E; the targets are A, B, C, D"):
        Screen.from_spec(spec, strange)
    screen = Screen.from_spec(spec, strange, unknown="mark")
    unknown_n = (strange.obs["target"] == "E").to_numpy()
    np.testing.assert_array_equal(screen.condition_n == -1, unknown_n)
    assert (screen.u_np[unknown_n] == 0).all()
    assert screen.conditions == [*tiny_screen.conditions, "A+C"]
    np.testing.assert_array_equal(screen.u_np[(strange.obs["target"] == "C+A").to_numpy()][0], [1, 0, 1, 0])


def test_missing_column_lists_the_columns(tiny_adata):
    for settings in (
        {"perturbation": "x"},
        {"batch": "x"},
        {"time": "x"},
        {"dose": "x"},
        {"library": "x"},
        {"guide": "x"},
    ):
        name = next(iter(settings))
        with pytest.raises(DataError, match=rf"obs\['x'\] not found; columns are \['target', .*Pass {name}="):
            Screen(tiny_adata, **settings)
    with pytest.raises(DataError, match=r"var\['x'\] not found"):
        Screen(tiny_adata, gene_symbols="x")
    with pytest.raises(DataError, match=r"layers\['x'\] not found; layers are \[\]"):
        Screen(tiny_adata, layer="x")


def test_no_control_lists_frequent_values(tiny_adata):
    with pytest.raises(DataError, match=r"one of \['NT'\].*non-targeting \(100 cells\)"):
        Screen(tiny_adata, control="NT")
    with pytest.raises(DataError, match="no perturbed cells"):
        Screen(tiny_adata[tiny_adata.obs["target"] == "non-targeting"])


def test_a_screen_without_control_cells(tiny_adata):
    screen = Screen(tiny_adata[tiny_adata.obs["target"] != "non-targeting"], control=None)
    assert screen.conditions == ["control", "A", "A+B", "B", "C", "D"]
    assert screen.describe().condition_cells["control"] == 0
    np.testing.assert_array_equal(screen.design(["control", "B"]), [[0] * 4, [0, 1, 0, 0]])


def test_small_conditions_are_listed(tiny_adata):
    few = tiny_adata[
        np.r_[
            np.flatnonzero(tiny_adata.obs["target"] != "D"),
            np.flatnonzero(tiny_adata.obs["target"] == "D")[:3],
        ]
    ]
    Screen(few, min_cells=3)
    with pytest.raises(DataError, match=r"at least 10 cells.*fewer in 1: D \(3\)"):
        Screen(few, min_cells=10)


@pytest.mark.parametrize("backed", [False, True])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite(tiny_adata, tmp_path, value, backed, monkeypatch):
    monkeypatch.setattr(matrix_module, "CHUNK_VALUES", 20 * 64)
    x_ng = dense(tiny_adata)
    x_ng[301, 7] = value
    tiny_adata.X = x_ng
    adata = tiny_adata
    if backed:
        tiny_adata.write_h5ad(tmp_path / "a.h5ad")
        adata = read(tmp_path / "a.h5ad", backed=True)
    with pytest.raises(DataError, match=f"cell '{tiny_adata.obs_names[301]}', gene 'gene7'"):
        Screen(adata)


def test_empty_cells_and_genes_need_a_word(tiny_adata):
    x_ng = dense(tiny_adata)
    x_ng[:3] = 0
    tiny_adata.X = sparse.csr_matrix(x_ng)
    with pytest.raises(DataError, match="3 of 400 cells have zeros only.*filter_cells.*allow_empty=True"):
        Screen(tiny_adata)
    assert Screen(tiny_adata, allow_empty=True).library_n[:3].tolist() == [1, 1, 1]
    x_ng = dense(tiny_adata)
    x_ng[:3] = 1
    x_ng[:, 4:6] = 0
    tiny_adata.X = x_ng
    with pytest.raises(DataError, match="2 of 20 genes are zero.*filter_genes.*allow_empty=True"):
        Screen(tiny_adata)
    assert Screen(tiny_adata, allow_empty=True).n_genes == 20


def test_repeated_names(tiny_adata):
    names = tiny_adata.var_names.to_list()
    tiny_adata.var_names = ["gene1", *names[1:]]
    with pytest.raises(
        DataError, match=r"unique gene names, found 1 that repeat: gene1.*var_names_make_unique"
    ):
        Screen(tiny_adata)
    tiny_adata.var_names = names
    tiny_adata.obs_names = ["cell1"] * 400
    with pytest.raises(DataError, match=r"unique cell names.*obs_names_make_unique"):
        Screen(tiny_adata)


def test_missing_values_in_columns(tiny_adata):
    tiny_adata.obs["holes"] = tiny_adata.obs["target"].astype(object).where(np.arange(400) > 4)
    with pytest.raises(DataError, match="5 missing of 400"):
        Screen(tiny_adata, "holes")
    with pytest.raises(DataError, match="as numbers, or as text with one unit.*found 'b[12]'"):
        Screen(tiny_adata, time="batch")
    tiny_adata.obs["total"] = 0
    with pytest.raises(DataError, match="400 cells at or below 0"):
        Screen(tiny_adata, library="total")
    with pytest.raises(DataError, match="separator"):
        Screen(tiny_adata, separator="")


def test_counts_and_normalised_values_are_told_apart(tiny_adata):
    counts = Screen(tiny_adata)
    counts.require_counts()
    assert counts.counts_hint() == "X"
    with pytest.raises(DataError, match=r"integers only, up to .*pass layer=, or use a count"):
        counts.require_normalised()
    tiny_adata.layers["umi"] = tiny_adata.X.copy()
    tiny_adata.X = np.log1p(dense(tiny_adata))
    logged = Screen(tiny_adata)
    logged.require_normalised()
    assert not logged.is_counts and logged.counts_hint() == "umi"
    with pytest.raises(DataError, match=r"layers\['umi'\] looks like counts: pass layer='umi'"):
        logged.require_counts()
    Screen(tiny_adata, layer="umi").require_counts()
    tiny_adata.raw = ad.AnnData(tiny_adata.layers.pop("umi"), tiny_adata.obs, tiny_adata.var)
    with pytest.raises(DataError, match=r"adata.raw.to_adata\(\)"):
        Screen(tiny_adata).require_counts()
    tiny_adata.raw = None
    with pytest.raises(DataError, match="no layer looks like counts"):
        Screen(tiny_adata).require_counts()


def test_negative_values_are_no_counts(tiny_adata):
    x_ng = dense(tiny_adata)
    x_ng[5, 5] = -3
    tiny_adata.X = x_ng
    with pytest.raises(DataError, match=r"adata.X holds -3"):
        Screen(tiny_adata).require_counts()


def test_x_of_a_kind_that_cannot_be_read(tiny_adata):
    tiny_adata.layers["text"] = np.full((400, 20), "a", dtype=object)
    with pytest.raises(DataError, match="expected numbers in layers"):
        Screen(tiny_adata, layer="text")
    with pytest.raises(DataError, match="found list; convert it"):
        matrix_module.Matrix([[1.0]], None, "adata.X")
    bare = ad.AnnData(obs=tiny_adata.obs, var=tiny_adata.var, layers={"counts": dense(tiny_adata)})
    with pytest.raises(DataError, match=r"adata.X is empty; layers are \['counts'\]"):
        Screen(bare)
    with pytest.raises(DataError, match="found an AnnData of 0 x 20"):
        Screen(tiny_adata[:0])


def test_read_says_what_is_wrong_with_a_file(tiny_adata, tmp_path):
    good = tmp_path / "good.h5ad"
    tiny_adata.write_h5ad(good)
    assert read(good).shape == (400, 20)
    with pytest.raises(DataError, match="found none"):
        read(tmp_path / "none.h5ad")
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    with pytest.raises(DataError, match="cut short or of another format"):
        read(cut)
    foreign = tmp_path / "foreign.h5ad"
    foreign.write_text("cell,gene\n")
    with pytest.raises(DataError, match="cut short or of another format"):
        read(foreign)
    import h5py

    with h5py.File(tmp_path / "other.h5ad", "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match=r"without \['obs', 'var'\]"):
        read(tmp_path / "other.h5ad")
    broken = tmp_path / "broken.h5ad"
    shutil.copy(good, broken)
    with h5py.File(broken, "a") as file:
        del file["obs"]
        file["obs"] = 3
    with pytest.raises(DataError, match="anndata cannot read it"):
        read(broken)


def test_repr_says_what_it_holds(tiny_screen):
    assert repr(tiny_screen).startswith(
        "Screen(400 cells x 20 genes of counts; 6 conditions, 4 targets, 2 batch"
    )
