"""Checker and shape inference without the weights, so that they cost milliseconds at any size."""

import onnx
import onnx_graphsurgeon as gs

from regcache.passes.detach_weights import detach_weights


def check_and_infer(graph: gs.Graph) -> None:
    """Run onnx's checker and strict shape inference, and write the shapes found onto the graph.

    Weights are replaced by graph inputs of the same type first. Raises onnx.checker.ValidationError
    or onnx.shape_inference.InferenceError where the graph is not valid.
    """
    model = _without_weights(graph)
    unknown = [item for item in model.graph.output if not item.type.tensor_type.HasField("shape")]
    for item in unknown:
        item.type.tensor_type.shape.dim.add()  # the checker insists on some shape
    onnx.checker.check_model(model)
    for item in unknown:
        item.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(
        model, check_type=True, strict_mode=True, data_prop=True
    )
    found = {
        info.name: info.type.tensor_type
        for info in (*inferred.graph.value_info, *inferred.graph.output)
    }
    for name, tensor in graph.tensors().items():
        if isinstance(tensor, gs.Variable) and name in found and tensor.inputs:
            tensor.shape = _dims(found[name])
            tensor.dtype = onnx.helper.tensor_dtype_to_np_dtype(found[name].elem_type)


def _dims(tensor_type: onnx.TypeProto.Tensor) -> list[int | str] | None:
    """Shape with names for symbolic dims, "?" for unknown ones; None when the rank is unknown."""
    if not tensor_type.HasField("shape"):
        return None
    return [
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?"
        for dim in tensor_type.shape.dim
    ]


def _without_weights(graph: gs.Graph) -> onnx.ModelProto:
    bare, _ = detach_weights(graph)
    outputs = {output.name for output in bare.outputs}
    for name, tensor in bare.tensors().items():
        if isinstance(tensor, gs.Variable) and tensor.inputs and name not in outputs:
            tensor.shape = None  # what an earlier form of the graph had here may be stale
    model: onnx.ModelProto = gs.export_onnx(bare, do_type_check=False)
    return model
