"""`regcache compile` to each precision, target and calibrator, on a tiny encoder."""

import json
import shutil
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from support.command_line import assert_refused
from support.timed_commands import cli
from support.tiny_source import RECIPE, photos
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration import calibrators
from regcache.export.onnx_file import sidecar
from regcache.runtime.speed import SpeedRatio

pytestmark = [
    pytest.mark.xdist_group("precisions"),
    pytest.mark.slow,
]  # one worker makes the artifacts for all
SPEC = Spec(width=32, heads=4, hidden=80, depth=2, grid=4)
LINEARS = 6 * SPEC.depth
MERGED = 4 * SPEC.depth
"""Linears where q, k and v are one."""
CALIBRATORS = ("output-error", "min-max", "percentile", "entropy", "mse")


SLOW = SpeedRatio(batch=1, threads=1, float_ms=10, quantized_ms=15, ratio=1.5, rounds=6)


@dataclass(frozen=True)
class Artifact:
    """A compiled folder."""

    path: Path

    @property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path / "model.onnx")

    @property
    def manifest(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return content

    @property
    def ops(self) -> Counter[str]:
        return Counter(node.op_type for node in self.model.graph.node)

    @property
    def types(self) -> Counter[int]:
        """How many initializers have each type."""
        return Counter(weight.data_type for weight in self.model.graph.initializer)

    @property
    def quantized_products(self) -> int:
        """MatMuls of two activations that are both quantized."""
        made = {output: node for node in self.model.graph.node for output in node.output}
        products = [node.input for node in self.model.graph.node if node.op_type == "MatMul"]
        behind = [[made[item].input[0] for item in pair if item in made] for pair in products]
        ops = [[made[item].op_type for item in pair if item in made] for pair in behind]
        return ops.count(["QuantizeLinear"] * 2)


@dataclass(frozen=True)
class Workshop:
    """An encoder and images, and artifacts made of them, each once."""

    folder: Path
    made: dict[tuple[str, ...], Artifact]

    def command(self, *options: str, output: str = "artifact") -> tuple[object, ...]:
        source, images = self.folder / "tiny.onnx", self.folder / "images"
        place = ("--images", images, "-o", self.folder / output)
        return "compile", source, *place, "--registers", "off", "--threads", 1, *options

    def compile(self, *options: str) -> Artifact:
        if options not in self.made:
            output = f"artifact{len(self.made)}"
            outcome = cli(*self.command(*options, output=output))
            assert outcome.code == 0, outcome
            assert "warning" not in outcome.err
            self.made[options] = Artifact(self.folder / output)
        return self.made[options]

    def cosine(self, artifact: Artifact, least: float) -> float:
        """The mean cosine on other images, where it passes."""
        report = self.folder / "parity.json"
        images = ("--images", self.folder / "others", "--json", report)
        outcome = cli("parity", artifact.path, *images, "--min-cosine", least, "--threads", 1)
        assert outcome.code == 0, outcome
        found: float = json.loads(report.read_text())["cosine_mean"]
        return found


def open_workshop(folder: Path, depth: int) -> Workshop:
    path = folder / "tiny.onnx"
    onnx.save(TinyVit(replace(SPEC, depth=depth)).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    photos(folder / "images", 16, seed=1)
    photos(folder / "others", 6, seed=2)
    return Workshop(folder, {})


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return open_workshop(tmp_path_factory.mktemp("precisions"), SPEC.depth)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """For what a second block tells nothing of."""
    return open_workshop(tmp_path_factory.mktemp("small"), 1)


def assert_outputs_are_float(model: onnx.ModelProto) -> None:
    onnx.checker.check_model(model, full_check=True)
    values = [*model.graph.input, *model.graph.output]
    assert [value.name for value in values] == ["pixel_values", "pooled", "last_hidden_state"]
    assert {value.type.tensor_type.elem_type for value in values} == {TensorProto.FLOAT}


def attribute(node: onnx.NodeProto, name: str) -> int:
    (found,) = (item.i for item in node.attribute if item.name == name)
    return found


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_w4a16_packs_every_linear(workshop: Workshop, rounding: str) -> None:
    artifact = workshop.compile("--precision", "w4a16", "--rounding", rounding)
    model = artifact.model
    assert_outputs_are_float(model)
    packed = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
    # Values and output projections have 8 bits, queries, keys and the MLP have 4.
    bits = Counter(attribute(node, "bits") for node in packed)
    assert bits == {8: 2 * SPEC.depth, 4: 4 * SPEC.depth}
    assert {attribute(node, "block_size") for node in packed} == {32}
    assert not artifact.ops["QuantizeLinear"]
    record = artifact.manifest["quantization"]
    assert (record["int8_share"], record["weight_bits"]) == (0, 4)
    assert (record["activation_bits"], record["sites"], record["left_float"]) == (None, [], [])
    assert artifact.manifest["speed"] == {"integer_matmuls": 0}
    assert 0.97 < workshop.cosine(artifact, 0.97) < 0.99999


def test_a_slow_model_is_refused_unless_it_is_for_memory(small: Workshop) -> None:
    for options, code in (((), 2), (("--accept-slower",), 0), (("--precision", "w4a16"), 0)):
        outcome = cli(*small.command(*options, output="slow"), ratio=SLOW)
        assert outcome.code == code
        assert "1.50 x float's time at batch 1" in outcome.err
        assert (small.folder / "slow").is_dir() == (code == 0)
        shutil.rmtree(small.folder / "slow", ignore_errors=True)


def test_gptq_is_nearer_in_w4a16(workshop: Workshop) -> None:
    options = ("--precision", "w4a16", "--rounding")
    found = [workshop.cosine(workshop.compile(*options, name), 0.9) for name in ("gptq", "nearest")]
    assert found[0] > found[1]


def test_a_packed_projection_is_split_for_w4a16(workshop: Workshop) -> None:
    """So that its values have 8 bits and its queries and keys 4."""
    folder = workshop.folder / "fused"
    folder.mkdir()
    source = folder / "tiny.onnx"
    onnx.save(TinyVit(Spec(**{**SPEC.__dict__, "qkv": "fused"})).model(), source)
    sidecar(source).write_text(RECIPE.to_json())
    (folder / "images").symlink_to(workshop.folder / "images")
    artifact = Workshop(folder, {}).compile("--precision", "w4a16")
    nodes = [node for node in artifact.model.graph.node if node.op_type == "MatMulNBits"]
    bits = Counter(attribute(node, "bits") for node in nodes)
    assert bits == {8: 2 * SPEC.depth, 4: 4 * SPEC.depth}


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_fp8_has_float8_weights(workshop: Workshop, target: str) -> None:
    artifact = workshop.compile("--precision", "fp8", "--target", target, "--no-half")
    assert_outputs_are_float(artifact.model)
    weights = [
        weight
        for weight in artifact.model.graph.initializer
        if weight.data_type == TensorProto.FLOAT8E4M3FN and len(weight.dims) == 2
    ]
    assert len(weights) == (LINEARS if target == "tensorrt" else MERGED)
    assert not artifact.types & Counter({TensorProto.INT8: 1, TensorProto.UINT8: 1})
    record = artifact.manifest["quantization"]
    assert record["activation_dtype"] == record["weight_dtype"] == "float8e4m3fn"
    assert {site["dtype"] for site in record["sites"]} == {"float8e4m3fn"}
    assert len(record["sites"]) == 4 * SPEC.depth
    assert artifact.ops["QuantizeLinear"] == 4 * SPEC.depth
    assert record["int8_share"] == 1
    assert artifact.manifest["speed"] is None
    assert 0.99 < workshop.cosine(artifact, 0.99) < 0.99999


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_nvfp4_has_weights_of_four_bits(workshop: Workshop, target: str) -> None:
    artifact = workshop.compile("--precision", "nvfp4", "--target", target)
    assert_outputs_are_float(artifact.model)
    assert artifact.types[TensorProto.FLOAT4E2M1] == LINEARS
    assert artifact.types[TensorProto.FLOAT8E4M3FN] == LINEARS
    assert artifact.ops["TRT_FP4DynamicQuantize"] == 4 * SPEC.depth
    record = artifact.manifest["quantization"]
    assert record["activation_dtype"] == record["weight_dtype"] == "float4e2m1fn"
    assert {site["dtype"] for site in record["sites"]} == {"float4e2m1fn"}
    assert artifact.manifest["speed"] is None
    assert 0.85 < workshop.cosine(artifact, 0.85) < 0.9999


def test_mxfp8_has_a_power_of_two_for_each_block(workshop: Workshop) -> None:
    folder = workshop.folder / "wide"
    folder.mkdir()
    source = folder / "tiny.onnx"
    onnx.save(TinyVit(Spec(**{**SPEC.__dict__, "hidden": 96})).model(), source)
    sidecar(source).write_text(RECIPE.to_json())
    for name in ("images", "others"):
        (folder / name).symlink_to(workshop.folder / name)
    wide = Workshop(folder, {})
    artifact = wide.compile("--precision", "mxfp8", "--target", "tensorrt")
    assert_outputs_are_float(artifact.model)
    record = artifact.manifest["quantization"]
    left = record["left_float"]
    assert left
    assert 0.9 <= record["int8_share"] < 1
    assert artifact.ops["TRT_MXFP8DynamicQuantize"] == 4 * SPEC.depth - len(left)
    quantized = LINEARS - sum(len(name.split("+")) for name in left)
    assert artifact.types[TensorProto.FLOAT8E4M3FN] == quantized
    assert artifact.types[TensorProto.UINT8] == quantized
    assert 0.99 < wide.cosine(artifact, 0.99) < 0.99999


def test_a_share_of_nvfp4_stays_float(workshop: Workshop) -> None:
    artifact = workshop.compile(
        *("--precision", "nvfp4", "--target", "tensorrt", "--fp4-share", "0.6")
    )
    record = artifact.manifest["quantization"]
    assert 0.6 <= record["int8_share"] < 1
    assert record["left_float"]
    assert 0 < artifact.types[TensorProto.FLOAT4E2M1] < LINEARS


def test_fp8_with_half_by_default(workshop: Workshop) -> None:
    artifact = workshop.compile("--precision", "fp8", "--target", "tensorrt")
    assert_outputs_are_float(artifact.model)
    assert artifact.types[TensorProto.FLOAT16]
    assert artifact.types[TensorProto.FLOAT8E4M3FN] >= LINEARS
    assert 0.99 < workshop.cosine(artifact, 0.99) < 0.99999


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx"])
def test_the_rest_is_half_unless_told(workshop: Workshop, target: str) -> None:
    plain = workshop.compile("--target", target, "--no-half")
    half = workshop.compile("--target", target)
    for artifact in (plain, half):
        assert_outputs_are_float(artifact.model)
        assert artifact.types[TensorProto.INT8] >= LINEARS
        assert 0.995 < workshop.cosine(artifact, 0.995) < 0.99999
    assert not plain.types[TensorProto.FLOAT16]
    assert "Cast" not in plain.ops
    assert half.types[TensorProto.FLOAT16] > half.types[TensorProto.FLOAT]
    assert half.ops["Cast"]
    names = [[one["name"] for one in each.manifest["passes"]] for each in (plain, half)]
    assert names[1] == [*names[0], "half_precision"]
    assert (half.path / "model.onnx").stat().st_size < (plain.path / "model.onnx").stat().st_size


def test_what_is_simulated_is_not_half(small: Workshop) -> None:
    command = ("--target", "tensorrt", "--simulate", "w6a6")
    assert not small.compile(*command).types[TensorProto.FLOAT16]
    assert small.compile(*command, "--half").types[TensorProto.FLOAT16]


def test_four_bits_are_rotated_where_told(workshop: Workshop) -> None:
    plain, rotated = (workshop.compile("--simulate", "w4a4", *more) for more in ((), ("--rotate",)))
    turned = {"rotate_stream": 1, "rotate_values": SPEC.depth, "rotate_hidden": SPEC.depth}
    for artifact, edits in ((plain, {}), (rotated, turned)):
        passes = artifact.manifest["passes"]
        found = {one["name"]: one["edits"] for one in passes if one["name"].startswith("rotate_")}
        assert found == edits
        assert artifact.manifest["options"]["rotate"] == bool(edits)
        record = artifact.manifest["quantization"]
        assert record["left_float"] == []
        assert (record["int8_share"] < 1) == bool(edits)  # its products are float
        assert len(record["sites"]) == 4 * SPEC.depth


@pytest.mark.parametrize("half", ["--half", "--no-half"])
def test_int8_attention_has_four_pairs_a_block(workshop: Workshop, half: str) -> None:
    """Of queries, keys, probabilities and values."""
    target = ("--target", "tensorrt-rtx", *(["--no-half"] if half == "--no-half" else []))
    plain, quantized = workshop.compile(*target), workshop.compile(*target, "--attention", "int8")
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert quantized.ops[op] - plain.ops[op] == 4 * SPEC.depth
    assert_outputs_are_float(quantized.model)
    (record,) = (one for one in quantized.manifest["passes"] if one["name"] == "quantize_attention")
    assert record.pop("skips") == record.pop("slower") == []
    assert record == {"name": "quantize_attention", "edits": SPEC.depth}
    assert (plain.quantized_products, quantized.quantized_products) == (0, 2 * SPEC.depth)
    assert workshop.cosine(plain, 0.99) > workshop.cosine(quantized, 0.97)


@pytest.mark.parametrize("target", ["ort-cpu", "tensorrt"])
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_every_calibrator_compiles(small: Workshop, calibrator: str, target: str) -> None:
    options = ("--calibrator", calibrator, "--target", target, "--int8-share", "1", "--no-equalize")
    artifact = small.compile(*options)
    record = artifact.manifest["quantization"]
    assert artifact.manifest["options"]["calibrator"] == calibrator
    assert len(record["sites"]) == 4
    for site in record["sites"]:
        (low, high), (first, last) = site["observed"], site["covered"]
        widest = max(-low, high) if target == "tensorrt" else high
        assert first < last <= widest * 1.1 + site["scale"]
    assert 0.98 < small.cosine(artifact, 0.98) < 0.99999


def test_calibrators_differ(small: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of the few values of a tiny encoder 99.99 % are all; to 8 bits, none should be clipped.
    monkeypatch.setattr(calibrators, "_KEPT", 97.0)
    scales = {}
    for calibrator in CALIBRATORS:
        options = ("--calibrator", calibrator, "--no-equalize", "--simulate", "w4a4")
        artifact = small.compile(*options, "--int8-share", "1")
        sites = artifact.manifest["quantization"]["sites"]
        scales[calibrator] = [site["scale"] for site in sites]
    assert len({tuple(found) for found in scales.values()}) == len(scales)
    for calibrator in ("percentile", "entropy", "mse"):
        assert np.less_equal(scales[calibrator], np.multiply(scales["min-max"], 1 + 1e-9)).all()
    assert np.less(scales["percentile"], scales["min-max"]).all()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--precision fp8", "fp8 runs on tensorrt and tensorrt-rtx, not on ort-cpu"),
        ("--precision w4a16 --target tensorrt", "w4a16 runs on ort-cpu, not on tensorrt"),
        ("--precision w4a16 --target tensorrt-rtx", "w4a16 runs on ort-cpu, not on tensorrt-rtx"),
        ("--precision w4a16 --simulate w8a8", "--simulate and --precision do not go together"),
        (
            "--precision fp8 --target tensorrt --simulate w4a16",
            "--simulate and --precision do not go together",
        ),
        ("--half", "--half and --attention int8 are for TensorRT, not ort-cpu"),
        ("--attention int8", "--half and --attention int8 are for TensorRT, not ort-cpu"),
        (
            "--precision fp8 --target tensorrt --calibrator percentile",
            "the percentile calibrator is for integers, not for fp8",
        ),
        ("--precision nvfp4", "nvfp4 runs on tensorrt and tensorrt-rtx, not on ort-cpu"),
        ("--precision mxfp8 --target tensorrt-rtx", "mxfp8 runs on tensorrt, not on tensorrt-rtx"),
        (
            "--precision nvfp4 --target tensorrt --calibrator mse",
            "the mse calibrator is for integers, not for nvfp4",
        ),
        (
            "--precision mxfp8 --target tensorrt",
            "mxfp8 has a scale for every 32 channels: blocks.0.fc2 reads 80",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    workshop: Workshop, options: str, reason: str
) -> None:
    before = sorted(workshop.folder.rglob("*"))
    outcome = cli(*workshop.command(*options.split(), output="refused"))
    assert_refused(outcome, reason)
    assert sorted(workshop.folder.rglob("*")) == before


def test_what_changes_nothing_is_not_refused(workshop: Workshop) -> None:
    usual = workshop.compile("--int8-share", "1")
    assert (
        workshop.compile("--int8-share", "1", "--no-half", "--attention", "float").ops == usual.ops
    )
