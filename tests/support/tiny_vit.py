"""A tiny ViT: its weights, its graph in many spellings, and the same in float64 numpy."""

import math
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from support.tiny_vit_graph import EPSILON, Builder

Array = NDArray[Any]


@dataclass(frozen=True)
class Spec:
    """What the encoder is and how its graph is spelled."""

    width: int = 16
    heads: int = 2
    depth: int = 2
    hidden: int = 32
    patch: int = 4
    grid: int = 3
    prefix: int = 1
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu", "swiglu"] = "gelu"
    qkv: Literal["separate", "fused"] = "separate"
    attention: Literal["matmul", "sdpa", "merged", "op4", "op3", "einsum", "einsum_all"] = "matmul"
    packed_gate: bool = False
    layer_norm: Literal["node", "pow", "mul", "rms"] = "node"
    gelu: Literal["node", "half_last", "half_first", "times_reciprocal"] = "node"
    gemm: bool = False
    layer_scale: bool = False
    pooling_head: bool = False
    dynamic_shapes: bool = False
    opset: int = 20
    seed: int = 0

    @property
    def size(self) -> int:
        return self.patch * self.grid

    @property
    def tokens(self) -> int:
        return self.prefix + self.grid**2


_MOST_WRITTEN = 256
_written: dict[Any, bytes] = {}
"""Models of this process, by what they are made of: most are those of many tests."""


@cache
def _drawn(spec: Spec) -> dict[str, Array]:
    """The weights of an encoder."""
    random, weights = np.random.default_rng(spec.seed), dict[str, Array]()

    def draw(name: str, *shape: int, mean: float = 0.0, std: float | None = None) -> None:
        scale = std if std is not None else 1 / math.sqrt(shape[0])
        weights[name] = (mean + scale * random.standard_normal(shape)).astype(np.float32)

    width, hidden = spec.width, spec.hidden
    draw("patch", width, 3, spec.patch, spec.patch, std=0.2)
    draw("patch.b", width, std=0.1)
    draw("prefix", 1, spec.prefix, width, std=1.0)
    draw("position", 1, spec.tokens, width, std=0.3)
    shapes = dict.fromkeys(("q", "k", "v", "out"), (width, width))
    shapes |= {"fc1": (width, hidden), "fc2": (hidden, width)}
    if spec.activation == "swiglu":
        shapes["gate"] = (width, hidden)
    for i in range(spec.depth):
        for name, shape in shapes.items():
            draw(f"{i}.{name}", *shape)
            draw(f"{i}.{name}.b", shape[1], std=0.1)
        for name in ("norm1", "norm2"):
            draw(f"{i}.{name}", width, mean=1.0, std=0.2)
            draw(f"{i}.{name}.b", width, std=0.2)
        for name in ("scale1", "scale2"):
            draw(f"{i}.{name}", width, mean=0.8, std=0.1)
    draw("norm", width, mean=1.0, std=0.2)
    draw("norm.b", width, std=0.2)
    if spec.pooling_head:
        draw("probe", 1, 1, width, std=1.0)
        for name in ("head.q", "head.k", "head.v"):
            draw(name, width, width)
    return weights


@dataclass(frozen=True)
class Registers:
    """What a reference run does besides: prefix K and V, let tokens run along, delete sinks."""

    start: int = 0
    end: int = 0
    keys: Array | None = None
    values: Array | None = None
    tokens: Array | None = None
    sinks: int = 0
    recorded: list[tuple[Array, Array]] | None = None
    kept: list[Array] = field(default_factory=list)

    def enter(self, x: Array, block: int, spec: Spec) -> Array:
        """At a block's input: tokens join, or the patches of largest norm go."""
        if block != self.start:
            return x
        if self.tokens is not None:
            return np.concatenate([np.repeat(self.tokens[None], len(x), axis=0), x], axis=1)
        if not self.sinks:
            return x
        norms = np.abs(x[:, spec.prefix :]).max(axis=-1)
        kept = np.sort(np.argsort(norms, axis=1)[:, : norms.shape[1] - self.sinks], axis=1)
        self.kept.append(kept)
        patches = np.take_along_axis(x[:, spec.prefix :], kept[..., None], axis=1)
        return np.concatenate([x[:, : spec.prefix], patches], axis=1)

    def leave(self, x: Array, block: int) -> Array:
        """Behind a block: tokens that ran along leave."""
        ends = self.tokens is not None and block == self.end - 1
        return x[:, len(self.tokens) :] if self.tokens is not None and ends else x

    def prefix(self, k: Array, v: Array, block: int) -> tuple[Array, Array]:
        """K and V [B, heads, T, D] with the registers of a block in front."""
        if self.recorded is not None:
            self.recorded.append((k, v))
        if self.keys is None or self.values is None or not self.start <= block < self.end:
            return k, v
        index = block - self.start
        keys, values = (
            np.repeat(item[index][None], len(k), 0) for item in (self.keys, self.values)
        )
        return np.concatenate([keys, k], axis=2), np.concatenate([values, v], axis=2)

    def restore(self, x: Array, spec: Spec) -> Array:
        """Tokens at every position again, deleted ones as the mean of the kept patches around.

        The mean of all kept patches counts as 9/1024 of a patch.
        """
        if not self.kept:
            return x
        whole = np.empty((len(x), spec.tokens, x.shape[2]))
        whole[:, : spec.prefix] = x[:, : spec.prefix]
        for rows, tokens, kept in zip(whole, x, self.kept[0], strict=True):
            patches = dict(zip(kept.tolist(), tokens[spec.prefix :], strict=True))
            for index in range(spec.grid**2):
                near = [row for place, row in patches.items() if touch(place, index, spec.grid)]
                of_all = 9 / 1024 * np.mean(list(patches.values()), axis=0)
                filled = (sum(near) + of_all) / (len(near) + 9 / 1024)
                rows[spec.prefix + index] = patches.get(index, filled)
        return whole


def touch(one: int, other: int, grid: int) -> bool:
    """Whether two patches of a square grid have a side or a corner in common."""
    (row, column), (next_row, next_column) = divmod(one, grid), divmod(other, grid)
    return max(abs(row - next_row), abs(column - next_column)) == 1


@dataclass
class TinyVit:
    """`model()` is the graph, `reference(images)` the float64 truth: [pooled, tokens]."""

    spec: Spec
    weights: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weights |= {name: weight.copy() for name, weight in _drawn(self.spec).items()}

    def model(self) -> onnx.ModelProto:
        """The graph: pixel_values [batch, 3, S, S] -> pooled [batch, W], last_hidden_state."""
        held = (
            (name, item.dtype, item.shape, item.tobytes()) for name, item in self.weights.items()
        )
        key = (self.spec, *held)
        if key not in _written:
            if len(_written) >= _MOST_WRITTEN:
                _written.clear()
            _written[key] = Builder(self).build().SerializeToString()
        return onnx.ModelProto.FromString(_written[key])

    def images(self, batch: int, seed: int = 0) -> NDArray[np.float32]:
        """Random input images."""
        shape = (batch, 3, self.spec.size, self.spec.size)
        return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)

    def reference(self, images: Array, registers: "Registers | None" = None) -> tuple[Array, Array]:
        """(pooled [B, W], tokens [B, T, W]) in float64, perhaps with registers or without sinks."""
        plan = registers or Registers()
        spec, w = self.spec, {k: v.astype(np.float64) for k, v in self.weights.items()}
        batch = len(images)
        tiles = images.astype(np.float64).reshape(
            batch, 3, spec.grid, spec.patch, spec.grid, spec.patch
        )
        patches = np.einsum("bcipjq,wcpq->bijw", tiles, w["patch"]) + w["patch.b"]
        x = patches.reshape(batch, -1, spec.width)
        x = np.concatenate([np.repeat(w["prefix"], batch, axis=0), x], axis=1) + w["position"]
        for i in range(spec.depth):
            x = plan.enter(x, i, spec)
            scale1, scale2 = (
                (w[f"{i}.scale1"], w[f"{i}.scale2"]) if spec.layer_scale else (1.0, 1.0)
            )
            x = x + scale1 * self._attention(self._normed(x, w, f"{i}.norm1"), w, i, plan)
            x = x + scale2 * self._mlp(self._normed(x, w, f"{i}.norm2"), w, i)
            x = plan.leave(x, i)
        x = self._normed(x, w, "norm")
        if not spec.pooling_head:
            return x[:, 0], plan.restore(x, spec)
        query = np.repeat(w["probe"], batch, axis=0) @ w["head.q"]
        probs = softmax(query @ (x @ w["head.k"]).swapaxes(1, 2) / math.sqrt(spec.width))
        return (probs @ (x @ w["head.v"]))[:, 0], plan.restore(x, spec)

    def capture(self, tokens: Array, start: int, end: int) -> tuple[Array, Array]:
        """K and V [end - start, heads, R, head_dim] of tokens [R, W] that see one another only."""
        w = {k: v.astype(np.float64) for k, v in self.weights.items()}
        x, seen = tokens[None].astype(np.float64), Registers(recorded=[])
        for i in range(start, end):
            scale1, scale2 = (
                (w[f"{i}.scale1"], w[f"{i}.scale2"]) if self.spec.layer_scale else (1.0, 1.0)
            )
            x = x + scale1 * self._attention(self._normed(x, w, f"{i}.norm1"), w, i, seen)
            x = x + scale2 * self._mlp(self._normed(x, w, f"{i}.norm2"), w, i)
        assert seen.recorded is not None
        keys, values = zip(*seen.recorded, strict=True)
        return np.concatenate(keys), np.concatenate(values)

    def _normed(self, x: Array, w: dict[str, Array], name: str) -> Array:
        if self.spec.layer_norm == "rms":
            return np.asarray(x / np.sqrt((x**2).mean(-1, keepdims=True) + EPSILON) * w[name])
        return layer_norm(x, w[name], w[f"{name}.b"])

    def _attention(self, x: Array, w: dict[str, Array], i: int, plan: "Registers") -> Array:
        heads, (batch, tokens, width) = self.spec.heads, x.shape
        q, k, v = (
            (x @ w[f"{i}.{n}"] + w[f"{i}.{n}.b"])
            .reshape(batch, tokens, heads, width // heads)
            .swapaxes(1, 2)
            for n in "qkv"
        )
        k, v = plan.prefix(k, v, i)
        probs = softmax(q @ k.swapaxes(2, 3) / math.sqrt(width // heads))
        mixed = (probs @ v).swapaxes(1, 2).reshape(batch, tokens, width)
        return np.asarray(mixed @ w[f"{i}.out"] + w[f"{i}.out.b"])

    def _mlp(self, x: Array, w: dict[str, Array], i: int) -> Array:
        inner = x @ w[f"{i}.fc1"] + w[f"{i}.fc1.b"]
        if self.spec.activation == "swiglu":
            gate = x @ w[f"{i}.gate"] + w[f"{i}.gate.b"]
            inner = gate / (1 + np.exp(-gate)) * inner
        else:
            inner = activate(self.spec.activation, inner)
        return np.asarray(inner @ w[f"{i}.fc2"] + w[f"{i}.fc2.b"])


def with_batch(model: onnx.ModelProto, batch: int | None) -> onnx.ModelProto:
    """The model with its batch fixed, or as it is."""
    if batch is not None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = batch
    return model


def layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = (centred**2).mean(axis=-1, keepdims=True)
    return np.asarray(centred / np.sqrt(variance + EPSILON) * scale + bias)


def softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


def activate(name: str, x: Array) -> Array:
    if name == "gelu":
        erf = np.reshape([*map(math.erf, (x / math.sqrt(2)).ravel().tolist())], x.shape)
        return np.asarray(x * 0.5 * (1 + erf))
    if name == "gelu_tanh":
        return np.asarray(
            0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        )
    if name == "relu":
        return np.asarray(x * (x > 0))
    return np.asarray(x / (1 + np.exp(-(1.702 if name == "quick_gelu" else 1.0) * x)))
