"""Zero points moved to 0: the same integers and numbers, nothing else changed, and INT8 engines."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import zoo
from support.biases import drop_biases
from support.block_weights import block_weights
from support.building import assert_builds, int8_products, needs_tensorrt
from support.canonical import canonical_graph
from support.examples import examples
from support.quantized_graphs import FORMATS, assert_same_numbers, quantized, zero_points
from support.registers import FORMS, with_registers
from support.running import run_graph
from support.scales import image_scales, linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Result, run, run_all
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.pack_weights import PackWeights
from regcache.passes.patches_as_linear import PatchesAsLinear
from regcache.passes.qdq_nodes import insert_pair, insert_weight
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.quantize_patches import QuantizePatches
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.walk import is_constant

Floats = NDArray[np.float32]

SOME = ("plain", "fused qkv", "swiglu", "gemm, dynamic", "attention operator")


def apply(graph: gs.Graph) -> Result:
    """Run the pass, check the graph with onnx in full, and that the one given is untouched."""
    original = told(graph)
    result = run(SignedIntegers(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    names = [node.name for node in result.graph.nodes]
    assert len(set(names)) == len(names)
    again = run(SignedIntegers(), result.graph)
    assert not again.changed
    assert again.graph is result.graph
    return result


def one_linear(
    zero: NDArray[Any],
    scale: float,
    weight: gs.Variable | gs.Constant,
    graph: gs.Graph,
    *,
    limits: tuple[int, int] | None = None,
    biased: bool = True,
) -> None:
    """Finish a graph: x [B, K] -> Q/DQ `floats` -> MatMul -> perhaps a bias `y` [B, N]."""
    (x,) = graph.inputs
    floats = insert_pair(graph, x, "x", scale, zero, limits)
    floats.name, floats.shape = "floats", x.shape
    product = gs.Variable("product" if biased else "y", dtype=np.float32, shape=["B", 3])
    graph.nodes.append(gs.Node("MatMul", "linear", {}, [floats, weight], [product]))
    graph.outputs = [product]
    if biased:
        y = gs.Variable("y", dtype=np.float32, shape=["B", 3])
        bias = gs.Constant("bias", np.array([0.5, -1, 2], np.float32))
        graph.nodes.append(gs.Node("Add", "bias", {}, [product, bias], [y]))
        graph.outputs = [y]


def empty_graph() -> gs.Graph:
    """x [B, 4], and nothing yet."""
    x = gs.Variable("x", dtype=np.float32, shape=["B", 4])
    return gs.Graph(inputs=[x], opset=20, ir_version=10, name="one")


@examples(40)
@given(st.data())
def test_one_linear_by_a_formula_in_float64(data: st.DataObject) -> None:
    """With numbers anywhere but near the middle between two integers, also beyond the range."""
    draw = data.draw
    dtype = np.dtype(draw(st.sampled_from(["uint8", "int8"])))
    first = 0 if dtype == np.uint8 else -128
    low = first + draw(st.integers(0, 100))
    high = low + draw(st.integers(1, first + 255 - low))
    zero = draw(st.integers(low, high))
    scale = np.float32(draw(st.floats(1e-4, 100)))
    clips = (low, high) != (first, first + 255)
    random = np.random.default_rng(draw(st.integers(0, 999)))
    weight_dtype = np.dtype(draw(st.sampled_from(["uint8", "int8"])))
    middle = draw(st.integers(120, 136)) if weight_dtype == np.uint8 else draw(st.integers(-8, 8))
    signed = random.integers(-110, 111, (4, 3))
    steps = random.uniform(0.001, 0.1, 3).astype(np.float32)
    graph = empty_graph()
    weight = insert_weight(graph, "w", (signed + middle).astype(weight_dtype), steps, middle)
    biased = draw(st.booleans())
    limits = (low, high) if clips else None
    one_linear(np.array(zero, dtype), float(scale), weight, graph, limits=limits, biased=biased)
    if draw(st.booleans()):  # the weight behind the activation, in the order of nodes
        first_node = graph.nodes.pop(0)
        graph.nodes.insert([node.op for node in graph.nodes].index("MatMul"), first_node)

    offset = random.uniform(-0.4, 0.4, (8, 4))
    x = ((random.integers(-300, 301, (8, 4)) + offset) * scale).astype(np.float32)
    rounded = np.clip(np.rint(x.astype(np.float64) / scale) + zero, low, high)
    real = (rounded - zero) * np.float64(scale)
    wanted = real @ (signed * steps.astype(np.float64)) + biased * np.array([0.5, -1, 2])

    result = apply(graph).graph
    assert len(result.nodes) <= len(graph.nodes) + 2 - biased
    for one in (graph, result):
        atol = 1e-4 * float(scale) + 1e-5 * float(np.abs(wanted).max())
        np.testing.assert_allclose(run_graph(one, x)[0], wanted, rtol=1e-5, atol=atol)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_encoder_computes_the_same(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = quantized(canonical_graph(vit.model()))
    result = apply(graph)
    assert_same_numbers(graph, result.graph, vit.images(2))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SOME)
def test_every_format(name: str, kind: str) -> None:
    """The integers, too: each is the old one, or 128 less."""
    vit = TinyVit(SPELLINGS[name])
    graph = quantized(canonical_graph(vit.model()), kind)
    result = apply(graph)
    assert_same_numbers(graph, result.graph, vit.images(2))
    for zero in zero_points(result.graph):
        assert zero.dtype == np.int8
        assert not zero.any()
    # Behind its QuantizeLinear, a block's first activation is what it was.
    site = view_encoder(graph).sites[0].tensor
    old, new = (integers(one, site.name, vit.images(1)) for one in (graph, result.graph))
    assert old.dtype == np.uint8
    assert new.dtype == np.int8
    assert (old.astype(int) - 128 == new).mean() > 0.98
    assert np.abs(old.astype(int) - 128 - new).max() <= 1


def integers(graph: gs.Graph, dequantized: str, images: Floats) -> NDArray[Any]:
    """What a DequantizeLinear reads."""
    maker = next(node for node in graph.nodes if node.outputs[0].name == dequantized)
    return np.asarray(run_graph(run(Observe((maker.inputs[0].name,)), graph).graph, images)[-1])


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SOME)
def test_edits_and_nothing_else(name: str, kind: str) -> None:
    """One Add for each activation; weights less 128; and of the rest, biases alone."""
    graph = quantized(canonical_graph(TinyVit(SPELLINGS[name]).model()), kind)
    view = view_encoder(graph)
    result = apply(graph)
    unsigned = kind != "U8S8"
    changed = 2 * len(view.sites) + unsigned * len(view.linears)
    assert len(result.log.edits) == changed
    assert not result.log.skips
    assert ops(result.graph) - ops(graph) == Counter({"Add": len(view.sites)})
    assert not ops(graph) - ops(result.graph)
    by_name = {node.name: node for node in result.graph.nodes}
    biases = {linear.bias_add.name for linear in view.linears if linear.bias_add is not None}
    for old in graph.nodes:
        new = by_name.pop(old.name)
        assert (new.op, new.attrs) == (old.op, old.attrs)
        assert [t.name for t in new.outputs] == [t.name for t in old.outputs]
        for slot, (ours, theirs) in enumerate(zip(new.inputs, old.inputs, strict=True)):
            if not is_constant(theirs):
                moved = old.op == "QuantizeLinear"
                assert ours.name == (f"{old.outputs[0].name}/moved" if moved else theirs.name)
            elif theirs.dtype == np.uint8:
                gone = theirs.values  # a zero point
                if slot == 0 or old.op == "Clip":
                    gone = 128 if old.op == "Clip" else old.inputs[2].values
                np.testing.assert_array_equal(ours.values, theirs.values.astype(int) - gone)
            elif old.name not in biases:
                assert ours.name == theirs.name
                np.testing.assert_array_equal(ours.values, theirs.values)
    assert {node.op for node in by_name.values()} == {"Add"}


def test_equal_weights_stay_one() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    first, second = view_encoder(graph).linears[:2]
    second.matmul.inputs[1] = first.matmul.inputs[1]
    names = (first.matmul.name, second.matmul.name)
    signed = apply(quantized(graph, "U8U8")).graph
    weights = [node.inputs[1] for node in signed.nodes if node.name in names]
    assert len(weights) == 2
    assert weights[0] is weights[1]


@pytest.mark.parametrize("kind", ["U8S8", "U8U8"])
@pytest.mark.parametrize("form", FORMS)
def test_registers_and_deleted_sinks(form: str, kind: str) -> None:
    vit = TinyVit(Spec(width=32, hidden=64, grid=4))
    graph = quantized(with_registers(view_encoder(canonical_graph(vit.model())), form), kind)
    assert_same_numbers(graph, apply(graph).graph, vit.images(2))


def test_a_linear_without_a_bias_gets_one() -> None:
    vit = TinyVit(Spec())
    names = ("blocks.0.q", "blocks.1.fc2")
    graph = quantized(drop_biases(canonical_graph(vit.model()), *names))
    result = apply(graph)
    added = len(view_encoder(graph).sites) + len(names)
    assert ops(result.graph) - ops(graph) == Counter({"Add": added})
    assert_same_numbers(graph, result.graph, vit.images(2))


def test_products_of_activations_get_an_add_behind_the_pair() -> None:
    """Unsigned pairs around both matmuls of attention, as no target makes them."""
    vit = TinyVit(Spec(depth=1))
    graph = quantized(canonical_graph(vit.model()))
    view = view_encoder(graph)
    attention, pairs = view.blocks[0].attention, 0
    for node in (attention.scores, attention.context):
        for slot, tensor in enumerate(node.inputs):
            name = f"{node.name}/{slot}"
            node.inputs[slot] = insert_pair(graph, tensor, name, 0.05, np.array(100, np.uint8))
            pairs += 1
    graph.toposort()
    result = apply(graph)
    assert pairs == 4
    assert ops(result.graph) - ops(graph) == Counter({"Add": len(view.sites) + 2 * pairs})
    assert_same_numbers(graph, result.graph, vit.images(2))


@pytest.mark.parametrize("given_away", ["floats", "product"])
def test_what_else_reads_or_leaves_is_made_good(given_away: str) -> None:
    """The dequantized numbers, or the product before its bias, as a further output."""
    graph = empty_graph()
    weight = gs.Constant("w", np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32))
    one_linear(np.array(7, np.uint8), 0.25, weight, graph)
    graph.outputs.append(graph.tensors()[given_away])
    result = apply(graph).graph
    assert [output.name for output in result.outputs] == ["y", given_away]
    x = (np.array([[-9, 0, 3, 90]], np.float32) + np.float32(0.3)) * np.float32(0.25)
    for found, wanted in zip(run_graph(result, x), run_graph(graph, x), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_without_zero_points_as_inputs() -> None:
    """ONNX's default, uint8 with zero point 0."""
    graph = empty_graph()
    one_linear(np.array(0, np.uint8), 0.25, gs.Constant("w", np.eye(4, 3, dtype=np.float32)), graph)
    for node in graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            node.inputs = node.inputs[:2]
    result = apply(graph).graph
    x = np.array([[-1, 0.1, 3, 90]], np.float32)
    np.testing.assert_allclose(run_graph(result, x)[0], run_graph(graph, x)[0], atol=1e-5)


def test_zero_points_of_a_weight_by_column() -> None:
    graph = empty_graph()
    stored = np.random.default_rng(0).integers(100, 130, (4, 3)).astype(np.uint8)
    weight = insert_weight(graph, "w", stored, np.array([0.1, 0.2, 0.3], np.float32), 0)
    weight.inputs[0].inputs[2].values = np.array([3, 100, 130], np.uint8)
    one_linear(np.array(128, np.uint8), 0.25, weight, graph)
    result = apply(graph).graph
    x = np.array([[-1, 0.1, 3, 9]], np.float32)
    np.testing.assert_allclose(run_graph(result, x)[0], run_graph(graph, x)[0], rtol=1e-6)


def test_integers_that_two_weights_read_around_other_zero_points() -> None:
    graph = empty_graph()
    stored = np.random.default_rng(0).integers(100, 120, (4, 3)).astype(np.uint8)
    one, two = (
        insert_weight(graph, f"w{middle}", stored, np.array([1, 2, 3], np.float32), middle)
        for middle in (100, 110)
    )
    two.inputs[0].inputs[0] = one.inputs[0].inputs[0]
    both = gs.Variable("both", dtype=np.float32)
    graph.nodes.append(gs.Node("Sub", "both", {}, [one, two], [both]))
    one_linear(np.array(128, np.uint8), 0.25, both, graph)
    x = np.array([[-1, 0.1, 3, 9]], np.float32)
    found = run_graph(apply(graph).graph, x)[0]
    np.testing.assert_allclose(found, run_graph(graph, x)[0], rtol=1e-6)


def test_nothing_to_move() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    symmetric = run(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    packed = run(PackWeights(block_weights(graph)), graph).graph
    for one in (graph, symmetric, packed):
        before = told(one)
        result = run(SignedIntegers(), one)
        assert not result.changed
        assert result.graph is one
        assert told(one) == before


def refusals() -> dict[str, tuple[gs.Graph, str]]:
    """Graphs that cannot be rewritten, and what the pass says."""

    def graph(zero: Any = 7, stored: Any = None) -> gs.Graph:
        made, weight = empty_graph(), gs.Constant("w", np.ones((4, 3), np.float32))
        if stored is not None:
            weight = insert_weight(made, "w", stored, np.ones(3, np.float32), 0)
        one_linear(np.array(zero, np.uint8), 0.25, weight, made)
        return made

    def node(made: gs.Graph, op: str) -> gs.Node:
        return next(item for item in made.nodes if item.op == op)

    halves, given_away, foreign, unknown = graph(), graph(), graph(), graph()
    node(halves, "QuantizeLinear").inputs[1].values = np.array(0.25, np.float16)
    given_away.outputs.append(node(given_away, "QuantizeLinear").outputs[0])
    bytes_in = gs.Variable("bytes", dtype=np.uint8, shape=["B", 4])
    foreign.inputs.append(bytes_in)
    node(foreign, "DequantizeLinear").inputs[0] = bytes_in
    unknown.inputs.append(gs.Variable("scale", dtype=np.float32, shape=[]))
    node(unknown, "QuantizeLinear").inputs[1] = unknown.inputs[1]
    several = graph([7, 8, 9, 10])
    return {
        "beyond int8": (graph(stored=np.full((4, 3), 200, np.uint8)), "'w/dq': .* beyond int8"),
        "float16": (halves, "'x/q': its scale is float16"),
        "given away": (given_away, "'x/q': its integers are not for a DequantizeLinear alone"),
        "foreign": (foreign, "'x/dq': reads integers of no QuantizeLinear"),
        "unknown": (unknown, "'x/q': its scale is not constant"),
        "several": (several, "'x/q': has several scales"),
    }


@pytest.mark.parametrize("name", refusals())
def test_refusals(name: str) -> None:
    graph, reason = refusals()[name]
    with pytest.raises(InputError, match=f"^signed_integers: \\w+Linear {reason}"):
        run(SignedIntegers(), graph)


def patches_in_integers() -> tuple[TinyVit, gs.Graph]:
    """Images rounded, cut into patches as integers, and multiplied, as for ONNX Runtime."""
    vit = TinyVit(Spec(width=32, hidden=64, grid=4))
    graph = canonical_graph(vit.model())
    steps = (QuantizePatches(image_scales(graph)), PatchesAsLinear())
    return vit, run_all(steps, graph)[0]


def test_integers_that_are_moved_before_they_are_read() -> None:
    vit, graph = patches_in_integers()
    result = apply(graph).graph
    (quantize,) = (node for node in result.nodes if node.op == "QuantizeLinear")
    way = [quantize]
    while way[-1].op != "DequantizeLinear":
        assert way[-1].outputs[0].dtype == np.int8
        (following,) = way[-1].outputs[0].outputs
        way.append(following)
    assert [node.op for node in way[1:-1]] == ["Reshape", "Transpose", "Reshape"]
    images = vit.images(3)
    for found, wanted in zip(run_graph(result, images), run_graph(graph, images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)


def test_moved_integers_that_leave_the_graph_are_refused() -> None:
    _, graph = patches_in_integers()
    (turned,) = [n.outputs[0] for n in graph.nodes if n.name.endswith("/turned/Transpose")]
    graph.outputs.append(turned)
    with pytest.raises(InputError, match="its integers are not for a DequantizeLinear alone"):
        run(SignedIntegers(), graph)


@needs_tensorrt
def test_tensorrt_multiplies_moved_integers() -> None:
    assert int8_products(assert_builds(apply(patches_in_integers()[1]).graph)) == 1


@needs_tensorrt
@pytest.mark.parametrize(
    ("kind", "form"),
    [("U8S8", "none"), ("U8U8", "kv and delete"), ("U8S8", "token"), ("fewer bits", "none")],
)
def test_tensorrt_multiplies_integers(kind: str, form: str) -> None:
    """q, k and v as one product, out, fc1 and fc2: all that is quantized, in every block."""
    spec = Spec(width=32, hidden=64, grid=4)
    graph = canonical_graph(TinyVit(spec).model())
    graph = graph if form == "none" else with_registers(view_encoder(graph), form)
    built = assert_builds(apply(quantized(graph, kind)).graph)
    assert int8_products(built) == 4 * spec.depth


@needs_tensorrt
@pytest.mark.parametrize(
    "name",
    [p for p in zoo.family_params() if p.values[0] in ("openclip-b16", "siglip-b16", "dinov3-s16")],
)
def test_families_build(name: str, folder: Path) -> None:
    graph = zoo.canonical_family(name, folder)
    built = assert_builds(run(SignedIntegers(), quantized(graph, "U8U8")).graph)
    assert int8_products(built) == 4 * len(view_encoder(graph).blocks)
