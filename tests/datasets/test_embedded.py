import numpy as np

from pyro_causalcell.data import Screen
from pyro_causalcell.datasets import norman2019_subset, papalexi2021, semrau2017


def test_papalexi2021_is_a_screen_of_counts():
    adata = papalexi2021()
    assert adata.shape == (20729, 299)
    screen = Screen(adata, batch="bio_rep", guide="guide", min_cells=40)
    screen.require_counts()
    assert len(screen.targets) == 25
    assert screen.describe().condition_cells["control"] == 2386
    assert screen.batch_names == ["bio_rep=rep_1", "bio_rep=rep_2", "bio_rep=rep_3"]
    assert {"IFNGR1", "IFNGR2", "JAK2", "STAT1", "SMAD4"} <= set(screen.targets)


def test_norman2019_subset_leaves_out_two_cells_and_says_so():
    adata = norman2019_subset()
    assert adata.shape == (3373, 120)
    assert list(adata.uns["dropped_cells"].values()) == [2]
    assert adata.obs["recov_err"].max() < 1e-9
    screen = Screen(adata, "perturbation", "control", layer="counts", batch="gemgroup", library="ncounts")
    screen.require_counts()
    combinations = [c for c in screen.conditions if "+" in c]
    assert len(combinations) == 15 and len(screen.conditions) == 34
    assert "KLF1+MAP2K6" in combinations
    Screen(adata, "perturbation", "control").require_normalised()
    # log1p of counts per 10,000 of the true depth, as PROVENANCE.md says
    x_ng = np.log1p(screen.x(np.arange(3373)) / screen.library_n[:, None] * 1e4)
    assert np.corrcoef(x_ng.ravel(), adata.X.toarray().ravel())[0, 1] > 0.999


def test_semrau2017_is_a_time_course_of_counts():
    adata = semrau2017()
    assert adata.shape == (2449, 41)
    screen = Screen(adata, control="control", time="time_h", allow_empty=True)
    screen.require_counts()
    assert screen.targets == []
    assert screen.describe().times == [0.0, 6.0, 12.0, 24.0, 36.0, 48.0, 60.0, 72.0, 96.0]
    assert np.median(screen.library_n) == 12
