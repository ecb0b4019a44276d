"""`regcache build` end to end on a tiny encoder, with the real TensorRT-RTX."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from support.building import needs_tensorrt
from support.command_line import Outcome, assert_refused, run_regcache
from support.engine_artifacts import compiled
from support.tiny_source import photos

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.engines import build
from regcache.compiler.engines.signed_model import REWRITE
from regcache.runtime import tensorrt_rtx
from regcache.runtime.engine_layers import products_by_precision

FILE = "engines/model-tensorrt-rtx-8.6-8.9-12.0-batch-1-1-8.engine"

pytestmark = [needs_tensorrt, pytest.mark.xdist_group("build"), pytest.mark.slow]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("photos") / "calibration", 8, seed=1)


@pytest.fixture(scope="module")
def int8(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("int8"), images, "--target", "tensorrt-rtx")


@pytest.fixture
def artifact(int8: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(int8, tmp_path / "artifact"))


@pytest.fixture(scope="module")
def built(int8: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """It with its engine, and what was said while that was built; nothing may change it."""
    artifact = Path(shutil.copytree(int8, tmp_path_factory.mktemp("built") / "artifact"))
    return artifact, run_regcache("build", artifact)


@pytest.fixture
def with_engine(built: tuple[Path, Outcome], tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(built[0], tmp_path / "artifact"))


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_an_engine_is_added_once(int8: Path, built: tuple[Path, Outcome]) -> None:
    before, (artifact, first) = contents(int8), built
    assert first.code == 0, first
    assert "warning" not in first.err
    assert first.out.startswith("built in ")
    assert str(artifact / FILE) in first.out
    after = contents(artifact)
    assert after.keys() == before.keys() | {FILE}
    assert {name: after[name] for name in before if name != "manifest.json"} == {
        name: content for name, content in before.items() if name != "manifest.json"
    }

    manifest = Artifact.open(artifact).manifest
    (record,) = manifest.engines
    assert record.file == FILE
    assert record.model == "model.onnx"
    assert record.version == tensorrt_rtx.library_version()
    assert record.compute_capabilities == ["8.6", "8.9", "12.0"]
    assert record.batch == (1, 1, 8)
    assert record.products == {"INT8": 4, "FP16": 3}  # qkv, out, fc1, fc2; patches and attention
    assert sum(record.layers.values()) > sum(record.products.values())
    assert record.gpu is None
    assert record.size_ratio is None
    assert not record.warnings
    assert "predicted from peak rates, not measured" in first.out
    gpus = "L4", "A10", "RTX 4090", "RTX 5090"
    predicted = [(time.gpu, time.batch) for time in record.predicted]
    assert predicted == [(gpu, batch) for gpu in gpus for batch in (1, 8)]
    for time in record.predicted:  # nothing but launches, of more kernels than in FP16
        assert time.launches_ms > 0.8 * time.total_ms
        assert time.ratio is not None
        assert time.ratio > 1
    assert manifest.files[FILE].sha256 == hashlib.sha256(after[FILE]).hexdigest()
    assert not any(text in after["manifest.json"].decode() for text in ("seconds", str(artifact)))

    again = run_regcache("build", artifact)
    assert again.code == 0
    assert again.out.startswith("up to date: ")
    assert "building" not in again.err
    assert contents(artifact) == after
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]


def test_what_makes_it_build_again(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("build", artifact, "--compute-capability", "8.9", "--max-batch", 4, "--no-predict")
    assert run_regcache(*options).out.startswith("built in ")
    with monkeypatch.context() as patch:
        patch.setattr(build, "quantized_products", lambda _: 5)
        forced = run_regcache(*options, "--force")
    assert forced.out.startswith("built in ")
    assert "computes 4 of 5 quantized products of model.onnx in 8 bits" in forced.err
    assert run_regcache(*options, "--opt-batch", 2).out.startswith("built in ")
    names = sorted(record.file for record in Artifact.open(artifact).manifest.engines)
    stem = "engines/model-tensorrt-rtx-8.9-batch-1"
    assert names == [f"{stem}-1-4.engine", f"{stem}-2-4.engine"]
    monkeypatch.setattr(tensorrt_rtx, "library_version", lambda: "0.1")
    assert run_regcache(*options).out.startswith("built in ")
    records = Artifact.open(artifact).manifest.engines
    assert sorted(record.file for record in records) == names  # in the place of the older version's
    assert not any(record.predicted for record in records)


def test_the_float_engine_is_for_comparison(built: tuple[Path, Outcome], with_engine: Path) -> None:
    artifact, first = with_engine, built[1]
    assert "the float engine's size" not in first.out
    report = artifact.parent / "build.json"
    both = run_regcache("build", artifact, "--float", "--json", report)
    assert both.code == 0, both
    assert "x the float engine's size" in both.out
    model, original = json.loads(report.read_text())["engines"]
    assert (model["built"], original["built"]) == (False, True)
    assert (model["seconds"] is None, original["seconds"] > 0) == (True, True)
    assert original["record"]["file"] == FILE.replace("model", "float")
    assert original["record"]["products"] == {"FP32": 7}
    assert original["record"]["size_ratio"] is None
    assert original["record"]["predicted"] == []
    ratio = model["record"]["size_ratio"]
    assert ratio == pytest.approx(model["size"] / original["size"], abs=1e-4)
    records = {item.file: item for item in Artifact.open(artifact).manifest.engines}
    assert records[FILE].size_ratio == ratio
    only_json = run_regcache("build", artifact, "--json", "-")
    assert json.loads(only_json.out)["engines"][0]["record"]["file"] == FILE


def test_every_capability_from_7_5_to_12_0(artifact: Path) -> None:
    known = tensorrt_rtx.supported_compute_capabilities()
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(known)
    model = Artifact.open(artifact).model
    for capability in known:
        built = tensorrt_rtx.build_engine(model, compute_capabilities=[capability])
        assert products_by_precision(built.layers) == {"INT8": 4, "FP16": 3}, capability
        assert not built.warnings
    outcome = run_regcache("build", artifact, "--compute-capability", "all")
    assert outcome.code == 0, outcome
    (record,) = Artifact.open(artifact).manifest.engines
    assert tuple(record.compute_capabilities) == known


def test_float8_leaves_out_what_has_none(images: Path, tmp_path: Path) -> None:
    artifact = compiled(tmp_path, images, "--target", "tensorrt", "--precision", "fp8")
    before = contents(artifact)
    named = run_regcache("build", artifact, "--compute-capability", "8.9,8.6")
    assert_refused(named, "compute capability 8.6: multiplies no FP8", "8.9")
    assert contents(artifact) == before
    built = run_regcache("build", artifact)
    assert built.code == 0, built
    assert "leaving out compute capability 8.6" in built.err
    (record,) = Artifact.open(artifact).manifest.engines
    assert record.compute_capabilities == ["8.9", "12.0"]
    assert record.products.keys() == {"FP8", "FP16"}


def test_nvfp4_is_for_blackwell(images: Path, tmp_path: Path) -> None:
    artifact = compiled(tmp_path, images, "--target", "tensorrt-rtx", "--precision", "nvfp4")
    before = contents(artifact)
    named = run_regcache("build", artifact, "--compute-capability", "8.9,12.0")
    assert_refused(named, "compute capability 8.9: multiplies no NVFP4", "begins with 10.0")
    assert contents(artifact) == before
    built = run_regcache("build", artifact)
    assert built.code == 0, built
    assert "leaving out compute capability 8.6, 8.9" in built.err
    (record,) = Artifact.open(artifact).manifest.engines
    assert record.compute_capabilities == ["12.0"]
    assert record.products.keys() == {"FP4", "FP16"}


FAST = ("--int8-share", "1", "--accept-slower", "--rounding", "nearest", "--no-equalize")


def test_integers_of_onnx_runtime_get_zero_points_of_0(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compiled(tmp_path, images, "--target", "ort-cpu", *FAST)
    before = contents(artifact)
    built = run_regcache("build", artifact, "--float")
    assert built.code == 0, built
    assert built.err.count("moving the zero points of model.onnx to 0") == 1
    after = contents(artifact)
    del before["manifest.json"], after["manifest.json"]
    assert after.keys() - before.keys() == {FILE, FILE.replace("model", "float")}
    assert after.items() >= before.items()  # model.onnx is what was compiled
    original, record = Artifact.open(artifact).manifest.engines
    assert (original.rewrite, record.rewrite) == (None, REWRITE)
    assert record.model == "model.onnx"
    assert record.products["INT8"] == 5  # patches, too
    assert record.size_ratio is not None
    assert run_regcache("build", artifact).out.startswith("up to date: ")
    monkeypatch.setattr(build, "REWRITE", "split_qkv 1 + signed_integers 2")
    again = run_regcache("build", artifact, "--float").out
    assert again.startswith("built in ")
    assert again.count("up to date: ") == 1  # the float engine


def test_weights_of_4_bits_are_refused(images: Path, tmp_path: Path) -> None:
    options = ("--target", "ort-cpu", "--precision", "w4a16", *FAST[2:])
    artifact = compiled(tmp_path, images, *options)
    before = contents(artifact)
    outcome = run_regcache("build", artifact)
    assert_refused(outcome, "MatMulNBits", "compile it with --target tensorrt-rtx")
    assert "moving" not in outcome.err
    assert contents(artifact) == before


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--compute-capability", "8.6,9.0"), "compute capability '9.0': TensorRT-RTX 1."),
        (("--compute-capability", ""), "compute capability ''"),
        (("--max-batch", "2", "--opt-batch", "3"), "--opt-batch 3 is larger than --max-batch 2"),
        (("--engine", "tensorrt", "--compute-capability", "8.6"), "this machine's GPU"),
    ],
)
def test_options_that_say_nothing(int8: Path, options: tuple[str, ...], reason: str) -> None:
    assert_refused(run_regcache("build", int8, *options), reason)
    assert not (int8 / "engines").exists()


def test_what_cannot_be_built(artifact: Path, images: Path, tmp_path: Path) -> None:
    assert_refused(run_regcache("build", tmp_path), "no regcache artifact")
    (artifact / "model.onnx").write_bytes(b"")
    assert_refused(run_regcache("build", artifact), "model.onnx: changed")
    (tmp_path / "bare").mkdir()
    bare = compiled(tmp_path / "bare", images, "--target", "tensorrt-rtx", "--no-float")
    assert_refused(run_regcache("build", bare, "--float"), "--no-float")


def test_without_the_float_model_a_time_is_predicted_but_no_ratio(
    artifact: Path, images: Path, tmp_path: Path
) -> None:
    bare = compiled(tmp_path, images, "--target", "tensorrt-rtx", "--no-float", "--force")
    built = run_regcache("build", bare, "--compute-capability", "8.9")
    assert "no float.onnx: nothing to compare the prediction with" in built.err
    (record,) = Artifact.open(bare).manifest.engines
    assert record.predicted
    assert all(time.ratio is None and time.total_ms > 0 for time in record.predicted)


def test_a_failure_leaves_the_artifact_as_it_was(
    with_engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, before = with_engine, contents(with_engine)

    def write_half(manifest: Manifest, folder: Path) -> None:
        (folder / "manifest.json").write_text(str(manifest)[:9])
        raise OSError(28, os.strerror(28), "manifest.json")

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "write", write_half)
        refused = run_regcache("build", artifact, "--force", "--no-predict")
    assert_refused(refused, "No space left on device")
    assert contents(artifact) == before
    assert Artifact.open(artifact).manifest.engines
    assert [path.name for path in artifact.parent.iterdir()] == ["artifact"]
