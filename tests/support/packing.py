"""A packed projection's way to its thirds, rewritten in the forms that exporters have for it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.check import check_and_infer
from regcache.passes.encoder import Block
from regcache.passes.find_blocks import view_encoder
from regcache.passes.split_qkv import packed_thirds
from regcache.passes.walk import is_constant


@dataclass
class _Writer:
    """Appends nodes behind a packed projection [B, T, 3 C] whose thirds are [B, heads, T, D]."""

    graph: gs.Graph
    block: Block
    heads: int
    count: int = 0
    thirds: list[gs.Variable] = field(default_factory=list)

    def write(
        self, op: str, source: gs.Tensor, *constants: Any, outs: int = 1, **attrs: Any
    ) -> Any:
        """A node on a tensor and constants of int64; its output, or a list of them."""
        self.count += 1
        name = f"{self.block.index}/repacked/{self.count}"
        inputs = [
            source,
            *(
                gs.Constant(f"{name}/{i}", np.array(item, np.int64))
                for i, item in enumerate(constants)
            ),
        ]
        outputs = [gs.Variable(f"{name}/out{i}", np.float32) for i in range(outs)]
        self.graph.nodes.append(gs.Node(op, name, attrs, inputs, outputs))
        return outputs if outs > 1 else outputs[0]

    def apart(self, flat: gs.Tensor) -> gs.Tensor:
        """[B, T, C] with its heads apart, [B, heads, T, D]."""
        split = self.write("Reshape", flat, [0, 0, self.heads, self.width // self.heads])
        return self.write("Transpose", split, perm=[0, 2, 1, 3])

    @property
    def width(self) -> int:
        return int(self.block.attention.projections[0].weight_shape[1]) // 3


def _split_columns(w: _Writer, packed: gs.Tensor) -> list[gs.Tensor]:
    return [w.apart(item) for item in w.write("Split", packed, [w.width] * 3, outs=3, axis=-1)]


def _slice_columns(w: _Writer, packed: gs.Tensor) -> list[gs.Tensor]:
    ends = [0, w.width, 2 * w.width, 2**63 - 1]
    parts = [w.write("Slice", packed, [ends[i]], [ends[i + 1]], [2]) for i in range(3)]
    return [w.apart(item) for item in parts]


def _gather_columns(w: _Writer, packed: gs.Tensor) -> list[gs.Tensor]:
    """[B, T, 3, C], as nn.MultiheadAttention packs it."""
    apart = w.write("Reshape", packed, [0, 0, 3, w.width])
    front = w.write("Transpose", w.write("Unsqueeze", apart, [0]), perm=[3, 1, 2, 0, 4])
    front = w.write("Squeeze", front, [-2])
    return [w.apart(w.write("Gather", front, i, axis=0)) for i in range(3)]


def _split_heads(w: _Writer, packed: gs.Tensor) -> list[gs.Tensor]:
    """unbind, as TorchScript writes it."""
    apart = w.write("Reshape", packed, [0, 0, 3, w.heads, w.width // w.heads])
    front = w.write("Transpose", apart, perm=[2, 0, 3, 1, 4])
    parts = w.write("Split", front, [1, 1, 1], outs=3, axis=0)
    return [w.write("Squeeze", item, [0]) for item in parts]


def _gather_heads(w: _Writer, packed: gs.Tensor) -> list[gs.Tensor]:
    """Indices of one dimension, which leave an axis of 1."""
    apart = w.write("Reshape", packed, [0, 0, 3, w.heads, w.width // w.heads])
    front = w.write("Transpose", apart, perm=[2, 0, 3, 1, 4])
    return [w.write("Squeeze", w.write("Gather", front, [i], axis=0), [0]) for i in range(3)]


def _by_head(w: _Writer, packed: gs.Tensor) -> list[gs.Tensor]:
    """[B, T, heads, 3 D]: what belongs to a head stands together."""
    size = w.width // w.heads
    linear = w.block.attention.projections[0]
    order = np.arange(3 * w.width).reshape(3, w.heads, size).swapaxes(0, 1).ravel()
    linear.matmul.inputs[1] = gs.Constant(f"{linear.name}/by head", linear.weight[:, order])
    assert linear.bias_add is not None
    slot = [is_constant(item) for item in linear.bias_add.inputs].index(True)
    bias = linear.bias_add.inputs[slot].values[order]
    linear.bias_add.inputs[slot] = gs.Constant(f"{linear.name}/bias by head", bias)
    apart = w.write(
        "Transpose", w.write("Reshape", packed, [0, 0, w.heads, 3 * size]), perm=[0, 2, 1, 3]
    )
    return list(w.write("Split", apart, [size] * 3, outs=3, axis=3))


FORMS: dict[str, Callable[[_Writer, gs.Tensor], list[gs.Tensor]]] = {
    "split columns": _split_columns,
    "slice columns": _slice_columns,
    "gather columns": _gather_columns,
    "split heads": _split_heads,
    "gather heads": _gather_heads,
    "by head": _by_head,
}


def repack(graph: gs.Graph, form: str) -> gs.Graph:
    """Rewrite the way from each packed projection of a float graph to its thirds."""
    view = view_encoder(graph)
    for block in view.blocks:
        (packed,) = block.attention.projections
        thirds = packed_thirds(packed)
        assert thirds is not None
        writer = _Writer(graph, block, view.heads)
        for old, new in zip(thirds, FORMS[form](writer, packed.output), strict=True):
            old.inputs.clear()
            (node,) = new.inputs
            node.outputs = [old if item is new else item for item in node.outputs]
    graph.cleanup().toposort()
    check_and_infer(graph)
    return graph
