"""Take the weights out of an ONNX message, so that what is left of it is small."""

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from regcache.passes.detach_weights import LARGEST_KEPT, Weights
from regcache.passes.errors import InputError
from regcache.passes.external_weights import (
    is_external,
    let_go,
    map_external,
    read_external,
    stored_tensors,
)
from regcache.passes.stored_tensors import check_finite, read_tensor, shape_and_type


def take_weights(model: onnx.ModelProto, path: Path) -> Weights:
    """Turn the large initializers of a message into graph inputs; returns their values by name.

    Values in the message are taken over, external ones are mapped from their file. Constant nodes
    become initializers first. `path`: the model's file, which external data lies beside.
    Raises InputError, naming the weight, where one cannot be read or holds NaN or infinity.
    """
    graph = model.graph
    _hoist_constants(graph)
    weights: Weights = {}
    kept, taken = [], []
    for tensor in graph.initializer:
        where = f"weight {tensor.name!r}"
        shape, _ = shape_and_type(tensor, where)
        if int(np.prod(shape, dtype=object)) > LARGEST_KEPT:
            weights[tensor.name] = _take(tensor, path, where)
            kind = tensor.data_type
            taken.append(onnx.helper.make_tensor_value_info(tensor.name, kind, list(shape)))
        else:
            kept.append(tensor.SerializeToString())
    del graph.initializer[:]
    graph.initializer.extend(map(onnx.TensorProto.FromString, kept))
    for tensor in stored_tensors(model):
        if is_external(tensor):
            read_external(tensor, path)
        where = f"weight {tensor.name!r}"
        check_finite(read_tensor(tensor, where), where)
    # Files of IR version 3 list their initializers among the inputs.
    listed = {*weights, *(tensor.name for tensor in graph.initializer)}
    inputs = [item for item in graph.input if item.name not in listed]
    del graph.input[:]
    graph.input.extend([*inputs, *taken])
    return weights


def _take(tensor: onnx.TensorProto, path: Path, where: str) -> NDArray[np.generic]:
    values = map_external(tensor, path) if is_external(tensor) else read_tensor(tensor, where)
    tensor.ClearField("raw_data")  # the message is as large as the file until then
    check_finite(values, where)
    let_go(values)
    return values


def _hoist_constants(graph: onnx.GraphProto) -> None:
    """Write the tensors of Constant nodes as initializers."""
    nodes = []
    for node in graph.node:
        attribute = node.attribute[0] if len(node.attribute) == 1 else None
        if node.op_type != "Constant" or attribute is None or attribute.name != "value":
            nodes.append(node.SerializeToString())
            continue
        if len(node.output) != 1 or not attribute.HasField("t"):
            raise InputError(f"Constant {node.name!r} holds no tensor")
        tensor = graph.initializer.add()
        tensor.CopyFrom(attribute.t)
        tensor.name = node.output[0]
        attribute.t.Clear()
    if len(nodes) < len(graph.node):
        del graph.node[:]
        graph.node.extend(map(onnx.NodeProto.FromString, nodes))
