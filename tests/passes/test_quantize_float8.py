"""FP8 Q/DQ insertion: valid graphs, the numbers of a simulation, and nothing else changed."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.float8_numbers import nearest
from support.running import run_graph
from support.scales import float8_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.detach_weights import pack_graph, unpack_graph
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float8 import FLOAT8, Float8
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears


def simulate(
    graph: gs.Graph, chosen: dict[str, Float8], only: frozenset[str] | None = None
) -> gs.Graph:
    """E4M3 spelled as arithmetic: clip, and round to steps of 1/8 of the power of two below.

    Where Log errs at a power of two, the number is so close to it that both steps give it.
    """
    copy = graph.copy()
    for linear in view_encoder(copy).linears:
        if only is not None and linear.name not in only:
            continue
        scale = np.float32(chosen[linear.input.name].scale)

        def node(op: str, *inputs: gs.Tensor | float, of: str = linear.name) -> gs.Variable:
            name = f"{of}/{len(copy.nodes)}"
            read = [
                item
                if isinstance(item, gs.Tensor)
                else gs.Constant(f"{name}/{i}", np.array(item, dtype=np.float32))
                for i, item in enumerate(inputs)
            ]
            output = gs.Variable(name, dtype=np.float32)
            copy.nodes.append(gs.Node(op, name, {}, read, [output]))
            return output

        clipped = node("Clip", node("Div", linear.input, scale), -448, 448)
        exponent = node("Floor", node("Div", node("Log", node("Abs", clipped)), np.log(2)))
        step = node("Pow", 2, node("Sub", node("Max", exponent, -6), 3))
        rounded = node("Mul", node("Round", node("Div", clipped, step)), step)
        peaks = np.abs(linear.weight).max(axis=0) / np.float32(448)
        weight = np.vectorize(nearest)(linear.weight / peaks).astype(np.float32) * peaks
        linear.matmul.inputs = [
            node("Mul", rounded, scale),
            gs.Constant(f"{linear.name}/rounded", weight),
        ]
    return copy.cleanup().toposort()


def optimized(graph: gs.Graph, images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """ONNX Runtime's optimisations without the one that takes a Relu before E4M3 for needless.

    ReluQuantRewrite of 1.32 drops a Relu before a QuantizeLinear whose zero point is the lowest
    number: for FP8, where negative numbers exist, it drops it too, and the result is wrong.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        gs.export_onnx(graph).SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["ReluQuantRewrite"],
    )
    outputs: list[NDArray[np.float32]] = session.run(None, {graph.inputs[0].name: images})
    return outputs


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_equal_simulated_float8(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = run(QuantizeFloat8(float8_scales(graph)), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(2)
    simulated = run_graph(simulate(graph, float8_scales(graph)), images)
    for found, wanted in zip(run_graph(result.graph, images), simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    fused = optimized(result.graph, images)
    for found, wanted in zip(fused, simulated, strict=True):
        # Other kernels may round a number to the other side of a tie, which moves a few others.
        assert np.abs(found - wanted).mean() < 0.02
    # Coarse, but the encoder it was: an error in the wiring is far larger than one of rounding.
    for found, truth in zip(fused, vit.reference(images), strict=True):
        assert np.abs(found - truth).mean() < 0.15


@pytest.mark.parametrize("name", SPELLINGS)
def test_edits_and_nothing_else(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    view = view_encoder(graph)
    result = run(QuantizeFloat8(float8_scales(graph)), graph)
    assert [edit.site for edit in result.log.edits] == [site.name for site in view.sites]
    assert {edit.what for edit in result.log.edits} == {"fp8 x fp8"}
    assert not result.log.skips
    assert result.graph.opset == graph.opset
    assert ops(result.graph) - ops(graph) == {
        "QuantizeLinear": len(view.sites),
        "DequantizeLinear": len(view.sites) + len(view.linears),
    }
    after = {node.name: node for node in result.graph.nodes}
    linears = {linear.matmul.name for linear in view.linears}
    for old in graph.nodes:
        node = after[old.name]
        assert (node.op, node.attrs) == (old.op, old.attrs)
        assert [item.name for item in node.outputs] == [item.name for item in old.outputs]
        if node.name not in linears:
            assert [item.name for item in node.inputs] == [item.name for item in old.inputs]


def test_types_and_scales_are_as_tensorrt_takes_them() -> None:
    """Activations per tensor, weights per output channel, zero points that only name the type."""
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    chosen = float8_scales(graph)
    result = run(QuantizeFloat8(chosen), graph).graph
    for site in view_encoder(graph).sites:
        (node,) = [n for n in result.nodes if n.name == f"{site.tensor.name}/q"]
        scale, zero = (item.values for item in node.inputs[1:])
        assert (scale.shape, scale.dtype) == ((), np.float32)
        assert scale == np.float32(chosen[site.tensor.name].scale)
        assert (zero.shape, zero.dtype, float(zero)) == ((), FLOAT8, 0.0)
    for linear in view_encoder(result).linears:
        node = linear.matmul.inputs[1].inputs[0]
        stored, scale, zero = (item.values for item in node.inputs)
        assert node.attrs == {"axis": 1}
        assert (stored.shape, stored.dtype) == (linear.weight_shape, FLOAT8)
        assert (scale.shape, scale.dtype) == (stored.shape[1:], np.float32)
        assert (zero.shape, zero.dtype) == (scale.shape, FLOAT8)
        assert np.abs(stored.astype(np.float32)).max(axis=0).tolist() == [448.0] * len(scale)


@pytest.mark.parametrize("form", ["packed", "saved"])
def test_the_view_reads_it_from_bytes_and_from_a_file(form: str, tmp_path: Path) -> None:
    vit = TinyVit(Spec(width=32, hidden=64))
    graph = canonical_graph(vit.model())
    result = run(QuantizeFloat8(float8_scales(graph)), graph).graph
    if form == "packed":
        again = unpack_graph(*pack_graph(result))
    else:
        save_graph(result, tmp_path / "model.onnx")
        again = import_graph(onnx.load(tmp_path / "model.onnx"))
    old, new = view_encoder(graph), view_encoder(again)
    assert all(linear.quantized for linear in new.linears)
    assert [site.name for site in new.sites] == [site.name for site in old.sites]
    assert [block.mlp.activation for block in new.blocks] == ["gelu"] * 2
    images = vit.images(1)
    for found, wanted in zip(run_graph(again, images), run_graph(result, images), strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_second_run_edits_nothing() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    step = QuantizeFloat8(float8_scales(graph))
    twice = run(step, run(step, graph).graph)
    assert not twice.changed
    assert {skip.reason for skip in twice.log.skips} == {"quantized already"}


def test_the_linears_not_named_stay_float() -> None:
    vit = TinyVit(Spec())
    graph = canonical_graph(vit.model())
    only = frozenset({"blocks.0.q", "blocks.0.v", "blocks.1.fc2"})
    result = run(QuantizeFloat8(float8_scales(graph), only), graph)
    quantized = {item.name for item in view_encoder(result.graph).linears if item.quantized}
    assert quantized == only
    assert {skip.reason for skip in result.log.skips} == {"not among those to quantize"}
    images = vit.images(2)
    simulated = run_graph(simulate(graph, float8_scales(graph), only), images)
    for found, wanted in zip(run_graph(result.graph, images), simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_float8_and_int8_mix() -> None:
    """Also where linears of both kinds read one tensor."""
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    names = {linear.name for linear in view_encoder(graph).linears}
    first = run(QuantizeFloat8(float8_scales(graph), frozenset({"blocks.0.q"})), graph).graph
    rest = frozenset(names - {"blocks.0.q"})
    integers = {
        name: Affine.from_range(*scale.range, "int8", symmetric=True)
        for name, scale in float8_scales(graph).items()
    }
    result = run(QuantizeLinears(integers, only=rest), first).graph
    onnx.checker.check_model(gs.export_onnx(result), full_check=True)
    assert all(linear.quantized for linear in view_encoder(result).linears)


def test_linears_that_share_a_weight_share_its_numbers() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    linears = view_encoder(graph).blocks[0].attention.projections
    linears[1].matmul.inputs[1] = linears[0].matmul.inputs[1]
    result = run(QuantizeFloat8(float8_scales(graph)), graph)
    weights = [linear.matmul.inputs[1] for linear in view_encoder(result.graph).linears]
    assert weights[0] is weights[1]
    assert ops(result.graph)["DequantizeLinear"] == 4 + 5


def test_a_site_without_a_scale_stays_float() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    chosen = float8_scales(graph)
    del chosen[view_encoder(graph).sites[3].tensor.name]
    result = run(QuantizeFloat8(chosen), graph)
    assert [(skip.site, skip.reason) for skip in result.log.skips] == [
        ("blocks.0.fc2", "no scale for its activation")
    ]
    quantized = [linear.quantized for linear in view_encoder(result.graph).linears]
    assert quantized == [True] * 5 + [False]


def test_refusals_are_one_line() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    chosen = float8_scales(graph)
    refused = {
        "quantize_float8: no tensor 'nowhere' in the graph": QuantizeFloat8({"nowhere": Float8(1)}),
        "quantize_float8: no linear 'blocks.1.q'": QuantizeFloat8(
            chosen, frozenset({"blocks.0.q", "blocks.1.q"})
        ),
    }
    for message, step in refused.items():
        with pytest.raises(InputError) as error:
            run(step, graph)
        assert str(error.value) == message
    old = import_graph(TinyVit(Spec(depth=1, opset=18, gelu="half_last")).model())
    with pytest.raises(InputError) as error:
        run(QuantizeFloat8({}), old)
    assert str(error.value) == "quantize_float8 needs opset 19 or later, the graph has 18"
