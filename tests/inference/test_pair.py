"""Building pairs from names, files, classes and instances; what check_pair says about a bad pair."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_causalcell.batch import Dims
from pyro_causalcell.errors import PairError
from pyro_causalcell.guides.sparse_shift import SparseShiftGuide
from pyro_causalcell.inference import build_pair, check_pair
from pyro_causalcell.models.sparse_shift import SparseShift

DIMS = Dims(n_cells=60, n_genes=6, n_targets=3, n_batches=2, target_cells=(10.0, 10.0, 10.0))

USER_PAIR = (Path(__file__).parent / "user_pair.py").read_text()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(USER_PAIR)
    return path


# ---------------------------------------------------------------- building


@pytest.mark.parametrize(
    "model", ["sparse-shift", "sparse_shift", SparseShift, "pyro_causalcell.models.sparse_shift:SparseShift"]
)
def test_the_package_s_pair_by_any_name(model):
    pair = build_pair(model, None, DIMS, {"n_latents": 4, "n_hidden": 8})
    assert isinstance(pair.model, SparseShift) and isinstance(pair.guide, SparseShiftGuide)
    assert (
        pair.model.n_latents == 4 and pair.model_source == "pyro_causalcell.models.sparse_shift:SparseShift"
    )
    assert pair.model_settings["n_genes"] == 6 and pair.guide_settings["n_latents"] == 4


def test_settings_go_where_they_are_known():
    pair = build_pair(
        "sparse-shift", None, DIMS, {"min_effect": 0.1, "intervention": "ignored", "n_hidden": 8}
    )
    assert "min_effect" in pair.model_settings and "min_effect" not in pair.guide_settings
    assert pair.guide.intervention == "ignored" and "intervention" not in pair.model_settings


@pytest.mark.parametrize("guide", [None, "file"])
def test_a_user_s_file(file, guide):
    guide = guide and f"{file}:MyGuide"
    pair = build_pair(f"{file}:MyModel", guide, DIMS, {"n_latents": 5})
    assert pair.model.decoder.in_features == pair.guide.loc.out_features == 5
    assert pair.model_source == f"{file}:MyModel" and pair.guide_source == f"{file}:MyGuide"
    assert type(build_pair(str(file), None, DIMS, {}).model).__name__ == "MyModel"


def test_an_edited_file_is_read_again(file):
    build_pair(str(file), None, DIMS, {})
    file.write_text(USER_PAIR.replace("n_latents=2", "n_latents=7"))
    assert build_pair(str(file), None, DIMS, {}).model.n_latents == 7


def test_instances_are_taken_as_they_are(file):
    made = build_pair(str(file), None, DIMS, {})
    pair = build_pair(made.model, made.guide, DIMS, {})
    assert pair.model is made.model and pair.guide is made.guide and pair.model_source is None


def test_parameters_and_states_of_both(file):
    pair = build_pair(str(file), None, DIMS, {})
    assert len(list(pair.parameters())) == 4
    other = build_pair(str(file), None, DIMS, {})
    other.load_state_dict(pair.state_dict())
    for a, b in zip(pair.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    pair.train(False)
    assert not pair.model.training and not pair.guide.training


@pytest.mark.parametrize(
    ("model", "guide", "settings", "message"),
    [
        ("sparse-shfit", None, {}, "no model named 'sparse-shfit'; known are .*'sparse-shift'"),
        ("sparse-shift", None, {"n_latent": 3}, "has a setting 'n_latent'; did you mean n_latents"),
        ("sparse-shift", None, {"n_genes": 3}, "n_genes"),
        ("sparse-shift", None, {"norm": "group"}, "takes norm= one of"),
        ("sparse-shift", None, {"direct": "maybe"}, r"takes direct= one of \[False, True\], found 'maybe'"),
        ("nowhere.py:Model", None, {}, "nowhere.py not found"),
        ("FILE:Other", None, {}, r"no module class 'Other'; it has \['MyGuide', 'MyModel'\]"),
        (SparseShift(6, 3), None, {}, None),
        (torch.nn.Linear(2, 2), None, {}, "a guide is needed"),
    ],
)
def test_what_cannot_be_built_is_said(file, model, guide, settings, message):
    if isinstance(model, str):
        model = model.replace("FILE", str(file))
    if message is None:
        build_pair(model, guide, DIMS, settings)
        return
    with pytest.raises(PairError, match=message):
        build_pair(model, guide, DIMS, settings)


def test_files_with_faults_are_named(tmp_path):
    broken, many = tmp_path / "broken.py", tmp_path / "many.py"
    broken.write_text("import not_there_at_all\n")
    many.write_text(USER_PAIR + "\nclass Second(MyModel):\n    pass\n")
    with pytest.raises(PairError, match="broken.py could not be imported.*not_there_at_all"):
        build_pair(f"{broken}:Model", None, DIMS, {})
    with pytest.raises(PairError, match="2 candidates|3 candidates"):
        build_pair(str(many), None, DIMS, {})


def test_a_script_s_class_is_found_again_by_its_file(file):
    """A run started from a script must be loadable from another one."""
    script = file.with_name("script.py")
    script.write_text(
        USER_PAIR
        + textwrap.dedent("""
        if __name__ == "__main__":
            from pyro_causalcell.batch import Dims
            from pyro_causalcell.inference import build_pair
            pair = build_pair(MyModel, MyGuide, Dims(9, 6, 3, 0, ()), {})
            print(pair.model_source)
            class Local:
                class Inner(MyModel):
                    pass
            print(build_pair(Local.Inner, MyGuide, Dims(9, 6, 3, 0, ()), {}).model_source)
        """)
    )
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:2] == [f"{script.resolve()}:MyModel", "None"]


# ---------------------------------------------------------------- checking


class _Model(pyro.nn.PyroModule):
    """A model with one fault."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault = fault

    def forward(self, batch):
        fault, n = self.fault, batch.n_cells
        if fault == "global":
            pyro.sample("rate", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        plate = pyro.plate(
            "rows" if fault == "plate name" else "cells", batch.n_total, subsample=batch.index_n
        )
        with plate:
            width = 3 if fault == "width" else 2
            z = pyro.sample("z", dist.Normal(torch.zeros(n, width), 1.0).to_event(1))
            if fault == "local":
                pyro.sample("w", dist.Normal(0.0, 1.0))
            rate = z.sum(-1, keepdim=True).exp().expand(n, 5 if fault == "genes" else 6)
            if fault == "infinite":
                rate = rate * 0
            x = dist.Poisson(rate)
            return pyro.sample("x", x if fault == "event" else x.to_event(1), obs=batch.x_ng)


class _Guide(pyro.nn.PyroModule):
    """Its guide with one fault."""

    def __init__(self, fault=""):
        super().__init__()
        self.fault = fault

    def forward(self, batch):
        fault, n = self.fault, batch.n_cells
        if fault == "factor":
            pyro.factor("push", torch.zeros(()))
        if fault == "good factor":
            pyro.factor("push", torch.zeros(()), has_rsample=True)
        if fault == "crash":
            torch.zeros(2) @ torch.zeros(3)
        if fault == "outside":
            pyro.sample("z", dist.Normal(torch.zeros(n, 2), 1.0).to_event(1))
            return
        with pyro.plate("rows" if fault == "plate name" else "cells", batch.n_total, subsample=batch.index_n):
            pyro.sample("zz" if fault == "name" else "z", dist.Normal(torch.zeros(n, 2), 1.0).to_event(1))


@pytest.mark.parametrize(
    ("model", "guide", "words"),
    [
        ("global", "", ["guide lacks ['rate']", "_Model", "_Guide", "test_pair.py"]),
        ("local", "", ["guide lacks ['w']"]),
        ("", "name", ["guide lacks ['z']", "has ['zz']"]),
        ("width", "", ["site 'z'", "| (3,)", "| (2,)", "test_pair.py"]),
        ("", "plate name", ["site 'z'", "['cells']", "['rows']", "scale"]),
        ("plate name", "plate name", ["no plate 'cells'", "pyro.plate"]),
        ("", "outside", ["'z'"]),
        ("", "factor", ["factor 'push'", "has_rsample=True", "test_pair.py"]),
        ("", "crash", ["the guide (_Guide", "fails on a minibatch", "test_pair.py"]),
        ("genes", "", ["site 'x'", "the model (_Model", "(12,) | (5,)", "(12, 6)"]),
        ("event", "", ["the model (_Model", "x"]),
        ("infinite", "", ["log p(x)", "not finite"]),
    ],
)
def test_check_pair_names_the_fault(batch, model, guide, words):
    with pytest.raises(PairError) as error:
        check_pair(_Model(model), _Guide(guide), batch)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_check_pair_accepts_good_pairs_and_needs_no_module(batch):
    check_pair(_Model(), _Guide(), batch)
    check_pair(_Model(), _Guide("good factor"), batch)
    check_pair(_Model("").forward, lambda b: _Guide()(b), batch)


@pytest.mark.parametrize("gates", ["posterior", "open", "closed", "sampled"])
def test_check_pair_accepts_the_family(build, batch, gates):
    check_pair(*build(gates=gates), batch)


@pytest.mark.parametrize("name", ["gates", "likelihood", "model.norm"])
def test_words_that_a_setting_does_not_know_are_refused(tiny_screen, name):
    with pytest.raises(PairError, match=rf"takes {name.split('.')[-1]}= one of \['.*found 'opne'"):
        build_pair("sparse-shift", None, tiny_screen.dims(), {name: "opne"})
