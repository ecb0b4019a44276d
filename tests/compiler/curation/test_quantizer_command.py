"""A command as the quantizer that decides: what it gets, and every way in which it may fail."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import pytest
from support.workbench_cases import SPEC, Case, make_case, random_tokens

from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.other_quantizer import ReallyQuantized
from regcache.compiler.curation.quantizer_command import QuantizerCommand
from regcache.compiler.curation.search import SearchTasks
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.tensor_ranges import tensor_ranges
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import save_graph

PYTHON = (sys.executable, "-S", "-E", "-c")
PLACES = ("{model}", "{images}", "{output}")
COPY = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[3])"


@pytest.fixture(scope="module")
def case() -> Case:
    return make_case()


def command(code: str, *more: str) -> QuantizerCommand:
    found = QuantizerCommand((*PYTHON, code, *PLACES, *more))
    found.check()
    return found


def outputs(judge: QuantizerCommand, case: Case) -> list[Any]:
    workbench, images = case.workbench, case.study.images
    really = ReallyQuantized(judge, images.fit, workbench.outputs, 2, threads=1)
    with really.open(workbench.graph) as quantized:
        return quantized.run(images.rank)


def writing(
    case: Case, change: Callable[[onnx.GraphProto], None], folder: Path
) -> QuantizerCommand:
    """A command that writes the float model of a case, changed, whatever it gets."""
    path = folder / "changed.onnx"
    save_graph(case.workbench.graph, path)
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, path)
    return command("import shutil, sys; shutil.copy(sys.argv[4], sys.argv[3])", str(path))


def refused(judge: QuantizerCommand, case: Case) -> str:
    with pytest.raises(InputError) as caught:
        outputs(judge, case)
    said = str(caught.value)
    assert said.startswith("--quantizer: ")
    assert "\n" not in said
    return said.removeprefix("--quantizer: ")


def test_what_it_gets_and_what_becomes_of_what_it_writes(case: Case, tmp_path: Path) -> None:
    """A place may be a part of a word, and come twice; other braces are left alone."""
    code = (
        "import json, shutil, sys; model, output, images, to, braces, again = sys.argv[1:]; "
        "shutil.copy(model, output.removeprefix('--to=')); shutil.copy(images, to); "
        "shutil.copy(model, to + '.onnx'); assert model == again; assert json.loads(braces) == {}"
    )
    seen = tmp_path / "seen.npy"
    words = ("{model}", "--to={output}", "{images}", str(seen), "{}", "{model}")
    judge = QuantizerCommand((*PYTHON, code, *words))
    judge.check()
    found = outputs(judge, case)
    fit = case.study.images.fit
    images = np.load(seen)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images[: len(fit)], fit)
    assert len(images) - len(fit) in (0, 1)  # filled up to whole batches of 2
    onnx.checker.check_model(onnx.load(f"{seen}.onnx"))
    references = case.workbench.references("rank")
    for one, other in zip(found, references, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_batch_that_it_fixes(case: Case, tmp_path: Path) -> None:
    def fix(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1

    found = outputs(writing(case, fix, tmp_path), case)
    references = case.workbench.references("rank")
    for one, other in zip(found, references, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (
            "import sys; print('on stdout'); print('a warning', file=sys.stderr); "
            "sys.exit('ValueError: no such layer')",
            "the command ended with exit code 1: ValueError: no such layer",
        ),
        (
            "import sys; print('no space'); sys.exit(3)",
            "the command ended with exit code 3: no space",
        ),
        ("import sys; sys.exit(4)", "the command ended with exit code 4"),
        (
            "import os; os.kill(os.getpid(), 9)",
            "the command was ended by signal 9 (out of memory?)",
        ),
        ("pass", "the command ended well, and wrote no {output}"),
    ],
    ids=["stderr", "stdout alone", "silently", "killed", "nothing written"],
)
def test_a_command_that_fails(code: str, expected: str, case: Case) -> None:
    assert refused(command(code), case) == expected


def test_what_onnx_runtime_cannot_load(case: Case) -> None:
    said = refused(command("import sys; open(sys.argv[3], 'w').write('no model')"), case)
    assert said.startswith("what it wrote: ONNX Runtime: ")


def test_what_takes_other_images(case: Case, tmp_path: Path) -> None:
    def resize(graph: onnx.GraphProto) -> None:
        graph.input[0].type.tensor_type.shape.dim[2].dim_value = 7

    assert refused(writing(case, resize, tmp_path), case).startswith("what it wrote: takes [")


def test_outputs_of_other_names(case: Case, tmp_path: Path) -> None:
    name = case.workbench.outputs[0]

    def rename(graph: onnx.GraphProto) -> None:
        (output,) = (item for item in graph.output if item.name == name)
        output.name = "renamed"
        graph.node.append(onnx.helper.make_node("Identity", [name], ["renamed"]))

    said = refused(writing(case, rename, tmp_path), case)
    assert said.startswith(f"what it wrote: has no output {name!r}, only ")


def test_outputs_of_other_shapes(case: Case, tmp_path: Path) -> None:
    """Found where they are held against the float encoder's."""
    wide = make_case(replace(SPEC, width=2 * SPEC.width))
    judge = writing(wide, lambda _: None, tmp_path)
    tasks = cast("SearchTasks", SimpleNamespace(reporter=Reporter()))
    held_out = HeldOut(case.workbench, tasks, judge)
    name, count = case.workbench.outputs[0], len(case.study.images.rank)
    with pytest.raises(InputError) as caught:
        held_out.best({Setting(): random_tokens(SPEC, 0)})
    shapes = [list(held.references("rank")[0].shape) for held in (wide.workbench, case.workbench)]
    assert shapes[0][0] == count
    assert str(caught.value) == f"--quantizer: output {name!r} is {shapes[0]}, not {shapes[1]}"


@pytest.mark.parametrize("place", PLACES)
def test_a_place_that_is_missing(place: str) -> None:
    words = (*PYTHON, "pass", *(word for word in PLACES if word != place))
    with pytest.raises(InputError) as caught:
        QuantizerCommand(words).check()
    said = f"the command has no {place}; it needs {{model}}, {{images}}, {{output}}"
    assert str(caught.value) == f"--quantizer: {said}"


def test_a_program_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^--quantizer: there is no program 'no/such/thing'$"):
        QuantizerCommand(("no/such/thing", *PLACES)).check()
    script = tmp_path / "quantize.py"  # that is there, and is no program
    script.write_text("")
    with pytest.raises(InputError, match="there is no program"):
        QuantizerCommand((str(script), *PLACES)).check()


def test_how_a_command_is_told() -> None:
    told = QuantizerCommand.of("python 'my quantizer.py' {model} {images} --to={output}")
    assert told.words == ("python", "my quantizer.py", "{model}", "{images}", "--to={output}")
    assert QuantizerCommand.of([*told.words]) == told
    assert QuantizerCommand.of(["a b", "{model}"]).words == ("a b", "{model}")
    with pytest.raises(InputError, match=r"^--quantizer: \"python 'q\": No closing quotation$"):
        QuantizerCommand.of("python 'q")
    for wrong in (7, ["python", 7]):
        with pytest.raises(InputError, match="is no command: a line, or a list of words"):
            QuantizerCommand.of(wrong)


@pytest.mark.parametrize("bound", [-1000.0, None], ids=["idle", "as it comes"])
def test_whether_a_bound_is_reached(bound: float | None, case: Case) -> None:
    """It is known, although the command says nothing of ranges."""
    workbench = case.workbench
    setting, tokens = Setting(bounded=True), random_tokens(case.vit.spec, 0)
    graph = place_registers(workbench.graph, workbench.view, setting, tokens)[0]
    products = {node.inputs[0].name: node.inputs[1] for node in graph.nodes if node.op == "Clip"}
    fit = case.study.images.fit
    ranges = tensor_ranges(graph, [fit], names=products)
    assert ranges.keys() == products.keys()
    least = min(float(low.min()) for low, _ in ranges.values())
    for low in products.values():
        low.values = np.array(least / 2 if bound is None else bound, np.float32)
    really = ReallyQuantized(command(COPY), fit, workbench.outputs, 2, threads=1)
    with really.open(graph) as quantized:
        assert quantized.bound_reached is (bound is None)


def test_where_there_is_no_bound(case: Case) -> None:
    really = ReallyQuantized(command(COPY), case.study.images.fit, case.workbench.outputs, 2)
    with really.open(case.workbench.graph) as quantized:
        assert not quantized.bound_reached
