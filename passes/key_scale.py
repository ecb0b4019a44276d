"""The constant that a graph multiplies keys by before the scores."""

import onnx_graphsurgeon as gs

from regcache.passes.walk import SHAPE_OPS, is_constant, producer


def scalar(tensor: gs.Tensor) -> bool:
    """Whether a tensor is a constant of one element."""
    return is_constant(tensor) and tensor.values.size == 1


def key_scale(key: gs.Tensor) -> float:
    """The product of the constants between the keys' heads and the scores; 1 without any."""
    scale = 1.0
    while (node := producer(key)) is not None:
        if node.op in {"Mul", "Div"}:
            factors = [item for item in node.inputs if scalar(item)]
            if len(factors) != 1 or (node.op == "Div" and factors[0] is not node.inputs[1]):
                break
            factor = float(factors[0].values.reshape(()))
            scale = scale * factor if node.op == "Mul" else scale / factor
            key = next(item for item in node.inputs if item is not factors[0])
        elif node.op in SHAPE_OPS:
            key = node.inputs[0]
        else:
            break
    return scale
