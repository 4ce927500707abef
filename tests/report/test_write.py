import dataclasses
import re

import numpy as np
import pytest
import scanpy as sc

from pyro_causalcell import report
from pyro_causalcell.cli import main
from pyro_causalcell.data import Screen, held_out_combinations, random_cells
from pyro_causalcell.errors import DataError
from pyro_causalcell.inference import fit
from pyro_causalcell.report import evidence, html, sections, write_report
from pyro_causalcell.report.write import _describe as describe
from pyro_causalcell.simulate import sparse_shift

SMALL = {"epochs": 3, "warm_start": 1, "n_latents": 3, "n_hidden": 16, "device": "cpu", "progress": False}
TITLES = (
    "Summary",
    "What was fitted",
    "Perturbations and programmes",
    "Genes of programmes",
    "Effects",
    "Doubles",
    "Baselines",
    "Predictive checks",
    "Calibration",
    "Likelihood",
    "Design audit",
    "Simulation-based calibration",
    "Training",
)


@pytest.fixture(autouse=True)
def _few_draws(monkeypatch):
    few = {"_CHECKED": 60, "_CALIBRATED": 60, "_WEIGHED": 20, "_REPLICATES": 4, "_DRAWS": 20, "_MANY": 4}
    for name, value in {**few, "_DRAWN": 60}.items():
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
    assert "perturbations move no programme" in text and "no graph given" in text
    assert "none were held out" in text
    assert "No perturbed condition has enough" in text


def test_normalised_data(tiny_adata, tmp_path):
    sc.pp.normalize_total(tiny_adata, target_sum=1e4)
    sc.pp.log1p(tiny_adata)
    screen = Screen(tiny_adata)
    trained = fit("sparse-shift", None, screen, likelihood="gaussian", **SMALL)
    text = write_report(trained, screen, tmp_path / "r.html", n_particles=20).read_text()
    assert "normalised values" in text and "Totals are summed" not in text
    assert "<td>correlation</td>" in text and "dispersion of the real cells" not in text


def test_a_screen_without_controls(tmp_path):
    adata = sparse_shift("released", n_interventions=5, cells_per_intervention=60, n_genes=40, n_latents=3)
    train = adata[adata.obs["split"] == "train"].copy()
    screen = Screen(train, "target", None)
    trained = fit("sparse-shift", None, screen, **SMALL | {"epochs": 4})
    text = write_report(trained, train, tmp_path / "r.html", n_particles=25).read_text()
    assert re.findall(r"<h2>(.*?)</h2>", text) == [title for title in TITLES if title != "Doubles"]
    assert "without control cells; values from X" in text
    assert "against the model&#x27;s control state (no perturbation), which was not measured here" in text
    assert "left out, because they need control cells" in text
    assert "<td>perturbed mean</td>" in text and "<td>control mean</td>" not in text


def test_an_interrupted_fit_is_marked(trained):
    cut = dataclasses.replace(trained[0], finished=False)
    *_, last = describe(cut, n_programmes=3)
    assert last == "Note: training was interrupted after 3 epochs; go on with --resume."


def test_gene_sets_join_the_page(trained, adata, tmp_path):
    pytest.importorskip("gseapy")
    gmt = tmp_path / "sets.gmt"
    gmt.write_text("FIRST\tnone\t" + "\t".join(adata.var_names[1:9]) + "\n")
    text = write_report(*trained, tmp_path / "r.html", gmt=gmt, n_particles=20).read_text()
    assert "<h3>Gene sets</h3>" in text and "<td>FIRST</td>" in text
    gmt.write_text("FIRST\tnone\tX\tY\n")
    with pytest.raises(DataError, match="same names and the same case"):
        write_report(*trained, tmp_path / "r.html", gmt=gmt, n_particles=20)


def test_other_cells_are_refused(trained, adata, tmp_path):
    with pytest.raises(DataError, match="split is of 400 cells and these data have 390"):
        write_report(trained[0], adata[:390].copy(), tmp_path / "r.html")


def test_a_place_that_cannot_be_written_is_said(trained, adata, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write_report(trained[0], adata, tmp_path / "file" / "r.html", n_particles=20)


def test_simulation_based_calibration_is_shown_or_how_to_make_it(trained, adata, sbc_folder, tmp_path):
    without = write_report(trained[0], adata, tmp_path / "a.html", n_particles=20).read_text()
    source = "pyro_causalcell.models.sparse_shift:SparseShift"
    command = f"pyro-causalcell sbc {source} --latents 2 --settings.min_effect 0 --out sbc"
    assert command in without and "simulated screens" not in without
    text = write_report(trained[0], adata, tmp_path / "b.html", sbc=sbc_folder, n_particles=20).read_text()
    assert command not in text and "In 30 small simulated screens" in text
    assert "Rejected: 1 of 4 latent quantities, shift[0,0] (posterior too narrow)" in text
    assert "data:image/png;base64," in text


def test_other_simulations_are_refused_before_the_work(trained, adata, sbc_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_causalcell.report.write.gather", None)
    page = tmp_path / "r.html"
    with pytest.raises(DataError, match="expected sbc.csv, ranks.csv and sbc.png in"):
        write_report(trained[0], adata, page, sbc=tmp_path)
    table = (sbc_folder / "sbc.csv").read_text()
    (sbc_folder / "sbc.csv").write_text(table.replace("gate", "switch"))
    with pytest.raises(DataError, match="'switch', 'z'.*this fit has.*'gate'.*run 'pyro-causalcell sbc"):
        write_report(trained[0], adata, page, sbc=sbc_folder)
    (sbc_folder / "sbc.csv").write_text(table.replace("ecdf_p", "p"))
    with pytest.raises(DataError, match=r"lacks the columns \['ecdf_p'\]"):
        write_report(trained[0], adata, page, sbc=sbc_folder)
    assert not page.exists()


def test_the_command_takes_the_folder(trained, adata, sbc_folder, tmp_path, monkeypatch):
    trained[0].save(tmp_path / "run")
    adata.write_h5ad(tmp_path / "S.h5ad")
    given = []
    monkeypatch.setattr(report, "write_report", lambda fit, data, out, **options: given.append(options))
    words = [
        "report",
        tmp_path / "run",
        tmp_path / "S.h5ad",
        "--sbc",
        sbc_folder,
        "--out",
        tmp_path / "r.html",
    ]
    assert main([str(word) for word in words]) == 0
    assert given[0]["sbc"] == sbc_folder


@pytest.fixture(scope="module")
def written(trained, adata, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_CHECKED", "_CALIBRATED", "_WEIGHED", "_DRAWN"):
            patch.setattr(evidence, name, 40)
        patch.setattr(evidence, "_REPLICATES", 4)
        patch.setattr(evidence, "_MANY", 4)
        return write_report(trained[0], adata, path, n_particles=20)


def test_a_page_has_no_errors_and_fits_wide_and_narrow_windows(browser, written):
    for width in (1280, 400):
        browser.open(written, width)
        browser.run("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert browser.run("document.documentElement.scrollWidth") <= width
        figures = "Array.from(document.querySelectorAll('figure, .table'))"
        assert browser.run(f"Math.max(...{figures}.map(f => f.getBoundingClientRect().right))") <= width
        assert browser.run("Array.from(document.images).every(i => i.complete && i.naturalWidth > 0)")
        wide = "Array.from(document.querySelectorAll('.table')).filter(t => t.scrollWidth > t.clientWidth)"
        if width == 400:  # wide tables scroll in their own boxes
            assert browser.run(f"{wide}.length") > 0
    assert browser.console == []


def test_keys_reach_the_filter_and_the_heads(browser, tmp_path, graph):
    file = tmp_path / "page.html"
    file.write_text(html.page("t", "s", {"Graph": sections.graph_section(graph)}, "f"))
    browser.open(file)
    rows = "Array.from(document.querySelectorAll('tbody tr')).filter(r => !r.hidden)"
    focus = "document.activeElement"
    for _ in range(10):
        browser.press("Tab")
        if browser.run(f"{focus} === document.querySelector('.filter input')"):
            break
    assert browser.run(f"{focus}.labels[0].textContent").startswith("Filter by perturbation")
    assert browser.run(f"getComputedStyle({focus}).outlineStyle") == "solid"
    for letter in "PROGRAMME_2 X":
        browser.press(letter)
    assert browser.run(f"{rows}.length") == 0
    browser.press("Backspace")
    assert browser.run(f"{rows}.map(r => r.cells[1].textContent)") == ["programme_2"] * 10
    assert browser.run("document.querySelector('[role=status]').textContent") == "10 of 60 shown"
    browser.press("Tab")  # the box of the table, which scrolls
    browser.press("Tab")
    assert browser.run(f"{focus}.tagName + {focus}.textContent") == "BUTTONperturbation"
    order = f"[{focus}.parentNode.getAttribute('aria-sort'), {rows}[0].cells[0].textContent]"
    assert browser.run(order) == [None, "BRD4"]  # the most probable one
    for direction, name in (("ascending", "ATF2"), ("descending", "STAT1")):
        browser.press("Enter")
        assert browser.run(order) == [direction, name]


def test_the_filter_of_effects_hides_figures_too(browser, tmp_path, effects):
    many = effects.isel(condition=np.arange(11) % effects.sizes["condition"])
    many = many.assign_coords(condition=[f"T{i}" for i in range(11)])
    file = tmp_path / "page.html"
    file.write_text(html.page("t", "s", {"Effects": sections.effects_section(many, 0.9)}, "f"))
    browser.open(file)
    seen = "Array.from(document.querySelectorAll('figure')).filter(f => f.checkVisibility()).length"
    assert browser.run(seen) == 9
    typed = (
        "var box = document.querySelector('input'); box.value = '{}'; box.dispatchEvent(new Event('input'))"
    )
    browser.run(typed.format("t10"))  # it is among those that are folded
    assert browser.run(seen) == 1
    assert browser.run("document.querySelector('details').open")
    browser.run(typed.format(""))
    assert browser.run(seen) == 11 and browser.console == []


def test_without_scripts_everything_is_shown(browser, tmp_path, graph):
    file = tmp_path / "page.html"
    file.write_text(html.page("t", "s", {"Graph": sections.graph_section(graph)}, "f"))
    browser.send("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(file)
    found = str(browser.send("DOM.getDocument", depth=-1)["root"])
    assert "'BUTTON'" not in found and "'class', 'filter', 'hidden'" in found  # nothing that would do nothing
    assert found.count("'TR'") == len(graph) + 1 and "'STAT1'" in found


def test_tables_sort_numbers_and_keep_missing_ones_last(browser, tmp_path, graph):
    file = tmp_path / "page.html"
    graph.loc[3, "probability"] = np.nan
    file.write_text(html.page("t", "s", {"Graph": html.table(graph)}, "f"))
    browser.open(file)
    rows = "Array.from(document.querySelectorAll('tbody tr')).map(r => r.cells[2].textContent)"
    click = "document.querySelectorAll('th button')[2].click()"
    for first in ("0.999", "0.01"):
        browser.run(click)
        shown = browser.run(rows)
        assert (shown[0], shown[-1]) == (first, "–")
