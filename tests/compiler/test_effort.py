"""What an effort does is what its options do, and the manifest says which these were."""

import json
from pathlib import Path

import onnx
import pytest
from support.command_line import run_regcache
from support.tiny_artifact import SPEC
from support.tiny_source import RECIPE, photos
from support.tiny_vit import TinyVit

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.job.effort import Effort, RegisterChoice
from regcache.export.onnx_file import sidecar

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Compile a tiny encoder by twenty photographs."""
    folder = tmp_path_factory.mktemp("effort")
    encoder = folder / "tiny.onnx"
    onnx.save(TinyVit(SPEC).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    images = photos(folder / "calibration", 20, seed=1)
    return ["compile", encoder, "--images", images, "--accept-slower", "--threads", "1"]


def compiled(command: list[object], output: Path, *options: str) -> tuple[Manifest, bytes]:
    """The manifest and model.onnx."""
    outcome = run_regcache(*command, "-o", output, *options)
    assert outcome.code == 0, outcome
    artifact = Artifact.open(output)
    return artifact.manifest, artifact.model.read_bytes()


def test_fast_is_what_its_options_are(command: list[object], tmp_path: Path) -> None:
    fast, model = compiled(command, tmp_path / "fast", "--effort", "fast")
    options = ("--registers", "off", "--no-rotate", "--int8-share", "1")
    spelt, same = compiled(command, tmp_path / "spelt", *options)
    assert model == same
    assert fast.options.effort is Effort.FAST
    assert fast.options.registers is spelt.options.registers is RegisterChoice.OFF
    assert not fast.options.rotate
    assert fast.quantization.int8_share == spelt.quantization.int8_share == 1
    assert fast.curation.reason == "Registers: none (they were not asked for)"


def test_thorough_looks_at_more(command: list[object], tmp_path: Path) -> None:
    balanced, _ = compiled(command, tmp_path / "balanced")
    thorough, _ = compiled(command, tmp_path / "thorough", "--effort", "thorough")
    written = json.loads((tmp_path / "thorough" / "manifest.json").read_text())["options"]
    assert (written["effort"], written["registers"], written["rotate"]) == (
        "thorough",
        "auto",
        True,
    )
    assert balanced.options.effort is Effort.BALANCED
    damage = [
        [record.damage for record in one.curation.sensitivity] for one in (balanced, thorough)
    ]
    assert len(damage[0]) == len(damage[1]) > 0
    assert damage[0] != damage[1]  # of 4 images, and of all 5 that ranges are chosen on
