"""ONNX files of any opset, size and exporter as graphs, and one clear line for what is none."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from support.examples import examples
from support.running import run_graph
from support.small_models import Draft
from support.spellings import SPELLINGS, shuffled
from support.tiny_vit import Spec, TinyVit

from regcache.passes.check import check_and_infer
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import save_graph
from regcache.passes.read_graph import read_graph, read_message, refuse_quantized

RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((48, 40)).astype(np.float32)  # large enough to leave the message
IMAGES = RANDOM.standard_normal((2, 3, 4, 4)).astype(np.float32)
OWN = "my.functions"
SMALL_OLD = Spec(
    depth=1, width=8, hidden=8, grid=2, opset=14, layer_norm="pow", gelu="half_last",
    dynamic_shapes=True,
)  # fmt: skip


def write(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_graph(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_computes_its_reference(name: str, tmp_path: Path) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = read_graph(write(vit.model(), tmp_path))
    onnx.checker.check_model(gs.export_onnx(graph), full_check=True)
    assert [item.name for item in graph.inputs] == ["pixel_values"]
    assert [item.name for item in graph.outputs] == ["pooled", "last_hidden_state"]
    images = vit.images(2)
    for found, wanted in zip(run_graph(graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_reading_what_was_read_changes_nothing(tmp_path: Path) -> None:
    graph = read_graph(write(TinyVit(Spec(dynamic_shapes=True)).model(), tmp_path))
    save_graph(graph, tmp_path / "one.onnx")
    save_graph(read_graph(tmp_path / "one.onnx"), tmp_path / "two.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def test_external_weights_stay_where_they_are(tmp_path: Path) -> None:
    """Mapped: a graph of any size takes no memory. Nodes in any order."""
    vit = TinyVit(Spec(width=64, hidden=128))
    model = vit.model()
    shuffled(model.graph, seed=3)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="d.bin", size_threshold=0)
    graph = read_graph(path)
    large = [t for t in graph.tensors().values() if isinstance(t, gs.Constant) and len(t.shape) > 1]
    mapped = [tensor for tensor in large if isinstance(tensor.values, np.memmap)]
    assert len(mapped) >= 6 * vit.spec.depth
    images = vit.images(1)
    np.testing.assert_allclose(run_graph(graph, images)[0], vit.reference(images)[0], atol=1e-5)


def function(
    name: str, nodes: list[onnx.NodeProto], opset: int = 18, attributes: tuple[str, ...] = ()
) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    return helper.make_function(OWN, name, ["x"], ["y"], nodes, imports, attributes)


def calling(
    functions: list[onnx.FunctionProto], opset: int = 18, **attributes: Any
) -> onnx.ModelProto:
    """A model that is Relu of what the first function makes of the image."""
    draft = Draft()
    y = draft.node(functions[0].name, "image", domain=OWN, **attributes)
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(OWN, 1)]
    return draft.model(
        {"image": ["n", 3, 4, 4]},
        [draft.node("Relu", y)],
        opset_imports=imports,
        functions=functions,
    )


def call(name: str, source: str, result: str) -> onnx.NodeProto:
    return helper.make_node(name, [source], [result], domain=OWN)


def constant(name: str, values: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))


def linear() -> onnx.FunctionProto:
    """With its weight inside, larger than what stays in a message."""
    return function(
        "Linear",
        [
            constant("shape", np.array([-1, 48])),
            helper.make_node("Reshape", ["x", "shape"], ["rows"]),
            constant("weight", WEIGHT),
            helper.make_node("MatMul", ["rows", "weight"], ["y"]),
        ],
    )


def test_nested_functions_are_inlined(tmp_path: Path) -> None:
    """Twice the same one; weights inside are taken out like others."""
    outer = function(
        "Outer", [call("Scale", "x", "a"), call("Scale", "a", "b"), call("Linear", "b", "y")]
    )
    scale = function("Scale", [helper.make_node("Add", ["x", "x"], ["y"])])
    graph = read_graph(write(calling([outer, scale, linear()]), tmp_path))
    assert [node.op for node in graph.nodes] == ["Add", "Add", "Reshape", "MatMul", "Relu"]
    assert not graph.functions
    assert [item.name for item in graph.inputs] == ["image"]
    check_and_infer(graph)
    wanted = np.maximum(4 * IMAGES.reshape(2, 48).astype(np.float64) @ WEIGHT, 0)
    np.testing.assert_allclose(run_graph(graph, IMAGES)[0], wanted, rtol=1e-5, atol=1e-5)


def test_attributes_of_functions_are_handed_in(tmp_path: Path) -> None:
    leaky = helper.make_node("LeakyRelu", ["x"], ["y"])
    slope = leaky.attribute.add(name="alpha", ref_attr_name="slope")
    slope.type = onnx.AttributeProto.FLOAT
    model = calling([function("Leaky", [leaky], attributes=("slope",))], slope=-0.5)
    graph = read_graph(write(model, tmp_path))
    np.testing.assert_allclose(
        run_graph(graph, IMAGES)[0], np.where(IMAGES < 0, -0.5 * IMAGES, IMAGES)
    )


@pytest.mark.parametrize(("inside", "outside"), [(13, 18), (18, 13), (13, 21), (20, 13), (13, 13)])
def test_functions_of_another_opset(inside: int, outside: int, tmp_path: Path) -> None:
    mean = (
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=[1])]
        if inside < 18
        else [
            constant("axes", np.array([1])),
            helper.make_node("ReduceMean", ["x", "axes"], ["y"]),
        ]
    )
    graph = read_graph(write(calling([function("Mean", mean, inside)], outside), tmp_path))
    wanted = np.maximum(IMAGES.mean(1, keepdims=True), 0)
    np.testing.assert_allclose(run_graph(graph, IMAGES)[0], wanted, rtol=1e-5, atol=1e-6)


def test_functions_that_call_themselves_are_refused(tmp_path: Path) -> None:
    one, two = function("One", [call("Two", "x", "y")]), function("Two", [call("One", "x", "y")])
    for functions in ([one, two], [function("Self", [call("Self", "x", "y")])]):
        message = refusal(write(calling(functions), tmp_path))
        assert message.startswith("its function ")
        assert message.endswith(" calls itself")


@pytest.mark.parametrize(
    "op",
    [
        "QuantizeLinear",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "MatMulInteger",
        "ConvInteger",
        "QLinearMatMul",
        "QLinearConv",
        "QAttention",
        "QGemm",
        "MatMulNBits",
        "DynamicQuantizeMatMul",
    ],
)
@pytest.mark.parametrize("place", ["graph", "branch", "function"])
def test_quantized_files_are_refused(op: str, place: str, tmp_path: Path) -> None:
    """Before anything else is looked at, wherever the operator stands."""
    node = helper.make_node(op, ["x"], ["y"], "quant")
    model = calling([function("F", [node] if place == "function" else [call("G", "x", "y")])])
    if place == "graph":
        model.graph.node.append(node)
    if place == "branch":
        branch = helper.make_graph([node], "b", [], [])
        model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=branch))
    message = refusal(write(model, tmp_path))
    assert message == f"quantized already ({op} 'quant'); bring the float file of it"


def test_a_float_file_is_not_taken_for_a_quantized_one(tmp_path: Path) -> None:
    model = TinyVit(Spec()).model()
    refuse_quantized(model, tmp_path)


def test_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert "No such file" in refusal(path)
    for content in (
        b"",
        b"\x00",
        b"not a model",
        onnx.ModelProto(ir_version=8).SerializeToString(),
    ):
        path.write_bytes(content)
        assert refusal(path).startswith("not an ONNX file, or truncated")
    path.unlink()
    path.mkdir()
    assert "directory" in refusal(path)


@pytest.mark.parametrize("text", [b"pixel_values", b"LayerNormalization", b"epsilon", b"0.fc1.b"])
def test_names_that_are_no_text(text: bytes, tmp_path: Path) -> None:
    """protobuf hands them out as bytes."""
    broken = TinyVit(Spec()).model().SerializeToString().replace(text, text[:-1] + b"\xff")
    path = tmp_path / "model.onnx"
    path.write_bytes(broken)
    assert refusal(path) == "not an ONNX file, or damaged (a name in it is no text)"


def test_a_text_attribute_that_is_no_text(tmp_path: Path) -> None:
    model = TinyVit(Spec()).model()
    gelu = next(node for node in model.graph.node if node.op_type == "Gelu")
    gelu.attribute[0].s = b"\xff"
    assert "an attribute in it is no text" in refusal(write(model, tmp_path))


def of_no_elements(name: str, kind: Any) -> onnx.AttributeProto:
    """An attribute that is a list of nothing."""
    return onnx.AttributeProto(name=name, type=kind)


def test_a_constant_of_no_numbers_is_a_tensor(tmp_path: Path) -> None:
    model = TinyVit(SMALL_OLD).model()
    nothing = helper.make_node("Constant", [], ["nothing"], "nothing")
    nothing.attribute.append(of_no_elements("value_ints", onnx.AttributeProto.INTS))
    model.graph.node.insert(0, nothing)
    graph = read_graph(write(model, tmp_path))
    (node,) = (node for node in graph.nodes if node.name == "nothing")
    assert node.attrs["value"].values.shape == (0,)
    gs.export_onnx(graph)


@pytest.mark.parametrize("kind", ["INTS", "FLOATS", "STRINGS"])
def test_other_empty_lists_are_refused(kind: str, tmp_path: Path) -> None:
    model = TinyVit(SMALL_OLD).model()
    node = model.graph.node[0]
    number = onnx.AttributeProto.AttributeType.Value(kind)
    node.CopyFrom(helper.make_node("Own", node.input, node.output, "odd", domain=OWN))
    node.attribute.append(of_no_elements("perm", number))
    model.opset_import.append(helper.make_opsetid(OWN, 1))
    assert refusal(write(model, tmp_path)) == "attribute 'perm' of Own 'odd' is an empty list"


def test_sparse_weights_are_refused(tmp_path: Path) -> None:
    values = numpy_helper.from_array(np.ones(2, np.float32), "thin")
    indices = numpy_helper.from_array(np.array([0, 5]))
    draft = Draft()
    model = draft.model({"image": [8]}, [draft.node("Add", "image", "thin")])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [8]))
    assert refusal(write(model, tmp_path)) == "weight 'thin' is stored as a sparse tensor"


def test_reasons_name_the_file_once(tmp_path: Path) -> None:
    """Those of steps that know the path, and of those that do not."""
    model = TinyVit(Spec(width=64)).model()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="d", size_threshold=0)
    (tmp_path / "d").unlink()
    assert refusal(path).startswith("external data of ")
    model = TinyVit(Spec()).model()
    model.graph.node[3].output[0] = model.graph.node[2].output[0]
    assert "is written by two nodes" in refusal(write(model, tmp_path))
    model = TinyVit(SMALL_OLD).model()
    model.opset_import[0].version = 99
    assert refusal(write(model, tmp_path)).startswith("opset 99 is newer")


def test_a_message_is_read_without_its_external_data(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    model = TinyVit(Spec(width=64)).model()
    onnx.save(model, path, save_as_external_data=True, location="d", size_threshold=0)
    (tmp_path / "d").unlink()
    assert len(read_message(path).graph.initializer) == len(model.graph.initializer)


@examples(150, ignore=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_never_end_in_a_traceback(data: st.DataObject, tmp_path: Path) -> None:
    spec = data.draw(st.sampled_from([Spec(depth=1, width=8, hidden=8, grid=2), SMALL_OLD]))
    content = bytearray(TinyVit(spec).model().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(bytes(content))
    with contextlib.suppress(InputError):
        assert read_graph(path).nodes
