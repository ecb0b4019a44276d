"""ONNX Runtime's fused activations and additions, in ONNX's operators."""

import onnx_graphsurgeon as gs

from regcache.passes.write_nodes import NodeWriter


def unfuse_gelu(write: NodeWriter, node: gs.Node) -> None:
    """Gelu: the exact one, by erf."""
    write.node("Gelu", "gelu", node.inputs[:1], node.outputs[0], approximate="none")


def unfuse_bias_gelu(write: NodeWriter, node: gs.Node) -> None:
    """BiasGelu: Gelu of a sum."""
    total = write.node("Add", "bias", node.inputs[:2])
    write.node("Gelu", "gelu", [total], node.outputs[0], approximate="none")


def unfuse_fast_gelu(write: NodeWriter, node: gs.Node) -> None:
    """FastGelu: the approximation by tanh, perhaps of a sum."""
    given = [item for item in node.inputs[:2] if not item.is_empty()]
    total = write.node("Add", "bias", given) if given[1:] else given[0]
    write.node("Gelu", "gelu", [total], node.outputs[0], approximate="tanh")


def unfuse_quick_gelu(write: NodeWriter, node: gs.Node) -> None:
    """QuickGelu: x sigmoid(alpha x); SiLU where alpha is 1."""
    data, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.702))
    scaled = data
    if alpha != 1:
        scaled = write.node("Mul", "alpha", [data, write.floats("alpha/value", alpha, data)])
    gate = write.node("Sigmoid", "gate", [scaled])
    write.node("Mul", "result", [data, gate], node.outputs[0])


def unfuse_bias_split_gelu(write: NodeWriter, node: gs.Node) -> None:
    """BiasSplitGelu: a sum is halved; the left half times Gelu of the right one."""
    total = write.node("Add", "bias", node.inputs[:2])
    halves = [gs.Variable(f"{write.prefix}/{side}") for side in ("left", "right")]
    split = gs.Node("Split", f"{write.prefix}/split", {"axis": -1, "num_outputs": 2})
    split.inputs, split.outputs = [total], halves
    write.graph.nodes.append(split)
    gate = write.node("Gelu", "gelu", halves[1:], approximate="none")
    write.node("Mul", "result", [halves[0], gate], node.outputs[0])


def unfuse_bias_add(write: NodeWriter, node: gs.Node) -> None:
    """BiasAdd: a bias, then what was before the layer."""
    data, bias, skip = node.inputs[:3]
    total = write.node("Add", "bias", [data, bias])
    write.node("Add", "skip", [total, skip], node.outputs[0])
