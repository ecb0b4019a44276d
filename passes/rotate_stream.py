"""Rotate the residual stream, so that no channel of what norms make of it holds an outlier.

A few channels of the stream are large in every token, and integers of one scale serve what a norm
makes of them badly. In a rotated stream no channel stands out, and the weights around it, which are
rotated along, have smaller outliers too (QuaRot, arXiv 2404.00456). The rotation goes into the
weights of the blocks, and costs one product before the first block and one in the last.
"""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.correct_bias import add_to_bias
from regcache.passes.encoder import Block, EncoderView, Linear
from regcache.passes.equalize_sources import norm_behind, refusal
from regcache.passes.find_blocks import view_encoder
from regcache.passes.rotated_stream import STREAM, rotated_stream
from regcache.passes.rotation_matrix import rotation_of_stream
from regcache.passes.walk import (
    consumers,
    data_inputs,
    is_constant,
    is_output,
    keeps_channels,
    producer,
    replace_everywhere,
)

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Weights that are turned at a time: each is in memory three times meanwhile, in float64.
_AT_ONCE = 4


@dataclass(frozen=True)
class RotateStream:
    """Rotate the residual stream [..., width] from the first block's input to the last one's.

    The last block's first norm still reads it rotated; what its own linears write is near the
    output, where channels are not alike. Norms keep their place and lose their weight and bias to
    the linears that read them; a layer scale goes into the linear before it. `seed` draws the
    rotation (see `rotation_of_stream`).
    Refused, and then nothing changes: a single block, a stream that something else than the blocks'
    norms and adds reads between the two ends (registers, outputs of middle layers), a norm that
    something else than linears reads, quantized linears, a linear whose product is a graph output
    before its bias, and a branch with anything but a bias and a layer scale.
    """

    seed: int = 0
    name: ClassVar[str] = "rotate_stream"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-3)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder."""
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Turn the weights, then the stream's two ends."""
        view = view_encoder(graph)
        reason = _why_not(view)
        if reason is not None:
            return Log((), (Skip("the residual stream", reason),))
        matrix = rotation_of_stream(view.width, self.seed)
        turned = _turned_weights(view, matrix)
        for norm, linears in _readers(view):
            _fold_norm(graph, norm, linears, turned)
        for linear, stream in _writers(view):
            _turn_output(graph, linear, stream, matrix, turned)
        _turn_ends(graph, view, matrix)
        return Log((Edit("the residual stream", f"{view.width} channels"),))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears; two products more, biases where there were none, no layer scales."""
        old, new = view_encoder(before), view_encoder(after)
        assert old.linear_shapes == new.linear_shapes
        assert rotated_stream(new)
        assert not list(_scales(new))
        biases = [sum(one.bias_add is not None for one in view.linears) for view in (old, new)]
        grown = 2 + biases[1] - biases[0] - len(list(_scales(old)))
        assert len(after.nodes) - len(before.nodes) == grown


def _why_not(view: EncoderView) -> str | None:
    """Why the stream cannot be rotated; None: it can."""
    if rotated_stream(view):
        return "rotated already"
    if len(view.blocks) < 2:
        return "there is one block"
    reasons = chain(
        (_unfit_stream(view, *pair) for pair in pairwise(view.blocks)),
        (_unfit_norm(view, *pair) for pair in _readers(view)),
        (_unfit_branch(view, *pair) for pair in _writers(view)),
    )
    return next((reason for reason in reasons if reason is not None), None)


def _unfit_stream(view: EncoderView, block: Block, following: Block) -> str | None:
    if block.output is not following.input:
        return f"something stands between {block.output.name} and the next block"
    for stream in (block.middle, block.output):
        if is_output(view.graph, stream) or len(consumers(stream)) != 2:
            return f"{stream.name} is read elsewhere"
    return None


def _unfit_norm(view: EncoderView, norm: gs.Node, linears: tuple[Linear, ...]) -> str | None:
    """Why a norm's weight and bias cannot go into the linears behind it; None: they can."""
    sites = [site for site in view.sites if site.linears[0] in linears]
    if len(sites) != 1 or sites[0].linears != linears:
        return f"{norm.name}: its linears read different activations"
    if norm_behind(view.graph, sites[0]) is not norm:
        return f"{norm.name}: something else reads it, or it has no weight for each channel"
    # Of what the norm's bias adds to a product, nothing shows before the linear's own bias.
    biased = [linear for linear in linears if linear.bias_add is not None]
    if any(is_output(view.graph, linear.matmul.outputs[0]) for linear in biased):
        return f"{sites[0].name}: its product is an output of the graph"
    reason = refusal(view, sites[0])
    return None if reason is None else f"{sites[0].name}: {reason}"


def _unfit_branch(view: EncoderView, linear: Linear, stream: gs.Variable) -> str | None:
    if linear.quantized:
        return f"{linear.name} is quantized already"
    fits = _branch(view.graph, linear, stream) is not None
    return None if fits else f"more than a bias and a layer scale follows {linear.name}"


def _readers(view: EncoderView) -> list[tuple[gs.Node, tuple[Linear, ...]]]:
    """The norms of the rotated stream, and the linears behind each."""
    found = []
    for block in view.blocks:
        found += [(block.norm1, block.attention.projections), (block.norm2, block.mlp.fc1)]
    return found[:-1]


def _writers(view: EncoderView) -> list[tuple[Linear, gs.Variable]]:
    """The linears that add to the rotated stream, and the stream behind each add."""
    found = []
    for block in view.blocks[:-1]:
        found += [(block.attention.out, block.middle), (block.mlp.fc2, block.output)]
    return found


def _branch(graph: gs.Graph, linear: Linear, stream: gs.Variable) -> tuple[gs.Node, ...] | None:
    """The Muls by a layer scale between a linear and its residual add.

    None: something else than these, a bias and what only moves tokens about.
    """
    found: list[gs.Node] = []
    tensor, add = linear.matmul.outputs[0], producer(stream)
    while True:
        if len(consumers(tensor)) != 1 or is_output(graph, tensor):
            return None
        (node,) = consumers(tensor)
        if node is add:
            return tuple(found)
        if node.op == "Mul" and len(data_inputs(node)) == 1:
            if _scale_of(node).shape not in {(), (1,), (linear.weight_shape[1],)}:
                return None
            found.append(node)
        elif node is not linear.bias_add and not keeps_channels(node):
            return None
        (tensor,) = node.outputs


def _scales(view: EncoderView) -> Iterator[gs.Node]:
    for linear, stream in _writers(view):
        yield from _branch(view.graph, linear, stream) or ()


def _scale_of(product: gs.Node) -> Doubles:
    constant = next(item for item in product.inputs if is_constant(item))
    return np.asarray(constant.values, np.float64)


def _turned_weights(view: EncoderView, matrix: Floats) -> dict[str, Floats]:
    """The new weight [K, N] of every linear around the rotated stream, by its name.

    Readers take their norm's weight in, writers their layer scale. Products are in float64.
    """
    turn = matrix.astype(np.float64)
    tasks = dict[str, Callable[[], Doubles]]()
    for norm, linears in _readers(view):
        scale = norm.inputs[1].values.astype(np.float64)
        for linear in linears:
            tasks[linear.name] = partial(_turned_rows, linear.weight, scale, turn)
    for linear, stream in _writers(view):
        scale = _layer_scale(view.graph, linear, stream)
        tasks[linear.name] = partial(_turned_columns, linear.weight, scale, turn)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        weights = pool.map(lambda task: np.asarray(task(), np.float32), tasks.values())
        return dict(zip(tasks, weights, strict=True))


def _turned_rows(weight: Floats, scale: Doubles, turn: Doubles) -> Doubles:
    product: Doubles = turn.T @ (scale[:, None] * weight.astype(np.float64))
    return product


def _turned_columns(weight: Floats, scale: Doubles, turn: Doubles) -> Doubles:
    product: Doubles = (weight.astype(np.float64) * scale) @ turn
    return product


def _layer_scale(graph: gs.Graph, linear: Linear, stream: gs.Variable) -> Doubles:
    """What a linear's output channels [N] are multiplied by before they are added to the stream."""
    scale = np.ones(linear.weight_shape[1])
    for product in _branch(graph, linear, stream) or ():
        scale = scale * _scale_of(product)
    return scale


def _fold_norm(
    graph: gs.Graph, norm: gs.Node, linears: tuple[Linear, ...], turned: Mapping[str, Floats]
) -> None:
    """Give a norm's weight and bias to the linears that read it, whose rows are turned."""
    has_bias = len(norm.inputs) > 2 and not norm.inputs[2].is_empty()
    for linear in linears:
        if has_bias:
            weight = linear.weight.astype(np.float64)
            shift = np.asarray(norm.inputs[2].values.astype(np.float64) @ weight, np.float32)
            add_to_bias(graph, linear, shift)
        _set_weight(linear, turned[linear.name])
    width = norm.inputs[1].values.size
    norm.inputs[1] = gs.Constant(f"{norm.name}/ones", np.ones(width, np.float32))
    if has_bias:
        norm.inputs[2] = gs.Constant(f"{norm.name}/zeros", np.zeros(width, np.float32))


def _turn_output(
    graph: gs.Graph,
    linear: Linear,
    stream: gs.Variable,
    matrix: Floats,
    turned: Mapping[str, Floats],
) -> None:
    """Let a linear write to the rotated stream, its layer scale included."""
    scale = _layer_scale(graph, linear, stream)
    for product in _branch(graph, linear, stream) or ():
        (data,), (output,) = data_inputs(product), product.outputs
        replace_everywhere(graph, output, data)
        product.outputs = []
    _set_weight(linear, turned[linear.name])
    add = linear.bias_add
    if add is not None:
        stored = next(item.values for item in add.inputs if is_constant(item))
        old = np.broadcast_to(stored.astype(np.float64).ravel(), scale.shape)
        bias = np.asarray((old * scale) @ matrix.astype(np.float64), np.float32)
        linear.replace_bias(gs.Constant(f"{linear.name}/bias/rotated", bias))


def _turn_ends(graph: gs.Graph, view: EncoderView, matrix: Floats) -> None:
    """Rotate what the first block reads, and rotate back what the last one adds to."""
    first, last = view.blocks[0], view.blocks[-1]
    inside = _product(graph, "in", first.input, matrix)
    for node in (first.norm1, producer(first.middle)):
        _reread(node, first.input, inside)
    outside = _product(graph, "out", last.input, np.ascontiguousarray(matrix.T))
    _reread(producer(last.middle), last.input, outside)


def _reread(node: gs.Node | None, old: gs.Variable, new: gs.Variable) -> None:
    assert node is not None
    node.inputs = [new if item is old else item for item in node.inputs]


def _product(graph: gs.Graph, where: str, tensor: gs.Variable, matrix: Floats) -> gs.Variable:
    name = f"{STREAM}/{where}"
    output = gs.Variable(f"{name}/out", dtype=np.float32)
    constant = gs.Constant(f"{name}/matrix", matrix)
    graph.nodes.append(gs.Node("MatMul", name, {}, [tensor, constant], [output]))
    return output


def _set_weight(linear: Linear, weight: Floats) -> None:
    linear.matmul.inputs[1] = gs.Constant(f"{linear.name}/rotated", weight)
