"""ONNX Runtime's norms with the addition before them, in ONNX's operators."""

import onnx_graphsurgeon as gs

from regcache.passes.rms_norm_opset import raise_for_rms_norm
from regcache.passes.unfused import given, refuse_outputs, used_output
from regcache.passes.walk import is_linear, producer
from regcache.passes.write_nodes import NodeWriter


def unfuse_simplified_layer_norm(write: NodeWriter, node: gs.Node) -> None:
    """SimplifiedLayerNormalization, which ONNX Runtime keeps among ONNX's own: an RMS norm."""
    refuse_outputs(write.graph, node, inv_std_var=1)
    epsilon, axis = float(node.attrs.get("epsilon", 1e-5)), int(node.attrs.get("axis", -1))
    raise_for_rms_norm(write.graph)
    write.node(
        "RMSNormalization", "norm", node.inputs[:2], node.outputs[0], axis=axis, epsilon=epsilon
    )


def unfuse_skip_layer_norm(write: NodeWriter, node: gs.Node) -> None:
    """SkipLayerNormalization: the layer norm of a sum, which is an output too."""
    refuse_outputs(write.graph, node, mean=1, inv_std_var=2)
    total = _sum(write, node, given(node, 4))
    inputs = [total, node.inputs[2], *([] if given(node, 3) is None else [node.inputs[3]])]
    epsilon = float(node.attrs.get("epsilon", 1e-12))
    write.node("LayerNormalization", "norm", inputs, node.outputs[0], axis=-1, epsilon=epsilon)


def unfuse_skip_simplified_layer_norm(write: NodeWriter, node: gs.Node) -> None:
    """SkipSimplifiedLayerNormalization: the RMS norm of a sum, which is an output too."""
    refuse_outputs(write.graph, node, mean=1, inv_std_var=2)
    total = _sum(write, node, given(node, 3))
    epsilon = float(node.attrs.get("epsilon", 1e-12))
    raise_for_rms_norm(write.graph)
    write.node(
        "RMSNormalization", "norm", [total, node.inputs[2]], node.outputs[0], axis=-1,
        epsilon=epsilon,
    )  # fmt: skip


def _sum(write: NodeWriter, node: gs.Node, bias: gs.Tensor | None) -> gs.Variable:
    """The input and the skip, and a bias, which belongs to the linear before one of them."""
    data, skip = node.inputs[:2]
    output = used_output(write.graph, node, 3)
    if bias is None:
        return write.node("Add", "skip", [data, skip], output)
    if _is_product(data) and not _is_product(skip):
        data = write.node("Add", "bias", [data, bias])
    else:
        skip = write.node("Add", "bias", [skip, bias])
    return write.node("Add", "skip", [data, skip], output)


def _is_product(tensor: gs.Tensor) -> bool:
    node = producer(tensor)
    return node is not None and is_linear(node)
