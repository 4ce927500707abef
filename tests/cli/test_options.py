"""Options come from signatures: what they are called, what they take, what help says."""

import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pyro_causalcell import cli as room
from pyro_causalcell import inference
from pyro_causalcell.data import Screen
from pyro_causalcell.inference import Fit
from pyro_causalcell.simulate import combination_screen, latent_scm, sparse_shift, temporal_scm

SIMULATORS = (sparse_shift, latent_scm, temporal_scm, combination_screen)

Run = Callable[..., Any]


def defaults(function: Callable[..., Any]) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_training_settings_are_those_of_the_library() -> None:
    library, here = defaults(inference.fit), defaults(room.fit)
    not_options = {"model", "guide", "screen", "split", "elbo", "out", "resume", "progress", "settings"}
    assert set(library) - not_options == room.TRAINING_SETTINGS
    for name in room.TRAINING_SETTINGS:
        assert here[name] == library[name], name


def test_settings_of_the_screen_are_those_of_the_library() -> None:
    library, here = defaults(Screen), defaults(room.fit)
    for name in set(library) - {"adata", "perturbation", "control", "guide", "embeddings"}:
        assert here[name] == library[name], name


def test_settings_of_the_simulator_are_those_of_the_library() -> None:
    """An option that is not given is left to the simulator, and every setting of a simulator is an option."""
    here = defaults(room.simulate)
    del here["out"], here["process"]
    settings = [defaults(simulator) for simulator in SIMULATORS]
    assert set(here) == set().union(*settings)
    assert here.pop("seed") == 0 and {chosen["seed"] for chosen in settings} == {0}
    assert set(here.values()) == {None}


def test_help_of_the_simulator_says_what_an_option_is_if_not_given() -> None:
    text = " ".join((inspect.getdoc(room.simulate) or "").split())
    words = {"seed", "n_control_cells", "preset", "changes", "likelihood", "graph", "dynamics", "times"}
    settings = [defaults(simulator) for simulator in SIMULATORS]
    for name in set().union(*settings) - words:
        values = [chosen[name] for chosen in settings if chosen.get(name) is not None]
        said = re.search(rf" {name}: (.*?)( \w+: |$)", text)
        assert said is not None
        for value in values:
            assert f"{value:,}".removesuffix(".0") in said[1], name


def test_every_argument_has_an_option_and_a_line_of_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, command in room.COMMANDS.items():
        shown = [option for group in command.shown().values() for option in group]
        assert sorted(shown) == sorted(command.arguments), name
        with pytest.raises(SystemExit, match="0"):
            room.main([name, "--help"])
        text = capsys.readouterr().out
        documented = inspect.getdoc(command.run) or ""
        for option in shown:
            assert f"    {option}: " in documented, f"{name} {option}"
            word = option.upper() if option in command.positional else f"--{option.replace('_', '-')}"
            assert f"\n  {word}" in text, f"{name} {word}"
        assert "null" not in text.replace("null does not clip", "") and "typing" not in text


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        room.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for name, command in room.COMMANDS.items():
        assert f" {name} {(inspect.getdoc(command.run) or '').splitlines()[0]}" in text


def test_every_example_of_the_manual_can_be_typed() -> None:
    manual = Path(__file__).parents[2] / "docs" / "cli.md"
    text = manual.read_text().replace("\\\n", " ")
    examples = [shlex.split(words) for words in re.findall(r"^\$ pyro-causalcell (.*)$", text, re.MULTILINE)]
    assert {words[0] for words in examples} == set(room.COMMANDS)
    for words in examples:
        if "--config" not in words:  # the file is made by the reader
            room._parser().parse_args(room._tidy(words))


def test_help_groups_options_and_shows_what_they_take(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        room.main(["fit", "--help"])
    text = capsys.readouterr().out
    assert text.startswith(
        "usage: pyro-causalcell fit DATA --perturbation COLUMN (--control NAME | --no-controls) --out RUN "
        "[options]"
    )
    for line in (
        "your data:",
        "model:",
        "training:",
        "result:",
        "  --likelihood nb|zinb|poisson|gaussian",
        "  --resume  ",
    ):
        assert f"\n{line}" in text, line
    assert "--resume RESUME" not in text and "--batch+" not in text


def test_printed_configuration_can_be_read_back(
    cli: Run, fit_words: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        room.main([*fit_words("run", "--batch", "batch", "--clip", "null"), "--print-config"])
    text = capfd.readouterr().out
    Path("fit.yaml").write_text(text)
    printed = yaml.safe_load(text)
    assert printed["control"] == ["non-targeting"] and printed["settings"] == {"n_hidden": 16}
    assert cli("fit", "--config", "fit.yaml", "--seed", 3).code == 0
    fit = Fit.load("run")
    assert (fit.seed, fit.training["clip"], fit.screen.batch) == (3, None, ["batch"])


def test_words_of_the_command_line_win_over_the_file(cli: Run, data: Path) -> None:
    Path("fit.yaml").write_text(
        f"data: {data}\nperturbation: target\ncontrol: non-targeting\nout: from_file\n"
        "epochs: 2\nquiet: true\nlatents: 3\nwarm_start: 0\nsettings:\n  n_hidden: 16\n"
    )
    assert (
        cli("fit", "--config", "fit.yaml", "--out", "run", "--epochs", 1, "--settings.n_layers", 1).code == 0
    )
    fit = Fit.load("run")
    assert len(fit.history) == 1 and not Path("from_file").exists()
    chosen = fit.settings["model"]["settings"]
    assert (chosen["n_hidden"], chosen["n_layers"]) == (16, 1)


@pytest.mark.parametrize(
    ("words", "tidy"),
    [
        (["fit", "d", "--min-cells", "3"], ["fit", "d", "--min_cells", "3"]),
        (["fit", "d", "--min-cells=3"], ["fit", "d", "--min_cells=3"]),
        (["fit", "--resume", "d"], ["fit", "--resume=true", "d"]),
        (["fit", "--resume=false", "d"], ["fit", "--resume=false", "d"]),
        (["fit", "--batch", "a-b", "--batch=c"], ["fit", '--batch=["a-b", "c"]']),
        (["predict", "r", "--perturb", "null"], ["predict", "r", '--perturb=["null"]']),
        (["predict", "r", "--perturb", "['A', B]"], ["predict", "r", '--perturb=["A", "B"]']),
        (["predict", "r", "--perturb"], ["predict", "r", "--perturb"]),
        (["--help"], ["--help"]),
    ],
)
def test_words_are_tidied(words: list[str], tidy: list[str]) -> None:
    assert room._tidy(words) == tidy


def test_names_that_look_like_other_values_stay_text(cli: Run, tiny_adata: Any) -> None:
    names = {"non-targeting": "no", "A": "1", "B": "null", "C": "true", "D": "1e5", "A+B": "1+null"}
    tiny_adata.obs["target"] = tiny_adata.obs["target"].astype(str).map(names)
    tiny_adata.write_h5ad("odd.h5ad")
    words = [
        "--perturbation",
        "target",
        "--control",
        "no",
        "--latents",
        2,
        "--epochs",
        1,
        "--settings.n_hidden",
        8,
    ]
    assert cli("fit", "odd.h5ad", *words, "--quiet", "--out", "run").code == 0
    assert Fit.load("run").screen.targets == ["1", "1e5", "null", "true"]
    assert (
        cli("predict", "run", "--perturb", "1", "--perturb", "null", "--cells", 2, "--out", "P.h5ad").code
        == 0
    )


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Pass perturbation=.", "Pass --perturbation."),
        ("remove them or pass allow_empty=True", "remove them or pass --allow-empty"),
        ("looks like counts: pass layer='counts', or", "looks like counts: pass --layer counts, or"),
        ("pass layer=None, or", "pass no --layer, or"),
        ("turn it off: warm_start=0", "turn it off: --warm-start 0"),
        ("expected 3 cells (min_cells=), found", "expected 3 cells (--min-cells), found"),
        ("found epochs=-3, warm_start=0", "found --epochs -3, --warm-start 0"),
        ("a=b stays, n_layers=3 too", "a=b stays, n_layers=3 too"),
    ],
)
def test_messages_speak_of_options(message: str, shown: str) -> None:
    assert room._as_options(message, "fit") == shown
