"""RMS norms in the spellings of exporters: one node of opset 23, and the same numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import parser
from support.examples import examples
from support.running import run_feeds

from regcache.passes.base import Result, run
from regcache.passes.check import check_and_infer
from regcache.passes.errors import InputError
from regcache.passes.fuse_layer_norm import FuseLayerNorm
from regcache.passes.fuse_rms_norm import FuseRmsNorm
from regcache.passes.onnx_file import import_graph

WIDTH = 8
SCALE = np.linspace(0.5, 2, WIDTH).astype(np.float32)
BIAS = np.linspace(-1, 1, WIDTH).astype(np.float32)
EPSILON = 1e-3  # large enough to show


def graph_of(body: str, constants: Mapping[str, Any] | None = None, opset: int = 20) -> gs.Graph:
    """x [batch, 5, 8] -> y, by the lines of `body`; `w`, `eps` and small numbers are constants."""
    values = {
        "w": SCALE, "b": BIAS, "eps": np.float32(EPSILON), "one": np.float32(1),
        "two": np.float32(2), "width": np.float32(WIDTH), "minus_half": np.float32(-0.5),
        "half": np.float32(0.5), "minus_one": np.float32(-1),
        "last": np.array([-1]), "third": np.array([2]),
        "one_wide": np.array([-1, 5, 1]),
    } | dict(constants or {})  # fmt: skip
    text = (
        f'<ir_version: 8, opset_import: ["" : {opset}]>'
        f"g (float[batch, 5, {WIDTH}] x) => (float[batch, 5, {WIDTH}] y) {{ {body} }}"
    )
    model = parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(
        onnx.numpy_helper.from_array(np.asarray(value), name)
        for name, value in values.items()
        if name in used
    )
    graph = import_graph(model)
    check_and_infer(graph)
    return graph


def pictures(seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    return (random.standard_normal((2, 5, WIDTH)) * random.exponential(1, (2, 5, 1))).astype("f")


def reference(x: NDArray[Any], scale: Any = SCALE, epsilon: float = EPSILON) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale)


def fused(graph: gs.Graph, wanted: NDArray[Any], step: Any = None) -> Result:
    """Fuse, check with onnx, hold the numbers against the reference and the graph as it was."""
    result = run(step or FuseRmsNorm(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    x = pictures()
    for one in (graph, result.graph):
        np.testing.assert_allclose(run_feeds(one, {"x": x})[0], wanted, rtol=1e-4, atol=1e-5)
    assert not run(step or FuseRmsNorm(), result.graph).changed
    return result


MEAN = "s = Pow(x, two) m = ReduceMean(s, last) e = Add(m, eps)"
SPELLINGS = {
    "reciprocal": f"{MEAN} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(n, w)",
    "weight first": f"{MEAN} r = Sqrt(e) i = Reciprocal(r) n = Mul(x, i) y = Mul(w, n)",
    "division": f"{MEAN} r = Sqrt(e) n = Div(x, r) y = Mul(n, w)",
    "one over": f"{MEAN} r = Sqrt(e) i = Div(one, r) n = Mul(i, x) y = Mul(n, w)",
    "power": f"{MEAN} i = Pow(e, minus_half) n = Mul(x, i) y = Mul(n, w)",
    "two powers": f"{MEAN} r = Pow(e, half) i = Pow(r, minus_one) n = Mul(x, i) y = Mul(n, w)",
    "square": """s = Mul(x, x) m = ReduceMean(s, third) e = Add(eps, m) r = Sqrt(e)
        n = Div(x, r) y = Mul(n, w)""",
    "sum": """s = Mul(x, x) t = ReduceSum(s, last) m = Div(t, width) e = Add(m, eps) r = Sqrt(e)
        n = Div(x, r) y = Mul(n, w)""",
    "sum of squares": """t = ReduceSumSquare(x, last) m = Div(t, width) e = Add(m, eps)
        r = Sqrt(e) n = Div(x, r) y = Mul(n, w)""",
    "weights on the root": f"{MEAN} r = Sqrt(e) i = Reciprocal(r) g = Mul(i, w) y = Mul(x, g)",
    "weights on the input": f"{MEAN} r = Sqrt(e) g = Mul(x, w) y = Div(g, r)",
    "casts": """f = Cast<to = 1>(x) s = Pow(f, two) m = ReduceMean(s, last) e = Add(m, eps)
        r = Sqrt(e) i = Reciprocal(r) n = Mul(f, i) h = Cast<to = 1>(n) y = Mul(w, h)""",
    "an axis lost and found": """s = Mul(x, x) m = ReduceMean<keepdims = 0>(s, last)
        u = Unsqueeze(m, last) e = Add(u, eps) r = Sqrt(e) n = Div(x, r) y = Mul(n, w)""",
    "cast twice": """f = Cast<to = 1>(x) s = Pow(f, two) m = ReduceMean(s, last) e = Add(m, eps)
        r = Sqrt(e) i = Reciprocal(r) g = Cast<to = 1>(x) n = Mul(g, i) y = Mul(w, n)""",
}  # fmt: skip


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_becomes_one_node(name: str) -> None:
    result = fused(graph_of(SPELLINGS[name]), reference(pictures()))
    (node,) = [node for node in result.graph.nodes if node.op != "Cast"]
    assert (node.op, result.graph.opset) == ("RMSNormalization", 23)
    np.testing.assert_allclose(node.attrs["epsilon"], EPSILON, rtol=1e-5)
    np.testing.assert_allclose(node.inputs[1].values, SCALE, rtol=1e-6)
    assert len(result.log.edits) == 1


def test_lower_opsets_are_refused() -> None:
    body = SPELLINGS["reciprocal"].replace("ReduceMean(s, last)", "ReduceMean<axes = [-1]>(s)")
    with pytest.raises(InputError, match="needs opset 20, the graph has 17"):
        run(FuseRmsNorm(), graph_of(body, opset=17))


def test_weights_in_other_forms() -> None:
    x, body = pictures(), SPELLINGS["reciprocal"]
    wide = graph_of(body, {"w": SCALE.reshape(1, 1, WIDTH)})
    assert fused(wide, reference(x)).graph.nodes[0].inputs[1].values.shape == (WIDTH,)
    bare = graph_of(body.replace("n = Mul(x, i) y = Mul(n, w)", "y = Mul(x, i)"))
    assert fused(bare, reference(x, 1)).graph.nodes[0].inputs[1].values.tolist() == [1] * WIDTH
    twice = graph_of(body.replace("y = Mul(n, w)", "p = Mul(n, w) q = Mul(two, p) y = Mul(q, w)"))
    assert len(fused(twice, reference(x, 2 * SCALE**2)).graph.nodes) == 1
    # A number for all channels behind the weights is something else: the scale of scores, perhaps.
    scaled = graph_of(body.replace("y = Mul(n, w)", "p = Mul(n, w) y = Mul(p, two)"))
    assert [node.op for node in fused(scaled, reference(x, 2 * SCALE)).graph.nodes] == [
        "RMSNormalization",
        "Mul",
    ]


def test_an_l2_norm_with_weights() -> None:
    """x / max(||x||, epsilon) * sqrt(width) * weights, and a small epsilon outside the root."""
    clipped = (
        """l = ReduceL2(x, last) c = Clip(l, low) n = Div(x, c) p = Mul(n, root) y = Mul(p, w)"""
    )
    numbers = {"low": np.float32(1e-12), "root": np.float32(WIDTH**0.5)}
    result = fused(graph_of(clipped, numbers), reference(pictures(), epsilon=0))
    assert [node.op for node in result.graph.nodes] == ["RMSNormalization"]
    outside = """l = ReduceL2(x, last) m = Mul(l, root) e = Add(m, eps) n = Div(x, e)
        y = Mul(n, w)"""
    numbers = {"eps": np.float32(1e-7), "root": np.float32(WIDTH**-0.5)}
    result = fused(graph_of(outside, numbers), reference(pictures(), epsilon=0))
    np.testing.assert_allclose(result.graph.nodes[0].attrs["epsilon"], 1e-14, rtol=1e-3)
    # As small as that: a larger one outside the root is no epsilon inside it.
    assert not run(FuseRmsNorm(), graph_of(outside, (numbers | {"eps": np.float32(1e-3)}))).changed


UNFIT = {
    "an embedding that is normalised": "l = ReduceL2(x, last) y = Div(x, l)",
    "a cube": "s = Pow(x, three) m = ReduceMean(s, last) r = Sqrt(m) y = Div(x, r)",
    "another axis": SPELLINGS["division"].replace("last", "second"),
    "another numerator": SPELLINGS["division"].replace("Div(x, r)", "Div(s, r)"),
    "a mean of other tokens": """s = Mul(x, x) m = ReduceMean<keepdims = 0>(s, last)
        t = Transpose(m) u = Reshape(t, one_wide) e = Add(u, eps) r = Sqrt(e) n = Div(x, r)
        y = Mul(n, w)""",
    "no root": f"{MEAN} n = Div(x, e) y = Mul(n, w)",
    "a root of the root": f"{MEAN} r = Sqrt(e) q = Sqrt(r) n = Div(x, q) y = Mul(n, w)",
    "the root divided": f"{MEAN} r = Sqrt(e) n = Div(r, x) y = Mul(n, w)",
    "a layer norm": """a = ReduceMean(x, last) c = Sub(x, a) s = Pow(c, two)
        m = ReduceMean(s, last) e = Add(m, eps) r = Sqrt(e) n = Div(c, r) y = Mul(n, w)""",
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_no_rms_norm_is_left_alone(name: str) -> None:
    constants = {"three": np.float32(3), "second": np.array([1])}
    graph = graph_of(UNFIT[name], constants)
    result = run(FuseRmsNorm(), graph)
    assert not result.changed
    assert result.graph.opset == 20


def test_a_result_that_is_read_elsewhere_stays() -> None:
    body = SPELLINGS["reciprocal"].replace("y = Mul(n, w)", "p = Mul(n, w) y = Add(p, n)")
    wanted = reference(pictures(), 1 + SCALE)
    result = fused(graph_of(body), wanted)
    assert [node.op for node in result.graph.nodes] == ["RMSNormalization", "Mul", "Add"]


CENTRED = "a = ReduceMean(x, last) c = Sub(x, a) s = Mul(c, c) m = ReduceMean(s, last)"
LAYER_NORMS = {
    "reciprocal": f"{CENTRED} e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r) n = Mul(c, i)",
    "power": f"{CENTRED} e = Add(m, eps) i = Pow(e, minus_half) n = Mul(c, i)",
    "mean twice": f"""{CENTRED} e = Add(m, eps) r = Sqrt(e) h = ReduceMean(x, last) d = Sub(x, h)
        n = Div(d, r)""",
    "variance without its axis": """a = ReduceMean(x, last) c = Sub(x, a) s = Mul(c, c)
        v = ReduceMean<keepdims = 0>(s, last) m = Reshape(v, one_wide)
        h = ReduceMean(x, third) d = Sub(x, h) e = Add(m, eps) r = Sqrt(e) n = Div(d, r)""",
    "casts": """f = Cast<to = 1>(x) a = ReduceMean(f, last) c = Sub(f, a) s = Mul(c, c)
        m = ReduceMean(s, last) e = Add(m, eps) r = Sqrt(e) n = Div(c, r)""",
}


@pytest.mark.parametrize("name", LAYER_NORMS)
def test_layer_norms_in_the_same_spellings(name: str) -> None:
    graph = graph_of(f"{LAYER_NORMS[name]} p = Mul(n, w) y = Add(p, b)")
    x = pictures().astype(np.float64)
    wanted = reference(x - x.mean(-1, keepdims=True)) + BIAS
    result = fused(graph, wanted, FuseLayerNorm())
    assert [node.op for node in result.graph.nodes if node.op != "Cast"] == ["LayerNormalization"]
    assert result.graph.opset == 20


@pytest.mark.parametrize("scale", [" g = Mul(i, w)", " g = Mul(w, i)", ""])
def test_layer_norms_of_tensorflow(scale: str) -> None:
    """x g + (bias - mean g), as a batch norm of the moments is written."""
    body = f"""{CENTRED} e = Add(m, eps) r = Sqrt(e) i = Reciprocal(r){scale or " g = Identity(i)"}
        p = Mul(x, g) q = Mul(a, g) d = Sub(b, q) y = Add(p, d)"""
    body = body if scale else body.replace(" g = Identity(i)", "").replace(" g)", " i)")
    x = pictures().astype(np.float64)
    wanted = reference(x - x.mean(-1, keepdims=True), SCALE if scale else 1) + BIAS
    result = fused(graph_of(body), wanted, FuseLayerNorm())
    assert [node.op for node in result.graph.nodes] == ["LayerNormalization"]
    other = graph_of(body.replace("Mul(a, ", "Mul(e, "))
    assert not run(FuseLayerNorm(), other).changed


@given(st.floats(1e-12, 1e-2), st.sampled_from(sorted(SPELLINGS)), st.integers(0, 5))
@examples(30)
def test_any_epsilon(epsilon: float, name: str, seed: int) -> None:
    graph = graph_of(SPELLINGS[name], {"eps": np.float32(epsilon)})
    result = run(FuseRmsNorm(), graph)
    assert len(result.log.edits) == 1
    x = pictures(seed)
    found = run_feeds(result.graph, {"x": x})[0]
    np.testing.assert_allclose(found, reference(x, epsilon=epsilon), rtol=1e-4, atol=1e-5)
