"""Older opsets come out as the canonical one and compute the same; what cannot is refused."""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.small_models import Draft
from support.tiny_vit import activate, layer_norm, softmax

from regcache.passes.check import check_message
from regcache.passes.errors import InputError
from regcache.passes.raise_opset import CANONICAL_OPSET, raise_opset

RANDOM = np.random.default_rng(0)
IMAGE = RANDOM.standard_normal((2, 3, 4, 4)).astype(np.float32)
WEIGHT = RANDOM.standard_normal((16, 8)).astype(np.float32)
SCALE, BIAS = (RANDOM.standard_normal(8).astype(np.float32) for _ in range(2))


def run(model: onnx.ModelProto) -> NDArray[Any]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"image": IMAGE})
    return np.asarray(found)


def opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {item.domain: item.version for item in model.opset_import}


def ops(model: onnx.ModelProto) -> list[tuple[str, str]]:
    return [(node.domain, node.op_type) for node in model.graph.node]


def linear(draft: Draft) -> str:
    rows = draft.node("Reshape", "image", draft.weight(np.array([0, 3, 16])))
    return draft.node("MatMul", rows, draft.weight(WEIGHT))


def numpy_linear() -> NDArray[Any]:
    return np.asarray(IMAGE.reshape(2, 3, 16).astype(np.float64) @ WEIGHT)


@pytest.mark.parametrize("opset", [8, 9, 11, 12, 13, 16, 17, 19])
def test_attributes_of_old_operators_become_inputs(opset: int) -> None:
    """Softmax of one flattened block, axes of ReduceMean and Unsqueeze, Clip's limits."""
    draft = Draft()
    x = linear(draft)
    clipped = (
        draft.node("Clip", x, min=-1.0, max=2.0)
        if opset < 11
        else draft.node(
            "Clip", x, *(draft.weight(np.array(end, np.float32)) for end in (-1.0, 2.0))
        )
    )
    mean = draft.node("ReduceMean", clipped, axes=[1], keepdims=0)
    taller = (
        draft.node("Unsqueeze", mean, axes=[1])
        if opset < 13
        else draft.node("Unsqueeze", mean, draft.weight(np.array([1])))
    )
    if opset >= 18:
        (node,) = [node for node in draft.nodes if node.op_type == "ReduceMean"]
        del node.attribute[:]
        node.attribute.append(helper.make_attribute("keepdims", 0))
        node.input.append(draft.weight(np.array([1])))
    probs = draft.node("Softmax", taller, axis=1 if opset < 13 else -1)
    model = draft.model({"image": ["n", 3, 4, 4]}, [probs], opset=opset)
    wanted = softmax(np.clip(numpy_linear(), -1, 2).mean(1))[:, None]
    np.testing.assert_allclose(run(model), wanted, rtol=1e-5)
    raised = raise_opset(model)
    onnx.checker.check_model(raised, full_check=True)
    assert opsets(raised) == {"": CANONICAL_OPSET}
    np.testing.assert_allclose(run(raised), wanted, rtol=1e-5)
    before = raised.SerializeToString()
    assert raise_opset(raised).SerializeToString() == before


@pytest.mark.parametrize("opset", [14, 16])
def test_operators_that_their_opset_does_not_have_yet_stay(opset: int) -> None:
    """As ONNX Runtime's optimiser writes LayerNormalization; in a branch too."""
    draft = Draft()
    x = linear(draft)
    weights = [draft.weight(values) for values in (SCALE, BIAS)]
    names = ("LayerNormalization", "Gelu")
    inside = helper.make_graph(
        [helper.make_node(names[0], [x, *weights], ["normal"], epsilon=1e-6)],
        "branch",
        [],
        [helper.make_tensor_value_info("normal", TensorProto.FLOAT, None)],
    )
    other = onnx.GraphProto.FromString(inside.SerializeToString().replace(b"normal", b"strict"))
    chosen = draft.node("If", draft.weight(np.array(True)), then_branch=inside, else_branch=other)
    y = draft.node(names[1], draft.node(names[0], chosen, *weights, epsilon=1e-6))
    raised = raise_opset(draft.model({"image": ["n", 3, 4, 4]}, [y], opset=opset))
    check_message(raised)
    assert opsets(raised) == {"": CANONICAL_OPSET}
    assert [op for _, op in ops(raised)][-2:] == list(names)
    once = layer_norm(numpy_linear(), SCALE.astype(np.float64), BIAS.astype(np.float64))
    twice = layer_norm(once, SCALE.astype(np.float64), BIAS.astype(np.float64))
    np.testing.assert_allclose(run(raised), activate("gelu", twice), rtol=1e-4, atol=1e-5)


def test_operators_of_other_domains_stay() -> None:
    draft = Draft()
    y = draft.node("FastGelu", linear(draft), domain="com.microsoft")
    y = draft.node("ReduceMean", y, axes=[1])
    imports = [helper.make_opsetid("", 14), helper.make_opsetid("com.microsoft", 1)]
    model = draft.model({"image": ["n", 3, 4, 4]}, [y], opset_imports=imports)
    wanted = run(model)
    raised = raise_opset(model)
    assert opsets(raised) == {"": CANONICAL_OPSET, "com.microsoft": 1}
    assert ("com.microsoft", "FastGelu") in ops(raised)
    np.testing.assert_allclose(run(raised), wanted, rtol=1e-6)


@pytest.mark.parametrize("opset", [20, 21, 23])
def test_newer_opsets_stay(opset: int) -> None:
    draft = Draft()
    y = draft.node("Gelu", linear(draft))
    model = draft.model({"image": ["n", 3, 4, 4]}, [y], opset=opset)
    before = model.SerializeToString()
    assert raise_opset(model).SerializeToString() == before


@pytest.mark.parametrize("opset", [13, 20])
def test_the_long_name_of_the_standard_domain(opset: int) -> None:
    draft = Draft()
    y = draft.node("Relu", linear(draft), domain="ai.onnx")
    imports = [helper.make_opsetid("ai.onnx", opset)]
    raised = raise_opset(draft.model({"image": ["n", 3, 4, 4]}, [y], opset_imports=imports))
    assert opsets(raised) == {"": CANONICAL_OPSET}
    assert {domain for domain, _ in ops(raised)} == {""}
    np.testing.assert_allclose(run(raised), np.maximum(numpy_linear(), 0), rtol=1e-5, atol=1e-6)


def test_an_operator_that_nobody_knows_is_left_for_later() -> None:
    """The checker of shapes names it; the version converter never sees it."""
    draft = Draft()
    y = draft.node("Frobnicate", linear(draft))
    raised = raise_opset(draft.model({"image": ["n", 3, 4, 4]}, [y], opset=15))
    assert ops(raised)[-1] == ("", "Frobnicate")
    with pytest.raises(onnx.checker.ValidationError, match="No Op registered for Frobnicate"):
        check_message(raised)


def relu(opset: int, **more: Any) -> onnx.ModelProto:
    draft = Draft()
    return draft.model({"image": [1, 3, 4, 4]}, [draft.node("Relu", "image")], opset=opset, **more)


@pytest.mark.parametrize(
    ("opset", "reason"),
    [
        (99, r"opset 99 is newer than the installed onnx knows \(\d+\)"),
        (2**40, "is newer than the installed onnx knows"),
        (0, "cannot convert opset 0 to 20"),
        (-3, "cannot convert opset -3 to 20"),
    ],
)
def test_opsets_that_do_not_exist(opset: int, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as caught:
        raise_opset(relu(opset))
    assert "\n" not in str(caught.value)


def test_a_graph_without_standard_operators() -> None:
    model = relu(15, opset_imports=[helper.make_opsetid("com.example", 1)])
    with pytest.raises(InputError, match="no standard ONNX operators"):
        raise_opset(model)


@pytest.mark.parametrize("opset", [13, 21])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda model: model.graph.node[0].input.__setitem__(0, "nowhere"), "'nowhere'"),
        (lambda model: model.graph.output.append(model.graph.output[0]), "is listed twice"),
        (lambda model: model.graph.input.append(model.graph.input[0]), "'image'"),
        (lambda model: model.graph.node[0].ClearField("output"), "Relu"),
        (lambda model: setattr(model, "ir_version", 99), "ir_version 99"),
    ],
)
def test_graphs_that_are_not_valid(opset: int, damage: Any, reason: str) -> None:
    """Refused before the version converter, which ends the process on some of them."""
    model = relu(opset)
    damage(model)
    with pytest.raises(InputError, match="not a valid ONNX graph") as caught:
        raise_opset(model)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ".cc:" not in str(caught.value)


@pytest.mark.parametrize(
    ("opset", "op", "attributes", "reason"),
    [
        (6, "Dropout", {"is_test": 0}, "Attribute is_test must not have value 0"),
        (1, "Pad", {"paddings": [0] * 8}, "No Adapter From Version"),
    ],
)
def test_what_the_converter_cannot_do_is_said(
    opset: int, op: str, attributes: dict[str, Any], reason: str
) -> None:
    draft = Draft()
    y = draft.node(op, "image", **attributes)
    with pytest.raises(InputError, match=f"cannot convert opset {opset} to 20: {reason}"):
        raise_opset(draft.model({"image": [1, 3, 4, 4]}, [y], opset=opset))
