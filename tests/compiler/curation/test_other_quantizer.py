"""Other libraries' quantizers: how they are called, and how often."""

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnxruntime import quantization
from support.workbench_cases import Case, make_case, random_tokens, run_named

from regcache.compiler.curation import called_libraries
from regcache.compiler.curation.called_libraries import NNCF, ORT
from regcache.compiler.curation.held_out import HeldOut
from regcache.compiler.curation.other_quantizer import OtherQuantizer, ReallyQuantized
from regcache.compiler.curation.search import SearchTasks
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.tensor_ranges import tensor_ranges
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import save_graph

NONE, BOUNDED = Setting(), Setting(bounded=True)
REGISTERS = Setting(candidates=(0,), start=1, end=3)
DELETION = Setting(delete_at=1, delete_count=1)
BOTH = REGISTERS.model_copy(update={"bounded": True})


@pytest.fixture
def case() -> Case:
    return make_case()


def placed(case: Case, setting: Setting) -> gs.Graph:
    tokens = random_tokens(case.vit.spec, setting.count)
    return place_registers(case.workbench.graph, case.workbench.view, setting, tokens)[0]


def quantizer(case: Case, library: OtherQuantizer) -> ReallyQuantized:
    return ReallyQuantized(library, case.study.images.fit, case.workbench.outputs, 2, threads=1)


def outputs(really: ReallyQuantized, case: Case, setting: Setting) -> list[Any]:
    with really.open(placed(case, setting)) as quantized:
        return quantized.run(case.study.images.rank)


@pytest.mark.parametrize("setting", [NONE, BOTH], ids=["without", "with registers and bound"])
def test_its_own_calibration_finds_the_same_ranges(
    setting: Setting, case: Case, tmp_path: Path
) -> None:
    graph, images = placed(case, setting), case.study.images.fit[:4]
    name, model = graph.inputs[0].name, tmp_path / "model.onnx"
    save_graph(graph, model)
    items = iter([{name: images[:2]}, {name: images[2:]}])
    reader = type("Reader", (), {"get_next": lambda _: next(items, None)})
    calibrator = quantization.create_calibrator(model, augmented_model_path=f"{model}.augmented")
    calibrator.collect_data(reader())
    wanted = {key: seen.range_value for key, seen in calibrator.compute_data().items()}
    found = tensor_ranges(graph, np.split(images, 2))
    assert len(wanted) > 50
    assert set(wanted) <= set(found)
    for key, pair in wanted.items():
        np.testing.assert_allclose(found[key], pair, rtol=1e-4, atol=1e-5, err_msg=key)


def test_a_version_that_takes_no_ranges(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds them itself, and the outputs are the same but for numbers on a tie."""
    if not hasattr(quantization, "save_tensors_data"):
        pytest.skip("this ONNX Runtime takes no ranges")
    found = outputs(quantizer(case, ORT), case, BOTH)
    monkeypatch.setattr(called_libraries, "_CACHE", "no option")
    monkeypatch.delattr(called_libraries, "tensor_ranges")
    own = outputs(quantizer(case, ORT), case, BOTH)
    for one, other in zip(found, own, strict=True):
        np.testing.assert_allclose(one, other, atol=0.02 * np.abs(other).max())


@pytest.mark.parametrize("bound", [-1000.0, None], ids=["idle", "as it comes"])
def test_whether_a_bound_is_reached(bound: float | None, case: Case) -> None:
    if not hasattr(quantization, "save_tensors_data"):
        pytest.skip("this ONNX Runtime takes no ranges")
    graph = placed(case, BOUNDED)
    products = {node.inputs[0].name: node.inputs[1] for node in graph.nodes if node.op == "Clip"}
    images = case.study.images.fit
    least = min(float(tensor_ranges(graph, [images])[name][0].min()) for name in products)
    for low in products.values():
        low.values = np.array(least / 2 if bound is None else bound, np.float32)
    with quantizer(case, ORT).open(graph) as quantized:
        assert quantized.bound_reached is (bound is None)


def test_only_the_best_so_far_is_run_on_the_images_that_decide(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a bound that no image reaches is left out: that one is R = 0 again."""
    errors = {NONE: 0.5, REGISTERS: 0.75, DELETION: 0.25}
    asked, current = list[tuple[Setting, str]](), list[Setting]()

    class Pretended(HeldOut):
        def _errors(self, images: Any, outputs: Any) -> Any:
            asked.append((current[-1], images))
            result = super()._errors(images, outputs)
            return type(result)((errors[current[-1]],) * len(result.errors))

    def noted(graph: Any, view: Any, setting: Setting, tokens: Any) -> Any:
        current.append(setting)
        return place_registers(graph, view, setting, tokens)

    monkeypatch.setattr("regcache.compiler.curation.held_out.place_registers", noted)
    tasks = cast("SearchTasks", SimpleNamespace(reporter=Reporter()))
    held_out = Pretended(case.workbench, tasks, ORT)
    tokens = random_tokens(case.vit.spec, 1)
    rivals = {REGISTERS: tokens, BOUNDED: tokens[:0], DELETION: tokens[:0]}
    assert held_out.best(rivals) == DELETION
    assert current == [NONE, *rivals]
    both = ("rank", "decide")
    expected = [(NONE, image) for image in both] + [(REGISTERS, "rank")]
    assert asked == expected + [(DELETION, image) for image in both]
    assert {setting: found.mean for setting, found in held_out.ranked.items()} == errors
    current.clear()
    assert held_out.best({DELETION: tokens[:0], REGISTERS: tokens}) == DELETION
    assert not current  # all are known
    asked.clear()
    assert held_out.improvement(DELETION, tokens[:0]).gain == 0.25
    assert not asked  # both are known
    assert held_out.measure({REGISTERS: tokens})[REGISTERS].mean == 0.75
    assert asked == [(REGISTERS, image) for image in both]


@pytest.fixture
def pretended_nncf(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A module that hands models back as they are, and what it was called with."""
    calls = list[dict[str, Any]]()

    def quantize(model: onnx.ModelProto, dataset: list[Any], **more: Any) -> onnx.ModelProto:
        print("a progress bar")
        calls.append({"model": model, "dataset": dataset, **more})
        return model

    module = ModuleType("nncf")
    module.__spec__ = ModuleSpec("nncf", None)
    vars(module).update(
        quantize=quantize,
        Dataset=list,
        ModelType=SimpleNamespace(TRANSFORMER="transformer"),
    )
    monkeypatch.setitem(sys.modules, "nncf", module)
    return calls


def test_how_nncf_is_called(
    case: Case, pretended_nncf: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    NNCF.check()
    found = outputs(quantizer(case, NNCF), case, NONE)
    (call,) = pretended_nncf
    onnx.checker.check_model(call["model"])
    feeds, fit = call["dataset"], case.study.images.fit
    assert [list(feed) for feed in feeds] == [[call["model"].graph.input[0].name]] * len(feeds)
    pixels = np.concatenate([next(iter(feed.values())) for feed in feeds])
    np.testing.assert_array_equal(pixels[: len(fit)], fit)
    assert (call["model_type"], call["subset_size"]) == ("transformer", len(feeds))
    names = case.workbench.outputs
    references = case.workbench.references("rank")
    for name, one, other in zip(names, found, references, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)
    assert not capsys.readouterr().out


def test_what_nncf_says_of_its_failure(
    case: Case, pretended_nncf: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such operator\nhere")

    monkeypatch.setattr(sys.modules["nncf"], "quantize", fail)
    with pytest.raises(InputError, match=r"^--for nncf: no such operator$"):
        outputs(quantizer(case, NNCF), case, NONE)
    assert not pretended_nncf


@pytest.mark.parametrize("setting", [NONE, REGISTERS], ids=["without", "with registers"])
def test_nncf_itself(setting: Setting, case: Case) -> None:
    """Where it is installed: the outputs are close to those in float, and are others."""
    pytest.importorskip("nncf")
    found = outputs(quantizer(case, NNCF), case, setting)
    graph, images = placed(case, setting), case.study.images.rank
    wanted = run_named(graph, list(case.workbench.outputs), images)
    for one, other in zip(found, wanted, strict=True):
        assert 0 < np.abs(one - other).max() < 0.2 * np.abs(other).max()
