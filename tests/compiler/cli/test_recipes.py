"""Which preprocessing recipe the command line takes: beside the source, of an option, assumed."""

import json
from pathlib import Path

import pytest
from support.cli_runs import Cli, assert_same_encoder
from support.command_line import assert_refused
from support.tiny_source import RECIPE

from regcache.export.onnx_file import sidecar
from regcache.passes.preprocess import Preprocess

# One worker compiles for all.
pytestmark = pytest.mark.xdist_group("cli")


def test_export_copies_the_recipe(cli: Cli, encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "copy.onnx"
    assert cli("export", encoder, "-o", output).code == 0
    assert_same_encoder(output, encoder)
    assert sidecar(output).read_text() == RECIPE.to_json()
    assert sorted(p.name for p in output.parent.iterdir()) == ["copy.onnx", "copy.preprocess.json"]


def test_the_recipe_that_transformers_left_beside_is_taken(
    cli: Cli, encoder: Path, tmp_path: Path
) -> None:
    sidecar(encoder).unlink()
    said = {"image_processor_type": "CLIPImageProcessor", "size": 18, "crop_size": 16}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    (tmp_path / "out").mkdir()
    assert cli("export", encoder, "-o", tmp_path / "out/copy.onnx").code == 0
    recipe = Preprocess.from_json(sidecar(tmp_path / "out/copy.onnx").read_text())
    assert (recipe.height, recipe.resize_to, recipe.background) == (16, (18, 18), (255, 255, 255))
    outcome = cli("inspect", encoder)
    assert outcome.code == 0
    assert "warning" not in outcome.err


@pytest.mark.slow
def test_an_option_replaces_what_lies_beside_and_unread_files_are_counted(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    sidecar(encoder).unlink()
    beside = tmp_path / "preprocessor_config.json"
    beside.write_text(json.dumps({"image_processor_type": "SamImageProcessor"}))
    for name in ("a.heic", "b.HEIC", "c.svg"):
        (calibration / name).touch()
    artifact, option = tmp_path / "artifact", tmp_path / "config.json"
    option.write_text(json.dumps({"pretrained_cfg": {"input_size": [3, 16, 16]}}))
    command = ("compile", encoder, "--images", calibration, "-o", artifact, "--registers", "off")
    assert_refused(cli(*command), "preprocessor_config.json", "--preprocess FILE replaces it")
    outcome = cli(*command, "--accept-slower", "--preprocess", option)
    assert outcome.code == 0
    assert outcome.err.count("were left out: 2 .heic (pip install pillow-heif), 1 .svg") == 1
    recipe = json.loads((artifact / "preprocess.json").read_text())
    assert (recipe["resize_to"], recipe["crop_offset"]) == ([18, 18], "round")
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["source"]["recipe"] == "option"


@pytest.mark.slow
def test_an_assumed_recipe_is_said(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    sidecar(encoder).unlink()
    artifact = tmp_path / "artifact"
    outcome = cli("compile", encoder, "--images", calibration, "-o", artifact)
    assert outcome.code == 0
    assert "warning: " in outcome.err
    assert "without a preprocessing recipe" in outcome.err
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["source"]["recipe"] == "assumed"
    option = tmp_path / "mine.json"
    option.write_text(RECIPE.to_json())
    command = ("compile", encoder, "--images", calibration, "-o", artifact, "--preprocess", option)
    assert cli(*command, "--registers", "off", "--no-equalize").code == 0
    assert (artifact / "preprocess.json").read_text() == RECIPE.to_json()
    wrong = json.loads(RECIPE.to_json()) | {"height": 24}
    option.write_text(json.dumps(wrong))
    assert_refused(cli(*command), "24 x 16")
