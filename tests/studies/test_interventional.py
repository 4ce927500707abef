import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from pyro_causalcell.datasets import replogle_pathways
from pyro_causalcell.errors import CausalCellError, DataError
from pyro_causalcell.studies import interventional, run_study
from pyro_causalcell.studies.sparse_shift import DEFAULT, METHODS, RELEASED

NORMAN = interventional.NORMAN


def _write(path, obs: dict, shifted: np.ndarray, n_genes: int = 12):
    """Counts of a public file's schema; cells of ``shifted`` have ten times the counts of the first gene."""
    rng = np.random.default_rng(0)
    mean_ng = np.full((len(shifted), n_genes), 4.0)
    mean_ng[shifted, 0] *= 10
    x_ng = rng.poisson(mean_ng).astype(np.float32)
    var = pd.DataFrame(
        {"gene_name": [f"G{g}" for g in range(n_genes)]}, index=[f"E{g}" for g in range(n_genes)]
    )
    frame = pd.DataFrame(obs, index=[f"c{n}" for n in range(len(shifted))])
    ad.AnnData(sparse.csr_matrix(x_ng), frame, var).write_h5ad(path)
    return path


@pytest.fixture
def replogle(tmp_path):
    """30 cells each of control, another target, and one target of each pathway."""
    held = [names[0] for names in replogle_pathways().values()]
    gene = np.repeat(["non-targeting", "TP53", *held], 30)
    obs = {"gene": gene, "sgID_AB": gene + "|x", "gem_group": 1}
    return _write(tmp_path / "k562.h5ad", obs, gene == held[0])


@pytest.fixture
def norman(tmp_path):
    """30 cells each of control, two singles and their double."""
    guides = ["NegCtrl0_NegCtrl0", "KLF1_NegCtrl0", "SET_NegCtrl0", "SET_KLF1"]
    guide = np.repeat([f"{g}__{g}" for g in guides], 30)
    names = np.repeat(["control", "KLF1", "SET", "SET_KLF1"], 30)
    obs = {"guide_id": guide, "perturbation": names, "gemgroup": 1, "nperts": np.repeat([0, 1, 1, 2], 30)}
    return _write(tmp_path / "norman.h5ad", obs, names == "SET_KLF1")


def test_grid_follows_the_file(norman, replogle) -> None:
    assert {job.setting for job in interventional.table_jobs()} == set(interventional.EMBEDDED)
    assert {job.setting for job in interventional.table_jobs(norman)} == {NORMAN}
    jobs = interventional.table_jobs(replogle, seeds=2)
    assert len({job.setting for job in jobs}) == 8
    assert len(jobs) == 8 * 2 * (len(METHODS) + len(interventional.MEANS))
    with pytest.raises(CausalCellError, match=r"unknown \['SENA'\]"):
        interventional.table_jobs(methods=["SENA"])
    with pytest.raises(CausalCellError, match="expected an h5ad file.*nothing.h5ad"):
        interventional.table_jobs(norman.parent / "nothing.h5ad")


def test_the_paper_s_numbers_have_rows() -> None:
    jobs = {(job.setting, job.method) for job in interventional.table_jobs()}
    assert {method for _, method in jobs} >= {method for _, method, _ in interventional.PAPER}
    assert interventional.PAPER[NORMAN, RELEASED, "i_nll_paper"] == 775.33


def test_held_out_cells_are_held_out_and_genes_come_from_the_others(norman, monkeypatch) -> None:
    few = interventional.Size(2, 2, 4)
    monkeypatch.setitem(interventional.SETTINGS, NORMAN, few)
    (job,) = interventional.table_jobs(norman, methods=["VAE"], seeds=1)
    train, held = interventional._cells(job)
    assert set(held.obs["condition"]) == {"SET+KLF1"}
    assert set(train.obs["condition"]) == {"control", "KLF1", "SET"}
    assert list(train.var_names) == list(held.var_names) and train.n_vars == 4


def test_study_runs_on_a_public_file(norman, tmp_path) -> None:
    table = run_study(
        "interventional",
        tmp_path / "s",
        data=norman,
        methods=[DEFAULT, *interventional.MEANS],
        seeds=1,
        quick=True,
        progress=False,
    )
    nll = table[table["metric"] == "i_nll_clean"].set_index("method")["mean"]
    assert set(nll.index) == {DEFAULT, *interventional.MEANS} and np.isfinite(nll).all()
    # The double has a mean of its own, which half of its cells tell.
    assert nll["condition mean"] < nll["training mean"] - 10
    page = (tmp_path / "s" / "table.md").read_text()
    assert "Real data" in page and "Quick size" in page
    assert (tmp_path / "s" / "rows.csv").exists() and (tmp_path / "s" / "table.png").exists()


def test_a_pathway_without_cells_is_told(replogle) -> None:
    adata = ad.read_h5ad(replogle)
    adata[adata.obs["gene"].isin(["non-targeting", "TP53"]).to_numpy()].copy().write_h5ad(replogle)
    job = interventional.table_jobs(replogle, methods=["VAE"], seeds=1)[0]
    with pytest.raises(DataError, match="targets of EXOSOME"):
        interventional._cells(job)
