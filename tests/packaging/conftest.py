"""Where the checkout is, and copies of the package laid out as it is installed."""

import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = {
    "pyro_causalcell": ROOT / "pyro_causalcell",
    "pyro_causalcell.models": ROOT / "models",
    "pyro_causalcell.guides": ROOT / "guides",
}


@pytest.fixture(scope="session")
def checkout() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def places() -> dict[str, Path]:
    """Dotted name of each root of the package on disk -> its folder."""
    return PLACES


@pytest.fixture(scope="session")
def packages_on_disk() -> set[str]:
    return {
        ".".join([name, *init.parent.relative_to(place).parts])
        for name, place in PLACES.items()
        for init in place.rglob("__init__.py")
    }


@pytest.fixture(scope="session")
def modules_on_disk(packages_on_disk: set[str]) -> set[str]:
    modules = {
        ".".join([name, *path.relative_to(place).with_suffix("").parts])
        for name, place in PLACES.items()
        for path in place.rglob("*.py")
        if path.name != "__init__.py"
    }
    return modules | packages_on_disk


@pytest.fixture
def link_tree(tmp_path: Path) -> Path:
    """A folder that holds the package as it is installed, made of links to the checkout."""
    package = tmp_path / "links" / "pyro_causalcell"
    package.mkdir(parents=True)
    for entry in (*PLACES["pyro_causalcell"].iterdir(), ROOT / "models", ROOT / "guides"):
        (package / entry.name).symlink_to(entry)
    return package.parent


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """The same folder as a copy of the Python files, for tests that plant a fault."""
    for name, place in PLACES.items():
        for path in place.rglob("*.py"):
            target = tmp_path / "copy" / Path(*name.split(".")) / path.relative_to(place)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    return tmp_path / "copy"
