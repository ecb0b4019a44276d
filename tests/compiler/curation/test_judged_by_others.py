"""`regcache registers` where another quantizer has the last word: a library's, or a command."""

import shlex
import sys
from collections.abc import Iterator
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
from support.sinking import SPEC, write_sinking
from support.tiny_source import RECIPE, photos

import regcache
from regcache.compiler.curation import called_libraries, other_quantizer
from regcache.compiler.curation.add_registers import Judge, RegistersResult
from regcache.compiler.curation.journal import journal_file
from regcache.passes.errors import InputError
from regcache.passes.marks import BOUNDED
from regcache.passes.onnx_file import load_model
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("executor")]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photos(tmp_path_factory.mktemp("images") / "photos", 20, seed=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sinking(tmp_path_factory.mktemp("sinking") / "sinking.onnx")


@pytest.fixture(scope="module")
def judged(source: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder and, as `.json`, its record, with ONNX Runtime's quantizer as the judge."""
    output = tmp_path_factory.mktemp("judged") / "encoder.onnx"
    found = regcache.registers(source, images, output, judge="ort", threads=1)
    output.with_suffix(".json").write_text(found.model_dump_json())
    return output


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
        quantized, calibration = tmp_path / "int8.onnx", tmp_path / "images.npy"
        pictures = list_images(photos(tmp_path / "photos", 8, seed=7))
        batches = [batch.images for batch in ImageFolder(pictures, RECIPE, 1)]
        np.save(calibration, np.concatenate(batches))
        own_quantizer.quantize(judged, calibration, quantized)
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


class TestBadInput:
    """One line, exit code 2, and no file."""

    def refused(self, source: Path, output: Path, images: Path, *more: object) -> str:
        outcome = run_regcache("registers", source, "--images", images, "-o", output, *more)
        assert_refused(outcome)
        return outcome.err.strip().splitlines()[-1]

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
        assert not list(tmp_path.iterdir())
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
