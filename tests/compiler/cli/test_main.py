"""The command line end to end on a tiny encoder: artifacts, parity, and artifacts that changed."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import onnx
import onnxruntime as ort
import pytest
from support.cli_runs import Cli, Compiled, assert_same_encoder
from support.command_line import Outcome, assert_refused
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit

from regcache.export.onnx_file import sidecar

# One worker compiles for all.
pytestmark = pytest.mark.xdist_group("cli")
PARITY_KEYS = {
    "cosine_mean",
    "cosine_min",
    "sqnr_db",
    "nn_agreement",
    "patch_cosine_mean",
    "n_images",
    "passed",
}


def test_compile_then_parity(
    cli: Cli, compiled: Compiled, evaluation: Path, tmp_path: Path
) -> None:
    artifact = compiled.artifact
    assert sorted(p.name for p in artifact.iterdir()) == [
        "README.md",
        "float.onnx",
        "manifest.json",
        "model.onnx",
        "preprocess.json",
    ]
    assert_same_encoder(artifact / "float.onnx", compiled.encoder)
    assert (artifact / "preprocess.json").read_text() == RECIPE.to_json()
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["calibration"] == {"images": 12, "skipped": []}
    assert manifest["encoder"]["blocks"] == SPEC.depth
    quantization = manifest["quantization"]
    assert len(quantization["sites"]) + len(quantization["left_float"]) == 4 * SPEC.depth
    assert quantization["int8_share"] >= 0.95
    assert manifest["source"]["recipe"] == "source"

    junit, report = tmp_path / "junit.xml", tmp_path / "parity.json"
    measured = cli("parity", artifact, "--images", evaluation, "--json", report, "--junit", junit)
    assert measured.code == 0, measured
    result = json.loads(report.read_text())
    assert result.keys() >= PARITY_KEYS
    assert result["n_images"] == 9
    assert result["passed"] is True
    assert result["reference"] == "float-onnx"
    assert 0.995 < result["cosine_min"] <= result["cosine_mean"] < 1.0
    assert ElementTree.parse(junit).getroot().find("testsuite") is not None
    strict = cli("parity", artifact, "--images", evaluation, "--min-cosine", "0.9999999")
    assert strict.code == 1
    assert "below" in strict.out


def test_the_version_is_told(cli: Cli) -> None:
    assert cli("--version") == Outcome(0, f"regcache {version('regcache')}\n", "")


@pytest.mark.slow
def test_the_model_is_integer_and_small(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    command = ("compile", encoder, "--images", calibration, "-o", artifact, "--int8-share", 1)
    assert cli(*command).code == 0
    model = onnx.load(artifact / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    stored = {weight.name: weight for weight in model.graph.initializer}
    integer = [name for name, weight in stored.items() if weight.data_type in {2, 3}]
    # and the patches' one
    assert len([name for name in integer if name.endswith("/quantized")]) == 6 * SPEC.depth + 1
    assert (artifact / "model.onnx").stat().st_size < 0.6 * encoder.stat().st_size
    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["pooled", "last_hidden_state"]
    for batch in (1, 3, 8):
        (pooled, _) = session.run(None, {"pixel_values": TinyVit(SPEC).images(batch)})
        assert pooled.shape == (batch, SPEC.width)


@pytest.mark.slow
def test_compiling_twice_gives_the_same_bytes(cli: Cli, compiled: Compiled, tmp_path: Path) -> None:
    command = ("compile", compiled.encoder, "--images", compiled.calibration)
    assert cli(*command, "-o", tmp_path / "two").code == 0
    for file in ("model.onnx", "preprocess.json", "manifest.json"):
        assert (compiled.artifact / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_knn_leave_one_out_and_gallery(
    cli: Cli, compiled: Compiled, calibration: Path, tmp_path: Path
) -> None:
    artifact = compiled.artifact
    labelled = tmp_path / "labelled"
    for name, seed in (("cat", 5), ("dog", 6)):
        photos(labelled / name, 4, seed)
    one_class = tmp_path / "one"
    photos(one_class / "cat", 2, seed=9)
    photos(one_class / "fox", 2, seed=9)
    report = tmp_path / "parity.json"
    base = ("parity", artifact, "--images", calibration, "--json", report)
    assert cli(*base, "--gallery", labelled, "--query", labelled).code == 0
    result = json.loads(report.read_text())
    for key in ("knn_top1_float", "knn_top1_quantized"):
        assert 0 <= result[key] <= 1
    assert_refused(cli(*base, "--gallery", labelled), "go together")
    assert_refused(cli(*base, "--gallery", labelled, "--query", one_class), "'fox'", str(one_class))


@pytest.mark.slow
def test_without_float_there_is_nothing_to_compare(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    artifact = tmp_path / "artifact"
    assert cli("compile", encoder, "--images", calibration, "-o", artifact, "--no-float").code == 0
    assert not (artifact / "float.onnx").exists()
    assert_refused(cli("parity", artifact, "--images", calibration), "--no-float")
    assert_refused(
        cli("parity", artifact, "--images", calibration, "--reference", "pytorch"), "no PyTorch"
    )


@pytest.mark.slow
def test_a_fixed_batch_compiles(
    cli: Cli, calibration: Path, evaluation: Path, tmp_path: Path
) -> None:
    model = TinyVit(SPEC).model()
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    path, artifact = tmp_path / "fixed.onnx", tmp_path / "artifact"
    onnx.save(model, path)
    sidecar(path).write_text(RECIPE.to_json())
    assert cli("compile", path, "--images", calibration, "-o", artifact).code == 0
    assert cli("parity", artifact, "--images", evaluation).code == 0


class TestTampering:
    """A changed artifact never passes."""

    @pytest.fixture
    def artifact(self, compiled: Compiled, tmp_path: Path) -> Path:
        return Path(shutil.copytree(compiled.artifact, tmp_path / "artifact"))

    @pytest.mark.parametrize("name", ["model.onnx", "float.onnx", "preprocess.json"])
    def test_a_changed_byte(self, cli: Cli, artifact: Path, calibration: Path, name: str) -> None:
        content = bytearray((artifact / name).read_bytes())
        content[len(content) // 2] ^= 1
        (artifact / name).write_bytes(bytes(content))
        assert_refused(cli("parity", artifact, "--images", calibration), name, "changed")

    def test_a_missing_or_added_file(self, cli: Cli, artifact: Path, calibration: Path) -> None:
        (artifact / "extra").write_text("")
        outcome = cli("parity", artifact, "--images", calibration)
        assert_refused(outcome, "extra", "not in the manifest")
        (artifact / "extra").unlink()
        (artifact / "model.onnx").unlink()
        assert_refused(cli("parity", artifact, "--images", calibration), "model.onnx", "missing")

    def test_a_broken_manifest(self, cli: Cli, artifact: Path, calibration: Path) -> None:
        (artifact / "manifest.json").write_text('{"format_version": 2}')
        assert_refused(cli("parity", artifact, "--images", calibration), "manifest.json")
        (artifact / "manifest.json").unlink()
        assert_refused(cli("parity", artifact, "--images", calibration), "no regcache artifact")
