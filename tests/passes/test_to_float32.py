"""Half and double precision become FP32: weights, casts, types that nodes name, inputs, outputs."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.examples import examples
from support.running import run_graph
from support.small_models import Draft, with_shapes
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.onnx_file import import_graph
from regcache.passes.to_float32 import ToFloat32, type_number
from regcache.passes.walk import is_constant

KINDS: dict[str, tuple[int, Any]] = {
    "half": (TensorProto.FLOAT16, np.float16),
    "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "double": (TensorProto.DOUBLE, np.float64),
}
RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.standard_normal((2, 3, 4, 4)).astype(np.float32)
WEIGHT = RANDOM.standard_normal((48, 5))


def only_float32(graph: gs.Graph) -> bool:
    types = {np.dtype(item.dtype).name for item in graph.tensors().values() if item.dtype}
    return not types & {"float16", "bfloat16", "float64"}


def linear(kind: int, dtype: Any) -> onnx.ModelProto:
    """Input, weight, result, a Cast there and back, and a tensor made by its type's number."""
    draft = Draft()
    rows = draft.node("Flatten", "image")
    product = draft.node("MatMul", rows, draft.weight(WEIGHT.astype(dtype)))
    single = draft.node("Cast", product, to=TensorProto.FLOAT)
    back = draft.node("Cast", single, to=kind)
    eye = draft.node("EyeLike", single, dtype=kind)
    shape = draft.weight(np.array([2, 5]))
    ones = draft.node("ConstantOfShape", shape, value=numpy_helper.from_array(np.ones(1, dtype)))
    shown = draft.node("Constant", value=numpy_helper.from_array(np.full(5, 0.5, dtype)))
    total = draft.node("Add", draft.node("Sub", back, eye), draft.node("Mul", ones, shown))
    return draft.model({"image": [2, 3, 4, 4]}, [total], dtype=kind, output_dtype=kind)


@pytest.mark.parametrize("name", KINDS)
def test_everything_is_turned(name: str) -> None:
    kind, dtype = KINDS[name]
    graph = import_graph(linear(kind, dtype))  # not even a valid one: no EyeLike of BF16
    result = run(ToFloat32(), graph)
    assert result.changed
    assert only_float32(result.graph)
    assert sorted(ops(result.graph)) == sorted(ops(graph))
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert not run(ToFloat32(), result.graph).changed
    stored = WEIGHT.astype(dtype).astype(np.float64)
    wanted = IMAGE.reshape(2, 48) @ stored - np.eye(2, 5) + 0.5
    (found,) = run_graph(result.graph, IMAGE)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_integers_truths_and_float32_stay() -> None:
    """Also the number of a type of integers; the graph comes back itself."""
    draft = Draft()
    positive = draft.node("Greater", "image", draft.weight(np.zeros(1, np.float32)))
    counted = draft.node("Cast", positive, to=TensorProto.INT64)
    total = draft.node("Add", counted, draft.weight(np.array([3])))
    graph = with_shapes(
        draft.model({"image": ["n", 3, 4, 4]}, [total], output_dtype=TensorProto.INT64)
    )
    result = run(ToFloat32(), graph)
    assert result.graph is graph
    assert not result.log.edits


def test_the_weights_of_an_encoder_are_the_nearest() -> None:
    """Every stored number is kept as it is; the original's arrays are left alone."""
    vit = TinyVit(Spec())
    halved = {name: values.astype(np.float16) for name, values in vit.weights.items()}
    model = vit.model()
    for tensor in model.graph.initializer:
        if tensor.name in halved:
            tensor.CopyFrom(numpy_helper.from_array(halved[tensor.name], tensor.name))
    graph = import_graph(model)
    after = graph.copy()
    ToFloat32().rewrite(after)
    assert ops(after) == ops(graph)
    for tensor in after.tensors().values():
        if is_constant(tensor) and tensor.name in halved:
            assert tensor.dtype == np.float32
            np.testing.assert_array_equal(tensor.values, halved[tensor.name])
    for tensor in graph.tensors().values():
        if is_constant(tensor) and tensor.name in halved:
            assert tensor.dtype == np.float16
    rounded = TinyVit(Spec())
    rounded.weights = {name: item.astype(np.float32) for name, item in halved.items()}
    images = vit.images(2)
    for found, wanted in zip(run_graph(after, images), rounded.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def ops(graph: gs.Graph) -> list[str]:
    return [node.op for node in graph.nodes]


@examples(40)
@given(values=hnp.arrays(np.uint16, 8), name=st.sampled_from(["half", "bfloat16"]))
def test_any_half_number(values: NDArray[np.uint16], name: str) -> None:
    stored = values.view(KINDS[name][1])
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, [8])])
    y = gs.Variable("y", np.float32)
    graph.nodes.append(gs.Node("Add", "add", {}, [graph.inputs[0], gs.Constant("w", stored)], [y]))
    graph.outputs = [y]
    ToFloat32().rewrite(graph)
    found = graph.nodes[0].inputs[1].values
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, stored.astype(np.float64).astype(np.float32))


def test_doubles_beyond_float32_are_infinite_without_a_warning() -> None:
    graph = gs.Graph(inputs=[gs.Variable("x", np.float32, [1])])
    large = gs.Constant("w", np.array([1e300, -1e300, 0.1]))
    graph.nodes.append(gs.Node("Add", "add", {}, [graph.inputs[0], large], [gs.Variable("y")]))
    with np.errstate(all="raise"):
        ToFloat32().rewrite(graph)
    np.testing.assert_array_equal(
        graph.nodes[0].inputs[1].values, np.array([np.inf, -np.inf, 0.1], np.float32)
    )


def branches() -> onnx.ModelProto:
    """Half constants outside that branches read, and inside; types and results inside too."""
    half = TensorProto.FLOAT16
    scale = numpy_helper.from_array(np.array(0.25, np.float16), "scale")
    then = helper.make_graph(
        [
            helper.make_node("Mul", ["shared", "scale"], ["product"]),
            helper.make_node("Cast", ["image"], ["halved"], to=half),
            helper.make_node("Add", ["halved", "product"], ["sum"]),
        ],
        "then",
        [],
        [helper.make_tensor_value_info("sum", half, None)],
        [scale],
    )
    other = helper.make_graph(
        [helper.make_node("Cast", ["image"], ["cast"], to=half)],
        "else",
        [],
        [helper.make_tensor_value_info("cast", half, None)],
    )
    draft = Draft()
    draft.weight(np.array(2, np.float16), "shared")
    mean = draft.node("ReduceMean", "image", keepdims=0)
    positive = draft.node("Greater", mean, draft.weight(np.array(0, np.float32)))
    chosen = draft.node("If", positive, then_branch=then, else_branch=other)
    return draft.model(
        {"image": [2, 3, 4, 4]}, [draft.node("Mul", chosen, "shared")], output_dtype=half
    )


def test_subgraphs_are_turned_too() -> None:
    graph = with_shapes(branches())
    result = run(ToFloat32(), graph)
    for node in result.graph.nodes:
        for inner in node.attrs.values():
            if isinstance(inner, gs.Graph):
                assert only_float32(inner)
                assert all(step.attrs["to"] == 1 for step in inner.nodes if step.op == "Cast")
    assert only_float32(result.graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    for image in (np.abs(IMAGE), -np.abs(IMAGE)):
        session = ort.InferenceSession(branches().SerializeToString())
        (wanted,) = session.run(None, {"image": image})
        (found,) = run_graph(result.graph, image)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=5e-3, atol=5e-3)
    assert not run(ToFloat32(), result.graph).changed


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("LayerNormalization", {"stash_type": TensorProto.BFLOAT16}),
        (
            "Attention",
            {"softmax_precision": TensorProto.FLOAT16, "q_num_heads": 1, "kv_num_heads": 1},
        ),
    ],
)
def test_the_precision_inside_an_operator(op: str, attributes: dict[str, int]) -> None:
    draft = Draft()
    x = draft.node("Reshape", "image", draft.weight(np.array([2, 4, 12])))
    inputs = [x] * 3 if op == "Attention" else [x, draft.weight(np.ones(12, np.float32))]
    y = draft.node(op, *inputs, **attributes)  # type: ignore[arg-type]
    graph = with_shapes(draft.model({"image": [2, 3, 4, 4]}, [y], opset=23))
    result = run(ToFloat32(), graph)
    key = next(iter(attributes))
    assert result.graph.nodes[-1].attrs[key] == TensorProto.FLOAT
    assert graph.nodes[-1].attrs[key] == attributes[key]


def test_dead_nodes_are_no_reason_to_fail() -> None:
    """The clean-up after the pass takes them out."""
    draft = Draft()
    draft.node("Neg", "image")
    halved = draft.node("Cast", "image", to=TensorProto.FLOAT16)
    model = draft.model({"image": [1]}, [halved], output_dtype=TensorProto.FLOAT16)
    result = run(ToFloat32(), with_shapes(model))
    assert ops(result.graph) == ["Cast"]


@pytest.mark.parametrize(
    ("value", "number"),
    [
        (np.float32, TensorProto.FLOAT),
        (np.dtype(np.float16), TensorProto.FLOAT16),
        (TensorProto.BFLOAT16, TensorProto.BFLOAT16),
        ("float64", TensorProto.DOUBLE),
        (None, 0),
        ("no type", 0),
        ([1, 2], 0),
    ],
)
def test_numbers_of_types(value: Any, number: int) -> None:
    assert type_number(value) == number


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("constant", [2**0.5, 0.5**0.5, (2 / np.pi) ** 0.5, 0.044715, 1.702])
def test_constants_of_gelu_are_what_they_were_rounded_from(constant: float, kind: Any) -> None:
    source = gs.Variable("x", dtype=np.float16, shape=["n"])
    scale = gs.Constant("scale", np.array(constant).astype(kind))
    other = gs.Constant("other", np.array([1.41, 0.5]).astype(kind))
    results = [gs.Variable(name, dtype=np.float16, shape=["n"]) for name in "ab"]
    nodes = [
        gs.Node("Mul", "scaled", {}, [source, scale], [results[0]]),
        gs.Node("Mul", "others", {}, [results[0], other], [results[1]]),
    ]
    graph = gs.Graph(nodes, [source], [results[1]], opset=20)
    ToFloat32().rewrite(graph)
    assert graph.tensors()["scale"].values == np.float32(constant)
    found = graph.tensors()["other"].values
    np.testing.assert_array_equal(found, np.array([1.41, 0.5]).astype(kind).astype(np.float32))
