"""Tiny encoders whose q, k and v come from one linear and are parted in exporters' ways."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper
from support.tiny_vit import TinyVit
from support.tiny_vit_graph import Builder

# How the packed columns are ordered: parts n, heads h, channels of a head d.
ORDERS = {
    "torchscript": "nhd", "split, then turned": "nhd", "gathered in the middle": "nhd",
    "split at the end": "nhd", "sliced at the end": "nhd", "by head": "hnd",
    "by head, joined": "hnd", "parts last": "hdn", "channels first": "dnh",
    "keys turned": "nhd", "heads merged": "nhd", "tokens first": "nhd", "normed": "nhd",
    "keys and values": "nhd",
}  # fmt: skip


@dataclass
class PackedVit(TinyVit):
    """A TinyVit whose projection is parted as `spelling` says; `batch`: a fixed one."""

    spelling: str = "torchscript"
    batch: int | None = None

    def model(self) -> onnx.ModelProto:
        model = _PackedBuilder(self).build()
        for value in (*model.graph.input, *model.graph.output) if self.batch else ():
            value.type.tensor_type.shape.dim[0].Clear()
            value.type.tensor_type.shape.dim[0].dim_value = self.batch or 0
        return model


class _PackedBuilder(Builder):
    def __init__(self, vit: PackedVit) -> None:
        super().__init__(vit)
        self.spelling = vit.spelling
        self.batch = vit.batch or -1
        self.head_dim = vit.spec.width // vit.spec.heads

    def _attention(self, x: str, i: int) -> str:
        spec, name = self.spec, self.spelling.replace(",", "").replace(" ", "_")
        mix = self._mix_turned if name == "keys_turned" else self._mix_matmul
        mixed = mix(*getattr(self, f"_{name}")(x, i))
        return self._linear(self._reshape(mixed, spec.tokens, spec.width), f"{i}.out", spec.width)

    def _packed(self, x: str, i: int, letters: str = "qkv") -> str:
        """A linear with the columns of several, in the spelling's order."""
        shape = (len(letters), self.spec.heads, self.head_dim)
        order = ["nhd".index(axis) for axis in ORDERS[self.spelling]]
        places = np.arange(len(letters) * self.spec.width).reshape(shape)
        columns = places.transpose(order).ravel()
        weight = np.concatenate([self.vit.weights[f"{i}.{n}"] for n in letters], axis=1)
        bias = np.concatenate([self.vit.weights[f"{i}.{n}.b"] for n in letters])
        product = self._node("MatMul", x, self._constant(f"{i}.{letters}", weight[:, columns]))
        return self._add(product, self._constant(f"{i}.{letters}.b", bias[columns]))

    def _to(self, x: str, *dims: int) -> str:
        return self._node("Reshape", x, self._ints(f"exactly_{dims}", *dims))

    def _parts(self, x: str, axis: int, count: int = 3) -> list[str]:
        name = f"n{len(self.nodes)}_Split"
        outputs = [f"{name}_{part}" for part in range(count)]
        self.nodes.append(
            helper.make_node("Split", [x], outputs, name, axis=axis, num_outputs=count)
        )
        return outputs

    def _squeezed(self, x: str, axis: int) -> str:
        return self._node("Squeeze", x, self._ints(f"axis_{axis}", axis))

    def _turned(self, x: str, *perm: int) -> str:
        return self._node("Transpose", x, perm=list(perm))

    def _picked(self, x: str, axis: int, count: int = 3) -> list[str]:
        return [
            self._node("Gather", x, self._ints(f"index_{part}", part, scalar=True), axis=axis)
            for part in range(count)
        ]

    def _torchscript(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, 3, self.spec.heads, self.head_dim)
        return [self._squeezed(p, 0) for p in self._parts(self._turned(y, 2, 0, 3, 1, 4), 0)]

    def _split_then_turned(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, 3, self.spec.heads, self.head_dim)
        return [self._squeezed(self._turned(p, 2, 0, 3, 1, 4), 0) for p in self._parts(y, 2)]

    def _gathered_in_the_middle(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, 3, self.spec.heads, self.head_dim)
        return [self._turned(p, 0, 2, 1, 3) for p in self._picked(y, 2)]

    def _by_heads(self, x: str) -> str:
        y = self._reshape(x, self.spec.tokens, self.spec.heads, self.head_dim)
        return self._turned(y, 0, 2, 1, 3)

    def _split_at_the_end(self, x: str, i: int) -> Sequence[str]:
        return [self._by_heads(p) for p in self._parts(self._packed(x, i), -1)]

    def _sliced_at_the_end(self, x: str, i: int) -> Sequence[str]:
        y, width, found = self._packed(x, i), self.spec.width, []
        for part in range(3):
            ends = [
                self._ints(f"at_{place}", place) for place in (part * width, (part + 1) * width)
            ]
            found.append(self._by_heads(self._node("Slice", y, *ends, self._ints("last", -1))))
        return found

    def _by_head(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, self.spec.heads, 3, self.head_dim)
        return [self._turned(self._squeezed(p, 3), 0, 2, 1, 3) for p in self._parts(y, 3)]

    def _by_head_joined(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, self.spec.heads, 3 * self.head_dim)
        return self._parts(self._turned(y, 0, 2, 1, 3), -1)

    def _parts_last(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, self.spec.heads, self.head_dim, 3)
        return [self._turned(p, 0, 2, 1, 3) for p in self._picked(y, 4)]

    def _channels_first(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, self.head_dim, 3, self.spec.heads)
        return self._picked(self._turned(y, 3, 0, 4, 1, 2), 0)

    def _keys_turned(self, x: str, i: int) -> Sequence[str]:
        y = self._reshape(self._packed(x, i), self.spec.tokens, 3, self.spec.heads, self.head_dim)
        q, k, v = self._picked(y, 2)
        return self._turned(q, 0, 2, 1, 3), self._turned(k, 0, 2, 3, 1), self._turned(v, 0, 2, 1, 3)

    def _mix_turned(self, q: str, k: str, v: str) -> str:
        q = self._node("Mul", q, self._number(self.head_dim**-0.5))
        probs = self._node("Softmax", self._node("MatMul", q, k), axis=-1)
        return self._turned(self._node("MatMul", probs, v), 0, 2, 1, 3)

    def _heads_merged(self, x: str, i: int) -> Sequence[str]:
        tokens, heads = self.spec.tokens, self.spec.heads
        parts = [self._to(p, -1, tokens, self.head_dim) for p in self._torchscript(x, i)]
        # ... and apart again, as nn.MultiheadAttention hands them on.
        return [self._reshape(p, heads, tokens, self.head_dim) for p in parts]

    def _tokens_first(self, x: str, i: int) -> Sequence[str]:
        """nn.MultiheadAttention: [T, B, 3 C] -> [3, T, B, C] -> [T, B heads, D], heads first."""
        tokens, heads, width = self.spec.tokens, self.spec.heads, self.spec.width
        y = self._packed(self._turned(x, 1, 0, 2), i)
        y = self._to(y, tokens, self.batch, 3, width)
        y = self._node("Unsqueeze", y, self._ints("front", 0))
        y = self._squeezed(self._turned(y, 3, 1, 2, 0, 4), -2)
        found = []
        for part in self._picked(y, 0):
            merged = self._to(part, tokens, -1, self.head_dim)
            found.append(self._reshape(self._turned(merged, 1, 0, 2), heads, tokens, self.head_dim))
        return found

    def _normed(self, x: str, i: int) -> Sequence[str]:
        """Queries and keys pass a norm over the channels of all heads; it does nothing here."""
        q, k, v = self._parts(self._packed(x, i), -1)
        return [self._by_heads(self._nothing(p)) for p in (q, k)] + [self._by_heads(v)]

    def _nothing(self, x: str) -> str:
        """The mean taken off and put back, so that two nodes read what there was."""
        mean = self._mean(x)
        return self._add(self._node("Sub", x, mean), mean)

    def _keys_and_values(self, x: str, i: int) -> Sequence[str]:
        q = self._by_heads(self._linear(x, f"{i}.q", self.spec.width))
        y = self._packed(x, i, "kv")
        y = self._reshape(y, self.spec.tokens, 2, self.spec.heads, self.head_dim)
        return [q, *self._picked(self._turned(y, 2, 0, 3, 1, 4), 0, 2)]
