"""A graph without its weights fits into a message, and is the same with them."""

import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.registers import random_kv
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, TargetName, resolve_target, simulate
from regcache.passes.base import run
from regcache.passes.detach_weights import detach_weights, pack_graph, unpack_graph
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.splice_registers import SpliceRegisters
from regcache.runtime.device import Device

WIDE = Spec(width=64, heads=4, hidden=256)
QUANTIZER = Quantizer(resolve_target(TargetName.ORT_CPU, u8s8_saturates=False))


def constants(graph: gs.Graph) -> dict[str, NDArray[Any]]:
    found = graph.tensors().items()
    return {name: item.values for name, item in found if isinstance(item, gs.Constant)}


def wide_graph(kind: str = "float") -> gs.Graph:
    graph = canonical_graph(TinyVit(WIDE).model())
    if kind == "registers":
        graph = run(SpliceRegisters(0, 2, *random_kv(WIDE, 2, 20)), graph).graph
    elif kind == "quantized":
        graph = run(QuantizeLinears(linear_scales(graph)), graph).graph
    return graph


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_comes_back_byte_for_byte(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    model, weights = pack_graph(graph)
    back = unpack_graph(model, weights)
    assert gs.export_onnx(back).SerializeToString() == gs.export_onnx(graph).SerializeToString()
    assert len(view_encoder(back).linears) == len(view_encoder(graph).linears)


@pytest.mark.parametrize("kind", ["float", "registers", "quantized"])
def test_large_weights_travel_beside_the_message(kind: str) -> None:
    graph = wide_graph(kind)
    before = gs.export_onnx(graph).SerializeToString()
    model, weights = pack_graph(graph)
    assert gs.export_onnx(graph).SerializeToString() == before
    whole = constants(graph)
    assert weights.keys() == {name for name, values in whole.items() if values.size > 1024}
    assert len(weights) >= 12
    held = sum(values.nbytes for values in weights.values())
    assert len(model) < len(before) - held + 100 * len(weights)  # a name and a shape for each
    back = unpack_graph(model, weights)
    for name, values in constants(back).items():
        assert values.dtype == whole[name].dtype
        np.testing.assert_array_equal(values, whole[name])
    for name in weights:
        assert constants(back)[name] is weights[name] is whole[name]  # shared, not copied
    assert [item.name for item in back.inputs] == ["pixel_values"]
    images = TinyVit(WIDE).images(3)
    for one, other in zip(run_graph(back, images), run_graph(graph, images), strict=True):
        assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize(("size", "leaves"), [(1024, False), (1025, True), ((5, 205), True)])
def test_the_smallest_weight_that_leaves(size: int | tuple[int, int], leaves: bool) -> None:
    x, y, z = (gs.Variable(name, np.float32, [1]) for name in "xyz")
    table = gs.Constant("table", np.ones(size, np.float32))
    nodes = [gs.Node("Mul", "one", {}, [x, table], [y]), gs.Node("Add", "two", {}, [y, table], [z])]
    graph = gs.Graph(nodes, [x], [z])
    bare, weights = detach_weights(graph)
    assert (weights.keys() == {"table"}) is leaves
    assert [item.name for item in bare.inputs] == ["x", *weights]
    back = unpack_graph(*pack_graph(graph))
    assert back.nodes[0].inputs[1] is back.nodes[1].inputs[1]  # still one tensor


def study(**more: Any) -> Study:
    images = ReferenceImages.deal(TinyVit(WIDE).images(7))
    return Study.of(wide_graph(), images, QUANTIZER, **more)


def test_a_study_comes_back_from_a_message() -> None:
    sent = study(batch=3, seed=5, sensitivity_images=2, screening_images=1)
    message = pickle.dumps(sent, pickle.HIGHEST_PROTOCOL)
    back = pickle.loads(message)
    assert (back.batch, back.seed) == (3, 5)
    assert (back.sensitivity_images, back.screening_images) == (2, 1)
    assert back.quantizer == sent.quantizer
    for ours, theirs in zip(vars(back.images).values(), vars(sent.images).values(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    wanted = gs.export_onnx(sent.graph).SerializeToString()
    assert gs.export_onnx(back.graph).SerializeToString() == wanted
    more = {"batch": 3, "seed": 5, "sensitivity_images": 2, "screening_images": 1}
    anew = Study.of(back.graph, back.images, back.quantizer, **more)
    assert back.key == sent.key == anew.key != ""
    held = sum(part.nbytes for part in vars(sent.images).values())
    assert len(message) < len(wanted) + held + 5000  # every array once


def test_equal_studies_have_equal_keys() -> None:
    assert study(batch=3).key == study(batch=3).key


def test_each_part_of_a_study_changes_its_key() -> None:
    plain = study()
    dealt = plain.images
    graph = plain.graph.copy()
    weight = next(node for node in graph.nodes if node.op == "MatMul").inputs[1]
    changed = weight.values.copy()
    changed[-1, -1] = np.nextafter(changed[-1, -1], np.float32(9))
    weight.values = changed
    small = plain.graph.copy()
    norm = next(node for node in small.nodes if node.op == "LayerNormalization")
    norm.inputs[2].values = -norm.inputs[2].values
    other = dealt.decide.copy()
    other[-1, -1, -1, -1] += 1
    images = [
        replace(dealt, decide=other),
        ReferenceImages(dealt.rank, dealt.fit, dealt.decide),
        ReferenceImages(dealt.fit[:-1], np.concatenate([dealt.fit[-1:], dealt.rank]), dealt.decide),
    ]
    quantizers = [
        Quantizer(QUANTIZER.target, Calibrator.MIN_MAX),
        Quantizer(QUANTIZER.target, device=Device(gpu=0)),
        Quantizer(QUANTIZER.target, device=Device(gpu=0, arrays="cuda:0")),
        Quantizer(resolve_target(TargetName.ORT_CPU, u8s8_saturates=True)),
        Quantizer(resolve_target(TargetName.TENSORRT, u8s8_saturates=False)),
        *(Quantizer(simulate(QUANTIZER.target, bits)) for bits in Simulation),
    ]
    studies = [
        plain,
        Study.of(graph, dealt, QUANTIZER),
        Study.of(small, dealt, QUANTIZER),
        *(Study.of(plain.graph, some, QUANTIZER) for some in images),
        *(Study.of(plain.graph, dealt, some) for some in quantizers),
        Study.of(plain.graph, dealt, QUANTIZER, seed=1),
        Study.of(plain.graph, dealt, QUANTIZER, batch=1),
        Study.of(plain.graph, dealt, QUANTIZER, sensitivity_images=1),
        Study.of(plain.graph, dealt, QUANTIZER, screening_images=1),
    ]
    assert len({one.key for one in studies}) == len(studies)
