"""What HalfPrecision keeps in FLOAT, and what it refuses."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from onnx.reference import ReferenceEvaluator
from support.canonical import canonical_graph
from support.halving import halved, parse, run_half
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.half_precision import HalfPrecision


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
