"""`regcache registers`: a float encoder with its registers that other quantizers gain by."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime import quantization
from support.command_line import assert_refused, run_regcache
from support.sinking import BLOCK, SPEC, write_sinking
from support.tiny_artifact import write_tiny
from support.tiny_source import RECIPE, photos

import regcache
from regcache.compiler.curation.add_registers import Judge, RegistersResult
from regcache.export.onnx_file import sidecar
from regcache.passes.canonicalize import canonicalize
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import REGISTERS
from regcache.passes.onnx_file import load_model
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.session import OrtSession

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("executor")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos", 20, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sinking(tmp_path_factory.mktemp("sinking") / "sinking.onnx")


@pytest.fixture(scope="module")
def added(source: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of `encoder.onnx` and of `found.json`."""
    folder = tmp_path_factory.mktemp("added")
    command = ("registers", source, "--images", images, "-o", folder / "encoder.onnx")
    outcome = run_regcache(*command, "--json", folder / "found.json")
    assert outcome.code == 0, outcome
    said = outcome.out.splitlines()
    assert said[0].startswith("Registers: R = 1 (kv) in blocks [1, 3) and 1 sinks deleted")
    assert said[1] == f"wrote {folder / 'encoder.onnx'}: in float, to be quantized"
    return folder


def pixels(count: int, folder: Path) -> Any:
    batches = ImageFolder(list_images(photos(folder, count, seed=7)), RECIPE, 1)
    return np.concatenate([batch.images for batch in batches])


def quantize(model: Path, output: Path, calibration: Any, ops: Sequence[str] | None) -> Path:
    """As somebody calls ONNX Runtime's quantize_static; `ops`: None for all that it knows."""
    name = onnx.load(model).graph.input[0].name
    items = iter([{name: image[None]} for image in calibration])

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> Any:
            return next(items, None)

    quantization.quantize_static(
        model,
        output,
        Reader(),
        per_channel=True,
        op_types_to_quantize=ops,
        activation_type=quantization.QuantType.QUInt8,
    )
    return output


def embed(model: Path, images: Any) -> Any:
    with OrtSession(model, threads=1) as session:
        return session.run(images)[0].reshape(len(images), -1)


def fc2_of(model: Path) -> str:
    """The name of the product that reads what the sink makes massive."""
    blocks = view_encoder(canonicalize(load_model(model))).blocks
    return str(blocks[BLOCK].mlp.fc2.matmul.name)


def error(wanted: Any, found: Any) -> float:
    lengths = np.linalg.norm(wanted, axis=1) * np.linalg.norm(found, axis=1)
    return float(1 - np.mean((wanted * found).sum(axis=1) / lengths))


def test_what_is_written_is_float_with_its_recipe_and_nothing_else(
    added: Path, source: Path
) -> None:
    assert sorted(path.name for path in added.iterdir()) == [
        "encoder.onnx",
        "encoder.preprocess.json",
        "found.json",
    ]
    assert (added / "encoder.preprocess.json").read_text() == sidecar(source).read_text()
    old, new = (load_model(path).graph for path in (source, added / "encoder.onnx"))
    assert [item.name for item in new.output] == [item.name for item in old.output]
    assert not [node.op_type for node in new.node if "Quantize" in node.op_type]


def test_the_record_tells_what_was_found(added: Path, source: Path) -> None:
    found = RegistersResult.model_validate_json((added / "found.json").read_text())
    assert found.source == str(source)
    assert found.judge is Judge.W8A8
    setting, seen = found.curation.setting, found.curation.improvement
    assert (found.registers, found.deleted) == (1, 1) == (setting.count, setting.delete_count)
    assert found.curation.sensitive_block == BLOCK
    assert {tried.setting.mode for tried in found.curation.tried} == {"kv"}
    assert seen is not None
    assert 0 < seen.with_setting < 0.5 * seen.without
    assert seen.gain_low > 0
    assert not found.curation.ablation  # nobody asked
    assert not found.curation.judged  # by no other library
    assert {"delete_sinks", "splice_registers"} <= {done.name for done in found.passes}


def test_blocks_and_attention_are_still_read(added: Path) -> None:
    graph = canonicalize(load_model(added / "encoder.onnx"))
    assert len(view_encoder(graph).blocks) == SPEC.depth
    concats = [node for node in graph.nodes if f"{REGISTERS}/kv" in node.name]
    assert {node.op for node in concats} >= {"Concat"}


@pytest.mark.parametrize("ops", [["MatMul", "Gemm", "Conv"], None], ids=["linears", "all ops"])
def test_quantize_static_gains_by_it(
    ops: list[str] | None, added: Path, source: Path, tmp_path: Path
) -> None:
    """By the file alone, however it is called; the ranges that it sees are the small ones."""
    images = pixels(16, tmp_path / "photos")
    wanted = embed(source, images[8:])
    errors, ranges = {}, {}
    for name, model in (("without", source), ("with", added / "encoder.onnx")):
        quantized = quantize(model, tmp_path / f"{name}.onnx", images[:8], ops)
        errors[name] = error(wanted, embed(quantized, images[8:]))
        graph = onnx.load(quantized).graph
        scales = {item.name: item for item in graph.initializer if item.name.endswith("_scale")}
        fc2 = fc2_of(model)
        into = next(node for node in graph.node if node.name == fc2).input[0]
        dequantize = next(node for node in graph.node if into in node.output)
        ranges[name] = float(onnx.numpy_helper.to_array(scales[dequantize.input[1]]))
        if name == "with":
            kept = [node.op_type for node in graph.node if f"{REGISTERS}/kv" in node.name]
            assert kept.count("Concat") == 2 * (SPEC.depth - BLOCK)
    assert errors["with"] < 0.6 * errors["without"]
    assert ranges["with"] < 0.5 * ranges["without"]


def test_python_writes_the_same_bytes(
    added: Path, source: Path, images: Path, tmp_path: Path
) -> None:
    output = tmp_path / "encoder.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = regcache.registers(source, images, output, judge="w8a8", threads=1)
    assert output.read_bytes() == (added / "encoder.onnx").read_bytes()
    assert json.loads(found.model_dump_json()) == json.loads((added / "found.json").read_text())
    with pytest.raises(InputError, match="there is no option 'rotate'; there are ablate"):
        regcache.registers(source, images, output, rotate=False)
    with pytest.raises(InputError, match="judge: 'int8' is none of w8a8, w6a6"):
        regcache.registers(source, images, output, judge="int8")


@pytest.mark.parametrize("judge", ["w6a6", "fp8"])
def test_where_nothing_helps_the_file_is_the_export(
    judge: str, images: Path, tmp_path: Path
) -> None:
    plain, exported, output = write_tiny(tmp_path), tmp_path / "float.onnx", tmp_path / "out.onnx"
    assert run_regcache("export", plain, "-o", exported).code == 0
    outcome = run_regcache(
        *("registers", plain, "--images", images, "-o", output, "--for", judge),
        *("--json", tmp_path / "found.json", "-q"),
    )
    assert outcome.code == 0, outcome
    assert outcome.out.startswith("Registers: none (")
    assert not outcome.err
    assert output.read_bytes() == exported.read_bytes()
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["registers"], found["deleted"]) == (0, 0)


class TestBadInput:
    """One line, exit code 2, and no file."""

    def refused(self, source: Path, output: Path, images: Path, *more: object) -> str:
        outcome = run_regcache("registers", source, "--images", images, "-o", output, *more)
        assert_refused(outcome)
        return outcome.err.strip().splitlines()[-1]

    def test_few_images(self, source: Path, tmp_path: Path) -> None:
        said = self.refused(source, tmp_path / "out.onnx", photos(tmp_path / "few", 15, seed=1))
        assert "a search needs 16 images, not 15" in said
        assert not list(tmp_path.glob("*out*"))

    def test_the_source_itself(self, source: Path, images: Path) -> None:
        before = source.read_bytes()
        assert "is the source; name another file" in self.refused(source, source, images)
        assert source.read_bytes() == before

    def test_no_search_at_all(self, source: Path, images: Path, tmp_path: Path) -> None:
        said = self.refused(source, tmp_path / "out.onnx", images, "--effort", "fast")
        assert "--effort fast looks for no registers" in said
