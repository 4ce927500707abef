"""setup.cfg says what is on disk: an unlisted folder or file would be missing from the wheel in silence."""

import configparser
import fnmatch
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pyro_causalcell


@pytest.fixture(scope="module")
def setup_cfg(checkout: Path) -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.optionxform = str  # type: ignore[assignment,method-assign]
    config.read(checkout / "setup.cfg")
    return config


def lines(value: str) -> list[str]:
    return [line for line in value.split("\n") if line and not line.startswith("#")]


def requirements(config: configparser.ConfigParser) -> dict[str, list[Requirement]]:
    groups = {"core": config["options"]["install_requires"], **config["options.extras_require"]}
    return {group: [Requirement(line) for line in lines(value)] for group, value in groups.items()}


def package_data(config: configparser.ConfigParser) -> dict[str, list[str]]:
    return {package: lines(value) for package, value in config["options.package_data"].items()}


def folder_of(package: str, places: dict[str, Path]) -> Path:
    root = max((name for name in places if f"{package}.".startswith(f"{name}.")), key=len)
    return places[root].joinpath(*package.removeprefix(root).strip(".").split("."))


def test_packages_are_those_on_disk(setup_cfg: configparser.ConfigParser, packages_on_disk: set[str]) -> None:
    listed = lines(setup_cfg["options"]["packages"])
    assert len(listed) == len(set(listed))
    assert set(listed) == packages_on_disk


def test_every_folder_with_python_files_is_a_package(places: dict[str, Path]) -> None:
    folders = {path.parent for place in places.values() for path in place.rglob("*.py")}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_every_package_data_pattern_finds_files(
    setup_cfg: configparser.ConfigParser, places: dict[str, Path]
) -> None:
    missing = [
        (package, pattern)
        for package, patterns in package_data(setup_cfg).items()
        for pattern in patterns
        if not any(folder_of(package, places).glob(pattern))
    ]
    assert missing == []


def test_every_data_file_is_package_data(
    setup_cfg: configparser.ConfigParser, places: dict[str, Path], packages_on_disk: set[str]
) -> None:
    patterns = package_data(setup_cfg)
    unlisted = [
        (package, path.name)
        for package in sorted(packages_on_disk)
        for path in folder_of(package, places).iterdir()
        if path.is_file() and path.suffix not in (".py", ".pyc")
        if not any(fnmatch.fnmatch(path.name, pattern) for pattern in patterns.get(package, []))
    ]
    assert unlisted == []


def test_no_requirement_is_pinned(setup_cfg: configparser.ConfigParser) -> None:
    pinned = [
        str(requirement)
        for group in requirements(setup_cfg).values()
        for requirement in group
        if any(specifier.operator in ("==", "===", "~=") for specifier in requirement.specifier)
    ]
    assert pinned == []


def test_constraints_pin_what_ci_installs_and_agree_with_setup_cfg(
    setup_cfg: configparser.ConfigParser, checkout: Path
) -> None:
    pins = {
        canonicalize_name(name): version
        for name, version in re.findall(r"^(\S+)==(\S+)$", (checkout / "constraints.txt").read_text(), re.M)
    }
    needed = requirements(setup_cfg)
    for requirement in needed["core"] + needed["docs"] + needed["test"]:
        version = pins[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), requirement


def test_one_version(checkout: Path, setup_cfg: configparser.ConfigParser) -> None:
    assert setup_cfg["metadata"]["version"] == "attr: pyro_causalcell.__version__"
    assert f"\nversion: {pyro_causalcell.__version__}\n" in (checkout / "CITATION.cff").read_text()


def test_setuptools_of_the_tests_can_build(setup_cfg: configparser.ConfigParser, checkout: Path) -> None:
    pyproject = tomllib.loads((checkout / "pyproject.toml").read_text())
    wanted = [str(requirement) for requirement in requirements(setup_cfg)["test"]]
    assert set(pyproject["build-system"]["requires"]) <= set(wanted)
