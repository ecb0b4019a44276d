"""What the search computes on pieces of an encoder equals the whole encoder, run directly."""

import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.number_formats import affines
from support.running import run_graph
from support.workbench_cases import (
    BATCHES,
    QUANTIZERS,
    SETTINGS,
    SPEC,
    Case,
    assert_errors,
    assert_scales,
    make_case,
    random_tokens,
    run_named,
)

from regcache.compiler.curation import workbench as workbench_module
from regcache.compiler.curation.screening import Screen, screened_ranges
from regcache.compiler.curation.sensitivity import block_damage
from regcache.compiler.curation.study import Study
from regcache.compiler.curation.trial import Trial, try_setting
from regcache.compiler.curation.workbench import HeldStudy, Workbench
from regcache.passes.check import check_and_infer
from regcache.passes.encoder import Block, by_tensor
from regcache.passes.errors import InputError
from regcache.passes.external_weights import mapping
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears

Floats = NDArray[np.float32]


@pytest.fixture(params=BATCHES, scope="module")
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(batch=BATCHES[request.param])


@pytest.mark.slow
def test_hidden_states_are_those_of_the_whole_encoder(case: Case) -> None:
    workbench = case.workbench
    assert len(workbench.fit) == len(workbench.quantized) == len(workbench.streams) == 4
    images = case.study.images
    wanted = run_named(case.graph, workbench.streams, images.fit)
    for found, stream in zip(workbench.fit, wanted, strict=True):
        np.testing.assert_allclose(found, stream, rtol=1e-5, atol=1e-5)
    quantized = run_named(case.quantized(case.graph), workbench.streams, images.rank)
    for found, stream in zip(workbench.quantized, quantized, strict=True):
        np.testing.assert_allclose(found, stream, rtol=1e-5, atol=1e-5)


def test_references_are_the_float_encoder(case: Case) -> None:
    workbench = case.workbench
    images = case.study.images
    (rank,), (decide,) = workbench.references("rank"), workbench.references("decide")
    for found, some in ((rank, images.rank), (decide, images.decide)):
        np.testing.assert_allclose(found, case.references(some), rtol=1e-4, atol=1e-5)


def test_scales_are_those_of_all_images_at_once(case: Case) -> None:
    workbench, step = case.workbench, case.step(case.graph)
    assert isinstance(step, QuantizeLinears)
    found = by_tensor(view_encoder(case.graph).sites, affines(workbench.scales))
    assert len(found) == len(workbench.scales)
    assert_scales(found, step.activations)


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_the_baseline_is_the_quantized_encoder(quantizer: str) -> None:
    case = make_case(quantizer=quantizer)
    wanted = case.errors(case.quantized(case.graph), case.study.images.rank)
    assert_errors(case.workbench.baseline, wanted)


def test_threads_share_the_workbench_of_a_held_study() -> None:
    held = HeldStudy(make_case().study)
    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(HeldStudy.workbench, [held] * 8))
    assert made == {held.workbench()}
    assert HeldStudy(held.study).workbench() not in made


def test_a_held_study_travels_without_its_workbench() -> None:
    held = HeldStudy(make_case().study)
    before = pickle.dumps(held)
    baseline = held.workbench().baseline
    assert pickle.dumps(held) == before
    copy = pickle.loads(before)
    assert copy.study.key == held.study.key
    np.testing.assert_array_equal(copy.workbench().baseline, baseline)


def test_a_workbench_goes_with_what_holds_it() -> None:
    held = HeldStudy(make_case().study)
    workbench = weakref.ref(held.workbench())
    assert block_damage(held, 0).sites
    del held
    assert workbench() is None


def test_states_of_a_large_encoder_lie_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are the same, also once their memory was given back."""
    case = make_case()
    usual = Workbench(replace(case.study, batch=1))  # as a large one runs
    monkeypatch.setattr(workbench_module, "LARGE", 0)
    large = Workbench(case.study)
    for found, wanted in ((large.fit, usual.fit), (large.quantized, usual.quantized)):
        assert all(mapping(state) is not None for state in found)
        assert all(mapping(state) is None for state in wanted)
    np.testing.assert_array_equal(large.baseline, usual.baseline)
    large.return_memory()
    for found, wanted in ((large.fit, usual.fit), (large.quantized, usual.quantized)):
        for state, same in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(state, same)


@pytest.mark.slow
def test_results_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case()
    settings = [SETTINGS[name] for name in ("kv", "deletion, then kv", "nothing")]
    trials = [Trial(setting, random_tokens(SPEC, setting.count)) for setting in settings]
    screens = [Screen(random_tokens(SPEC, count), 1, 3) for count in (0, 2)]

    def everything(threads: int) -> list[Any]:
        held = HeldStudy(case.study)
        monkeypatch.setattr(workbench_module, "available_cpus", lambda: threads)
        with ThreadPoolExecutor(threads) as pool:
            results: list[Any] = list(pool.map(partial(try_setting, held), trials))
            results += pool.map(partial(block_damage, held), range(1, 3))
            results += pool.map(partial(screened_ranges, held), screens)
        workbench = held.workbench()
        states = [*workbench.fit, *workbench.quantized]
        states += [*workbench.references("rank"), *workbench.references("decide")]
        hidden = [x.tobytes() for x in states]
        return [*results, workbench.scales, workbench.baseline.tobytes(), hidden]

    assert everything(4) == everything(1)


def test_a_flattened_mlp_shows_all_its_tokens() -> None:
    """[B T, K], in a batch that is fixed and filled up: 5 images are two batches of 3."""
    case = make_case(quantizer="s8s8 min-max", batch=3)
    flat = case.study.graph.copy()
    for block in view_encoder(flat).blocks:
        flatten(flat, block)
    check_and_infer(flat)
    images, quantizer = case.study.images, case.study.quantizer
    workbench = Workbench(Study.of(flat, images, quantizer, batch=3))
    every = [
        *workbench.stream_norms, *workbench.site_norms.values(),
        *case.workbench.stream_norms, *case.workbench.site_norms.values(),
    ]  # fmt: skip
    for norms in every:
        assert norms.linf.counts.sum() == len(images.fit) * case.vit.spec.tokens
    for block in view_encoder(flat).blocks:
        assert len(block.mlp.fc2.input.shape) == 2
    assert_scales(affines(workbench.scales), affines(case.workbench.scales))


def flatten(graph: gs.Graph, block: Block) -> None:
    """Run a block's MLP on [B T, width], as exporters of Gemm do."""
    source, result = block.norm2.outputs[0], block.mlp.fc2.output
    flat = gs.Variable(f"{source.name}/flat", dtype=np.float32)
    for node in list(source.outputs):
        node.inputs = [flat if item is source else item for item in node.inputs]
    wide = gs.Variable(f"{result.name}/wide", dtype=np.float32)
    for node in list(result.outputs):
        node.inputs = [wide if item is result else item for item in node.inputs]
    for old, new, shape in ((source, flat, [-1, 16]), (result, wide, [-1, 10, 16])):
        target = gs.Constant(f"{new.name}/shape", np.array(shape))
        graph.nodes.append(gs.Node("Reshape", new.name, {}, [old, target], [new]))
    graph.toposort()


def test_sequence_first_hidden_states_are_refused() -> None:
    case = make_case()
    graph = case.graph.copy()
    view = view_encoder(graph)
    turned = [(view.blocks[0].input, "in"), (view.blocks[-1].output, "out")]
    for block in view.blocks:
        turned.append((block.norm1.outputs[0], f"{block.index}.norm1"))
        turned.append((block.attention.out.output, f"{block.index}.out"))
    for tensor, name in turned:
        new = gs.Variable(f"turned/{name}", dtype=np.float32)
        for node in list(tensor.outputs):
            node.inputs = [new if item is tensor else item for item in node.inputs]
        graph.nodes.append(gs.Node("Transpose", new.name, {"perm": [1, 0, 2]}, [tensor], [new]))
    check_and_infer(graph.toposort())
    images = case.study.images
    np.testing.assert_allclose(  # the encoder that it was
        run_graph(graph, images.fit)[0], case.references(images.fit), rtol=1e-3, atol=1e-5
    )
    with pytest.raises(InputError, match=r"block 0.* does not have the batch in front"):
        Workbench(Study.of(graph, images, case.study.quantizer))


def test_sensitivity_alone_quantizes_no_whole_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search alone needs images to rank and to decide."""
    monkeypatch.setattr(Workbench, "_run_quantized", lambda _: pytest.fail("quantized"))
    monkeypatch.setattr(Workbench, "references", lambda *_: pytest.fail("ran references"))
    damage = block_damage(HeldStudy(make_case().study), 0)
    assert damage.whole > 0
