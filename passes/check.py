"""Checker and shape inference without the weights, so that they cost milliseconds at any size."""

from collections.abc import Mapping, Sequence
from functools import cache
from math import prod
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter, dtype_to_onnx

from regcache.passes.detach_weights import export_skeleton
from regcache.passes.microsoft import DOMAIN
from regcache.passes.tensorrt_operators import DOMAIN as TENSORRT
from regcache.passes.walk import tensors_of

# BEiT's index of relative positions has a million at 512 pixels.
_LONGEST_ROW = 1 << 22
# What onnx's own tools raise; they share no base.
ONNX_ERRORS = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    onnx.version_converter.ConvertError,
    RuntimeError,
    ValueError,
    IndexError,
)


def check_message(model: onnx.ModelProto) -> None:
    """Run onnx's checker on a message, whose inputs and outputs may lack a shape.

    The checker wants some shape for each, so they have one meanwhile. Serialises the model. Raises
    onnx.checker.ValidationError where the graph is not valid.
    """
    unknown = [
        item
        for item in (*model.graph.input, *model.graph.output)
        if item.type.WhichOneof("value") in {None, "tensor_type"}
        and not item.type.tensor_type.HasField("shape")
    ]
    for item in unknown:
        item.type.tensor_type.shape.dim.add()
    onnx.checker.check_model(model)
    for item in unknown:
        item.type.tensor_type.ClearField("shape")


def check_and_infer(graph: gs.Graph) -> None:
    """Run onnx's checker and strict shape inference, and write the shapes found onto the graph.

    Weights are replaced by graph inputs of the same type first. Raises onnx.checker.ValidationError
    or onnx.shape_inference.InferenceError where the graph is not valid.
    """
    tensors = tensors_of(graph)
    model = _without_weights(graph, tensors)
    check_message(model)
    _refuse_long_rows(model)
    inferred = _infer(model)
    found = {
        info.name: info.type.tensor_type
        for info in (*inferred.graph.value_info, *inferred.graph.output)
        if info.type.tensor_type.elem_type  # not of sequences
    }
    for name, tensor in tensors.items():
        if isinstance(tensor, gs.Variable) and name in found and tensor.inputs:
            # Not through its properties, which take as long as the inference.
            tensor.__dict__["shape"] = _dims(found[name])
            tensor.__dict__["dtype"] = _numpy_type(found[name].elem_type)
    for node in graph.nodes:
        if node.op == "Reshape":
            _check_reshape(node)
    _refuse_perms(graph)


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its tensors' types and shapes; raises InferenceError where it is not valid.

    Data propagation, which follows the numbers that shapes are made of, has errors of its own: it
    takes the vectors behind an outer product for vectors of one length. Where nothing but it has
    something to say, the node is right, and what follows it is inferred from its shape.
    """
    infer = onnx.shape_inference.infer_shapes
    try:
        try:
            return infer(model, check_type=True, strict_mode=True, data_prop=True)
        except onnx.shape_inference.InferenceError:
            infer(model, check_type=True, strict_mode=True)
            return infer(model, check_type=True, data_prop=True)
    except (RuntimeError, ValueError) as error:  # a type that there is not, a size that overflows
        raise onnx.shape_inference.InferenceError(str(error)) from error


def _check_reshape(node: gs.Node) -> None:
    """Raise InferenceError where a Reshape cannot be done, which onnx's inference lets pass."""
    before, after = (item.shape for item in (node.inputs[0], node.outputs[0]))
    static = all(
        shape is not None and all(isinstance(dim, int) for dim in shape)
        for shape in (before, after)
    )
    if static and prod(before) != prod(after):
        raise onnx.shape_inference.InferenceError(
            f"Reshape {node.name or node.outputs[0].name!r} makes {list(after)} of {list(before)}"
        )


def _refuse_perms(graph: gs.Graph) -> None:
    """Raise InferenceError for a Transpose that leaves axes out, which onnx lets pass."""
    for node in graph.nodes:
        if node.op == "Transpose" and "perm" in node.attrs and node.inputs[0].shape is not None:
            perm, rank = list(node.attrs["perm"]), len(node.inputs[0].shape)
            if sorted(perm) != list(range(rank)):
                raise onnx.shape_inference.InferenceError(
                    f"Transpose {node.name!r} of {rank} axes has perm {perm}"
                )


def _refuse_long_rows(model: onnx.ModelProto) -> None:
    """Raise InferenceError for a row that data propagation would take gigabytes for.

    It makes a symbol of 140 bytes for every number of a tensor of one dimension.
    """
    plain = onnx.shape_inference.infer_shapes(model).graph
    for info in (*plain.input, *plain.value_info, *plain.output):
        dims = info.type.tensor_type.shape.dim
        if len(dims) == 1 and dims[0].dim_value > _LONGEST_ROW:
            raise onnx.shape_inference.InferenceError(
                f"the tensor {info.name!r} has {dims[0].dim_value} numbers in a row"
            )


def _dims(tensor_type: onnx.TypeProto.Tensor) -> list[int | str] | None:
    """Shape with names for symbolic dims, "?" for unknown ones; None when the rank is unknown."""
    if not tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value or dim.dim_param or (0 if dim.HasField("dim_value") else "?")
        for dim in tensor_type.shape.dim
    ]


def _without_weights(graph: gs.Graph, tensors: Mapping[str, gs.Tensor]) -> onnx.ModelProto:
    """The graph's message; weights are inputs, and inner tensors have a type but no shape."""
    model, weights = export_skeleton(graph)
    for weight in weights.values():
        model.graph.input.append(OnnxExporter.export_value_info_proto(weight, False))
    ends = {item.name for item in (*graph.inputs, *graph.outputs)}
    for name, tensor in tensors.items():
        if isinstance(tensor, gs.Variable) and tensor.dtype is not None and name not in ends:
            # What an earlier form of the graph had here may be stale; but onnx infers nothing of
            # ONNX Runtime's or TensorRT's operators: the pass that writes them gives their outputs
            # a shape.
            inferred = tensor.inputs and tensor.inputs[0].domain not in {DOMAIN, TENSORRT}
            _declare(model, tensor, None if inferred else tensor.shape)
    return model


def _declare(
    model: onnx.ModelProto, tensor: gs.Variable, shape: Sequence[int | str] | None
) -> None:
    """Add an inner tensor's type to a message, and its shape where that is known."""
    if shape is not None or tensor.type != "tensor_type":
        found = gs.Variable(tensor.name, tensor.dtype, shape, tensor.type)
        model.graph.value_info.append(OnnxExporter.export_value_info_proto(found, False))
    else:  # a tenth of the time
        info = model.graph.value_info.add(name=tensor.name)
        info.type.tensor_type.elem_type = _element_type(tensor.dtype)


@cache
def _numpy_type(number: int) -> np.dtype[Any]:
    """NumPy's type for onnx.TensorProto's number."""
    found: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(number)
    return found


@cache
def _element_type(dtype: Any) -> int:
    """onnx.TensorProto's number of a type."""
    return int(dtype_to_onnx(dtype))
