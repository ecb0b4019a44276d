"""Find x / sqrt(mean(x^2) + epsilon) in a graph, however an exporter spelled it."""

from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.scalar_function import evaluate
from regcache.passes.walk import consumers, is_constant, is_output, producer, skip_back

REDUCTIONS = frozenset({"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"})
_PASSED = frozenset({"Cast", "Identity"})
# One number for each token may lose its axis and get it back, and be repeated for every channel.
_SPREAD = _PASSED | {"Expand", "Reshape", "Unsqueeze"}
ROOT_OPS = _SPREAD | {"Add", "Clip", "Div", "Max", "Mul", "Pow", "Reciprocal", "Sqrt"}
_LONGEST = 8
# Mean squares that a root is evaluated at: its square must be linear in them.
_PROBES = np.array([0.0, 1e-3, 1.0, 7.0, 300.0])


@dataclass(frozen=True)
class RootMeanSquare:
    """`output` is `source` over the root of its mean square and `epsilon`, times `scale` [width].

    `weighted`: whether the graph multiplies each channel by a number; `scale` is one number for
    all of them where not.
    """

    source: gs.Tensor
    output: gs.Variable
    epsilon: float
    scale: gs.Constant
    weighted: bool


def find_root_mean_square(graph: gs.Graph, reduction: gs.Node) -> RootMeanSquare | None:
    """The norm that a reduction of the last axis is part of; None where it is part of none.

    Matched: the mean as ReduceMean, or as a sum or an L2 norm, divided by the width or not; the
    square as Pow or Mul or within the reduction; root, epsilon and inverse in any elementwise
    spelling (what it computes is evaluated); weights before or after the division, as one constant
    or several; Cast nodes anywhere. Of an epsilon outside the root, the square goes inside, where
    it is so small that no more than rounding changes.
    Refused: an unknown width, a sum or L2 norm without weights for each channel (an embedding is
    normalised like this), and a type that changes on the way.
    """
    source = squares_of(reduction)
    if source is None or not reduces_last_axis(reduction):
        return None
    width = source.shape[-1] if source.shape else None
    applied = _root(reduction.outputs[0])
    if applied is None or not isinstance(width, int):
        return None
    root, node = applied
    if not _for_each_token(root, source):
        return None
    fitted = fit_root(reduction, root, width, inverse=node.op == "Mul")
    followed = _follow(graph, source, width, root, node)
    if fitted is None or followed is None:
        return None
    (epsilon, factor), (output, constants) = fitted, followed
    weighted = any(constant.values.size > 1 for constant in constants)
    if output.dtype != source.dtype or (reduction.op != "ReduceMean" and not weighted):
        return None
    scale = _scale(output, constants, width, factor)
    return RootMeanSquare(source, output, epsilon, scale, weighted)


def subtracted_mean(tensor: gs.Tensor) -> gs.Tensor | None:
    """The tensor x, where `tensor` is x - mean(x) over the last axis; None where it is not."""
    node = producer(skip_back(tensor, _PASSED))
    if node is None or node.op != "Sub":
        return None
    return node.inputs[0] if is_mean_of(node.inputs[1], node.inputs[0]) else None


def is_mean_of(tensor: gs.Tensor, source: gs.Tensor) -> bool:
    """Whether a tensor is the mean of another's last axis, for each token."""
    mean = producer(skip_back(tensor, _SPREAD))
    if mean is None or mean.op != "ReduceMean" or not reduces_last_axis(mean):
        return False
    return _for_each_token(tensor, source) and same_values(mean.inputs[0], source)


def same_values(one: gs.Tensor, other: gs.Tensor, depth: int = 4) -> bool:
    """Whether two tensors are computed alike from the same tensors, Cast nodes aside."""
    one, other = skip_back(one, _PASSED), skip_back(other, _PASSED)
    if one is other:
        return True
    if is_constant(one) and is_constant(other):
        return bool(np.array_equal(one.values, other.values))
    first, second = producer(one), producer(other)
    if depth == 0 or first is None or second is None or len(first.outputs) != 1:
        return False
    if first.op == second.op == "ReduceMean":  # the last axis has two numbers
        last = reduces_last_axis(first) and reduces_last_axis(second)
        alike = first.attrs.get("keepdims", 1) == second.attrs.get("keepdims", 1)
        return last and alike and same_values(first.inputs[0], second.inputs[0], depth - 1)
    pairs = list(zip(first.inputs, second.inputs, strict=False))
    return (
        (first.op, len(first.inputs), first.attrs) == (second.op, len(second.inputs), second.attrs)
        and first is not second
        and all(same_values(*pair, depth - 1) for pair in pairs)
    )


def squares_of(reduction: gs.Node) -> gs.Tensor | None:
    """The tensor whose squares a reduction sums; None where it sums something else."""
    if reduction.op in {"ReduceSumSquare", "ReduceL2"}:
        return reduction.inputs[0]
    if reduction.op not in REDUCTIONS:
        return None
    node = producer(skip_back(reduction.inputs[0], _PASSED))
    if node is None or node.op not in {"Mul", "Pow"}:
        return None
    first, second = node.inputs
    two = is_constant(second) and second.values.size == 1 and second.values.item() == 2
    square = two if node.op == "Pow" else same_values(first, second)
    return first if square else None


def reduces_last_axis(node: gs.Node) -> bool:
    """Whether a Reduce node takes the last axis alone."""
    axes = node.attrs.get("axes")
    if axes is None and len(node.inputs) > 1 and is_constant(node.inputs[1]):
        axes = node.inputs[1].values.tolist()
    rank = len(node.inputs[0].shape or ())
    return axes in ([-1], [rank - 1] if rank else [-1])


def _for_each_token(numbers: gs.Tensor, source: gs.Tensor) -> bool:
    """Whether a tensor has one number, perhaps repeated, where `source` has all channels."""
    shape, wanted = numbers.shape, source.shape
    if shape is None or wanted is None or len(shape) != len(wanted):
        return False
    pairs = list(zip(shape, wanted, strict=True))
    same = all(a == b for a, b in pairs[:-1] if isinstance(a, int) and isinstance(b, int))
    return same and pairs[-1][0] in (1, pairs[-1][1])


def _root(tensor: gs.Variable) -> tuple[gs.Variable, gs.Node] | None:
    """The root behind a reduction and the Div by it, or its inverse and the Mul by it."""
    for _ in range(_LONGEST):
        following = consumers(tensor)
        if len(following) != 1:
            return None
        (node,) = following
        others = [item for item in node.inputs if item is not tensor and not is_number(item)]
        if others and (node.op == "Mul" or (node.op == "Div" and node.inputs[1] is tensor)):
            return tensor, node
        if node.op not in ROOT_OPS or (others and node.op not in _SPREAD):
            return None
        tensor = node.outputs[0]
    return None


def is_number(tensor: gs.Tensor) -> bool:
    return bool(tensor.is_empty() or (is_constant(tensor) and tensor.values.size == 1))


def fit_root(
    reduction: gs.Node, root: gs.Variable, width: int, *, inverse: bool
) -> tuple[float, float] | None:
    """(epsilon, factor): what is divided by the root is factor * x / sqrt(mean(x^2) + epsilon)."""
    sums = _PROBES if reduction.op == "ReduceMean" else _PROBES * width
    probes = np.sqrt(sums) if reduction.op == "ReduceL2" else sums
    with np.errstate(all="ignore"):
        found = evaluate(reduction.outputs[0], root, probes)
        if found is None or found.shape != probes.shape:
            return None
        square = 1 / found**2 if inverse else found**2
    slope = float((square[-1] - square[-2]) / (_PROBES[-1] - _PROBES[-2]))
    if not np.isfinite(square).all() or slope <= 0:
        return None
    slope = 1.0 if abs(slope - 1) < 1e-6 else slope
    epsilon = float(square[0]) / slope
    fits = np.allclose(square, slope * (_PROBES + epsilon), rtol=1e-4, atol=0)
    return (epsilon, slope**-0.5) if fits else None


def _follow(
    graph: gs.Graph, source: gs.Tensor, width: int, root: gs.Variable, node: gs.Node
) -> tuple[gs.Variable, list[gs.Constant]] | None:
    """Go along the products behind a root, to the last that has the source or a weight in it.

    Returns that product and the constants that were multiplied into it.
    """
    tensor, factors, has_source = root, list[gs.Constant](), False
    found: tuple[gs.Variable, list[gs.Constant]] | None = None
    while True:
        if node.op not in _PASSED:
            (other,) = [item for item in node.inputs if item is not tensor]
            factor = _factor(other, None if has_source else source, width)
            if factor is None:
                return found
            constants, is_source = factor
            factors, has_source = [*factors, *constants], has_source or is_source
            if has_source and (is_source or any(item.values.size > 1 for item in constants)):
                found = node.outputs[0], factors
        tensor = node.outputs[0]
        following = consumers(tensor)
        if len(following) != 1 or is_output(graph, tensor):
            return found
        (node,) = following
        product = node.op == "Mul" and node.inputs[0] is not node.inputs[1]
        if not product and node.op not in _PASSED:
            return found


def _factor(
    tensor: gs.Tensor, source: gs.Tensor | None, width: int
) -> tuple[list[gs.Constant], bool] | None:
    """What a factor is made of: (constants, whether the source is in it); None: something else."""
    if is_constant(tensor):
        size = tensor.values.size
        fits = size == 1 or (size == width and tensor.values.shape[-1] == width)
        return ([tensor], False) if fits else None
    if source is None:
        return None
    if same_values(tensor, source):
        return [], True
    node = producer(skip_back(tensor, _PASSED))
    if node is None or node.op != "Mul":
        return None
    for weight, data in (node.inputs, node.inputs[::-1]):
        constants = _factor(weight, None, width)
        if constants is not None and same_values(data, source):
            return constants[0], True
    return None


def _scale(
    output: gs.Variable, constants: list[gs.Constant], width: int, factor: float
) -> gs.Constant:
    """The weight of each channel: the graph's own constant where it is that."""
    if len(constants) == 1 and factor == 1 and constants[0].values.shape == (width,):
        return constants[0]
    product = np.full(width, factor, np.float64)
    for constant in constants:
        product = product * constant.values.reshape(-1)
    return gs.Constant(f"{output.name}/scale", product.astype(output.dtype))
