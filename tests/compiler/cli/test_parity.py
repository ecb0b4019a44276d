"""`regcache parity` as a gate: thresholds, blocks, reports, and the same numbers every time."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import onnx
import pytest
from numpy.random import default_rng
from PIL import Image
from support.command_line import assert_refused, run_regcache
from support.mutations import copy_artifact, flip_scale, forge
from support.tiny_artifact import tiny_artifact
from support.tiny_source import RECIPE

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.parity import reference
from regcache.compiler.parity.reference import Original
from regcache.runtime.images import preprocess_image

pytestmark = pytest.mark.xdist_group("cli_parity")  # one worker makes the artifact for all


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("artifact"), depth=2)


@pytest.fixture(scope="module")
def images(artifact: Path) -> Path:
    return artifact.parent / "calibration"


@pytest.fixture(autouse=True)
def _no_step_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    """CI sets it for the tests themselves."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def limits(folder: Path, text: str) -> Path:
    file = folder / "thresholds.toml"
    file.write_text(text)
    return file


def measured(report: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(report.read_text())
    return content


def test_thresholds_from_a_file_decide(artifact: Path, images: Path, tmp_path: Path) -> None:
    base = ("parity", artifact, "--images", images, "--json", tmp_path / "p.json")
    good = limits(tmp_path, "cosine_mean = 0.99\ncosine_min = 0.9\nnn_agreement = 0.0")
    assert run_regcache(*base, "--thresholds", good).code == 0
    found = measured(tmp_path / "p.json")
    assert [check["name"] for check in found["checks"]] == [
        "cosine_mean", "cosine_min", "nn_agreement", "n_nonfinite",
    ]  # fmt: skip
    assert found["min_cosine"] == 0.99
    bad = limits(tmp_path, "sqnr_db = 190.0")
    junit = tmp_path / "junit.xml"
    failed = run_regcache(*base, "--thresholds", bad, "--junit", junit)
    assert failed.code == 1
    assert "is below 190" in " ".join(failed.out.split())
    assert measured(tmp_path / "p.json")["passed"] is False
    cases = {
        case.get("name"): case.find("failure") for case in ElementTree.parse(junit).iter("testcase")
    }
    assert [name for name, failure in cases.items() if failure is not None] == ["sqnr_db"]


def test_min_cosine_takes_precedence(artifact: Path, images: Path, tmp_path: Path) -> None:
    file = limits(tmp_path, "cosine_mean = 1.0")
    base = ("parity", artifact, "--images", images, "--thresholds", file)
    assert run_regcache(*base).code == 1
    assert run_regcache(*base, "--min-cosine", 0.9).code == 0
    assert run_regcache(*base, "--min-cosine", "nan").code == 2


def test_a_threshold_that_cannot_be_held_is_refused(
    artifact: Path, images: Path, tmp_path: Path
) -> None:
    base = ("parity", artifact, "--images", images, "--thresholds")
    knn = limits(tmp_path, "knn_top1_drop = 0.01")
    assert_refused(run_regcache(*base, knn), "knn_top1_drop", "--gallery")
    blocks = limits(tmp_path, "block_cosine_mean = 0.9")
    assert_refused(run_regcache(*base, blocks), "--per-layer")
    before_images = ("parity", artifact, "--images", tmp_path / "none", "--thresholds", blocks)
    assert_refused(run_regcache(*before_images), "block_cosine_mean")
    assert_refused(run_regcache(*base, limits(tmp_path, "x = 1")), "no such threshold")
    assert_refused(run_regcache(*base, tmp_path / "none.toml"), "none.toml")


def test_per_layer_names_the_block_that_broke(artifact: Path, images: Path, tmp_path: Path) -> None:
    base = ("--images", images, "--per-layer", "--json", tmp_path / "p.json")
    healthy = run_regcache("parity", artifact, *base)
    assert healthy.code == 0
    assert "the error jumps in no block" in " ".join(healthy.out.split())
    found = measured(tmp_path / "p.json")
    assert [block["name"] for block in found["blocks"]] == ["blocks.0", "blocks.1"]
    assert "first_jump" not in found
    broken = copy_artifact(artifact, tmp_path / "broken")
    for seed in range(4):
        flip_scale(broken, default_rng(seed))
    forge(broken)
    run_regcache("parity", broken, *base)
    assert measured(tmp_path / "p.json")["first_jump"] in {"blocks.0", "blocks.1"}


def test_per_layer_goes_through_operators_that_are_not_onnxs(
    artifact: Path, images: Path, tmp_path: Path
) -> None:
    """Behind MatMulNBits no shape is inferred, with or without what the file says of tensors."""
    packed = tmp_path / "packed"
    options = ("--images", images, "--precision", "w4a16", "--accept-slower", "--threads", 1)
    assert run_regcache("compile", artifact.parent / "tiny.onnx", "-o", packed, *options).code == 0
    bare = copy_artifact(packed, tmp_path / "bare")
    model = onnx.load(bare / "model.onnx")
    assert any(node.op_type == "MatMulNBits" for node in model.graph.node)
    del model.graph.value_info[:]
    onnx.save(model, bare / "model.onnx")
    forge(bare)
    found = []
    for folder in (packed, bare):
        base = ("--images", images, "--per-layer", "--json", tmp_path / "p.json")
        assert run_regcache("parity", folder, *base).code == 0
        found.append(measured(tmp_path / "p.json")["blocks"])
    assert [block["name"] for block in found[0]] == ["blocks.0", "blocks.1"]
    assert all(0 < block["relative_error"] < 0.1 for block in found[0])
    assert found[0] == found[1]


def test_outputs_are_compared_one_by_one(artifact: Path, images: Path, tmp_path: Path) -> None:
    report = tmp_path / "p.json"
    assert run_regcache("parity", artifact, "--images", images, "--json", report).code == 0
    found = measured(report)
    names = [output["name"] for output in found["outputs"]]
    assert names == ["pooled", "last_hidden_state"]
    assert found["outputs"][0]["cosine_mean"] == pytest.approx(found["cosine_mean"], abs=1e-12)
    assert "blocks" not in found


def test_two_runs_write_the_same_bytes(artifact: Path, images: Path, tmp_path: Path) -> None:
    written = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        files = [folder / file for file in ("p.json", "junit.xml", "summary.md")]
        options = zip(("--json", "--junit", "--summary"), files, strict=True)
        command = [item for pair in options for item in pair]
        base = ("parity", artifact, "--images", images, "--per-layer", "--threads", 1)
        assert run_regcache(*base, *command).code == 0
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]


def test_the_summary_goes_where_github_says(
    artifact: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, own = tmp_path / "step.md", tmp_path / "own.md"
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    base = ("parity", artifact, "--images", images)
    assert run_regcache(*base).code == 0
    assert "regcache parity: passed" in step.read_text()
    assert run_regcache(*base, "--min-cosine", 1, "--summary", own).code == 1
    assert "regcache parity: FAILED" in own.read_text()
    assert step.read_text().count("regcache parity") == 1


def test_float_is_compared_with_pytorch_only(artifact: Path, images: Path) -> None:
    base = ("parity", artifact, "--images", images, "--against", "float")
    assert_refused(run_regcache(*base), "is an ONNX file, there is no PyTorch original")
    assert_refused(run_regcache(*base, "--reference", "float-onnx"), "with itself")


def test_pixels_are_held_against_the_sources_own(
    artifact: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny recipe drops what is transparent; a library that shows it on white differs."""
    mixed = tmp_path / "mixed"
    shutil.copytree(images, mixed)
    Image.new("RGBA", (40, 30), (10, 20, 30, 0)).save(mixed / "clear.png")
    white = replace(RECIPE, background=(255, 255, 255))
    report = tmp_path / "p.json"
    with Artifact.open(artifact).float_session(threads=1) as session:
        original = Original("pytorch", session.run, lambda image: preprocess_image(image, white))
        monkeypatch.setattr(reference, "_pytorch", lambda *_: original)
        same = run_regcache("parity", artifact, "--images", images, "--json", report)
        assert (same.code, measured(report)["pixels"]["max_difference"]) == (0, 0.0)
        assert "own processor" not in same.err
        base = ("parity", artifact, "--images", mixed, "--json", report)
        found = run_regcache(*base, "--junit", tmp_path / "junit.xml")
        assert found.code == 0
        assert " ".join(found.err.split()).count("1 of 8 images differ, by up to 245 of 255") == 1
        assert measured(report)["pixels"] == {
            "n_images": 8,
            "n_different": 1,
            "max_difference": 245.0,
            "worst_image": "clear.png",
            "worst_mode": "RGBA",
        }
        gate = limits(tmp_path, "pixel_difference = 1.0")
        assert run_regcache(*base, "--thresholds", gate).code == 1
    float_onnx = ("--reference", "float-onnx", "--thresholds", gate)
    assert_refused(run_regcache(*base, *float_onnx), "pixel_difference: not measured")
