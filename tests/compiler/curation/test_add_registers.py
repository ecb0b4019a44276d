"""`regcache registers`: a float encoder with its registers that other quantizers gain by."""

import json
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnxruntime import quantization
from support import own_quantizer
from support.command_line import assert_refused, run_regcache
from support.sinking import BLOCK, SPEC, write_sinking
from support.tiny_artifact import write_tiny
from support.tiny_source import RECIPE, photos

import regcache
from regcache.compiler.curation import called_libraries, other_quantizer
from regcache.compiler.curation.add_registers import Judge, RegistersResult
from regcache.compiler.curation.journal import journal_file
from regcache.export.onnx_file import sidecar
from regcache.passes.canonicalize import canonicalize
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import BOUNDED, REGISTERS
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


@pytest.fixture(scope="module")
def judged(source: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and, as `.json`, its record, with ONNX Runtime's quantizer as the judge."""
    output = tmp_path_factory.mktemp("judged") / "encoder.onnx"
    found = regcache.registers(source, images, output, judge="ort", threads=1)
    output.with_suffix(".json").write_text(found.model_dump_json())
    return output


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


class TestJudgedByOrt:
    """ONNX Runtime's own quantizer chooses between the best settings, and R = 0."""

    def test_it_ships_what_the_quantizer_does_best_with(self, judged: Path) -> None:
        text = judged.with_suffix(".json").read_text()
        curation = RegistersResult.model_validate_json(text).curation
        without, best, *others = curation.judged
        assert not without.setting.changes
        found = min(curation.tried, key=lambda one: one.error or np.inf).setting
        assert best.setting == found.model_copy(update={"bounded": True})
        assert {one.setting.bounded for one in others} == {True}
        assert {one.setting.mode for one in others} == {"kv"}
        chosen = min(curation.judged, key=lambda one: one.error or np.inf)
        assert curation.setting == chosen.setting
        assert chosen.setting.bounded
        assert curation.improvement is not None
        assert curation.improvement.gain_low > 0

    def test_the_bound_is_in_the_range_that_it_sees(self, judged: Path, tmp_path: Path) -> None:
        """The Clip is gone then: saturation does what it did."""
        graph = load_model(judged).graph
        clips = {node.name: node for node in graph.node if node.name.startswith(BOUNDED)}
        assert len(clips) == SPEC.depth
        quantized = quantize(judged, tmp_path / "int8.onnx", pixels(8, tmp_path / "photos"), None)
        after = onnx.load(quantized).graph
        assert not [node.name for node in after.node if node.name in clips]
        values = {item.name: onnx.numpy_helper.to_array(item) for item in after.initializer}
        lows = {item.name: onnx.numpy_helper.to_array(item) for item in graph.initializer}
        for clip in clips.values():
            (rounded,) = (
                node
                for node in after.node
                if node.op_type == "QuantizeLinear" and node.input[0] == clip.output[0]
            )
            scale, zero = (values[name].astype(float) for name in rounded.input[1:])
            least = -zero * scale
            assert float(lows[clip.input[1]]) - scale <= least <= 0


def test_a_command_chooses_as_the_library_that_it_calls(
    source: Path, images: Path, judged: Path, tmp_path: Path
) -> None:
    """It is asked about the best setting without a bound, too, to learn that one helps."""
    script, output = Path(own_quantizer.__file__), tmp_path / "encoder.onnx"
    command = shlex.join([sys.executable, str(script), "{model}", "{images}", "{output}"])
    more = ("--quantizer", command, "--json", tmp_path / "found.json", "--threads", 1)
    outcome = run_regcache("registers", source, "--images", images, "-o", output, *more)
    assert outcome.code == 0, outcome
    found = RegistersResult.model_validate_json((tmp_path / "found.json").read_text())
    wanted = RegistersResult.model_validate_json(judged.with_suffix(".json").read_text())
    assert found.quantizer == tuple(shlex.split(command))
    assert found.judge is Judge.W8A8
    assert wanted.quantizer is None
    errors, others = (
        {item.setting: item.error for item in result.curation.judged} for result in (found, wanted)
    )
    best = wanted.curation.judged[1].setting
    assert errors.keys() - others.keys() == {best.model_copy(update={"bounded": False})}
    for setting, error in others.items():
        assert errors[setting] == pytest.approx(error, rel=0.05), setting
    assert found.curation.setting == wanted.curation.setting
    assert output.read_bytes() == judged.read_bytes()


def test_where_the_quantizer_is_better_off_without(
    source: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R = 0, the exported file, and a line that says so."""
    run = other_quantizer.ReallyQuantized.open

    @contextmanager
    def worse(self: Any, graph: Any) -> Iterator[Any]:
        noise = 100.0 if BOUNDED in str(graph.nodes) else 0.0
        with run(self, graph) as made:
            yield SimpleNamespace(
                bound_reached=True,
                run=lambda images: [item + noise for item in made.run(images)],
            )

    monkeypatch.setattr(other_quantizer.ReallyQuantized, "open", worse)
    output, exported = tmp_path / "encoder.onnx", tmp_path / "float.onnx"
    assert run_regcache("export", source, "-o", exported).code == 0
    outcome = run_regcache("registers", source, "--images", images, "-o", output, "--for", "ort")
    assert outcome.code == 0, outcome
    assert "Registers: none (the quantizer itself does better without: error " in outcome.out
    assert output.read_bytes() == exported.read_bytes()


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

    def test_a_library_that_is_not_there(
        self, source: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(called_libraries, "find_spec", lambda _: None)
        said = self.refused(source, tmp_path / "out.onnx", images, "--for", "nncf")
        assert "--for nncf needs nncf: pip install nncf" in said

    def test_a_command_that_cannot_be_called(
        self, source: Path, images: Path, tmp_path: Path
    ) -> None:
        """Said before the search."""
        output = tmp_path / "out.onnx"
        said = self.refused(source, output, images, "--quantizer", "quantize {model} {output}")
        assert "--quantizer: the command has no {images}; it needs" in said
        command = "no-such-program {model} {images} {output}"
        said = self.refused(source, output, images, "--quantizer", command)
        assert "--quantizer: there is no program 'no-such-program'" in said
        said = self.refused(source, output, images, "--quantizer", command, "--for", "ort")
        assert "--quantizer and --for ort: only one can decide" in said
        with pytest.raises(InputError, match="--quantizer: 7 is no command"):
            regcache.registers(source, images, output, quantizer=7)  # type: ignore[arg-type]

    def test_a_command_that_fails(self, source: Path, images: Path, tmp_path: Path) -> None:
        """What was searched is kept, for the next run."""
        output = tmp_path / "out.onnx"
        command = [sys.executable, "-S", "-c", "raise SystemExit('no kernel')"]
        words = [*command, "{model}", "{images}", "{output}"]
        with pytest.raises(InputError, match=r"--quantizer: the command ended .* 1: no kernel$"):
            regcache.registers(source, images, output, quantizer=words, threads=1)
        assert [path.name for path in tmp_path.iterdir()] == [journal_file(output).name]

    def test_a_library_that_fails(
        self, source: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise RuntimeError("no kernel\nof that kind")

        monkeypatch.setattr(quantization, "quantize_static", fail)
        output = tmp_path / "out.onnx"
        said = self.refused(source, output, images, "--for", "ort")
        assert "--for ort: no kernel" in said
        assert not output.exists()
        assert not list(tmp_path.glob("*.json"))
