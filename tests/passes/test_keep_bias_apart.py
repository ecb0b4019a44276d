"""Biases kept apart: integer kernels where shapes are fixed, the same bits, nothing else new."""

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit, with_batch
from support.untouched import told

from regcache.passes.base import Result, run
from regcache.passes.check import check_and_infer
from regcache.passes.find_blocks import view_encoder
from regcache.passes.keep_bias_apart import KeepBiasApart
from regcache.passes.qdq_nodes import insert_pair, insert_weight
from regcache.passes.signed_integers import SignedIntegers
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.walk import is_constant
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops

ROWS, COLUMNS = 5, 3


def fixed(vit: TinyVit, batch: int) -> gs.Graph:
    """The canonical graph of an export that fixed the batch."""
    return canonical_graph(with_batch(vit.model(), batch))


def apply(graph: gs.Graph) -> Result:
    """Run the pass, check the graph with onnx in full, and that the one given is untouched."""
    original = told(graph)
    result = run(KeepBiasApart(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    assert not run(KeepBiasApart(), result.graph).changed
    return result


def kernels(graph: gs.Graph) -> int:
    """How many products ONNX Runtime computes in integers."""
    return integer_matmuls(optimised_ops(gs.export_onnx(graph).SerializeToString(), threads=1))


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "U8S8") for name in SPELLINGS), ("plain", "U8U8")]
)
def test_every_linear_of_a_fixed_batch_is_an_integer_kernel(name: str, kind: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = quantized(fixed(vit, 2), kind)
    linears = view_encoder(graph).linears
    result = apply(graph)
    assert kernels(graph) == 0
    assert kernels(result.graph) == len(linears) == len(result.log.edits)
    assert not result.log.skips
    images = vit.images(2)
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, graph)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    biased = [linear.bias_add is not None for linear in view_encoder(result.graph).linears]
    assert biased == [linear.bias_add is not None for linear in linears]


@pytest.mark.parametrize("name", ["plain", "gemm, dynamic", "merged heads"])
def test_a_free_batch_is_left_alone(name: str) -> None:
    graph = quantized(canonical_graph(TinyVit(SPELLINGS[name]).model()))
    result = apply(graph)
    assert result.graph is graph
    assert kernels(graph) == len(view_encoder(graph).linears)


def test_float_linears_are_left_alone() -> None:
    graph = fixed(TinyVit(Spec()), 1)
    assert apply(graph).graph is graph


def test_only_the_biases_change() -> None:
    graph = quantized(fixed(TinyVit(Spec()), 1))
    result = apply(graph).graph
    assert ops(result) == ops(graph)
    widened = 0
    for ours, theirs in zip(result.nodes, graph.nodes, strict=True):
        assert (ours.name, ours.op, ours.attrs) == (theirs.name, theirs.op, theirs.attrs)
        for new, old in zip(ours.inputs, theirs.inputs, strict=True):
            if not is_constant(old):
                assert new.name == old.name
                continue
            np.testing.assert_array_equal(new.values.ravel(), old.values.ravel())
            if new.values.shape != old.values.shape:
                assert (theirs.op, new.values.shape) == ("Add", (1, 1, *old.values.shape))
                widened += 1
    assert widened == len(view_encoder(graph).linears)


def flat_linear(rows: int | str, added: NDArray[Any] | None) -> gs.Graph:
    """x [M, K] through a quantized linear [M, N]; without a constant, a second input is added."""
    x = gs.Variable("x", np.float32, [rows, 4])
    graph = gs.Graph(inputs=[x], opset=20, ir_version=10, name="flat")
    integers = np.random.default_rng(0).integers(-127, 128, (4, COLUMNS)).astype(np.int8)
    weight = insert_weight(graph, "w", integers, np.full(COLUMNS, 0.01, np.float32), 0)
    floats = insert_pair(graph, x, "x", 0.05, np.array(117, np.uint8))
    product = gs.Variable("product", np.float32)
    output = gs.Variable("y", np.float32, [rows, COLUMNS])
    bias: gs.Tensor = gs.Variable("x2", np.float32, [rows, COLUMNS])
    if added is None:
        graph.inputs.append(bias)
    else:
        bias = gs.Constant("bias", added)
    graph.nodes.append(gs.Node("MatMul", "linear", {}, [floats, weight], [product]))
    graph.nodes.append(gs.Node("Add", "add", {}, [bias, product], [output]))
    graph.outputs = [output]
    return graph.toposort()


def shaped(graph: gs.Graph) -> gs.Graph:
    """The graph with the shapes that onnx infers."""
    check_and_infer(graph)
    return graph


def outputs_of(graph: gs.Graph, rows: int) -> NDArray[Any]:
    """y, as ONNX Runtime computes it when it has optimised the graph."""
    random = np.random.default_rng(1)
    session = ort.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    widths = {"x": 4, "x2": COLUMNS}
    feed = {
        item.name: random.standard_normal((rows, widths[item.name])).astype(np.float32)
        for item in session.get_inputs()
    }
    (found,) = session.run(None, feed)
    return np.asarray(found)


VECTORS: list[tuple[int, ...] | None] = [(COLUMNS,), (1, COLUMNS), None]
MATRICES: list[tuple[int, ...] | None] = [(ROWS, COLUMNS), (ROWS, 1)]


@pytest.mark.parametrize(
    ("rows", "shape"),
    [*((ROWS, shape) for shape in (*VECTORS, *MATRICES)), *(("rows", shape) for shape in VECTORS)],
    ids=str,
)
def test_two_dimensions(rows: int | str, shape: tuple[int, ...] | None) -> None:
    """[N], [1, N], [M, N] and [M, 1], and what the graph computes (None)."""
    random = np.random.default_rng(2)
    added = None if shape is None else random.standard_normal(shape).astype(np.float32)
    graph = shaped(flat_linear(rows, added))
    result = apply(graph)
    assert (kernels(graph), kernels(result.graph)) == (0, 1)
    wide = Counter({"Squeeze": 1}) + Counter({"Unsqueeze": int(shape is None)})
    assert ops(result.graph) - ops(graph) == wide
    (output,) = result.graph.outputs
    assert (output.name, output.shape) == ("y", [rows, COLUMNS])
    # The same integers; ONNX Runtime's float Gemm adds up in another order.
    np.testing.assert_allclose(outputs_of(result.graph, ROWS), outputs_of(graph, ROWS), atol=1e-5)


@pytest.mark.parametrize("form", ["read twice", "an output", "a number for all", "not quantized"])
def test_what_onnx_runtime_does_not_merge(form: str) -> None:
    graph = flat_linear(ROWS, np.ones(COLUMNS, np.float32))
    (matmul,) = (node for node in graph.nodes if node.op == "MatMul")
    (add,) = (node for node in graph.nodes if node.op == "Add")
    (product,) = matmul.outputs
    if form == "an output":
        product.shape = [ROWS, COLUMNS]
        graph.outputs.append(product)
    elif form == "read twice":
        add.inputs = [product, product]
    elif form == "a number for all":
        add.inputs[0] = gs.Constant("one", np.array(1, np.float32))
    else:
        matmul.inputs[1] = gs.Constant("float", np.ones((4, COLUMNS), np.float32))
    graph = shaped(graph.cleanup().toposort())
    assert apply(graph).graph is graph
    assert kernels(graph) == (form != "not quantized")


def test_passes_for_tensorrt_read_what_is_left() -> None:
    """A fixed batch, compiled for ONNX Runtime: projections split, zero points moved to 0."""
    vit = TinyVit(Spec(qkv="fused"))
    kept = apply(quantized(fixed(vit, 2))).graph
    split = run(SplitQkv(), kept)
    assert [edit.site for edit in split.log.edits] == ["blocks.0.qkv", "blocks.1.qkv"]
    signed = run(SignedIntegers(), split.graph).graph
    # The zero points of the pairs go into the biases that are there.
    assert ops(signed)["Add"] == ops(split.graph)["Add"] + len(view_encoder(kept).sites)
    images = vit.images(2)
    pair = (run_graph(one, images) for one in (signed, kept))
    for found, wanted in zip(*pair, strict=True):
        np.testing.assert_allclose(found, wanted, atol=0.05)
