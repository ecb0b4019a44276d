"""The command line end to end on a tiny encoder: results, exit codes and bad input."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from onnx import numpy_helper
from support.canonical import canonical_graph
from support.command_line import Outcome, assert_refused, run_regcache
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import Spec, TinyVit

from regcache.export.onnx_file import sidecar
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import save_graph
from regcache.passes.preprocess import Preprocess

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


Cli = Callable[..., Outcome]


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


@dataclass(frozen=True)
class Compiled:
    """A command that ran once for several tests, which leave its files as they are."""

    encoder: Path
    calibration: Path
    artifact: Path
    outcome: Outcome


@pytest.fixture(scope="module")
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


def assert_same_encoder(rewritten: Path, original: Path) -> None:
    """The same inputs and outputs, and the same numbers for any number of images."""
    one, other = (ort.InferenceSession(path) for path in (rewritten, original))
    names = [item.name for item in other.get_outputs()]
    assert [item.name for item in one.get_outputs()] == names
    assert [item.name for item in one.get_inputs()] == ["pixel_values"]
    for batch in (1, 3):
        feed = {"pixel_values": TinyVit(SPEC).images(batch)}
        for found, wanted in zip(one.run(names, feed), other.run(names, feed), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)


def test_compile_then_parity(
    cli: Cli, compiled: Compiled, evaluation: Path, tmp_path: Path
) -> None:
    artifact = compiled.artifact
    assert sorted(p.name for p in artifact.iterdir()) == [
        "float.onnx",
        "manifest.json",
        "model.onnx",
        "preprocess.json",
    ]
    assert_same_encoder(artifact / "float.onnx", compiled.encoder)
    assert (artifact / "preprocess.json").read_text() == RECIPE.to_json()
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["calibration"] == {"images": 12, "skipped": []}
    assert manifest["encoder"]["blocks"] == 3
    quantization = manifest["quantization"]
    assert len(quantization["sites"]) + len(quantization["left_float"]) == 12
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
    assert len([name for name in integer if name.endswith("/quantized")]) == 6 * SPEC.depth
    assert (artifact / "model.onnx").stat().st_size < 0.6 * encoder.stat().st_size
    session = ort.InferenceSession(artifact / "model.onnx", providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == ["pooled", "last_hidden_state"]
    for batch in (1, 3, 8):
        (pooled, _) = session.run(None, {"pixel_values": TinyVit(SPEC).images(batch)})
        assert pooled.shape == (batch, SPEC.width)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt", "tensorrt-rtx"])
def test_targets(
    cli: Cli, compiled: Compiled, evaluation: Path, tmp_path: Path, target: str
) -> None:
    artifact = compiled.artifact  # of the default target
    if target != "ort-cpu":
        artifact = tmp_path / "artifact"
        command = ("compile", compiled.encoder, "--images", compiled.calibration, "-o", artifact)
        assert cli(*command, "--target", target).code == 0
    model = onnx.load(artifact / "model.onnx")
    zero_points = [
        numpy_helper.to_array(weight)
        for weight in model.graph.initializer
        if weight.name.endswith("/zero_point")
    ]
    if target != "ort-cpu":
        assert {array.dtype for array in zero_points} == {np.dtype(np.int8)}
        assert all((array == 0).all() for array in zero_points)
    else:
        assert np.dtype(np.uint8) in {array.dtype for array in zero_points}
    assert cli("parity", artifact, "--images", evaluation).code == 0


@pytest.mark.slow
def test_a_packed_projection_is_split_for_tensorrt_only(
    cli: Cli, calibration: Path, tmp_path: Path
) -> None:
    path = tmp_path / "packed.onnx"
    onnx.save(TinyVit(replace(SPEC, qkv="fused")).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    for target, linears in (("ort-cpu", 4), ("tensorrt-rtx", 6)):
        artifact = tmp_path / target
        command = ("compile", path, "--images", calibration, "-o", artifact, "--target", target)
        assert cli(*command, "--int8-share", 1).code == 0
        weights = onnx.load(artifact / "model.onnx").graph.initializer
        stored = [weight for weight in weights if weight.name.endswith("/quantized")]
        assert len(stored) == linears * SPEC.depth
        assert cli("parity", artifact, "--images", calibration).code == 0


def test_what_is_left_slower_is_said(cli: Cli, calibration: Path, tmp_path: Path) -> None:
    """Packed projections with a step behind them that no pass follows."""
    graph = canonical_graph(TinyVit(replace(SPEC, qkv="fused")).model())
    for block in view_encoder(graph).blocks:
        (reshape,) = block.attention.projections[0].output.outputs
        scaled = gs.Variable(f"{block.index}/scaled", np.float32)
        number = gs.Constant(f"{block.index}/number", np.array(1.1, np.float32))
        inputs = [reshape.inputs[0], number]
        graph.nodes.append(gs.Node("Mul", f"{block.index}/scale", {}, inputs, [scaled]))
        reshape.inputs[0] = scaled
    path, artifact = tmp_path / "packed.onnx", tmp_path / "artifact"
    save_graph(graph.toposort(), path)
    sidecar(path).write_text(RECIPE.to_json())
    command = ("compile", path, "--images", calibration, "-o", artifact)
    compiled = cli(*command, "--target", "tensorrt-rtx", "--registers", "off", "--no-equalize")
    assert compiled.code == 0, compiled
    line = (
        "split_qkv left blocks.0.qkv and 2 more alone: the way to its parts is none that is known"
        "; TensorRT computes it in float"
    )
    assert compiled.err.count(f"warning: {line}\n") == 1
    passes = json.loads((artifact / "manifest.json").read_text())["passes"]
    assert [record["slower"] for record in passes if record["name"] == "split_qkv"] == [[line]]


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


def test_export_copies_the_recipe(cli: Cli, encoder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "copy.onnx"
    assert cli("export", encoder, "-o", output).code == 0
    assert_same_encoder(output, encoder)
    assert sidecar(output).read_text() == RECIPE.to_json()
    assert sorted(p.name for p in output.parent.iterdir()) == ["copy.onnx", "copy.preprocess.json"]


def test_inspect_prints_blocks_and_outliers(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    plain = cli("inspect", encoder)
    assert plain.code == 0
    assert "3 blocks" in " ".join(plain.out.split())
    found = cli("inspect", encoder, "--images", calibration, "--json", "-")
    assert found.code == 0
    report = json.loads(found.out)
    assert report["n_images"] == 12
    assert report["tokens"] == 17
    _check_inspection(report, encoder, calibration)
    table = cli("inspect", encoder, "--images", calibration)
    assert "Residual stream" in table.out
    assert "fc2" in table.out


def _check_inspection(report: dict[str, object], encoder: Path, calibration: Path) -> None:
    """The numbers against numpy over the activations of all images at once."""
    from regcache.runtime.images import ImageFolder, list_images

    (batch,) = ImageFolder(list_images(calibration), RECIPE, batch_size=99)
    model = onnx.load(encoder)
    add = [node for node in model.graph.node if node.op_type == "Add"][-2].output[0]
    block = report["blocks"][-1]  # type: ignore[index]
    assert set(block["linears"]) == {"q", "k", "v", "out", "fc1", "fc2"}
    name = next(
        node.input[0] for node in reversed(model.graph.node) if node.op_type == "LayerNormalization"
    )
    model.graph.output.append(onnx.helper.make_tensor_value_info(name, 1, None))
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    stream = session.run([name], {"pixel_values": batch.images})[0]
    assert add
    peaks = np.abs(stream).max(axis=-1)
    found = block["stream"]
    assert found["linf"]["maximum"] == pytest.approx(peaks.max(), rel=1e-4)
    assert found["linf"]["median"] == pytest.approx(np.median(peaks), rel=0.05)
    first = found["outliers"][0]
    image, token = np.unravel_index(peaks.argmax(), peaks.shape)
    assert first["token"] == token
    assert first["image"] == batch.paths[int(image)].name
    assert first["kind"] == ("class" if token == 0 else "patch")
    assert first["channel"] == np.abs(stream[image, token]).argmax()


def test_a_full_disk_while_inspecting_is_one_line(
    cli: Cli, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scratch/observed.onnx")

    monkeypatch.setattr("regcache.compiler.cli.main.inspect_encoder", full)
    outcome = cli("inspect", encoder)
    assert_refused(outcome, "scratch/observed.onnx: No space left on device")


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


class TestBadInput:
    """Exit code 2, one line, no artifact left behind."""

    @pytest.fixture
    def refuse(self, cli: Cli, calibration: Path, tmp_path: Path) -> Callable[..., None]:
        def compile_and_check(source: object, *parts: str, images: Path = calibration) -> None:
            before = sorted(tmp_path.rglob("*"))
            outcome = cli("compile", source, "--images", images, "-o", tmp_path / "artifact")
            assert_refused(outcome, *parts)
            assert sorted(tmp_path.rglob("*")) == before

        return compile_and_check

    def test_truncated(self, refuse: Callable[..., None], encoder: Path) -> None:
        encoder.write_bytes(encoder.read_bytes()[:3000])
        refuse(encoder, "tiny.onnx", "truncated")

    def test_nan_weights(self, refuse: Callable[..., None], encoder: Path) -> None:
        model = onnx.load(encoder)
        for weight in model.graph.initializer:
            if weight.name == "1.fc2":
                array = numpy_helper.to_array(weight).copy()
                array[0, 0] = np.nan
                weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        onnx.save(model, encoder)
        refuse(encoder, "tiny.onnx", "'1.fc2' holds NaN")

    def test_external_data_outside(self, refuse: Callable[..., None], tmp_path: Path) -> None:
        path = tmp_path / "big.onnx"
        onnx.save(
            TinyVit(SPEC).model(), path, save_as_external_data=True, location="d", size_threshold=0
        )
        path.write_bytes(path.read_bytes().replace(b"location\x12\x01d", b"location\x12\x01/"))
        refuse(path, "big.onnx", "outside")

    def test_no_transformer(self, refuse: Callable[..., None], tmp_path: Path) -> None:
        path = tmp_path / "cnn.onnx"
        onnx.save(TinyVit(Spec(depth=0, grid=4)).model(), path)
        sidecar(path).write_text(RECIPE.to_json())
        refuse(path, "cnn.onnx", "no transformer block")

    @pytest.mark.torch
    def test_missing_and_unknown_sources(self, refuse: Callable[..., None]) -> None:
        refuse("nowhere.onnx", "nowhere.onnx", "no such file")
        refuse("what", "'what' is no source")
        refuse("sample:other", "sample:other")

    def test_broken_sidecar(self, refuse: Callable[..., None], encoder: Path) -> None:
        sidecar(encoder).write_text("{}")
        refuse(encoder, "tiny.preprocess.json", "not a preprocessing recipe")

    def test_empty_folder(self, refuse: Callable[..., None], encoder: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        refuse(encoder, str(empty), "no image", images=empty)
        refuse(encoder, "gone", images=tmp_path / "gone")

    def test_only_broken_images(
        self, refuse: Callable[..., None], encoder: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "broken"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
        refuse(encoder, "a.jpg", images=folder)

    def test_an_enormous_png(
        self, refuse: Callable[..., None], encoder: Path, calibration: Path
    ) -> None:
        import struct
        import zlib

        def chunk(kind: bytes, body: bytes) -> bytes:
            checksum = struct.pack(">I", zlib.crc32(kind + body))
            return struct.pack(">I", len(body)) + kind + body + checksum

        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (calibration / "sky.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        refuse(encoder, "sky.png", "30000 x 30000 pixels")

    def test_output_in_the_way(self, cli: Cli, encoder: Path, calibration: Path) -> None:
        outcome = cli("compile", encoder, "--images", calibration, "-o", calibration)
        assert_refused(outcome, str(calibration), "holds no regcache artifact")
        assert len(list(calibration.iterdir())) == 12

    def test_a_resolution_for_a_fixed_graph(
        self, cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
    ) -> None:
        command = ("compile", encoder, "--images", calibration, "-o", tmp_path / "artifact")
        assert_refused(cli(*command, "--resolution", 32), "resolution")

    def test_a_read_only_place(self, cli: Cli, encoder: Path, calibration: Path) -> None:
        outcome = cli("compile", encoder, "--images", calibration, "-o", "/proc/artifact")
        assert_refused(outcome, "/proc")


@pytest.mark.slow
def test_a_broken_image_is_skipped_and_said(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    whole = (calibration / "03.png").read_bytes()
    (calibration / "03.png").write_bytes(whole[: len(whole) // 2])
    artifact = tmp_path / "artifact"
    outcome = cli("compile", encoder, "--images", calibration, "-o", artifact)
    assert outcome.code == 0
    assert re.search(r"skipped .*03\.png: ", outcome.err)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["calibration"]["images"] == 11
    assert manifest["calibration"]["skipped"][0].startswith("03.png: ")


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
