"""Large weights leave the message as inputs of the same name and type; small ones stay in it."""

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.small_models import Draft

from regcache.passes.detach_weights import LARGEST_KEPT
from regcache.passes.errors import InputError
from regcache.passes.message_weights import take_weights

RANDOM = np.random.default_rng(0)
LARGE, SMALL = (
    RANDOM.standard_normal(size).astype(np.float32) for size in (LARGEST_KEPT + 1, LARGEST_KEPT)
)
NOWHERE = Path("model.onnx")


def weighted(**weights: NDArray[Any]) -> onnx.ModelProto:
    draft = Draft()
    y = draft.node("Sum", "image", *(draft.weight(item, name) for name, item in weights.items()))
    return draft.model({"image": [1]}, [y])


def refusal(model: onnx.ModelProto, path: Path = NOWHERE) -> str:
    with pytest.raises(InputError) as caught:
        take_weights(model, path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_only_large_weights_leave() -> None:
    model = weighted(large=LARGE, small=SMALL)
    nodes = list(model.graph.node)
    found = take_weights(model, NOWHERE)
    assert found.keys() == {"large"}
    np.testing.assert_array_equal(found["large"], LARGE)
    (kept,) = model.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(kept), SMALL)
    (image, large) = model.graph.input
    assert image == helper.make_tensor_value_info("image", TensorProto.FLOAT, [1])
    assert large == helper.make_tensor_value_info("large", TensorProto.FLOAT, LARGE.shape)
    assert list(model.graph.node) == nodes
    assert len(model.SerializeToString()) < SMALL.nbytes + 500


def test_a_second_run_takes_nothing() -> None:
    model = weighted(large=LARGE, small=SMALL)
    take_weights(model, NOWHERE)
    before = model.SerializeToString()
    assert take_weights(model, NOWHERE) == {}
    assert model.SerializeToString() == before


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, np.int64, np.bool_])
def test_types_stay(dtype: Any) -> None:
    values = RANDOM.integers(0, 2, (50, 50)).astype(dtype)
    model = weighted(large=values)
    found = take_weights(model, NOWHERE)["large"]
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)
    kind = model.graph.input[1].type.tensor_type.elem_type
    assert kind == helper.np_dtype_to_tensor_dtype(values.dtype)


def test_constant_nodes_become_weights() -> None:
    """Large and small; those that hold plain numbers stay nodes."""
    draft = Draft()
    names = [draft.node("Constant", value=numpy_helper.from_array(v)) for v in (LARGE, SMALL)]
    names.append(draft.node("Constant", value_float=0.5))
    y = draft.node("Sum", "image", *names)
    model = draft.model({"image": [1]}, [y])
    found = take_weights(model, NOWHERE)
    assert found.keys() == {names[0]}
    np.testing.assert_array_equal(found[names[0]], LARGE)
    assert [tensor.name for tensor in model.graph.initializer] == [names[1]]
    assert [node.op_type for node in model.graph.node] == ["Constant", "Sum"]
    onnx.checker.check_model(_with_shape(model))


def _with_shape(model: onnx.ModelProto) -> onnx.ModelProto:
    model.graph.output[0].type.tensor_type.shape.dim.add()
    return model


def test_external_weights_are_mapped_and_small_ones_read(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    written = weighted(large=LARGE, small=SMALL)
    onnx.save(written, path, save_as_external_data=True, location="d", size_threshold=0)
    model = onnx.load(path, load_external_data=False)
    found = take_weights(model, path)
    assert isinstance(found["large"], np.memmap)
    np.testing.assert_array_equal(found["large"], LARGE)
    (kept,) = model.graph.initializer
    np.testing.assert_array_equal(numpy_helper.to_array(kept), SMALL)
    model.SerializeToString()
    (tmp_path / "d").write_bytes(b"")
    message = refusal(onnx.load(path, load_external_data=False), path)
    assert message == f"{path}: external data of 'large' is truncated: 'd'"


def test_external_data_in_a_branch_is_read(tmp_path: Path) -> None:
    (tmp_path / "d").write_bytes(SMALL.tobytes())
    tensor = TensorProto(name="t", dims=SMALL.shape, data_type=TensorProto.FLOAT)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="d")
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    branch = helper.make_graph([node], "b", [], [helper.make_tensor_value_info("c", 1, None)])
    draft = Draft()
    y = draft.node("If", draft.weight(np.array(True)), then_branch=branch, else_branch=branch)
    model = draft.model({"image": [1]}, [y])
    assert take_weights(model, tmp_path / "m.onnx") == {}
    for attribute in model.graph.node[0].attribute:
        found = numpy_helper.to_array(attribute.g.node[0].attribute[0].t)
        np.testing.assert_array_equal(found, SMALL)


def test_initializers_that_are_inputs_too() -> None:
    """As files of IR version 3 list them."""
    model = weighted(large=LARGE, small=SMALL)
    for name, values in (("large", LARGE), ("small", SMALL)):
        model.graph.input.append(helper.make_tensor_value_info(name, 1, values.shape))
    take_weights(model, NOWHERE)
    assert [item.name for item in model.graph.input] == ["image", "large"]


@pytest.mark.parametrize("values", [LARGE, SMALL])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers(values: NDArray[Any], bad: float) -> None:
    broken = values.copy()
    broken[7] = bad
    assert refusal(weighted(broken=broken)) == "weight 'broken' holds NaN or infinity"


@pytest.mark.parametrize("values", [LARGE, np.arange(3)])
@pytest.mark.parametrize("size", [-1, 1])
def test_weights_of_the_wrong_size(values: NDArray[Any], size: int) -> None:
    """Small integers too: shapes are made of them."""
    model = weighted(broken=values)
    (tensor,) = model.graph.initializer
    tensor.raw_data = tensor.raw_data[:-1] if size < 0 else tensor.raw_data + b"\0"
    assert refusal(model).startswith("weight 'broken' cannot be read: ")


def test_weights_that_cannot_be() -> None:
    model = weighted(broken=LARGE)
    model.graph.initializer[0].dims[0] = -5
    assert refusal(model) == "weight 'broken' has no such shape: [-5]"
    model.graph.initializer[0].data_type = 0
    model.graph.initializer[0].dims[0] = 5
    assert refusal(model) == "weight 'broken' has an unknown data type: 0"


def test_a_constant_without_a_tensor() -> None:
    draft = Draft()
    y = draft.node("Constant", value=1)
    model = draft.model({"image": [1]}, [y])
    assert refusal(model) == "Constant 'n0' holds no tensor"
