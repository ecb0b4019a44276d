"""The lock holds hashes of all that pyproject.toml asks for, and nothing of who wrote it."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_ENTRY = re.compile(
    r"^(?P<name>[a-z0-9.-]+)==(?P<version>\S+) \\\n(?P<hashes>(?: +--hash=.*\n)+)", re.M
)


@pytest.fixture(scope="module")
def lock() -> str:
    return (ROOT / "requirements" / "dev.txt").read_text(encoding="utf-8")


def wanted() -> list[Requirement]:
    """What the project, its exports and its development need, extras of its own replaced."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras, found = project["optional-dependencies"], []
    waiting = [*project["dependencies"], *extras["export"], *extras["dev"]]
    while waiting:
        requirement = Requirement(waiting.pop())
        if requirement.name == project["name"]:
            waiting += [item for extra in requirement.extras for item in extras[extra]]
        else:
            found.append(requirement)
    return found


def test_all_that_is_asked_for_is_locked(lock: str) -> None:
    versions = {item["name"]: item["version"] for item in _ENTRY.finditer(lock)}
    for requirement in wanted():
        version = versions.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement}: `make lock` writes requirements/dev.txt anew"
        assert requirement.specifier.contains(version), f"{requirement} is {version}: `make lock`"
    assert {"pip", "setuptools"} <= versions.keys()  # which install and build


def test_every_line_is_a_version_with_its_hashes(lock: str) -> None:
    rest = _ENTRY.sub("", lock)
    assert [line for line in rest.splitlines() if not line.startswith("#")] == []
    hashes = re.findall(r"--hash=(\S+)", lock)
    assert len(hashes) == lock.count("--hash=") > 100
    assert all(re.fullmatch("sha256:[0-9a-f]{64}", item) for item in hashes)


def test_no_host_and_no_path_is_in_it(lock: str) -> None:
    assert "/" not in lock
