"""Bring packed projections of queries, keys and values into timm's order, whoever exported them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.axis_factors import LostTrackError
from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Linear
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.packed_parts import Part, find_parts
from regcache.passes.split_qkv import packed_thirds
from regcache.passes.walk import is_constant, producer
from regcache.passes.write_nodes import NodeWriter

# Writes one node on a tensor; it makes the output that is given, or one of its own.
_Step = Callable[[gs.Tensor, gs.Variable | None], gs.Variable]


@dataclass(frozen=True)
class OrderQkv:
    """Write [B, T, 3 C] -> Reshape [B, T, 3, heads, D] -> Transpose [3, B, heads, T, D] -> Gather.

    That is the one form that the passes behind read. Matched: one linear for queries, keys and
    values that Reshape, Transpose, Split, Slice, Gather, Squeeze, Unsqueeze and Flatten nodes part
    in any order: its columns are put in timm's order where they are in another. What is packed
    another way (keys and values alone, channels of all heads as one axis) becomes a linear each.
    Tokens before images [T, B, C] are turned round before the projection rather than behind it.
    Refused: parts that something reads together, that are of unequal size or an output of the
    graph, and a quantized projection.
    """

    name: ClassVar[str] = "order_qkv"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without blocks is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Write the nodes from the projection to its parts; the old ones fall to the clean-up."""
        edits, skips = [], []
        try:
            view = view_encoder(graph)
        except InputError:
            return Log()  # the reason is for whoever needs the blocks
        for block in view.blocks:
            for linear in block.attention.projections:
                letters = linear.name.rpartition(".")[2]
                if len(letters) == 1 or packed_thirds(linear) is not None:
                    continue
                try:
                    if linear.quantized:
                        raise LostTrackError("it is quantized")
                    parts = find_parts(graph, block.attention, linear, view.head_dim)
                    what = _order(graph, linear, parts)
                except LostTrackError as error:
                    skips.append(Skip(linear.name, str(error)))
                else:
                    edits.append(Edit(linear.name, what))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same columns, in one linear or in one each."""
        old, new = view_encoder(before), view_encoder(after)
        assert (old.heads, old.head_dim) == (new.heads, new.head_dim)
        for one, other in zip(old.blocks, new.blocks, strict=True):
            columns = [
                sum(linear.weight_shape[1] for linear in block.attention.projections)
                for block in (one, other)
            ]
            assert columns[0] == columns[1]


def _order(graph: gs.Graph, linear: Linear, parts: Mapping[str, Part]) -> str:
    """Write one projection's parts anew; returns what was done."""
    batch = _batch_axis(linear, parts)
    source = linear.input if batch == 0 else _turned_round(linear)
    axes = {letter: _axes(part, batch) for letter, part in parts.items()}
    write = NodeWriter(graph, f"{linear.matmul.outputs[0].name}/parts")
    heads = {part.heads for part in parts.values()}
    if len(parts) < 3 or None in heads or len(heads) > 1:
        for letter, part in parts.items():
            steps = _projection(write, letter, linear, part.columns)
            steps += _arrangement(write, letter, part, axes[letter], "btc")
            _take(steps, source, part.tensor)
        return "a linear each"
    sizes = heads.pop() or ()
    columns = np.concatenate([part.columns for part in parts.values()])
    if source is linear.input and np.array_equal(columns, np.arange(len(columns))):
        packed: gs.Tensor = linear.output
    else:
        packed = _take(_projection(write, "qkv", linear, columns), source)
    apart = write.reshape("apart", packed, 0, 0, 3, *sizes)
    turned = write.transpose("turned", apart, 2, 0, 3, 1, 4)
    for index, (letter, part) in enumerate(parts.items()):
        place = write.constant(f"{letter}/index", np.array(index, np.int64))
        third = partial(_gather, write, letter, place)
        steps = _arrangement(write, letter, part, axes[letter], "bhtd")
        _take([third, *steps], turned, part.tensor)
    return "in timm's order"


def _batch_axis(linear: Linear, parts: Mapping[str, Part]) -> int:
    """Which of a projection's first two axes counts images; the other one counts tokens."""
    shape = linear.output.shape
    unknown = [axis for axis, dim in enumerate(shape) if not isinstance(dim, int)]
    if len(shape) != 3 or len(unknown) > 1:
        raise LostTrackError(f"its output has the shape {shape}")
    if unknown:
        return unknown[0]
    # Matrices have tokens and channels last.
    last = [
        factor.source
        for part in parts.values()
        for axis in part.layout.axes[-2:]
        for factor in axis
        if factor.source != part.layout.channels
    ]
    return 1 if last and set(last) == {0} else 0


def _turned_round(linear: Linear) -> gs.Tensor:
    """What a projection of [T, B, C] reads, as [B, T, C]."""
    node = producer(linear.input)
    if node is None or node.op != "Transpose" or node.attrs.get("perm") != [1, 0, 2]:
        raise LostTrackError("its tokens come before its images")
    return node.inputs[0]


def _axes(part: Part, batch: int) -> list[str]:
    """What each axis of a part counts: b images, t tokens, h heads, d channels of a head, c all."""
    lead = {batch: "b", 1 - batch: "t"}
    channels = dict(zip(part.channels, "c" if part.heads is None else "hd", strict=False))
    axes = [
        "".join(channels.get(factor) or lead.get(factor.source, "?") for factor in axis)
        for axis in part.layout.axes
    ]
    counted = "".join(axes)
    if "".join(sorted(counted)) not in {"bct", "bdht", "ct", "dht"}:
        raise LostTrackError(f"{part.tensor.name!r} has its tokens or images on several axes")
    return axes


def _projection(
    write: NodeWriter, name: str, linear: Linear, columns: NDArray[np.int64]
) -> list[_Step]:
    """A linear with some columns of another."""
    weight = write.constant(f"{name}/weight", np.ascontiguousarray(linear.weight[:, columns]))
    steps: list[_Step] = [
        lambda data, output: write.node("MatMul", f"{name}/matmul", [data, weight], output)
    ]
    if linear.bias_add is not None:
        values = next(item.values for item in linear.bias_add.inputs if is_constant(item))
        whole = np.broadcast_to(values, linear.weight_shape[1:])
        bias = write.constant(f"{name}/bias/values", whole[columns])
        steps.append(
            lambda tensor, output: write.node("Add", f"{name}/bias", [tensor, bias], output)
        )
    return steps


def _arrangement(
    write: NodeWriter, name: str, part: Part, axes: Sequence[str], have: str
) -> list[_Step]:
    """The nodes from [B, T, C] or [B, heads, T, D] to the axes of a part."""
    steps: list[_Step] = []
    sizes = part.heads
    if have == "btc" and sizes is not None:
        have = "bthd"
        steps.append(
            lambda tensor, output: write.reshape(
                f"{name}/apart", tensor, 0, 0, *sizes, output=output
            )
        )
    counted = "".join(axes)
    fixed = "b" not in counted  # a batch of one image leaves no trace
    perm = [have.index(kind) for kind in ("b" if fixed else "") + counted]
    if perm != sorted(perm):
        steps.append(
            lambda data, output: write.transpose(f"{name}/turned", data, *perm, output=output)
        )
    if fixed or any(len(axis) != 1 for axis in axes):
        lengths = [prod(factor.size for factor in axis) for axis in part.layout.axes]
        target = [-1 if "b" in axis else size for axis, size in zip(axes, lengths, strict=True)]
        steps.append(
            lambda data, output: write.reshape(f"{name}/merged", data, *target, output=output)
        )
    return steps


def _gather(
    write: NodeWriter, name: str, place: gs.Constant, tensor: gs.Tensor, output: gs.Variable | None
) -> gs.Variable:
    return write.node("Gather", name, [tensor, place], output, axis=0)


def _take(
    steps: Sequence[_Step], tensor: gs.Tensor, output: gs.Variable | None = None
) -> gs.Variable:
    """Write steps one behind the other; the last makes `output`, where one is given."""
    made = tensor
    for step in steps:
        made = step(made, output if step is steps[-1] else None)
    return made
