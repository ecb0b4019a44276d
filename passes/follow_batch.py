"""Carry the batch's place through one operator (see batch_place)."""

from collections.abc import Callable, Mapping, Sequence

import onnx_graphsurgeon as gs

from regcache.passes.batch_place import (
    Place,
    StuckError,
    axes_of,
    int_values,
    slice_axes,
    static_shape,
)

Places = Mapping[int, Place]
"""Places by the tensor's id; tensors that do not depend on the image have none."""
_Rule = Callable[[gs.Node, Place, int], Sequence[Place]]

ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "And",
        "BitwiseAnd",
        "BitwiseNot",
        "BitwiseOr",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Div",
        "Dropout",
        "Elu",
        "Equal",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "Greater",
        "GreaterOrEqual",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Less",
        "LessOrEqual",
        "Log",
        "Max",
        "Mean",
        "Min",
        "Mish",
        "Mod",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "PRelu",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Sum",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
        "Where",
        "Xor",
    ]
)


def only_place(node: gs.Node, places: Places) -> Place:
    """The place in the node's first input; raises StuckError when another input has one too."""
    found = [number for number, item in enumerate(node.inputs) if id(item) in places]
    if found != [0]:
        raise StuckError(node, "takes the images by an input that is not followed")
    return places[id(node.inputs[0])]


def follow_single(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    """Places in the outputs of an operator with one input that depends on the image.

    Raises StuckError where the operator mixes images or is not known.
    """
    rule = _RULES.get(node.op)
    if rule is None:
        raise StuckError(node, "is not known to keep images apart")
    return rule(node, place, batch)


def _rank(node: gs.Node) -> int:
    return len(static_shape(node.inputs[0], node))


def _same(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    return [place] * len(node.outputs)


def _first_axis(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if place.axis != 0:
        raise StuckError(node, f"has the batch on axis {place.axis}")
    return _same(node, place, batch)


def _batch_norm(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if node.attrs.get("training_mode", 0):
        raise StuckError(node, "takes the statistics of the batch")
    return _first_axis(node, place, batch)


def _along_axis(default: int) -> _Rule:
    """An operator that works along its attribute `axis` and leaves the others alone."""

    def rule(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
        if place.axis == int(node.attrs.get("axis", default)) % _rank(node):
            raise StuckError(node, "works along the batch")
        return _same(node, place, batch)

    return rule


def _normalisation(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if place.axis >= int(node.attrs.get("axis", -1)) % _rank(node):
        raise StuckError(node, "normalises over the batch")
    return [place, *(place for _ in node.outputs[1:])]


def _reduction(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if node.op.startswith("Arg"):
        axes: list[int] | None = [int(node.attrs.get("axis", 0))]
    else:
        axes = axes_of(node, 1)
    rank = _rank(node)
    reduced = {axis % rank for axis in axes} if axes else set(range(rank))
    if axes is None and node.attrs.get("noop_with_empty_axes", 0):
        reduced = set()
    if place.axis in reduced:
        raise StuckError(node, "reduces over the batch")
    kept = node.attrs.get("keepdims", 1)
    return [place if kept else place.moved(place.axis - sum(a < place.axis for a in reduced))]


def _transpose(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    perm = node.attrs.get("perm") or list(reversed(range(_rank(node))))
    return [place.moved(list(perm).index(place.axis))]


def _squeeze(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    shape, axes = static_shape(node.inputs[0], node), axes_of(node, 1)
    if axes is None and batch == 1:
        raise StuckError(node, "drops every axis of length 1, perhaps the batch")
    gone = {i for i, dim in enumerate(shape) if dim == 1}
    if axes is not None:
        gone = {axis % len(shape) for axis in axes}
    if place.axis in gone:
        raise StuckError(node, "drops the batch")
    return [place.moved(place.axis - sum(axis < place.axis for axis in gone))]


def _unsqueeze(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    rank = len(static_shape(node.outputs[0], node))
    new = {axis % rank for axis in axes_of(node, 1) or ()}
    old = [axis for axis in range(rank) if axis not in new]
    return [place.moved(old[place.axis])]


def _gather(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    axis = int(node.attrs.get("axis", 0)) % _rank(node)
    if axis == place.axis:
        raise StuckError(node, "picks images of the batch")
    added = len(static_shape(node.inputs[1], node)) - 1
    return [place if place.axis < axis else place.moved(place.axis + added)]


def _slice(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    axes = slice_axes(node)
    if place.axis in axes:
        before, after = (
            static_shape(t, node)[place.axis] for t in (node.inputs[0], node.outputs[0])
        )
        steps = int_values(node.inputs[4], node) if len(node.inputs) > 4 else [1] * len(axes)
        if before != after or steps[axes.index(place.axis)] != 1:
            raise StuckError(node, "cuts the batch")
    return [place]


def _pad(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    before = static_shape(node.inputs[0], node)[place.axis]
    if static_shape(node.outputs[0], node)[place.axis] != before:
        raise StuckError(node, "pads the batch")
    return [place]


def _tile(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if int_values(node.inputs[1], node)[place.axis] != 1:
        raise StuckError(node, "repeats the batch")
    return [place]


def _expand(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    source, result = (static_shape(item, node) for item in (node.inputs[0], node.outputs[0]))
    axis = place.axis + len(result) - len(source)
    if result[axis] != source[place.axis]:
        raise StuckError(node, "repeats the batch")
    return [place.moved(axis)]


def _resize(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if place.axis in _resized_axes(node):
        raise StuckError(node, "resizes the batch")
    if node.attrs.get("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise StuckError(node, "has sizes that depend on one another")
    if node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        raise StuckError(node, "crops by a region")
    return [place]


def _resized_axes(node: gs.Node) -> list[int]:
    pairs = zip(*(static_shape(t, node) for t in (node.inputs[0], node.outputs[0])), strict=True)
    return [axis for axis, (old, new) in enumerate(pairs) if old != new]


def _trilu(node: gs.Node, place: Place, batch: int) -> Sequence[Place]:
    if place.axis >= _rank(node) - 2:
        raise StuckError(node, "works along the batch")
    return [place]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(["Softmax", "LogSoftmax", "Hardmax", "TopK", "Split"], _along_axis(-1)),
    "Split": _along_axis(0),
    "BatchNormalization": _batch_norm,
    "CastLike": _same,
    **dict.fromkeys(
        [
            "AveragePool",
            "Conv",
            "ConvTranspose",
            "DepthToSpace",
            "GlobalAveragePool",
            "GlobalMaxPool",
            "GroupNormalization",
            "InstanceNormalization",
            "LRN",
            "LpPool",
            "MaxPool",
            "SpaceToDepth",
        ],
        _first_axis,
    ),
    **dict.fromkeys(
        ["LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"], _normalisation
    ),
    **dict.fromkeys(
        [
            "ReduceMean",
            "ReduceSum",
            "ReduceMax",
            "ReduceMin",
            "ReduceL1",
            "ReduceL2",
            "ReduceProd",
            "ReduceSumSquare",
            "ReduceLogSumExp",
            "ReduceLogSum",
            "ArgMax",
            "ArgMin",
        ],
        _reduction,
    ),
    "LpNormalization": _along_axis(-1),
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Gather": _gather,
    "Slice": _slice,
    "Pad": _pad,
    "Tile": _tile,
    "Expand": _expand,
    "Resize": _resize,
    "Trilu": _trilu,
}
