"""The wheel holds everything, built from the sdist as a user's installer may build it, and works alone."""

import hashlib
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

# What the sdist is made of. Nothing else of the checkout may be needed, or reach the wheel.
SOURCES = [
    "setup.cfg",
    "pyproject.toml",
    "MANIFEST.in",
    "README.md",
    "LICENSE",
    "NOTICE",
    "pyro_causalcell",
    "models",
    "guides",
]


def run(code: str, wheel_folder: Path, cwd: Path, *args: str) -> str:
    """Run Python code in a process of its own that finds the unpacked wheel and no checkout."""
    # An editable install would lend the modules that the wheel lacks.
    lonely = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in str(f)]\n"
    result = subprocess.run(
        [sys.executable, "-c", lonely + textwrap.dedent(code), *args],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(wheel_folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def build(checkout: Path, folder: Path) -> Path:
    """Build the wheel from a copy: a build/ folder must not be left in the checkout, nor be read from it."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in SOURCES:
        if (checkout / name).is_dir():
            shutil.copytree(checkout / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(checkout / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder / "dist"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path) -> Path:
    folder = wheel.parent / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_only_one_top_level_package(unpacked: Path) -> None:
    top = {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"}
    assert top == {"pyro_causalcell"}


def test_metadata(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert "\nLicense-Expression: BSD-3-Clause\n" in metadata
    assert {path.name for path in info.rglob("*") if path.name in ("LICENSE", "NOTICE")} == {
        "LICENSE",
        "NOTICE",
    }
    assert "pyro-causalcell = pyro_causalcell.cli:main" in (info / "entry_points.txt").read_text()


def test_every_module_imports_from_the_wheel(
    unpacked: Path, modules_on_disk: set[str], tmp_path: Path
) -> None:
    code = """
        import importlib, pathlib, sys
        folder, *names = sys.argv[1:]
        for name in names:
            module = importlib.import_module(name)
            assert pathlib.Path(module.__file__).is_relative_to(folder), (name, module.__file__)
    """
    names = sorted(name for name in modules_on_disk if not name.endswith(".__main__"))
    run(code, unpacked, tmp_path, str(unpacked), *names)


def test_data_travel_unchanged(unpacked: Path, checkout: Path, tmp_path: Path) -> None:
    code = """
        import hashlib
        from importlib.resources import files
        for entry in sorted(files("pyro_causalcell.datasets").iterdir(), key=lambda entry: entry.name):
            if entry.name.endswith((".h5ad", ".md")):
                print(entry.name, hashlib.sha256(entry.read_bytes()).hexdigest())
    """
    found = dict(line.split() for line in run(code, unpacked, tmp_path).splitlines())
    folder = checkout / "pyro_causalcell" / "datasets"
    expected = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.suffix in (".h5ad", ".md")
    }
    assert {"norman2019_subset.h5ad", "papalexi2021.h5ad", "PROVENANCE.md"} <= expected.keys()
    assert found == expected


def test_types_travel(unpacked: Path) -> None:
    assert (unpacked / "pyro_causalcell" / "py.typed").exists()


def test_checkout_as_working_directory_finds_models_and_guides(unpacked: Path, checkout: Path) -> None:
    # The working directory comes before the wheel, and its pyro_causalcell/ has no models/ and guides/ in it.
    code = """
        import pyro_causalcell, pyro_causalcell.models, pyro_causalcell.guides
        for module in (pyro_causalcell, pyro_causalcell.models, pyro_causalcell.guides):
            print(module.__file__)
    """
    found = run(code, unpacked, checkout).splitlines()
    assert found == [
        str(checkout / folder / "__init__.py") for folder in ("pyro_causalcell", "models", "guides")
    ]
