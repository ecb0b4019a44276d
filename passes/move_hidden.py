"""Move what a few hidden units of MLPs hold to a token of its own (test-time registers)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.encoder import Block, EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import MOVED, REGISTERS, TOKENS, rotates
from regcache.passes.register_nodes import LAST, Writer
from regcache.passes.walk import (
    data_inputs,
    is_constant,
    keeps_channels,
    producer,
    skip_affine,
    skip_rotation,
)

Floats = NDArray[np.float64]

_ZERO_AT_ZERO = frozenset({"gelu", "gelu_tanh", "quick_gelu", "silu", "relu"})


@dataclass(frozen=True)
class MoveHidden:
    """Let the last token have the largest activation of some hidden units, and no other any.

    Some units of MLPs make the sinks: they are large there and nowhere else (arXiv 2506.08010). For
    each `(block, unit)` of `units` the largest activation over all other tokens goes to the last
    one, which SpliceRegisterTokens has appended, and all others get zero. The encoder's linears
    hold zeros for these units; what they added to the stream is computed beside them, in float,
    from one small product of the MLP's norm. So no range that is quantized holds their outliers.

    Refused with InputError: a graph whose last token is not appended, or not at these blocks, the
    last block, MLPs that are gated, quantized, or whose activation is not known to be zero at zero,
    and nodes behind the activation that are not understood.
    """

    units: tuple[tuple[int, int], ...]
    name: ClassVar[str] = "move_hidden"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder whose last token runs along in the blocks of the units."""
        view = view_encoder(graph)
        running = _running_along(view)
        for index, units in self._by_block().items():
            if index not in running or index + 1 not in running:
                raise InputError(f"units: no token is appended at block {index} and the next")
            mlp = view.blocks[index].mlp
            if len(mlp.fc1) > 1 or mlp.activation not in _ZERO_AT_ZERO:
                raise InputError(f"units: the MLP of block {index} is gated, or {mlp.activation}")
            if mlp.fc1[0].quantized or mlp.fc2.quantized:
                raise InputError(f"units: the MLP of block {index} is quantized")
            hidden = mlp.fc1[0].weight_shape[1]
            if not 0 <= min(units) <= max(units) < hidden:
                raise InputError(f"units: block {index} has hidden units 0 to {hidden - 1}")
            _pushed(view.blocks[index], units)
        if any(node.name.startswith(MOVED) for node in graph.nodes):
            raise InputError("units: some are moved already")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Zero the units' weights, and add what they held to the last token."""
        view, edits = view_encoder(graph), []
        for index, units in self._by_block().items():
            _move(graph, view.blocks[index], units)
            edits.append(Edit(f"blocks.{index}.fc1", f"{len(units)} units moved to the last token"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears, and the outputs' shapes as they were."""
        assert view_encoder(before).linear_shapes == view_encoder(after).linear_shapes
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert old.shape[1:] == new.shape[1:]

    def _by_block(self) -> dict[int, list[int]]:
        """The units of each block, in order."""
        found = dict[int, list[int]]()
        for block, unit in sorted(set(self.units)):
            found.setdefault(block, []).append(unit)
        return found


def _running_along(view: EncoderView) -> range:
    """The blocks in which appended tokens run along; none without."""
    names = [block.input.name for block in view.blocks]
    start = next((i for i, name in enumerate(names) if name == f"{TOKENS}concat/out"), None)
    if start is None:
        return range(0)
    end = next((i for i, name in enumerate(names) if name == f"{TOKENS}slice/out"), len(names))
    return range(start, end)


def _move(graph: gs.Graph, block: Block, units: list[int]) -> None:
    """The nodes of one block; its stream goes on behind them."""
    write = Writer(graph, f"move/{block.index}")
    (fc1,), added = block.mlp.fc1, _pushed(block, units)
    weight, bias = fc1.weight[:, units], fc1.bias[units]
    others = write.slice("others", block.middle, 0, -1)
    norm = block.norm2
    normed = write.node(norm.op, "norm", [others, *norm.inputs[1:]], **norm.attrs)
    product = write.node("MatMul", "product", [normed, _constant(write, "weight", weight)])
    biased = write.node("Add", "biased", [product, _constant(write, "bias", bias)])
    held = _activated(write, block, biased)
    largest = write.node("ReduceMax", "largest", [held, write.ints("tokens", 1)], keepdims=1)
    _zero(block, units)  # the activation behind it has been copied
    moved = write.node("MatMul", "moved", [largest, _constant(write, "added", added)])
    stream = block.output
    readers = list(stream.outputs)
    first = write.slice("first", stream, 0, -1)
    last = write.node("Add", "last", [write.slice("appended", stream, -1, LAST), moved])
    joined = write.node("Concat", "stream", [first, last], axis=1)
    for node in readers:
        node.inputs = [joined if item is stream else item for item in node.inputs]


def _zero(block: Block, units: list[int]) -> None:
    """Take the units out of fc1, so that their activation is zero."""
    (fc1,) = block.mlp.fc1
    weight = fc1.weight.copy()
    weight[:, units] = 0
    fc1.matmul.inputs[1] = gs.Constant(f"{MOVED}{fc1.name}/weight", weight)
    if fc1.bias_add is not None:
        bias = fc1.bias
        bias[units] = 0
        fc1.replace_bias(gs.Constant(f"{MOVED}{fc1.name}/bias", bias))


def _activated(write: Writer, block: Block, product: gs.Tensor) -> gs.Tensor:
    """The block's activation function, node by node, of another product."""
    start = block.mlp.fc1[0].output
    made: dict[int, gs.Tensor] = {id(start): product}

    def copied(tensor: gs.Tensor) -> gs.Tensor:
        if is_constant(tensor):
            return tensor
        if id(tensor) not in made:
            node = producer(tensor)
            assert node is not None
            inputs = [copied(item) for item in node.inputs]
            made[id(tensor)] = write.node(node.op, f"act_{len(made)}", inputs, **node.attrs)
        return made[id(tensor)]

    return copied(activation_of(block))


def activation_of(block: Block) -> gs.Tensor:
    """What a block's activation function makes [..., K], not rotated, shifted nor equalized."""
    return skip_rotation(skip_affine(block.mlp.fc2.input))


def _pushed(block: Block, units: list[int]) -> Floats:
    """What each unit adds to the stream for an activation of 1, [units, width].

    Raises InputError for nodes that are not understood.
    """
    hidden = block.mlp.fc1[0].weight_shape[1]
    rows = np.zeros((len(units), hidden))
    rows[np.arange(len(units)), units] = 1
    for node in _path(block.mlp.fc2.input, activation_of(block)):
        rows = _through(node, rows)
    rows = rows @ block.mlp.fc2.weight.astype(np.float64)
    add = producer(block.output)
    assert add is not None
    branch = next(item for item in data_inputs(add) if item is not block.middle)
    for node in _path(branch, block.mlp.fc2.output):
        rows = _through(node, rows)
    return rows


def _path(end: gs.Tensor, start: gs.Tensor) -> list[gs.Node]:
    """The nodes from `start` to `end`, in the order in which data meets them."""
    nodes = list[gs.Node]()
    while end is not start:
        node = producer(end)
        if node is None or len(data_inputs(node)) != 1:
            raise InputError("units: what stands behind the activation is not understood")
        nodes.append(node)
        (end,) = data_inputs(node)
    return nodes[::-1]


def _through(node: gs.Node, rows: Floats) -> Floats:
    """Rows [n, K] behind a linear node, but for the constant that it adds."""
    if node.op in {"Add", "Sub"} or (keeps_channels(node) and not rotates(node)):
        return rows
    if node.op == "Mul" or (node.op == "Div" and is_constant(node.inputs[1])):
        factors = next(item for item in node.inputs if is_constant(item)).values.reshape(-1)
        return np.asarray(rows / factors if node.op == "Div" else rows * factors)
    if node.op == "Reshape" and rotates(node):
        kept = [int(side) for side in node.inputs[1].values if side != 0]
        return rows.reshape(len(rows), *kept)
    if node.op == "MatMul" and is_constant(node.inputs[1]):
        return np.asarray(rows @ node.inputs[1].values.astype(np.float64))
    raise InputError(f"units: {node.op} {node.name!r} behind the activation is not understood")


def _constant(write: Writer, name: str, values: NDArray[np.floating]) -> gs.Constant:
    full = f"{REGISTERS}/{write.prefix}/{name}"
    return gs.Constant(full, np.ascontiguousarray(values, np.float32))
