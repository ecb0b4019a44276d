"""Prefix cached registers to the keys and values of attention (RegCache, mode kv)."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.encoder import Block, EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.key_scale import key_scale, scalar
from regcache.passes.register_nodes import (
    check_blocks,
    first_marked,
    insert_concat,
    over_batch,
)
from regcache.passes.token_positions import between, leaving
from regcache.passes.walk import consumers, count_ops, is_output, producer

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SpliceRegisters:
    """Concatenate R registers to K and V of every attention from block `start` to `end` - 1.

    `keys`, `values`: float32 [end - start, heads, R, head_dim] as they enter attention, after any
    rotation or norm of the keys and before the scaling of the scores (see capture_registers).
    Registers are never queries, pass no MLP and get no rotation. R = 0 leaves the graph alone.

    Matched: softmax between two matmuls, operands of rank 4 [B, heads, ...] or merged [B heads,
    ...], the scale on either operand; ONNX's Attention without mask or cache. Refused with
    InputError: a mask that remains, attention that is an output or read elsewhere, registers that
    do not fit the heads, blocks spliced already.
    """

    start: int
    end: int
    keys: Floats
    values: Floats
    name: ClassVar[str] = "splice_registers"
    parity: ClassVar[Parity] = Lossy()

    @property
    def count(self) -> int:
        """R, the number of registers."""
        return int(self.keys.shape[2])

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder whose heads the registers fit."""
        view = view_encoder(graph)
        check_blocks(self.start, self.end, len(view.blocks))
        blocks = self.end - self.start
        if self.keys.ndim != 4 or self.keys.shape != self.values.shape:
            raise InputError("registers: keys and values need one shape, [blocks, heads, R, dim]")
        wanted = (blocks, view.heads, self.count, view.head_dim)
        if self.keys.shape != wanted:
            raise InputError(
                f"registers: shape {self.keys.shape} does not fit {blocks} blocks of "
                f"{view.heads} heads of {view.head_dim}"
            )
        if not (np.isfinite(self.keys).all() and np.isfinite(self.values).all()):
            raise InputError("registers: keys and values must be finite")
        for block in view.blocks[self.start : self.end]:
            _check_attention(view, block)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert a Concat before the scores and one before the values' matmul of each block."""
        if self.count == 0:
            return Log()
        view = view_encoder(graph)
        edits = []
        for block in view.blocks[self.start : self.end]:
            self._splice(graph, view, block)
            edits.append(Edit(f"blocks.{block.index}", f"{self.count} registers in K and V"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Two Concat nodes a block, the same blocks, the outputs' shapes as they were."""
        assert count_ops(after, "Concat") - count_ops(before, "Concat") >= 2 * (
            self.end - self.start
        )
        assert len(view_encoder(after).blocks) == len(view_encoder(before).blocks)
        for old, new in zip(before.outputs, after.outputs, strict=True):
            assert old.name == new.name
            assert old.shape[1:] == new.shape[1:]

    def _splice(self, graph: gs.Graph, view: EncoderView, block: Block) -> None:
        attention, index = block.attention, block.index - self.start
        keys, values = self.keys[index], self.values[index]
        name = f"kv/blocks.{block.index}"
        if attention.scores is attention.context:
            for slot, letter, cached in ((1, "k", keys), (2, "v", values)):
                shaped, axis = _for_attention_op(cached, len(attention.scores.inputs[slot].shape))
                registers = over_batch(graph, shaped, f"{name}/{letter}")
                insert_concat(
                    graph, attention.scores, slot, registers, axis, f"{name}/{letter}/concat"
                )
            return
        scaled = keys * np.float32(key_scale(attention.key))
        for node, cached, axis, letter in (
            (attention.scores, scaled.swapaxes(1, 2), -1, "k"),
            (attention.context, values, -2, "v"),
        ):
            rank = len(node.inputs[1].shape)
            shaped = np.ascontiguousarray(cached[None], dtype=np.float32)
            registers = over_batch(graph, shaped, f"{name}/{letter}")
            if rank == 3:
                registers = _merge_heads(graph, registers, cached.shape)
            insert_concat(graph, node, 1, registers, rank + axis, f"{name}/{letter}/concat")


def _check_attention(view: EncoderView, block: Block) -> None:
    graph, attention = view.graph, block.attention
    where = f"blocks.{block.index}"
    if first_marked(graph.nodes, f"kv/{where}/") is not None:
        raise InputError(f"registers: {where} has registers already")
    if attention.scores is attention.context:
        node = attention.scores
        extra = [tensor for tensor in node.inputs[3:] if not tensor.is_empty()]
        if extra or node.attrs.get("is_causal", 0):
            raise InputError(f"registers: {node.op} {node.name!r} has a mask or a cache")
        if any(consumers(item) or is_output(graph, item) for item in node.outputs[1:]):
            raise InputError(f"registers: the attention of {where} leaves the encoder")
        return
    weights = between(view, attention.scores.outputs[0], attention.context.outputs[0])
    end = attention.context.outputs[0]
    if leaving(graph, [attention.scores, *weights], end) is not None:
        raise InputError(f"registers: the attention of {where} leaves the encoder")
    # What stands between the scores and the softmax must not depend on the number of keys.
    node = producer(attention.softmax.inputs[0])
    while node is not None and node is not attention.scores:
        others = [item for item in node.inputs if item is not node.inputs[0]]
        if node.op not in {"Mul", "Div", "Cast", "Identity"} or not all(map(scalar, others)):
            raise InputError(f"registers: {node.op} {node.name!r} masks the scores of {where}")
        node = producer(node.inputs[0])


def _for_attention_op(cached: Floats, rank: int) -> tuple[Floats, int]:
    """[1, heads, R, dim] and its token axis, or [1, R, heads dim] for inputs of rank 3."""
    if rank == 4:
        return np.ascontiguousarray(cached[None]), 2
    heads, count, dim = cached.shape
    return np.ascontiguousarray(cached.swapaxes(0, 1).reshape(1, count, heads * dim)), 1


def _merge_heads(graph: gs.Graph, registers: gs.Tensor, shape: tuple[int, ...]) -> gs.Tensor:
    """[B, heads, X, Y] -> [B heads, X, Y]."""
    merged = gs.Variable(f"{registers.name}/merged", dtype=np.float32)
    target = gs.Constant(f"{registers.name}/shape", np.array([-1, *shape[1:]], dtype=np.int64))
    node = gs.Node("Reshape", f"{registers.name}/merge", {}, [registers, target], [merged])
    graph.nodes.append(node)
    return merged
