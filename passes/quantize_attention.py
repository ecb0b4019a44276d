"""Put Q/DQ pairs before both matmuls of attention (ONNX QuantizeLinear, opset 13)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.affine import Affine
from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.encoder import Attention, EncoderView
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.qdq_nodes import free_name, insert_pair
from regcache.passes.walk import count_ops, producer

_OPERANDS = "queries, keys or values"
LONGEST = 512
"""Keys up to which TensorRT fuses int8 attention, registers included."""
PROBABILITIES = Affine(1 / 127, 0, "int8")
"""The scale of softmax's output, which lies in [0, 1]."""


@dataclass(frozen=True)
class QuantizeAttention:
    """Quantize the operands of q k^T and of probabilities v: int8 per tensor, zero point 0.

    `activations` gives the scales of queries (after their scaling), keys and values by the names
    of their tensors (see attention_operands); probabilities that it does not name get 1/127.
    Matched: softmax between two matmuls, operands of rank 4 or merged [B heads, ...], K and V with
    spliced registers, which are quantized along.
    `only_scores`: the operands of q k^T alone, of any number of keys, and values stay float: what
    OpenVINO fuses without the accuracy that rounding probabilities costs. It moves the pairs up to
    the projections itself.
    Skipped: ONNX's Attention, more than 512 keys or an unknown number of them, a block that
    `activations` does not name fully, one that is quantized already.

    TensorRT-RTX 1.7 fuses the result into one int8 kernel only with all four pairs and where the
    projections are int8 too; else it computes two products apart. Most probabilities lie below
    1/127, and the accuracy that costs has to be measured.
    """

    activations: Mapping[str, Affine]
    only_scores: bool = False
    name: ClassVar[str] = "quantize_attention"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder; signed scales of 8 bits that name tensors of the graph."""
        view_encoder(graph)
        tensors = graph.tensors()
        for name, scale in self.activations.items():
            if name not in tensors:
                raise InputError(f"quantize_attention: no tensor {name!r} in the graph")
            if (scale.dtype, scale.zero_point, scale.bits) != ("int8", 0, 8):
                raise InputError(
                    f"quantize_attention: {name!r} needs int8 of 8 bits and zero point 0"
                )

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert four Q/DQ pairs a block, fewer where two operands are one tensor."""
        edits, skips = [], []
        taken = frozenset(graph.tensors())
        done: dict[str, gs.Variable] = {}
        for block in view_encoder(graph).blocks:
            site, attention = f"blocks.{block.index}.attention", block.attention
            reason = self._refusal(attention)
            if reason is not None:
                skips.append(Skip(site, reason, "its products are not in int8"))
                continue
            for node in self._products(attention):
                for slot, tensor in enumerate(node.inputs):
                    if tensor.name not in done:
                        scale = self.activations.get(tensor.name, PROBABILITIES).scale
                        name = free_name(tensor.name, taken)
                        done[tensor.name] = insert_pair(
                            graph, tensor, name, scale, np.array(0, "i1")
                        )
                    node.inputs[slot] = done[tensor.name]
            edits.append(Edit(site, "int8 x int8"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same blocks, each as it was or with all operands dequantized; only pairs are new."""
        old, new = view_encoder(before), view_encoder(after)
        planned = 0
        for one, other in zip(old.blocks, new.blocks, strict=True):
            if self._refusal(one.attention) is None:
                planned += 1
                assert all(self._dequantized(other.attention))
            else:
                assert self._dequantized(one.attention) == self._dequantized(other.attention)
        pairs = count_ops(after, "QuantizeLinear") - count_ops(before, "QuantizeLinear")
        assert len(after.nodes) - len(before.nodes) == 2 * pairs <= 8 * planned

    def _refusal(self, attention: Attention) -> str | None:
        if attention.scores is attention.context:
            return "ONNX's Attention has no place for Q/DQ pairs"
        if any(self._dequantized(attention)):
            return "quantized already"
        keys = attention.key.shape[-1] if attention.key.shape else None
        if not self.only_scores:
            if not isinstance(keys, int):
                return "the number of keys is not known"
            if keys > LONGEST:
                return f"{keys} keys; TensorRT fuses int8 attention up to {LONGEST}"
        wanted = _operands(attention)[: 2 if self.only_scores else 3]
        if any(tensor.name not in self.activations for tensor in wanted):
            return f"no scale for its {'queries or keys' if self.only_scores else _OPERANDS}"
        return None

    def _products(self, attention: Attention) -> list[gs.Node]:
        """The products to quantize."""
        return [attention.scores] if self.only_scores else [attention.scores, attention.context]

    def _dequantized(self, attention: Attention) -> list[bool]:
        """Which of the operands to quantize stand behind a DequantizeLinear."""
        operands = _operands(attention)[: 2 if self.only_scores else 4]
        makers = [producer(tensor) for tensor in operands]
        return [maker is not None and maker.op == "DequantizeLinear" for maker in makers]


def attention_operands(view: EncoderView) -> dict[int, tuple[str, str, str, str]]:
    """The tensors whose ranges QuantizeAttention needs, by block: queries, keys, values, softmax.

    Keys are [B, heads, head_dim, T] or merged, registers included. The softmax's may be left out,
    see PROBABILITIES. Blocks that hold ONNX's Attention are not there.
    """
    found = {}
    for block in view.blocks:
        if block.attention.scores is not block.attention.context:
            query, key, value, probabilities = _operands(block.attention)
            found[block.index] = (query.name, key.name, value.name, probabilities.name)
    return found


def _operands(attention: Attention) -> tuple[gs.Variable, gs.Variable, gs.Variable, gs.Variable]:
    return attention.query, attention.key, attention.value, attention.context.inputs[0]
