"""What is refused as no valid graph, and what is inferred of one that is."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from onnx import TensorProto, helper, numpy_helper

from regcache.passes.check import check_and_infer


def outer_product(kind: int, factors: tuple[str, str], weights: bool = False) -> gs.Graph:
    """The product of two of x [2], y [3], tall [2, 1] and wide [1, 3], in its own shape once more.

    Rotary angles are computed so, of `weights`.
    """
    vectors = [
        helper.make_tensor_value_info(*item) for item in (("x", kind, [2]), ("y", kind, [3]))
    ]
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = {"x": np.ones(2, dtype), "y": np.ones(3, dtype)} if weights else {}
    values |= {"second": np.array([1]), "first": np.array([0])}
    nodes = [
        helper.make_node("Unsqueeze", ["x", "second"], ["tall"]),
        helper.make_node("Unsqueeze", ["y", "first"], ["wide"]),
        helper.make_node("Mul", factors, ["product"]),
        helper.make_node("Shape", ["product"], ["shape"]),
        helper.make_node("Reshape", ["product", "shape"], ["again"]),
    ]
    output = helper.make_tensor_value_info("again", kind, None)
    initializers = [numpy_helper.from_array(array, name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "outer", [] if weights else vectors, [output], initializers)
    return gs.import_onnx(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]))


@pytest.mark.parametrize("weights", [False, True], ids=["inputs", "weights"])
@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64], ids=["float", "int64"])
@pytest.mark.parametrize("factors", [("tall", "wide"), ("tall", "y")], ids=["both", "one"])
def test_an_outer_product_of_vectors_of_two_lengths(
    kind: int, factors: tuple[str, str], weights: bool
) -> None:
    """onnx's data propagation says that 2 and 3 numbers do not multiply."""
    graph = outer_product(kind, factors, weights)
    check_and_infer(graph)
    shapes = {name: tensor.shape for name, tensor in graph.tensors().items()}
    assert shapes["product"] == shapes["again"] == [2, 3]


def test_vectors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(onnx.shape_inference.InferenceError, match="Incompatible dimensions"):
        check_and_infer(outer_product(TensorProto.FLOAT, ("x", "y")))
