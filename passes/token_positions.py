"""Places in a graph that depend on token positions: splits off the prefix, rotary tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.encoder import EncoderView
from regcache.passes.errors import InputError
from regcache.passes.walk import (
    HEAD_OPS,
    consumers,
    data_inputs,
    is_constant,
    is_output,
    upstream,
)


@dataclass(frozen=True)
class SplitPlace:
    """A Split of the sequence into prefix and patches, with its two constant sizes."""

    node: gs.Node

    @property
    def sizes(self) -> list[int]:
        """The number of tokens in each part."""
        sizes: list[int] = self.node.inputs[1].values.tolist()
        return sizes


@dataclass(frozen=True)
class TablePlace:
    """A Mul of heads [B, H, N, D] with a rotary table [..., N, D]; `sine` multiplies the halves
    that were swapped, and so is 0 where there is no rotation (the cosine is 1)."""

    node: gs.Node
    slot: int
    sine: bool

    @property
    def table(self) -> gs.Constant:
        """The table, shared with other places: replace it, never write into it."""
        constant: gs.Constant = self.node.inputs[self.slot]
        return constant


@dataclass(frozen=True)
class Positions:
    """The splits and rotary tables in a stretch of blocks."""

    splits: tuple[SplitPlace, ...]
    tables: tuple[TablePlace, ...]


def between(view: EncoderView, start: gs.Tensor, end: gs.Tensor | None) -> list[gs.Node]:
    """The nodes that compute `end` from `start`, or everything downstream of `start`."""
    forward: dict[int, gs.Node] = {}
    waiting = list(consumers(start))
    while waiting:
        node = waiting.pop()
        if id(node) not in forward:
            forward[id(node)] = node
            if not any(output is end for output in node.outputs):
                waiting.extend(n for output in node.outputs for n in consumers(output))
    if end is None:
        return list(forward.values())
    behind = upstream(end, lambda node: node.inputs if id(node) in forward else ())
    return [node for node in behind if id(node) in forward]


def leaving(graph: gs.Graph, nodes: Sequence[gs.Node], end: gs.Tensor) -> gs.Tensor | None:
    """The first tensor but `end` that `nodes` make for others, or as an output; None without."""
    inside = {id(node) for node in nodes}
    for node in graph.nodes:
        for made in node.outputs if id(node) in inside else ():
            leaves = any(id(reader) not in inside for reader in consumers(made))
            if made is not end and (leaves or is_output(graph, made)):
                return made
    return None


def find_positions(nodes: Iterable[gs.Node], view: EncoderView) -> Positions:
    """The splits and rotary tables among `nodes`.

    Raises InputError, naming the node, at one that depends on positions in a way that is not
    understood: a mask or bias per token, a slice that ends at a fixed token, a reshape that mixes
    tokens with the batch.
    """
    tokens, patches = view.tokens, view.patches
    lengths = {tokens, patches} - {None, 1}
    splits, tables = [], []
    for node in nodes:
        if node.op == "Split" and len(node.inputs) > 1 and is_constant(node.inputs[1]):
            if sum(node.inputs[1].values.tolist()) == tokens:
                splits.append(SplitPlace(node))
        elif node.op == "Slice":
            _check_slice(node, lengths)
        elif node.op == "Reshape":
            _check_reshape(node, lengths)
        elif node.op in {"Add", "Mul", "Sub", "Div", "Where"}:
            for slot, item in enumerate(node.inputs):
                if is_constant(item) and len(item.shape) >= 2 and lengths & set(item.shape[:-1]):
                    tables.append(_table(node, slot))
    return Positions(tuple(splits), tuple(tables))


def _check_slice(node: gs.Node, lengths: set[int | None]) -> None:
    ends = node.inputs[2]
    if is_constant(ends) and set(ends.values.tolist()) & lengths:
        shape = node.inputs[0].shape or []
        if lengths & set(shape[1:-1]):
            raise InputError(f"registers: Slice {node.name!r} ends at a fixed token")


def _check_reshape(node: gs.Node, lengths: set[int | None]) -> None:
    """A shape that does not copy the batch would let it absorb a change of the tokens."""
    target, dims = node.inputs[1], node.inputs[0].shape
    copies = is_constant(target) and target.values[0] == 0 and not node.attrs.get("allowzero", 0)
    if not copies and (dims is None or lengths & set(dims[1:])):
        raise InputError(f"registers: Reshape {node.name!r} needs every position")


def _table(node: gs.Node, slot: int) -> TablePlace:
    table = node.inputs[slot]
    data = node.inputs[1 - slot] if len(node.inputs) == 2 else None
    if node.op != "Mul" or data is None or len(data.shape or ()) != 4:
        raise InputError(f"registers: {node.op} {node.name!r} holds a constant for every token")
    if table.shape[-2] != data.shape[2] or int(np.prod(table.shape[:-2])) != 1:
        raise InputError(f"registers: {node.op} {node.name!r} is no rotary table per token")
    return TablePlace(node, slot, _swaps_halves(data))


def _swaps_halves(tensor: gs.Tensor) -> bool:
    """Whether the heads were negated in part on the way: rotate-half, the sine's operand."""

    def follow(node: gs.Node) -> list[gs.Tensor]:
        return data_inputs(node) if node.op in HEAD_OPS - {"Add", "Mul"} else []

    return any(node.op == "Neg" for node in upstream(tensor, follow))
