"""Messages that are not what ONNX's tools can be fed with: each kind is named in one line."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from support.small_models import Draft

from regcache.passes.check_structure import check_structure
from regcache.passes.errors import InputError
from regcache.passes.read_graph import read_graph

OWN = "my.functions"


def small() -> onnx.ModelProto:
    """Relu of image + weight, with the inner tensor's type written down."""
    draft = Draft()
    total = draft.node("Add", "image", draft.weight(np.ones((3, 4, 4), np.float32)))
    model = draft.model({"image": ["n", 3, 4, 4]}, [draft.node("Relu", total)])
    inner = helper.make_tensor_value_info(total, TensorProto.FLOAT, ["n", 3, 4, 4])
    model.graph.value_info.append(inner)
    return model


def refusal(model: onnx.ModelProto) -> str:
    with pytest.raises(InputError) as caught:
        check_structure(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_right_stays_as_it_is() -> None:
    model = small()
    before = model.SerializeToString()
    check_structure(model)
    assert model.SerializeToString() == before


# --- What it says of itself.

PLACES: dict[str, Callable[[onnx.ModelProto], ValueInfoProto]] = {
    "the input 'image'": lambda model: model.graph.input[0],
    "the output 'n1_Relu'": lambda model: model.graph.output[0],
    "the tensor 'n0_Add'": lambda model: model.graph.value_info[0],
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("number", [40, 99, -1, 10**7])
def test_types_that_there_are_not(place: str, number: int) -> None:
    model = small()
    PLACES[place](model).type.tensor_type.elem_type = number
    assert refusal(model) == f"{place} has an unknown data type: {number}"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "INT4", "COMPLEX64"])
def test_types_that_no_encoder_computes_with(place: str, kind: str) -> None:
    model = small()
    PLACES[place](model).type.tensor_type.elem_type = TensorProto.DataType.Value(kind)
    assert refusal(model) == f"{place} is of type {kind}, which no float encoder computes with"


@pytest.mark.parametrize("place", PLACES)
def test_text_may_stand_beside_the_image(place: str) -> None:
    model = small()
    PLACES[place](model).type.tensor_type.elem_type = TensorProto.STRING
    check_structure(model)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["map_type", "optional_type", "sparse_tensor_type"])
def test_what_is_no_tensor(place: str, kind: str) -> None:
    model = small()
    item = PLACES[place](model)
    item.ClearField("type")
    getattr(item.type, kind).SetInParent()
    assert refusal(model) == f"{place} is no tensor: {kind.removesuffix('_type')}"


def test_sequences_of_tensors_are_none_of_its_business() -> None:
    model = small()
    held = helper.make_tensor_sequence_value_info("n0_Add", TensorProto.FLOAT, None)
    model.graph.value_info[0].CopyFrom(held)
    check_structure(model)
    nested = helper.make_sequence_type_proto(held.type)
    model.graph.value_info[0].type.CopyFrom(nested)
    assert refusal(model) == "the tensor 'n0_Add' is no tensor or sequence of them"


def test_types_that_are_undefined() -> None:
    """Of an input they are missed; of an inner tensor nobody needs them."""
    model = small()
    model.graph.value_info[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    check_structure(model)
    assert not model.graph.value_info[0].HasField("type")
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UNDEFINED
    assert refusal(model) == "the input 'image' has no data type"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dim", [-2, 2**31, -(2**63)])
def test_sizes_that_there_are_not(place: str, dim: int) -> None:
    model = small()
    item = PLACES[place](model)
    item.CopyFrom(helper.make_tensor_value_info(item.name, TensorProto.FLOAT, ["n", 3, dim]))
    assert refusal(model) == f"{place} has no such shape: ['n', 3, {dim}]"


def test_more_numbers_than_there_can_be() -> None:
    model = small()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 10**7  # well
    check_structure(model)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 10**6
    shape = [10**7, 3, 10**6, 10**6]
    assert refusal(model) == f"the input 'image' has no such shape: {shape}"


def test_minus_one_is_an_unknown_size(tmp_path: Path) -> None:
    model = small()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    assert read_graph(path).inputs[0].shape == [None, 3, 4, 4]


@pytest.mark.parametrize("kind", ["input", "output", "weight"])
def test_names_that_stand_there_twice(kind: str) -> None:
    model = small()
    field = getattr(model.graph, "initializer" if kind == "weight" else kind)
    field.append(field[0])
    assert refusal(model).endswith(f"the {kind} {field[0].name!r} is listed twice")


@pytest.mark.parametrize("kind", ["GRAPHS", "TENSORS", "TYPE_PROTO", "SPARSE_TENSOR", "UNDEFINED"])
def test_attributes_that_would_be_dropped(kind: str) -> None:
    model = small()
    number = AttributeProto.AttributeType.Value(kind)
    model.graph.node[0].attribute.add(name="odd", type=number)
    message = f"attribute 'odd' of Add 'n0' is of a kind that is not read: {kind}"
    assert refusal(model) == message


@pytest.mark.parametrize("place", ["graph", "function"])
def test_a_split_that_is_told_of_billions_of_outputs(place: str) -> None:
    model = small()
    split = helper.make_node("Split", ["image"], ["a", "b"], "s", axis=1, num_outputs=2**31)
    if place == "graph":
        model.graph.node.append(split)
    else:
        opsets = [helper.make_opsetid("", 20)]
        made = helper.make_function(OWN, "f", ["image"], ["a", "b"], [split], opsets)
        model.functions.append(made)
    assert refusal(model) == "Split 's' has 2 outputs, and is told of 2147483648"


@pytest.mark.parametrize("version", [0, -1, 2**40])
@pytest.mark.parametrize("domain", ["", OWN])
def test_opsets_that_there_cannot_be(version: int, domain: str) -> None:
    model = small()
    model.opset_import.append(helper.make_opsetid(domain, version))
    assert refusal(model) == f"there is no opset {version} of {domain or 'ai.onnx'}"


# --- Attributes of functions.


def leaky(place: str) -> onnx.ModelProto:
    """LeakyRelu whose slope is a function's attribute, which no function is around to give."""
    node = helper.make_node("LeakyRelu", ["n1_Relu"], ["y"], "leaky")
    node.attribute.add(name="alpha", ref_attr_name="slope", type=AttributeProto.FLOAT)
    model = small()
    if place == "branch":
        output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
        branch = helper.make_graph([node], "b", [], [output])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch)
        model.graph.initializer.append(numpy_helper.from_array(np.array(True), "c"))
    model.graph.node.append(node)
    return model


@pytest.mark.parametrize("place", ["graph", "branch"])
def test_attributes_of_no_function(place: str) -> None:
    message = "attribute 'alpha' of LeakyRelu 'leaky' refers to 'slope' of a function, but is in "
    assert refusal(leaky(place)) == f"{message}none"


# --- How much there is.


def calling(bodies: dict[str, list[str]]) -> onnx.ModelProto:
    """A model that calls the first function; each calls others, one after the other."""
    draft = Draft()
    first = next(iter(bodies))
    ids = [helper.make_opsetid("", 20), helper.make_opsetid(OWN, 1)]
    functions = []
    for name, calls in bodies.items():
        names = ["x", *(f"h{number}" for number in range(len(calls) - 1)), "y"]
        nodes = [
            helper.make_node(call, [source], [made], domain=OWN if call in bodies else "")
            for call, source, made in zip(calls, names[:-1], names[1:], strict=True)
        ]
        functions.append(helper.make_function(OWN, name, ["x"], ["y"], nodes, ids))
    made = draft.node(first, "image", domain=OWN)
    return draft.model({"image": [1]}, [made], opset_imports=ids, functions=functions)


def doubling(steps: int) -> onnx.ModelProto:
    names = [f"f{step}" for step in range(steps)]
    return calling(
        {name: [inner] * 2 for name, inner in zip(names, [*names[1:], "Relu"], strict=True)}
    )


def test_functions_that_double_are_counted_before_they_are_inlined() -> None:
    check_structure(doubling(12))
    for steps in (17, 40, 100):
        started = time.process_time()
        message = refusal(doubling(steps))
        assert message == "it has more than 50,000 nodes, those of functions counted"
        assert time.process_time() - started < 5


def test_functions_that_call_one_another_in_a_circle() -> None:
    assert refusal(calling({"One": ["Two"], "Two": ["Relu", "One"]})) == (
        "its function 'One' calls itself"
    )
    unused = calling({"Used": ["Relu"], "Self": ["Self"]})
    assert refusal(unused) == "its function 'Self' calls itself"


def test_functions_that_call_one_another_without_an_end_in_sight() -> None:
    chain = {f"f{step}": [f"f{step + 1}" if step < 2000 else "Relu"] for step in range(2001)}
    assert refusal(calling(chain)) == "its functions call one another more than 100 deep"


def test_functions_of_one_name() -> None:
    model = calling({"One": ["Relu"]})
    model.functions.append(model.functions[0])
    assert refusal(model) == "its function 'One' is defined twice"


def test_functions_that_carry_much_into_every_call() -> None:
    model = calling({"All": ["Heavy"] * 40, "Heavy": ["Relu"]})
    model.functions[1].doc_string = "x" * (1 << 25)
    assert refusal(model) == "its functions become more than 1024 MB of nodes"


def nested(depth: int) -> onnx.ModelProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    node = helper.make_node("Identity", ["image"], ["y"])
    for _ in range(depth):
        branch = helper.make_graph([node], "branch", [], [output])
        empty = helper.make_graph([], "none", [], [output])
        node = helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=empty)
    model = small()
    model.graph.node.append(node)
    return model


def test_graphs_in_graphs() -> None:
    check_structure(nested(16))
    assert refusal(nested(17)) == "its graphs are nested more than 16 deep"


def test_more_nodes_than_an_encoder_has() -> None:
    model = small()
    many = [helper.make_node("Relu", ["image"], [f"r{n}"]) for n in range(50_000)]
    model.graph.node.extend(many)
    assert refusal(model).startswith("it has more than 50,000 nodes")
