"""Turn a decomposed layer norm back into one node (ONNX LayerNormalization, opset 17)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.errors import InputError
from regcache.passes.walk import consumers, count_ops, is_constant, producer


@dataclass(frozen=True)
class _Match:
    source: gs.Tensor
    output: gs.Tensor
    epsilon: float
    scale: gs.Constant | None
    bias: gs.Constant | None


@dataclass(frozen=True)
class FuseLayerNorm:
    """Replace ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div (, Mul, Add) over the last axis.

    Matched: the square as Pow(x, 2) or Mul(x, x), with or without scale and bias, the axis as an
    attribute or an input. Refused: another axis, a scale or bias that is no vector of the width,
    an unknown width.
    """

    name: ClassVar[str] = "fuse_layer_norm"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 17, which introduced LayerNormalization."""
        if graph.opset < 17:
            raise InputError(f"fuse_layer_norm needs opset 17, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the LayerNormalization nodes; the old ones fall to the clean-up."""
        edits, skips = [], []
        for node in [node for node in graph.nodes if node.op == "Div"]:
            match = _match(node)
            if match is None:
                continue
            width = match.source.shape[-1] if match.source.shape else None
            if not isinstance(width, int):
                skips.append(Skip(node.name, "the width of the layer norm is not known"))
                continue
            scale = match.scale or gs.Constant(
                f"{node.name}/scale", np.ones(width, dtype=np.float32)
            )
            match.output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    "LayerNormalization",
                    name=f"{node.name}/layer_norm",
                    attrs={"axis": -1, "epsilon": match.epsilon},
                    inputs=[match.source, scale] + ([match.bias] if match.bias else []),
                    outputs=[match.output],
                )
            )
            edits.append(Edit(node.name, f"LayerNormalization(epsilon={match.epsilon:g})"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Every new LayerNormalization took the place of at least one ReduceMean."""
        count = count_ops(after, "LayerNormalization") - count_ops(before, "LayerNormalization")
        assert count <= count_ops(before, "ReduceMean") - count_ops(after, "ReduceMean")


def _match(div: gs.Node) -> _Match | None:
    """Match upstream from (x - mean) / sqrt(variance + epsilon)."""
    centred, root = producer(div.inputs[0]), producer(div.inputs[1])
    if centred is None or root is None or (centred.op, root.op) != ("Sub", "Sqrt"):
        return None
    source = centred.inputs[0]
    shifted = producer(root.inputs[0])
    if not _is_last_axis_mean(producer(centred.inputs[1]), source):
        return None
    if shifted is None or shifted.op != "Add":
        return None
    epsilon = next((item for item in shifted.inputs if is_constant(item)), None)
    variance = next((producer(item) for item in shifted.inputs if not is_constant(item)), None)
    if epsilon is None or epsilon.values.size != 1 or variance is None:
        return None
    square = producer(variance.inputs[0]) if variance.op == "ReduceMean" else None
    if square is None or not _is_last_axis_mean(variance, square.outputs[0]):
        return None
    if not _is_square_of(square, centred.outputs[0]):
        return None
    width = source.shape[-1] if source.shape else None
    scale, output = _affine(div.outputs[0], "Mul", width)
    bias, output = _affine(output, "Add", width) if scale else (None, output)
    return _Match(source, output, float(epsilon.values.reshape(())), scale, bias)


def _is_last_axis_mean(node: gs.Node | None, source: gs.Tensor) -> bool:
    if node is None or node.op != "ReduceMean" or node.inputs[0] is not source:
        return False
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and is_constant(node.inputs[1]):
        axes = node.inputs[1].values.tolist()
    rank = len(source.shape) if source.shape else None
    return axes in ([-1], [rank - 1] if rank else [-1]) and node.attrs.get("keepdims", 1) == 1


def _is_square_of(node: gs.Node, tensor: gs.Tensor) -> bool:
    if node.op == "Mul":
        return all(item is tensor for item in node.inputs)
    exponent = node.inputs[1] if node.op == "Pow" else None
    return (
        exponent is not None
        and node.inputs[0] is tensor
        and is_constant(exponent)
        and exponent.values.size == 1
        and float(exponent.values.reshape(())) == 2.0
    )


def _affine(tensor: gs.Tensor, op: str, width: int | None) -> tuple[gs.Constant | None, gs.Tensor]:
    """The [width] constant that the only consumer multiplies by or adds, and its output."""
    following = consumers(tensor)
    if len(following) == 1 and following[0].op == op:
        for item in following[0].inputs:
            if is_constant(item) and item.values.shape == (width,):
                return item, following[0].outputs[0]
    return None, tensor
