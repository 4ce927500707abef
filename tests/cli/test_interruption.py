"""Ctrl-C, kill -9 and a full disk: a checkpoint stays, and --resume ends at the same numbers."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from pyro_causalcell.cli import main
from pyro_causalcell.inference import Fit, fitted
from pyro_causalcell.inference.training import Trainer

Run = Callable[..., Any]
EPOCHS = 24


@pytest.fixture(scope="session")
def words(fit_words: Run) -> list[str]:
    """A fit to ``run`` that lasts long enough to be stopped."""
    return list(fit_words("run", "--epochs", EPOCHS, "--warm-start", 4, "--batch-size", 64))


@pytest.fixture(scope="session")
def uninterrupted(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same fit, never stopped."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert main([*words, "--out", str(out)]) == 0
    return out


def start_and_stop(words: list[str], folder: Path, how: signal.Signals) -> tuple[int, str]:
    """Start a fit in another process, and stop it after its first epochs."""
    process = subprocess.Popen(
        [sys.executable, "-m", "pyro_causalcell", *words], cwd=folder, stderr=subprocess.PIPE, text=True
    )
    checkpoint = folder / "run" / "checkpoint.pt"
    deadline = time.monotonic() + 300
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(how)
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def assert_same_fit(one: Path, other: Path) -> None:
    states = [torch.load(folder / "weights.pt", weights_only=True) for folder in (one, other)]
    for kind in ("model", "guide"):
        assert states[0][kind].keys() == states[1][kind].keys()
        for name, value in states[0][kind].items():
            assert torch.equal(value, states[1][kind][name]), name
    histories = [pd.read_csv(folder / "history.csv").drop(columns="seconds") for folder in (one, other)]
    pd.testing.assert_frame_equal(*histories, check_exact=True)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_stopped_fit_goes_on_as_if_nothing_had_been(
    cli: Run, words: list[str], uninterrupted: Path, tmp_path: Path, how: signal.Signals
) -> None:
    code, err = start_and_stop(words, tmp_path, how)
    stopped_at = torch.load("run/checkpoint.pt", weights_only=True)["progress"]["epoch"]
    assert 0 < stopped_at < EPOCHS
    if how is signal.SIGINT:
        assert code == 130 and err.count("\n") == 1
        assert not Fit.load("run").finished
        assert "run holds the last whole epoch" in err and err.rstrip().endswith("--batch-size 64 --resume")
    else:
        assert code == -signal.SIGKILL
    assert cli(*words, "--resume").code == 0
    assert_same_fit(Path("run"), uninterrupted)


def test_ctrl_c_before_the_first_epoch_leaves_nothing(
    cli: Run, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Trainer) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_train_epoch", stop)
    result = cli(*words)
    assert (result.code, result.out) == (130, [])
    assert "stopped before the first epoch was over" in result.err[-1]
    assert not list(Path().glob("run/*"))


def test_ctrl_c_in_other_commands(cli: Run, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", stop)
    assert cli("graph", run, "--out", "G.csv") == (130, [], ["pyro-causalcell: stopped; nothing was written"])
    assert list(Path().iterdir()) == []


def test_an_interrupted_fit_is_told_by_the_commands_that_load_it(cli: Run, run: Path) -> None:
    shutil.copytree(run, "run")
    record = json.loads(Path("run/fit.json").read_text())
    Path("run/fit.json").write_text(json.dumps(record | {"finished": False}))
    result = cli("graph", "run", "--out", "G.csv")
    said = "pyro-causalcell: training was interrupted after 3 epochs; go on with --resume"
    assert (result.code, result.err) == (0, [said]) and Path("G.csv").exists()


def test_resuming_a_finished_fit_changes_nothing(cli: Run, fit_words: Run) -> None:
    assert cli(*fit_words("run")).code == 0
    before = torch.load("run/weights.pt", weights_only=True)
    assert cli(*fit_words("run", "--resume")).code == 0
    after = torch.load("run/weights.pt", weights_only=True)
    assert all(torch.equal(v, after["guide"][k]) for k, v in before["guide"].items())


def test_resume_starts_where_there_is_nothing_yet(cli: Run, fit_words: Run) -> None:
    assert cli(*fit_words("run", "--resume")).code == 0
    assert Path("run/fit.json").exists()


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing")],
)
def test_a_full_disk_keeps_the_last_checkpoint(
    cli: Run, words: list[str], uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save, saved = torch.save, []

    def fills_up(state: Any, file: Any) -> None:
        if len(saved) == 3:
            Path(file).write_bytes(b"half")
            raise error
        saved.append(save(state, file))

    with monkeypatch.context() as patch:
        patch.setattr(fitted.torch, "save", fills_up)
        result = cli(*words)
    assert (result.code, result.out, len(result.err)) == (2, [], 1)
    assert str(error.args[-1]) in result.err[0] and "--resume" in result.err[0]
    assert [p.name for p in Path("run").iterdir()] == ["checkpoint.pt"]
    assert torch.load("run/checkpoint.pt", weights_only=True)["progress"]["epoch"] == 3
    assert cli(*words, "--resume").code == 0
    assert_same_fit(Path("run"), uninterrupted)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("needs the right to mount a file system")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_a_disk_that_is_really_full(cli: Run, fit_words: Run, small_disk: Path) -> None:
    run = small_disk / "run"
    assert cli(*fit_words(run)).code == 0
    kept = {p.name: p.read_bytes() for p in run.iterdir()}
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "ballast").write_bytes(b"0" * (free - 8192))
    result = cli(*fit_words(run, "--epochs", 4, "--resume"))
    assert (result.code, result.out, len(result.err)) == (2, [], 1) and "0.0 MiB free" in result.err[0]
    assert {p.name: p.read_bytes() for p in run.iterdir()} == kept
    assert cli("graph", run, "--out", small_disk / "G.csv").code == 0
    assert json.loads((run / "fit.json").read_text())["format"] == 1
