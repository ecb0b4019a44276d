"""FLOAT16 where nothing is quantized: types node by node, numbers, refusals, and real builds."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from support.attention_graphs import SPEC, prepared
from support.building import assert_builds, needs_tensorrt
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import attention_scales, linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.passes.affine import Affine
from regcache.passes.base import Result, run
from regcache.passes.check import check_and_infer
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float8 import Float8
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime.engine_layers import products_by_precision
from regcache.runtime.tensorrt_rtx import build_engine

FLOAT_OPS = {"LayerNormalization", "RMSNormalization", "Softmax"}
Array = NDArray[Any]
STEPS = [HalfPrecision(), HalfPrecision(float_stream=True)]


def parse(text: str, opset: int = 20) -> gs.Graph:
    """A graph from ONNX's text form, typed."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    graph = import_graph(onnx.parser.parse_model(f"{header} {text}"))
    check_and_infer(graph)
    for node in graph.nodes:
        node.name = node.outputs[0].name
    return graph


def run_half(graph: gs.Graph, values: Array) -> list[Array]:
    """The outputs of a graph with one input, every tensor stored in its own type.

    By onnx's evaluator: ONNX Runtime's CPU drops Casts to FLOAT16 that it would have to undo.
    """
    evaluator = ReferenceEvaluator(gs.export_onnx(graph))
    outputs = evaluator.run(None, {graph.inputs[0].name: values})
    return [np.asarray(item) for item in outputs]


def halved(graph: gs.Graph, step: HalfPrecision = STEPS[0]) -> Result:
    """The pass run and what holds for every graph: valid, nothing else changed, idle when rerun."""
    result = run(step, graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert_same_but_types(graph, result.graph)
    again = run(step, result.graph)
    assert not again.changed
    return result


def assert_same_but_types(before: gs.Graph, after: gs.Graph) -> None:
    """Without its Casts and with constants as FLOAT, the new graph is the old one."""
    casts = ops(after)["Cast"] - ops(before)["Cast"]
    assert len(after.nodes) - len(before.nodes) == casts
    old = {node.name: node for node in before.nodes}
    names = frozenset(old)
    for node in after.nodes:
        if node.op == "Cast" and node.name not in names:
            continue
        one = old.pop(node.name)
        assert (node.op, node.attrs, len(node.inputs)) == (one.op, one.attrs, len(one.inputs))
        for slot, wanted in enumerate(one.inputs):
            item = node.inputs[slot]
            while item.inputs and item.inputs[0].name not in names:  # a new Cast
                (item,) = item.inputs[0].inputs
            assert item.name.removesuffix("/float16") == wanted.name
            if isinstance(wanted, gs.Constant):
                half = wanted.dtype == np.float32 and item.dtype == np.float16
                assert half or item.dtype == wanted.dtype
                np.testing.assert_array_equal(item.values, wanted.values.astype(item.dtype))
    assert not old


def types(graph: gs.Graph, op: str) -> set[str]:
    """The types of all floats that the nodes of one op read and make."""
    return {
        np.dtype(item.dtype).name
        for node in graph.nodes
        if node.op == op
        for item in (*node.inputs, *node.outputs)
        if np.dtype(item.dtype).name.startswith("float")
    }


@pytest.mark.parametrize("step", STEPS, ids=["half stream", "float stream"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_are_those_of_the_encoder(name: str, step: HalfPrecision) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = halved(graph, step)
    images = vit.images(2)
    for found, truth in zip(run_half(result.graph, images), vit.reference(images), strict=True):
        assert found.dtype == np.float32
        # FLOAT16 rounds to 2 ** -11; a dozen roundings follow each other.
        assert 2e-4 < np.abs(found - truth).max() / np.abs(truth).max() < 4e-3


@pytest.mark.parametrize("name", SPELLINGS)
def test_only_norms_and_softmax_stay_float(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    result = halved(graph)
    for op in ops(result.graph).keys() - {"Cast", "Gather", "Identity", "Reshape"}:
        if any(node.op == op and node.outputs[0].dtype != np.int64 for node in result.graph.nodes):
            assert types(result.graph, op) == {"float32" if op in FLOAT_OPS else "float16"}, op
    assert [item.dtype for item in (*result.graph.inputs, *result.graph.outputs)] == [
        np.float32
    ] * 3
    edited = {edit.site for edit in result.log.edits}
    assert {edit.what for edit in result.log.edits} == {"FLOAT16"}
    assert edited.isdisjoint(skip.site for skip in result.log.skips)
    assert {skip.reason for skip in result.log.skips} <= {
        "a norm, softmax, power or sum",
        "moves FLOAT",
    }


def test_a_float_stream_is_cast_only_beside_the_stream() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    result = halved(graph, STEPS[1])
    for block in view_encoder(result.graph).blocks:
        for tensor in (block.input, block.middle, block.output):
            assert tensor.dtype == np.float32
            assert tensor.inputs[0].op == "Add"
        assert block.norm1.inputs[0] is block.input
        assert {linear.weight.dtype.name for linear in block.linears} == {"float16"}
    reasons = [skip.reason for skip in result.log.skips]
    assert reasons.count("on the residual stream") == 1 + 2 * 2


@pytest.mark.parametrize("step", STEPS, ids=["half stream", "float stream"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_quantized_numbers_and_integers(name: str, step: HalfPrecision) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    graph = run(QuantizeAttention(attention_scales(graph)), graph).graph
    graph = run(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    result = halved(graph, step).graph
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert types(result, op) == {"float16"}
    old = {name: item for name, item in graph.tensors().items() if item.dtype == np.int8}
    for name_, tensor in result.tensors().items():
        if isinstance(tensor, gs.Constant) and tensor.dtype == np.int8:
            np.testing.assert_array_equal(tensor.values, old.pop(name_).values)
    assert not any(isinstance(item, gs.Constant) for item in old.values())
    images = vit.images(8)
    found, wanted = run_half(result, images), run_graph(graph, images)
    for one, other in zip(found, wanted, strict=True):
        # A number on the other side of a tie moves by a step, and moves others.
        assert np.abs(one - other).mean() < 0.035
    truth = vit.reference(images)[1]
    assert np.abs(found[1] - truth).mean() < 1.15 * np.abs(wanted[1] - truth).mean()


def test_integers_and_what_they_stand_for_are_exact() -> None:
    """QuantizeLinear and DequantizeLinear in FLOAT16, against numpy."""
    graph = parse(
        """g (float[500] x) => (int8[500] q, float[500] y)
        <float s = {0.0371}, int8 z = {0}>
        { q = QuantizeLinear(x, s, z)
          y = DequantizeLinear(q, s, z) }"""
    )
    result = halved(graph).graph
    halves = np.random.default_rng(0).normal(0, 2, 500).astype(np.float16)
    integers, floats = run_graph(result, halves.astype(np.float32))
    scale = np.float16(0.0371)
    wanted = np.clip(np.rint(halves.astype(np.float32) / np.float32(scale)), -128, 127)
    np.testing.assert_array_equal(integers, wanted.astype(np.int8))
    np.testing.assert_array_equal(floats, (wanted.astype(np.float16) * scale).astype(np.float32))


def test_registers_and_deleted_sinks() -> None:
    """The choice of what to delete is made from the same norms, in the stream's own type."""
    vit = TinyVit(Spec())
    graph = canonical_graph(vit.model())
    deleted = run(DeleteSinks(1, 2), graph).graph
    images = vit.images(1)
    wanted = vit.reference(images, Registers(start=1, end=2, sinks=2))
    for step in STEPS:
        result = halved(deleted, step).graph
        assert types(result, "TopK") == {"float32" if step.float_stream else "float16"}
        for found, truth in zip(run_half(result, images), wanted, strict=True):
            assert np.abs(found - truth).max() <= 4e-3 * np.abs(truth).max()


def test_what_is_observed_beyond_half_stays_float() -> None:
    """Also behind a Reshape that nobody observed."""
    graph = parse(
        """g (float[4] x) => (float[4] y) <float k = {1000.0}, int64[1] to = {4}>
        { a = Mul(x, k)
          b = Mul(a, k)
          c = Reshape(b, to)
          d = Div(c, k)
          y = Div(d, k) }"""
    )
    x = np.array([1, 2, 3, 4], dtype=np.float32)
    with np.errstate(over="ignore"):
        assert np.isinf(run_half(halved(graph).graph, x)[0]).all()
    result = halved(graph, HalfPrecision({"b": (1e6, 4e6), "a": (-1000.0, 4000.0)}))
    assert [(skip.site, skip.reason) for skip in result.log.skips] == [
        ("b", "'b' is beyond FLOAT16"),
        ("c", "'b' is beyond FLOAT16"),
        ("d", "'c' is beyond FLOAT16"),
    ]
    np.testing.assert_allclose(run_half(result.graph, x)[0], x, rtol=2e-3)


PRODUCT = """g (float[3, 2] x) => (float[3, 2] y, float[3, 2] z)
    <float sx = {SX}, float[2] sw = {SW, 0.02}, int8 zx = {0}, int8[2] zw = {0, 0},
     int8[2, 2] w = {1, 2, -3, 127}, int8[2, 2] v = {7, -5, 100, 4}>
    { xq = QuantizeLinear(x, sx, zx)
      xd = DequantizeLinear(xq, sx, zx)
      wd = DequantizeLinear<axis = 1>(w, sw, zw)
      vd = DequantizeLinear<axis = 1>(v, sx, zx)
      y = MatMul(xd, wd)
      z = MatMul(xd, vd) }"""


@pytest.mark.parametrize(
    ("activation", "weight", "first", "reason"),
    [
        ("0.01", "0.000001", "wd", "its scale is below FLOAT16's normal numbers"),
        ("0.000001", "0.01", "xq", "its scale is below FLOAT16's normal numbers"),
        ("600.0", "0.01", "xq", "its integers stand for numbers beyond FLOAT16"),
    ],
)
def test_pairs_that_do_not_fit_stay_float_with_all_they_multiply(
    activation: str, weight: str, first: str, reason: str
) -> None:
    """TensorRT refuses a product of a FLOAT and a FLOAT16 scale."""
    graph = parse(PRODUCT.replace("SX", activation).replace("SW", weight))
    result = run(HalfPrecision(), graph)
    assert not result.changed
    skips = {skip.site: skip.reason for skip in result.log.skips}
    assert skips.keys() == {"xq", "xd", "wd", "vd", "y", "z"}
    assert skips[first] == reason
    assert skips["y"] == skips["z"] == "multiplies with FLOAT scales"
    fitting = halved(parse(PRODUCT.replace("SX", "0.01").replace("SW", "0.02")))
    assert len(fitting.log.edits) == 6
    assert not fitting.log.skips


def test_a_pair_whose_tensor_is_beyond_half_stays_float() -> None:
    graph = parse(PRODUCT.replace("SX", "0.01").replace("SW", "0.02"))
    for name in ("x", "xd"):
        result = run(HalfPrecision({name: (0.0, 1e5)}), graph)
        assert not result.changed
        assert len(result.log.skips) == 6


def test_small_scalars_and_powers_stay_float() -> None:
    """A decomposed RMS norm of numbers whose squares leave FLOAT16."""
    graph = parse(
        """g (float[2, 4] x) => (float[2, 4] y)
        <float two = {2.0}, int64[1] axes = {-1}, float eps = {0.000001}, float one = {1.0}>
        { h = Mul(x, one)
          p = Pow(h, two)
          m = ReduceMean(p, axes)
          e = Add(m, eps)
          r = Sqrt(e)
          y = Div(h, r) }"""
    )
    x = np.array([[1000, -2000, 3000, 4000], [0, 0, 0, 0]], dtype=np.float32)
    result = halved(graph)
    assert [skip.site for skip in result.log.skips] == ["p", "m", "e", "r"]
    assert result.log.skips[2].reason == "reads 1e-06"
    (found,) = run_half(result.graph, x)
    np.testing.assert_allclose(found, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6), rtol=2e-3)


def test_constants_beyond_half_are_refused_where_they_would_be_converted() -> None:
    text = "g (float[2] x) => (float[2] y) <float[2] k = {1.0, VALUE}> { y = OP(x, k) }"
    large = parse(text.replace("VALUE", "-70000.0").replace("OP", "Mul"))
    with pytest.raises(InputError, match=r"Mul 'y' reads the constant 'k', which holds 70000"):
        run(HalfPrecision(), large)
    assert not run(
        HalfPrecision(), parse(text.replace("VALUE", "7e4").replace("OP", "Pow"))
    ).changed
    most = halved(parse(text.replace("VALUE", "65504.0").replace("OP", "Mul"))).graph
    x = np.array([1, 0.5], dtype=np.float32)
    np.testing.assert_array_equal(run_half(most, x)[0], [1, 32752])


def test_a_mask_of_minus_infinity_is_kept() -> None:
    graph = parse("g (float[2] x) => (float[2] y) <float[2] k = {1.0, 1.0}> { y = Add(x, k) }")
    mask = gs.Constant("mask", np.array([0, -np.inf], dtype=np.float32))
    graph.nodes[0].inputs[1] = mask
    x = np.ones(2, dtype=np.float32)
    np.testing.assert_array_equal(run_half(halved(graph).graph, x)[0], [1, -np.inf])


def test_types_that_onnx_fixes_and_outputs_that_are_read() -> None:
    """Resize wants FLOAT scales; integers and Casts stay; an output has other readers."""
    graph = parse(
        """g (float[1, 1, 2, 2] x, int64[1] n)
           => (float[1, 1, 4, 4] y, float[1, 1, 4, 4] z, int64[1, 1, 4, 4] i)
        <float[4] s = {1.0, 1.0, 2.0, 2.0}, float k = {3.0}>
        { a = Mul(x, k)
          y = Resize<mode = "nearest">(a, , s)
          f = Cast<to = 1>(n)
          z = Add(y, f)
          i = Cast<to = 7>(z) }"""
    )
    result = halved(graph)
    resize = next(node for node in result.graph.nodes if node.op == "Resize")
    assert [resize.inputs[0].dtype, resize.inputs[2].dtype] == [np.float16, np.float32]
    assert [item.dtype for item in result.graph.outputs] == [np.float32, np.float32, np.int64]
    model = gs.export_onnx(result.graph)
    x = np.arange(4, dtype=np.float32).reshape(1, 1, 2, 2)
    y, z, i = ReferenceEvaluator(model).run(None, {"x": x, "n": np.array([5])})
    np.testing.assert_array_equal(y, 3 * x.repeat(2, axis=2).repeat(2, axis=3))
    np.testing.assert_array_equal(z, np.asarray(y) + 5)
    np.testing.assert_array_equal(i, z)


def test_ops_of_others_stay_float() -> None:
    graph = parse(
        """g (float[2] x) => (float[2] y) <float k = {2.0}>
        { a = Mul(x, k)
          b = Abs(a)
          y = Mul(b, k) }"""
    )
    graph.nodes[1].op, graph.nodes[1].domain = "QuickGelu", "com.microsoft"
    result = run(HalfPrecision(), graph)
    assert [(skip.site, skip.reason) for skip in result.log.skips] == [("b", "not an op of ONNX")]
    x = np.array([1, -1], dtype=np.float32)
    np.testing.assert_allclose(run_graph(result.graph, x)[0], run_graph(graph, x)[0], rtol=2e-3)


def test_refusals() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    with pytest.raises(InputError, match="no tensor 'nowhere' in the graph"):
        run(HalfPrecision({"nowhere": (0.0, 1.0)}), graph)
    text = "g (float[2] x) => (float[2] y) { y = Abs(x) }"
    with pytest.raises(InputError, match="needs opset 19, the graph has 18"):
        run(HalfPrecision(), parse(text, 18))
    with pytest.raises(InputError, match="no transformer block"):
        run(HalfPrecision(float_stream=True), parse(text))
    untyped = parse(text)
    untyped.nodes[0].outputs[0].dtype = None
    with pytest.raises(InputError, match="the type of 'y' is not known"):
        run(HalfPrecision(), untyped)
    branch = "{ y = If(c) <then_branch = t () => (float[2] a) { a = Abs(x) }, "
    branch += "else_branch = e () => (float[2] b) { b = Neg(x) }> }"
    with pytest.raises(InputError, match="If 'y' is control flow"):
        run(HalfPrecision(), parse(f"g (float[2] x, bool c) => (float[2] y) {branch}"))


@needs_tensorrt
@pytest.mark.parametrize("step", STEPS, ids=["half stream", "float stream"])
@pytest.mark.parametrize("name", ["plain", "sdpa", "attention operator"])
def test_tensorrt_fuses_attention(name: str, step: HalfPrecision) -> None:
    """Float encoders: projections, patches and the rest in FP16, attention in one kernel."""
    spec = Spec(**{**SPELLINGS[name].__dict__, "width": 128, "hidden": 256})
    built = assert_builds(run(step, canonical_graph(TinyVit(spec).model())).graph)
    fused = [layer.precision for layer in built.layers if layer.fused_attention]
    assert fused == ["FP16"] * spec.depth
    assert products_by_precision(built.layers).keys() == {"FP16"}


@needs_tensorrt
@pytest.mark.parametrize("shrink", ["weight", "activation"])
def test_tensorrt_takes_scales_too_small_for_half(shrink: str) -> None:
    """A channel, or all, that FLOAT16 scales would lose: still INT8 with fused attention."""
    graph = canonical_graph(TinyVit(SPEC).model())
    site = view_encoder(graph).sites[0]
    chosen = linear_scales(graph, "int8")
    if shrink == "activation":
        chosen[site.tensor.name] = Affine(1e-6, 0, "int8")
    else:
        weight = site.linears[0].weight.copy()
        weight[:, 3] *= 1e-4
        site.linears[0].matmul.inputs[1] = gs.Constant("small", weight)
    result = run(HalfPrecision(), run(QuantizeLinears(chosen), graph).graph)
    small = [skip for skip in result.log.skips if skip.reason.startswith("its scale is below")]
    assert len(small) == (2 if shrink == "activation" else 1)
    built = assert_builds(result.graph)
    assert products_by_precision(built.layers) == {"FP16": 3, "INT8": 8}
    assert sum(layer.fused_attention for layer in built.layers) == SPEC.depth


@needs_tensorrt
def test_float8_products_stay_float8(tmp_path: Path) -> None:
    """Also as built: FP8 linears, FP16 attention in one kernel."""
    graph = canonical_graph(TinyVit(SPEC).model())
    sites = view_encoder(graph).sites
    chosen = {site.tensor.name: Float8.from_range(-4.0, 5.0) for site in sites}
    result = halved(run(QuantizeFloat8(chosen), graph).graph)
    for op in ("QuantizeLinear", "DequantizeLinear"):
        assert types(result.graph, op) == {"float16", "float8_e4m3fn"}
    path = tmp_path / "model.onnx"
    save_graph(result.graph, path)
    built = build_engine(path, compute_capabilities=["8.9"])
    assert products_by_precision(built.layers) == {"FP16": 3, "FP8": 8}
    assert sum(layer.fused_attention for layer in built.layers) == SPEC.depth


@needs_tensorrt
def test_products_hand_on_half() -> None:
    """What FLOAT16 scales are for: INT8 products write FP16, not FP32."""
    built = assert_builds(prepared(SPEC, True, False, True, 0))
    written = {
        kind
        for layer in built.layers
        if layer.multiplies and layer.precision == "INT8"
        for kind in layer.outputs
    }
    assert "FP32" not in written
