"""A tiny encoder and photographs for the command line, and an artifact that is compiled once."""

from pathlib import Path

import onnx
import pytest
from support.cli_runs import Cli, Compiled
from support.command_line import run_regcache
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit

from regcache.export.onnx_file import sidecar


@pytest.fixture
def cli() -> Cli:
    """Run `regcache ARGS` in this process."""
    return run_regcache


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(SPEC).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    return path


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    return photos(tmp_path / "calibration", 12, seed=1)


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    return photos(tmp_path / "evaluation", 9, seed=2)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """The tiny encoder, compiled with nothing but defaults."""
    folder = tmp_path_factory.mktemp("compiled")
    encoder, artifact = folder / "tiny.onnx", folder / "artifact"
    onnx.save(TinyVit(SPEC).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    images = photos(folder / "calibration", 12, seed=1)
    outcome = run_regcache("compile", encoder, "--images", images, "-o", artifact)
    assert outcome.code == 0, outcome
    return Compiled(encoder, images, artifact, outcome)
