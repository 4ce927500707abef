"""Run folders: resume, refusal, damage, full disks, users' files."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from pyro_causalcell.errors import CheckpointError
from pyro_causalcell.inference import Fit, engine, fit, fitted, training

MODEL = "sparse-shift"


class Killed(BaseException):
    """Ends a run as abruptly as Python can."""


def _state(f: Fit) -> dict[str, torch.Tensor]:
    return {f"{kind}.{k}": v for kind, part in f.pair.state_dict().items() for k, v in part.items()}


def _assert_same(a: Fit, b: Fit) -> None:
    left, right = _state(a), _state(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k], right[k]) for k in left)
    columns = [c for c in a.history if c != "seconds"]
    pd.testing.assert_frame_equal(a.history[columns], b.history[columns], check_exact=True)


def _kill_after(monkeypatch, epochs: int, during: str) -> None:
    """Stop the process once so many epochs are in the checkpoint: before, in or after the next write."""
    saved = training.Trainer.save_checkpoint

    def save(self):
        if self.progress.epoch > epochs and during == "before the write":
            raise Killed
        saved(self)
        if self.progress.epoch == epochs and during == "after the write":
            raise Killed

    monkeypatch.setattr(training.Trainer, "save_checkpoint", save)


@pytest.fixture
def settings(quick):
    return quick | {
        "epochs": 6,
        "warm_start": 2,
        "gates": "posterior",
        "norm": "batch",
        "dropout": 0.1,
        "lr_drops": 1,
    }


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize(
    ("epochs", "during"), [(1, "after the write"), (2, "after the write"), (4, "before the write")]
)
def test_interrupted_and_resumed_is_uninterrupted(
    tiny_screen, settings, tmp_path, monkeypatch, epochs, during
):
    """Bit for bit, whether it stops in the warm start, at the turn of the axes, or later."""
    whole = fit(MODEL, None, tiny_screen, out=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch:
        _kill_after(patch, epochs, during)
        with pytest.raises(Killed):
            fit(MODEL, None, tiny_screen, out=tmp_path / "cut", **settings)
    kept = torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)
    assert kept["progress"]["epoch"] == epochs
    torch.rand(13)  # another process has another random state
    resumed = fit(MODEL, None, tiny_screen, out=tmp_path / "cut", resume=True, **settings)
    _assert_same(whole, resumed)


def test_resume_under_early_stopping(tiny_screen, settings, tmp_path, monkeypatch):
    stopping = settings | {"epochs": None, "max_epochs": 30, "patience": 2, "lr": 0.05}
    whole = fit(MODEL, None, tiny_screen, **stopping)
    with monkeypatch.context() as patch:
        _kill_after(patch, 4, "after the write")
        with pytest.raises(Killed):
            fit(MODEL, None, tiny_screen, out=tmp_path / "run", **stopping)
    _assert_same(whole, fit(MODEL, None, tiny_screen, out=tmp_path / "run", resume=True, **stopping))


@pytest.mark.parametrize(
    "length", [{"epochs": 4}, {"epochs": None, "max_epochs": 60, "patience": 1, "lr": 0.1}]
)
def test_resuming_a_finished_run_changes_nothing(tiny_screen, settings, tmp_path, length):
    whole = fit(MODEL, None, tiny_screen, out=tmp_path / "run", **settings | length)
    again = fit(MODEL, None, tiny_screen, out=tmp_path / "run", resume=True, **settings | length)
    _assert_same(whole, again)


def test_resume_without_a_checkpoint_starts_and_without_a_folder_complains(tiny_screen, settings, tmp_path):
    fresh = fit(MODEL, None, tiny_screen, out=tmp_path / "new", resume=True, **settings)
    _assert_same(fresh, fit(MODEL, None, tiny_screen, **settings))
    with pytest.raises(CheckpointError, match="out="):
        fit(MODEL, None, tiny_screen, resume=True, **settings)


def test_more_epochs_continue_a_run(tiny_screen, settings, tmp_path):
    short = fit(MODEL, None, tiny_screen, out=tmp_path / "run", **settings | {"lr_drops": 0, "epochs": 4})
    longer = fit(MODEL, None, tiny_screen, out=tmp_path / "run", resume=True, **settings | {"lr_drops": 0})
    assert len(longer.history) == 6
    assert longer.history["train_loss"].iloc[:4].tolist() == short.history["train_loss"].tolist()


@pytest.mark.parametrize(
    "change",
    [
        {"lr": 1e-3},
        {"n_hidden": 9},
        {"min_effect": 0.9},
        {"seed": 5},
        {"weights": {"z": 2.0}},
        {"intervention": "ignored"},
    ],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_are_refused(tiny_screen, settings, tmp_path, change):
    fit(MODEL, None, tiny_screen, out=tmp_path / "run", **settings | {"epochs": 3, "warm_start": 1})
    with pytest.raises(CheckpointError, match="other settings, data or code"):
        fit(
            MODEL,
            None,
            tiny_screen,
            out=tmp_path / "run",
            resume=True,
            **settings | {"epochs": 3, "warm_start": 1} | change,
        )


def test_other_data_are_refused(tiny_screen, tiny_adata, settings, tmp_path):
    from pyro_causalcell.data import Screen

    fit(MODEL, None, tiny_screen, out=tmp_path / "run", **settings)
    fewer = Screen(tiny_adata[:, :19].copy(), batch="batch", guide="guide")
    with pytest.raises(CheckpointError, match="other settings, data or code"):
        fit(MODEL, None, fewer, out=tmp_path / "run", resume=True, **settings)


USER = (Path(__file__).parent / "user_pair.py").read_text()


@pytest.fixture
def user(quick):
    return {k: v for k, v in quick.items() if k != "n_hidden"}


def test_other_code_is_refused_and_the_copy_still_loads(tiny_screen, user, tmp_path):
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(USER)
    first = fit(f"{file}:MyModel", f"{file}:MyGuide", tiny_screen, out=run, **user)
    file.write_text(USER.replace("0.5", "0.25"))
    with pytest.raises(CheckpointError, match="other settings, data or code"):
        fit(f"{file}:MyModel", f"{file}:MyGuide", tiny_screen, out=run, resume=True, **user)
    file.unlink()
    loaded = Fit.load(run)
    assert (run / "mine.py").read_text() == USER
    assert all(
        torch.equal(a, b) for a, b in zip(_state(first).values(), _state(loaded).values(), strict=True)
    )
    shutil.move(run, tmp_path / "moved")  # a run folder stands on its own
    moved = Fit.load(tmp_path / "moved")
    moved.save(tmp_path / "copy")
    assert type(Fit.load(tmp_path / "copy").model).__name__ == "MyModel"


def test_a_file_edited_while_it_trains_is_not_mistaken_for_what_trained(
    tiny_screen, user, tmp_path, monkeypatch
):
    file, run = tmp_path / "mine.py", tmp_path / "run"
    file.write_text(USER)
    saved = training.Trainer.save_checkpoint

    def edit_then_save(self):
        file.write_text(USER.replace("0.5", "0.125"))
        saved(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "save_checkpoint", edit_then_save)
        fit(f"{file}:MyModel", f"{file}:MyGuide", tiny_screen, out=run, **user)
    assert (run / "mine.py").read_text() == USER
    with pytest.raises(CheckpointError, match="other settings, data or code"):
        fit(f"{file}:MyModel", f"{file}:MyGuide", tiny_screen, out=run, resume=True, **user)


def test_model_and_guide_files_of_one_name_are_both_kept(tiny_screen, user, tmp_path):
    for room in ("models", "guides"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "mine.py").write_text(USER + f"\n# {room}\n")
    sources = (f"{tmp_path}/models/mine.py:MyModel", f"{tmp_path}/guides/mine.py:MyGuide")
    fit(*sources, tiny_screen, out=tmp_path / "run", **user)
    texts = {p.name: p.read_text() for p in (tmp_path / "run").glob("*.py")}
    assert len(texts) == 2 and any("# guides" in t for t in texts.values())
    loaded = Fit.load(tmp_path / "run")
    loaded.save(tmp_path / "again")
    assert type(Fit.load(tmp_path / "again").guide).__name__ == "MyGuide"


def test_instances_are_asked_for_again(tiny_screen, tmp_path, user, build):
    namespace: dict = {}
    exec(USER, namespace)
    model, guide = namespace["MyModel"](20, 4), namespace["MyGuide"](20)
    del user["n_latents"]
    f = fit(model, guide, tiny_screen, out=tmp_path / "run", **user)
    with pytest.raises(CheckpointError, match="trained as an instance; pass model="):
        Fit.load(tmp_path / "run")
    loaded = Fit.load(tmp_path / "run", model=namespace["MyModel"](20, 4), guide=namespace["MyGuide"](20))
    assert all(torch.equal(a, b) for a, b in zip(_state(f).values(), _state(loaded).values(), strict=True))


def test_a_notebook_s_classes_can_be_fitted_into_a_folder(tmp_path):
    """Code typed at a prompt has no file."""
    code = USER + textwrap.dedent(f"""
        import anndata as ad, numpy as np, pandas as pd
        from pyro_causalcell.data import Screen
        from pyro_causalcell.inference import fit
        x = np.random.default_rng(0).poisson(3.0, (60, 5)).astype("float32") + 1
        labels = ["A", "B", "non-targeting"] * 20
        obs = pd.DataFrame({{"target": labels}}, index=[f"c{{i}}" for i in range(60)])
        screen = Screen(ad.AnnData(x, obs))
        f = fit(MyModel, MyGuide, screen, epochs=2, out={str(tmp_path / "run")!r}, progress=False)
        print(len(f.history))
    """)
    result = subprocess.run([sys.executable], input=code, capture_output=True, text=True, check=False)
    assert result.returncode == 0 and result.stdout.strip() == "2", result.stderr


# ---------------------------------------------------------------- files


@pytest.fixture
def run(tiny_screen, quick, tmp_path):
    fit(MODEL, None, tiny_screen, out=tmp_path / "run", **quick | {"epochs": 2})
    return tmp_path / "run"


def test_what_is_in_a_run_folder(run):
    assert {p.name for p in run.iterdir()} == {
        "fit.json",
        "weights.pt",
        "history.csv",
        "split.npz",
        "checkpoint.pt",
    }
    record = json.loads((run / "fit.json").read_text())
    assert record["format"] == fitted.FORMAT and record["screen"]["targets"] == ["A", "B", "C", "D"]
    for name in ("weights.pt", "checkpoint.pt"):  # no code in them
        torch.load(run / name, weights_only=True)
    assert (run / "fit.json").stat().st_mode & 0o044  # readable by others, as any output


def test_load_gives_back_everything(tiny_screen, settings, tmp_path):
    f = fit(MODEL, None, tiny_screen, out=tmp_path / "run", interactions=((0, 1),), **settings)
    loaded = Fit.load(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(_state(f).values(), _state(loaded).values(), strict=True))
    assert loaded.dims == f.dims and loaded.screen == f.screen and loaded.seed == f.seed
    assert loaded.cells == f.cells and loaded.training == json.loads(json.dumps(f.training))
    np.testing.assert_array_equal(loaded.split.train, f.split.train)
    pd.testing.assert_frame_equal(loaded.history, f.history, check_exact=False)
    assert not loaded.model.training and loaded.path == tmp_path / "run"
    assert json.loads(json.dumps(loaded.settings)) == json.loads(json.dumps(f.settings))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no folder", "no fit at"),
        ("unfinished", "checkpoint of an unfinished run"),
        ("newer", "format 99.*update pyro_causalcell"),
        ("json cut", "not a fit's record"),
        ("json foreign", "not a fit's record"),
        ("weights cut", "weights.pt cannot be read"),
        ("weights foreign", "weights.pt cannot be read"),
        ("weights gone", "weights.pt not found"),
        ("weights a list", "holds a list"),
        ("weights of another", "does not fit the model"),
        ("history gone", "damaged"),
        ("split cut", "damaged|split"),
    ],
)
def test_damaged_runs_are_refused_with_a_reason(run, damage, message):
    record, weights = run / "fit.json", run / "weights.pt"
    if damage == "no folder":
        run = run / "nowhere"
    elif damage == "unfinished":
        record.unlink()
    elif damage == "newer":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"format": 99}))
    elif damage == "json cut":
        record.write_text(record.read_text()[:100])
    elif damage == "json foreign":
        record.write_text("[1, 2]")
    elif damage == "weights cut":
        weights.write_bytes(weights.read_bytes()[:-2000])
    elif damage == "weights foreign":
        weights.write_text("hello")
    elif damage == "weights gone":
        weights.unlink()
    elif damage == "weights a list":
        torch.save([1, 2], weights)
    elif damage == "weights of another":
        torch.save({"model": {"a": torch.ones(1)}, "guide": {}}, weights)
    elif damage == "history gone":
        (run / "history.csv").unlink()
    elif damage == "split cut":
        (run / "split.npz").write_bytes((run / "split.npz").read_bytes()[:50])
    with pytest.raises(CheckpointError, match=message):
        Fit.load(run)


def test_code_in_a_checkpoint_is_not_run(run):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {run}/owned",)

    torch.save({"model": Payload()}, run / "weights.pt")
    with pytest.raises(CheckpointError):
        Fit.load(run)
    assert not (run / "owned").exists()


def test_a_cut_or_foreign_checkpoint_is_refused_on_resume(tiny_screen, quick, run):
    content = (run / "checkpoint.pt").read_bytes()
    for broken in (content[:-500], b"something else"):
        (run / "checkpoint.pt").write_bytes(broken)
        with pytest.raises(CheckpointError, match="cut short"):
            fit(MODEL, None, tiny_screen, out=run, resume=True, **quick | {"epochs": 2})
    torch.save({"epoch": 3}, run / "checkpoint.pt")
    with pytest.raises(CheckpointError, match="other settings, data or code"):
        fit(MODEL, None, tiny_screen, out=run, resume=True, **quick | {"epochs": 2})


@pytest.mark.parametrize("where", ["torch", "fsync", "mkstemp"])
def test_a_full_disk_leaves_the_old_checkpoint(tiny_screen, quick, run, monkeypatch, where):
    before = {p.name: p.read_bytes() for p in run.iterdir()}

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_written(state, file):
        with open(file, "wb") as handle:
            handle.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed writing file")

    target = {
        "torch": (torch, "save", half_written),
        "fsync": (os, "fsync", full),
        "mkstemp": (fitted.tempfile, "mkstemp", full),
    }
    with monkeypatch.context() as patch:
        patch.setattr(*target[where])
        with pytest.raises(CheckpointError, match="could not be written.*untouched"):
            fit(MODEL, None, tiny_screen, out=run, **quick | {"epochs": 2, "seed": 8})
        with pytest.raises(CheckpointError, match="could not be written.*untouched"):
            Fit.load(run).save(run)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before  # and no half-written files beside
    Fit.load(run)


def test_a_folder_that_cannot_be_made(tiny_screen, quick, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="could not be written"):
        fit(MODEL, None, tiny_screen, out=tmp_path / "file" / "run", **quick | {"epochs": 1})


def test_ctrl_c_keeps_a_checkpoint_and_passes_on(tiny_screen, settings, tmp_path, monkeypatch):
    whole = fit(MODEL, None, tiny_screen, **settings)
    step, calls = engine.elbo_terms, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 30:  # in the middle of an epoch
            raise KeyboardInterrupt
        return step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "elbo_terms", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fit(MODEL, None, tiny_screen, out=tmp_path / "run", **settings)
    stopped = Fit.load(tmp_path / "run")
    n = len(stopped.history)
    assert 0 < n < 6 and not stopped.finished
    assert stopped.interruption == f"training was interrupted after {n} epochs; go on with --resume"
    stopped.save(tmp_path / "copy")
    assert not Fit.load(tmp_path / "copy").finished
    _assert_same(whole, fit(MODEL, None, tiny_screen, out=tmp_path / "run", resume=True, **settings))
    assert whole.finished and Fit.load(tmp_path / "run").finished and not whole.interruption


def test_runs_that_do_not_say_are_finished(run):
    record = json.loads((run / "fit.json").read_text())
    assert record.pop("finished") is True
    (run / "fit.json").write_text(json.dumps(record))
    assert Fit.load(run).finished


def test_a_killed_process_loses_at_most_an_epoch(tmp_path):
    """SIGKILL from outside at an arbitrary moment."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent("""
        import sys
        import anndata as ad, numpy as np, pandas as pd
        from pyro_causalcell.data import Screen
        from pyro_causalcell.inference import fit
        x = np.random.default_rng(0).poisson(3.0, (90, 5)).astype("float32") + 1
        obs = pd.DataFrame({"target": ["A", "B", "non-targeting"] * 30}, index=[f"c{i}" for i in range(90)])
        fit("sparse-shift", None, Screen(ad.AnnData(x, obs)), n_latents=2, n_hidden=4, epochs=100000,
            warm_start=2, out=sys.argv[1], progress=False)
        """)
    )
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")], stderr=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    try:
        deadline = time.monotonic() + 60
        while not checkpoint.exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.4)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    state = torch.load(checkpoint, weights_only=True)
    assert state["progress"]["epoch"] == len(state["progress"]["history"]) >= 1
