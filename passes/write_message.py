"""Write nodes and constants into a message: what graphsurgeon writes, in a third of its time."""

from functools import cache
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

_Attribute = onnx.AttributeProto


def write_node(node: gs.Node, message: onnx.NodeProto) -> None:
    """Fill an empty message with a node."""
    message.op_type = node.op
    message.input.extend([item.name for item in node.inputs])
    message.output.extend([item.name for item in node.outputs])
    if node.name:
        message.name = node.name
    if node.domain is not None:
        message.domain = node.domain
    for name, value in node.attrs.items():
        _write_attribute(name, value, message)


def _write_attribute(name: str, value: Any, message: onnx.NodeProto) -> None:
    """Add an attribute; tensors, graphs and what is rare are left to graphsurgeon."""
    kind = type(value)
    if kind is int:
        message.attribute.add(name=name, type=_Attribute.INT, i=value)
    elif kind is float:
        message.attribute.add(name=name, type=_Attribute.FLOAT, f=value)
    elif kind is str:
        message.attribute.add(name=name, type=_Attribute.STRING, s=value.encode())
    elif kind is list and value and all(type(item) is int for item in value):
        message.attribute.add(name=name, type=_Attribute.INTS, ints=value)
    else:
        message.attribute.extend(OnnxExporter.export_attributes({name: value}))


def is_plain(constant: gs.Constant) -> bool:
    """Whether a constant is an array of a type that NumPy itself has, to be written as that."""
    values = constant._values  # not `values`, which reads what lies in a file yet
    return (
        type(values) is np.ndarray
        and values.dtype.kind in "fiub"
        and constant.export_dtype == values.dtype
        and constant.data_location is None
    )


def write_plain(constant: gs.Constant, message: onnx.TensorProto) -> None:
    """Fill an empty message with a constant that is_plain."""
    values = constant._values
    message.name = constant.name
    message.data_type = _number(values.dtype)
    message.dims.extend(values.shape)
    message.raw_data = values.tobytes()


@cache
def _number(dtype: np.dtype[Any]) -> int:
    """onnx.TensorProto's number of a type."""
    return int(onnx.helper.np_dtype_to_tensor_dtype(dtype))
