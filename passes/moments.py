"""Find a layer norm that was written as a batch norm of its moments, as TensorFlow's are."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.root_mean_square import (
    ROOT_OPS,
    fit_root,
    is_mean_of,
    is_number,
    same_values,
    squares_of,
    subtracted_mean,
)
from regcache.passes.walk import consumers, is_constant, is_output


@dataclass(frozen=True)
class Moments:
    """`output` is the layer norm of `source` with `scale` and `bias` [width]."""

    source: gs.Tensor
    output: gs.Variable
    epsilon: float
    scale: gs.Constant
    bias: gs.Constant


def find_moments(graph: gs.Graph, reduction: gs.Node) -> Moments | None:
    """The norm that the mean of squares `reduction` is part of; None where it is part of none.

    Matched: x g + (bias - mean(x) g), where g is the inverse root of the variance, times the scale
    where there is one. Refused: an unknown width, and numbers on the way that something else reads.
    """
    centred = squares_of(reduction)
    source = None if centred is None else subtracted_mean(centred)
    width = source.shape[-1] if source is not None and source.shape else None
    if source is None or not isinstance(width, int):
        return None
    inverse = _inverse(reduction.outputs[0])
    fitted = fit_root(reduction, inverse, width, inverse=True)
    gain, scale = _scaled(inverse, width)
    joined = _joined(graph, gain, source, width)
    if fitted is None or joined is None or joined[0].dtype != source.dtype:
        return None
    (epsilon, factor), (output, bias) = fitted, joined
    weights = (np.ones(width) if scale is None else scale.values) * factor
    if scale is None or factor != 1:
        scale = gs.Constant(f"{output.name}/scale", weights.astype(output.dtype))
    return Moments(source, output, epsilon, scale, bias)


def _inverse(tensor: gs.Variable) -> gs.Variable:
    """The last tensor that is computed from a reduction and numbers alone."""
    while len(following := consumers(tensor)) == 1 and following[0].op in ROOT_OPS:
        if any(item is not tensor and not is_number(item) for item in following[0].inputs):
            return tensor
        tensor = following[0].outputs[0]
    return tensor


def _scaled(inverse: gs.Variable, width: int) -> tuple[gs.Variable, gs.Constant | None]:
    """(what both products read, the scale that was multiplied into it)."""
    following = consumers(inverse)
    if len(following) == 1 and following[0].op == "Mul":
        for item in following[0].inputs:
            if is_constant(item) and item.values.shape == (width,):
                return following[0].outputs[0], item
    return inverse, None


def _joined(
    graph: gs.Graph, gain: gs.Variable, source: gs.Tensor, width: int
) -> tuple[gs.Variable, gs.Constant] | None:
    """(output, bias) of source * gain + (bias - mean * gain)."""
    products = consumers(gain)
    if len(products) != 2 or any(node.op != "Mul" for node in products):
        return None
    for one, other in (products, products[::-1]):
        (data,), (mean,) = (
            [item for item in node.inputs if item is not gain] or [gain] for node in (one, other)
        )
        if not same_values(data, source) or not is_mean_of(mean, source):
            continue
        rest, total = consumers(other.outputs[0]), consumers(one.outputs[0])
        if [node.op for node in (*rest, *total)] != ["Sub", "Add"]:
            return None
        bias, shifted = rest[0].inputs[0], rest[0].outputs[0]
        fits = is_constant(bias) and bias.values.shape == (width,)
        inner = [one.outputs[0], other.outputs[0], shifted]
        alone = consumers(shifted) == total and not any(is_output(graph, item) for item in inner)
        return (total[0].outputs[0], bias) if fits and alone else None
    return None
