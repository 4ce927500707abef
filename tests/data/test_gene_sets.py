"""GMT files against the genes of a screen."""

import pytest

from pyro_causalcell.data import gene_sets, read_gmt
from pyro_causalcell.errors import DataError

GENES = ["A", "B", "C", "D"]


@pytest.fixture
def gmt(tmp_path):
    path = tmp_path / "sets.gmt"
    path.write_text("one\thttp://x\tC\tA\tC\tZ\n\ntwo\t\tB\tD\ttail\nthree\tnone\tY\tA\t\n")
    return path


def test_sets_become_columns(gmt):
    assert gene_sets(gmt, GENES, min_genes=2) == {"one": [0, 2], "two": [1, 3]}
    assert gene_sets(gmt, GENES, min_genes=1)["three"] == [0]


def test_file_is_read_in_order_each_gene_once(gmt):
    assert read_gmt(gmt) == {"one": ["C", "A", "Z"], "two": ["B", "D", "tail"], "three": ["Y", "A"]}


def test_names_that_do_not_match_are_told(gmt):
    with pytest.raises(DataError, match=r"found 0 at most; the screen calls its genes E1, E2"):
        gene_sets(gmt, ["E1", "E2"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"one,desc,A,B\n", "line 1"),
        (b"one\tdesc\tA\none\tdesc\tB\n", "'one' twice"),
        (b"\n", "empty file"),
        (b"\x1f\x8b\x08\xff\xfe", "other bytes"),
    ],
)
def test_other_files_are_refused(tmp_path, content, said):
    path = tmp_path / "bad.gmt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_gmt(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match="found none"):
        read_gmt(tmp_path / "no.gmt")
