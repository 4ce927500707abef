import dataclasses
import re
import shutil
import subprocess
import textwrap

import numpy as np
import pytest
import scanpy as sc

from pyro_causalcell.data import Screen, held_out_combinations, random_cells
from pyro_causalcell.errors import DataError
from pyro_causalcell.inference import fit
from pyro_causalcell.report import evidence, write_report
from pyro_causalcell.report.html import page, table
from pyro_causalcell.report.write import _describe as describe
from pyro_causalcell.simulate import sparse_shift

SMALL = {"epochs": 3, "warm_start": 1, "n_latents": 3, "n_hidden": 16, "device": "cpu", "progress": False}
TITLES = (
    "Summary",
    "What was fitted",
    "Perturbations and programmes",
    "Genes of programmes",
    "Effects",
    "Baselines",
    "Predictive checks",
    "Calibration",
    "Likelihood",
    "Training",
)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    for name, value in {"_CHECKED": 60, "_WEIGHED": 20, "_REPLICATES": 4, "_MANY": 4, "_DRAWN": 60}.items():
        monkeypatch.setattr(evidence, name, value)


@pytest.fixture(scope="module")
def adata(_tiny):
    named = _tiny.copy()
    named.var_names = ["<i>gene0</i>", *named.var_names[1:]]
    return named


@pytest.fixture(scope="module")
def trained(adata):
    screen = Screen(adata, batch="batch")
    return fit("sparse-shift", None, screen, split=random_cells(screen, 0.3), **SMALL), screen


def test_page_holds_every_part_and_nothing_from_outside(trained, adata, tmp_path):
    path = write_report(trained[0], adata, tmp_path / "new" / "report.html", n_particles=20)
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", text) == list(TITLES)
    assert "<i>gene0</i>" not in text
    assert not re.search(r"https?://", text)
    assert "interrupted" not in text and "not measured here" not in text
    assert "validation cells" in text and "4 perturbations" in text
    for name, value in {"model.likelihood": "nb", "model.n_latents": 3, "training.epochs": 3}.items():
        assert f"<td>{name}</td><td>{value}</td>" in text  # chosen, and left at its default
    assert "target_cells" not in text
    assert list(path.parent.iterdir()) == [path]
    again = write_report(trained[0], trained[1], tmp_path / "again.html", n_particles=20).read_text()
    assert again.split("<footer>")[0] == text.split("<footer>")[0]  # the footer has the date


def test_unseen_combinations_are_the_held_out_cells(tiny_screen, tmp_path):
    split = held_out_combinations(tiny_screen, ["A+B"])
    trained = fit("sparse-shift", None, tiny_screen, split=split, **SMALL)
    text = write_report(trained, tiny_screen, tmp_path / "r.html", n_particles=20).read_text()
    assert "60 held-out test cells" in text
    assert "were trained on" not in text


def test_models_without_a_graph_and_without_held_out_cells(tiny_screen, tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "_MANY", 1000)
    everything = random_cells(tiny_screen, validation=0.0)
    settings = {**SMALL, "warm_start": 0, "gates": "closed"}
    trained = fit("sparse-shift", None, tiny_screen, split=everything, **settings)
    text = write_report(trained, tiny_screen, tmp_path / "r.html", n_particles=20).read_text()
    assert "perturbations move no programme" in text
    assert "none were held out" in text
    assert "No perturbed condition has enough" in text


def test_normalised_data(tiny_adata, tmp_path):
    sc.pp.normalize_total(tiny_adata, target_sum=1e4)
    sc.pp.log1p(tiny_adata)
    screen = Screen(tiny_adata)
    trained = fit("sparse-shift", None, screen, likelihood="gaussian", **SMALL)
    text = write_report(trained, screen, tmp_path / "r.html", n_particles=20).read_text()
    assert "normalised values" in text and "Totals are summed" not in text


def test_a_screen_without_controls(tmp_path):
    adata = sparse_shift("released", n_interventions=5, cells_per_intervention=60, n_genes=40, n_latents=3)
    train = adata[adata.obs["split"] == "train"].copy()
    screen = Screen(train, "target", None)
    trained = fit("sparse-shift", None, screen, **SMALL | {"epochs": 4})
    text = write_report(trained, train, tmp_path / "r.html", n_particles=25).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == list(TITLES)
    assert "without control cells; values from X" in text
    assert "against the model&#x27;s control state (no perturbation), which was not measured here" in text
    assert "left out, because they need control cells" in text
    assert "<td>perturbed mean</td>" in text and "<td>control mean</td>" not in text


def test_genes_of_programmes_are_those_of_the_control_state(tiny_adata):
    """Whoever lends libraries and batches, the cells drawn are not perturbed."""
    seen = []
    adata = tiny_adata[tiny_adata.obs["target"] != "non-targeting"].copy()
    screen = Screen(adata, control=None)
    trained = fit("sparse-shift", None, screen, **SMALL)
    trained.model.register_forward_pre_hook(lambda _, given: seen.append(given[0].u_np))
    evidence.programme_genes(trained, screen)
    drawn = [u_np for u_np in seen if len(u_np) > 1]  # a single cell tells the number of programmes
    assert drawn and not any(u_np.any() for u_np in drawn)


def test_an_interrupted_fit_is_marked(trained):
    cut = dataclasses.replace(trained[0], finished=False)
    *_, last = describe(cut, n_programmes=3)
    assert last == "Note: training was interrupted after 3 epochs; go on with --resume."


def test_a_programme_is_told_by_its_genes(trained):
    loadings = evidence.programme_genes(*trained)
    assert loadings.shape == (3, 20)
    assert np.isfinite(loadings.to_numpy()).all()
    assert (loadings.abs().to_numpy() > 0).any()


def test_other_cells_are_refused(trained, adata, tmp_path):
    with pytest.raises(DataError, match="split is of 400 cells and these data have 390"):
        write_report(trained[0], adata[:390].copy(), tmp_path / "r.html")


def test_a_place_that_cannot_be_written_is_said(trained, adata, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_report(trained[0], adata, tmp_path / "file" / "r.html", n_particles=20)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs a browser")
def test_tables_sort_and_filter_in_a_browser(tmp_path, graph):
    body = page("t", "s", {"Graph": table(graph)}, "f")
    drive = """
    var box = document.querySelector('.table'), heads = box.querySelectorAll('th'), found = [];
    function first() { return Array.from(box.querySelectorAll('tbody tr')).find(r => !r.hidden).cells; }
    heads[2].click(); found.push(first()[2].textContent);
    heads[2].click(); found.push(first()[2].textContent);
    heads[0].click(); found.push(first()[0].textContent);
    var search = box.querySelector('input'); search.value = 'stat1 programme_4';
    search.dispatchEvent(new Event('input'));
    found.push(box.querySelectorAll('tbody tr:not([hidden])').length);
    document.title = found.join(' ');
    """
    file = tmp_path / "page.html"
    file.write_text(body.replace("</body>", f"<script>{textwrap.dedent(drive)}</script></body>"))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run([BROWSER, *flags, file.as_uri()], capture_output=True, text=True, timeout=60)
    assert "<title>0.999 0.01 ATF2 1</title>" in done.stdout
