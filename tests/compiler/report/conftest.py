"""A tiny artifact that was compiled with nothing but defaults, and its report's pieces."""

from pathlib import Path

import pytest
from support.command_line import run_regcache
from support.tiny_artifact import write_tiny
from support.tiny_source import photos

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.report.subject import Subject, read_subject


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("reported") / "photos", 16, seed=1)


@pytest.fixture(scope="session")
def compiled(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact; page.html beside it is the report that compile wrote."""
    folder = tmp_path_factory.mktemp("compiled")
    encoder = write_tiny(folder, depth=3)
    command = ("compile", encoder, "--images", images, "-o", folder / "artifact")
    speed = ("--threads", 1, "--accept-slower")
    outcome = run_regcache(*command, *speed, "--report", folder / "page.html")
    assert outcome.code == 0, outcome
    assert "page.html: open it in a browser" in outcome.out
    return folder / "artifact"


@pytest.fixture(scope="session")
def subject(compiled: Path) -> Subject:
    return read_subject(Artifact.open(compiled), threads=1)
