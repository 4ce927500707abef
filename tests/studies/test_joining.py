"""Ways of joining unpaired snapshots: which of them find the lagged effects that are there."""

import numpy as np
import pytest

from pyro_causalcell.simulate import linear_snapshots
from pyro_causalcell.studies import joining, run_study


@pytest.fixture(scope="module")
def cells():
    adata = linear_snapshots(effect=2.0, seed=7)
    groups = adata.obs.groupby(["target", "time"], observed=True).indices
    return {key: adata.X[rows].astype(np.float32) for key, rows in groups.items()}


def _errors(found_kk):
    truth_kk = np.array([[0.6, 0, 0, 0], [0.5, 0.6, 0, 0], [0, -0.5, 0.6, 0], [0.4, 0, 0, 0.6]])
    return np.abs(found_kk - truth_kk)


def test_independent_pairs_forget(cells):
    found_kk = joining.independent_pairs(cells)
    assert (found_kk.diagonal() < 0.35).all()
    assert (np.abs([found_kk[edge] for edge in joining.EDGES]) < 0.3).all()


def test_optimal_transport_takes_likeness_for_memory(cells):
    found_kk = joining.optimal_transport(cells)
    assert (found_kk.diagonal() > 0.75).all()
    assert (np.abs([found_kk[edge] for edge in joining.EDGES]) < 0.2).all()


def test_entropic_transport_does_so_less_and_finds_no_more(cells):
    found_kk = joining.entropic_transport(cells)
    assert (found_kk.diagonal() > 0.5).all()
    assert (found_kk.diagonal() < joining.optimal_transport(cells).diagonal()).all()
    assert (np.abs([found_kk[edge] for edge in joining.EDGES]) < 0.25).all()


@pytest.mark.parametrize("law", [joining.mixture, joining.moments])
def test_the_population_prior_remembers(cells, law):
    assert _errors(joining.population_prior(cells, law)).max() < 0.2
    assert _errors(joining.population_means(cells)).max() < 0.2


def test_the_study_runs(tmp_path):
    table = run_study("joining", tmp_path, quick=True, progress=False)
    assert set(table["method"]) == {"truth", *joining.METHODS}
    truth = table[table["method"] == "truth"].set_index("metric")["mean"]
    assert truth["2_on_3"] == pytest.approx(-0.5)
    assert "Quick size" in (tmp_path / "table.md").read_text()
