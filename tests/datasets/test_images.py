import numpy as np
import pytest

from pyro_causalcell.datasets import read_causal3dident
from pyro_causalcell.errors import DataError
from pyro_causalcell.simulate import scenes


def arrays(n=7):
    """A file of the published form: column 5 (gamma) and the material do not vary."""
    rng = np.random.default_rng(0)
    raw_nf = rng.uniform(0, 2, (n, 10)).astype(np.float32)
    raw_nf[:, 5] = 0
    set_nf = np.zeros((n - 1, 12), dtype=np.int64)
    set_nf[1, :3] = 1
    set_nf[2, 3:6] = 1
    set_nf[4, 10] = 1
    return {
        "imgs": rng.integers(0, 255, (n, 8, 8, 4), dtype=np.uint8),
        "raw_latents": raw_nf,
        "shape_latents": np.column_stack([rng.integers(7, size=n), np.zeros(n)]).astype(np.uint8),
        "interventions": set_nf,
    }


def test_columns_and_targets_are_those_of_the_scenes(tmp_path):
    file = arrays()
    np.savez(tmp_path / "test.npz", **file)
    data = read_causal3dident(tmp_path / "test.npz")
    own = scenes(2, length=2, size=8)
    assert data.factor.values.tolist() == own.factor.values.tolist()
    for name in ("image", "factors", "target"):
        assert data[name].dims == own[name].dims
    np.testing.assert_array_equal(data.image[0], file["imgs"][..., :3])
    np.testing.assert_allclose(data.factors[0].sel(factor="rot_spot"), file["raw_latents"][:, 6])
    np.testing.assert_array_equal(data.factors[0].sel(factor="shape"), file["shape_latents"][:, 0])
    # Row i of the file is what led to scene i + 1.
    assert data.target[0].sel(factor="pos_y").values.nonzero()[0].tolist() == [2]
    assert data.target[0].sel(factor="rot_beta").values.nonzero()[0].tolist() == [3]
    assert data.target[0].sel(factor="shape").values.nonzero()[0].tolist() == [5]


def test_sequences_are_cut_and_the_rest_is_counted(tmp_path):
    file = arrays()
    np.savez(tmp_path / "train.npz", **file)
    data = read_causal3dident(tmp_path / "train.npz", length=3)
    assert data.image.shape == (2, 3, 8, 8, 3) and data.attrs["left_out"] == 1
    np.testing.assert_array_equal(data.image[1, 0], file["imgs"][3, ..., :3])
    assert data.target[1, 0].sel(factor="rot_alpha")


def without(name):
    file = arrays()
    del file[name]
    return file


@pytest.mark.parametrize(
    ("file", "length", "words"),
    [
        (without("raw_latents"), None, "raw_latents"),
        (arrays() | {"interventions": np.zeros((3, 12))}, None, "n - 1, 12"),
        (arrays() | {"raw_latents": np.random.default_rng(0).random((7, 10))}, None, "rot_gamma"),
        (arrays(), 8, "between 1 and the 7 scenes"),
    ],
)
def test_other_files_are_refused(tmp_path, file, length, words):
    np.savez(tmp_path / "x.npz", **file)
    with pytest.raises(DataError, match=words):
        read_causal3dident(tmp_path / "x.npz", length=length)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="expected an npz file"):
        read_causal3dident(tmp_path / "none.npz")
