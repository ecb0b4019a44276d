"""A tiny ViT as an ONNX graph in many exporters' spellings, and the same in float64 numpy."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[Any]
EPSILON = 1e-6


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
        """Tokens at every position again, deleted ones as the mean of the kept patches."""
        if not self.kept:
            return x
        patches = x[:, spec.prefix :]
        whole = np.repeat(patches.mean(axis=1, keepdims=True), spec.grid**2, axis=1)
        np.put_along_axis(whole, self.kept[0][..., None], patches, axis=1)
        return np.concatenate([x[:, : spec.prefix], whole], axis=1)


@dataclass
class TinyVit:
    """`model()` is the graph, `reference(images)` the float64 truth: [pooled, tokens]."""

    spec: Spec
    weights: dict[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        spec, random = self.spec, np.random.default_rng(self.spec.seed)

        def draw(name: str, *shape: int, mean: float = 0.0, std: float | None = None) -> None:
            scale = std if std is not None else 1 / math.sqrt(shape[0])
            self.weights[name] = (mean + scale * random.standard_normal(shape)).astype(np.float32)

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

    def model(self) -> onnx.ModelProto:
        """The graph: pixel_values [batch, 3, S, S] -> pooled [batch, W], last_hidden_state."""
        return Builder(self).build()

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
        return np.asarray(x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))
    if name == "gelu_tanh":
        return np.asarray(
            0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))
        )
    if name == "relu":
        return np.asarray(x * (x > 0))
    return np.asarray(x / (1 + np.exp(-(1.702 if name == "quick_gelu" else 1.0) * x)))


class Builder:
    """Writes the nodes one by one, as an exporter does."""

    def __init__(self, vit: TinyVit) -> None:
        self.vit, self.spec = vit, vit.spec
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}

    def build(self) -> onnx.ModelProto:
        spec = self.spec
        x = self._embed()
        for i in range(spec.depth):
            x = self._add(
                x, self._scaled(self._attention(self._norm(x, f"{i}.norm1"), i), f"{i}.scale1")
            )
            x = self._add(x, self._scaled(self._mlp(self._norm(x, f"{i}.norm2"), i), f"{i}.scale2"))
        hidden = self._norm(x, "norm")
        pooled = (
            self._pool(hidden)
            if spec.pooling_head
            else self._node("Gather", hidden, self._ints("class_index", 0, scalar=True), axis=1)
        )
        self.nodes.append(helper.make_node("Identity", [pooled], ["pooled"], "pooled"))
        self.nodes.append(helper.make_node("Identity", [hidden], ["last_hidden_state"], "hidden"))
        image: list[str | int | None] = ["batch", 3, spec.size, spec.size]
        graph = helper.make_graph(
            self.nodes,
            "tiny_vit",
            [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, image)],
            [
                helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", spec.width]),
                helper.make_tensor_value_info(
                    "last_hidden_state", TensorProto.FLOAT, ["batch", spec.tokens, spec.width]
                ),
            ],
            list(self.initializers.values()),
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", spec.opset)])
        model.ir_version = 8 if self.spec.opset < 21 else 11
        onnx.checker.check_model(model, full_check=True)
        return model

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"n{len(self.nodes)}_{op}"
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def _constant(self, name: str, values: Array) -> str:
        self.initializers.setdefault(name, numpy_helper.from_array(values, name))
        return name

    def _weight(self, name: str) -> str:
        return self._constant(name, self.vit.weights[name])

    def _number(self, value: float) -> str:
        return self._constant(f"const_{value!r}", np.array(value, dtype=np.float32))

    def _ints(self, name: str, *values: int, scalar: bool = False) -> str:
        array = np.array(values, dtype=np.int64)
        return self._constant(name, array.reshape(()) if scalar else array)

    def _add(self, a: str, b: str) -> str:
        return self._node("Add", a, b)

    def _batch_size(self) -> str:
        shape = self._node("Shape", "pixel_values")
        return self._node("Gather", shape, self._ints("batch_axis", 0), axis=0)

    def _reshape(self, x: str, *dims: int) -> str:
        """Reshape with the batch in front, spelled as a constant or as shape arithmetic."""
        if not self.spec.dynamic_shapes:
            return self._node("Reshape", x, self._ints(f"to_{dims}", -1, *dims))
        rest = self._ints(f"rest_{dims}", *dims)
        return self._node("Reshape", x, self._node("Concat", self._batch_size(), rest, axis=0))

    def _embed(self) -> str:
        spec = self.spec
        x = self._node(
            "Conv", "pixel_values", self._weight("patch"), self._weight("patch.b"),
            kernel_shape=[spec.patch] * 2, strides=[spec.patch] * 2,
        )  # fmt: skip
        x = self._node("Transpose", self._reshape(x, spec.width, spec.grid**2), perm=[0, 2, 1])
        if spec.prefix:
            ones = self._ints("ones", 1, 1)
            shape = self._node("Concat", self._batch_size(), ones, axis=0)
            x = self._node("Concat", self._node("Expand", self._weight("prefix"), shape), x, axis=1)
        return self._add(x, self._weight("position"))

    def _norm(self, x: str, name: str) -> str:
        scale, bias = self._weight(name), self._weight(f"{name}.b")
        if self.spec.layer_norm == "node":
            return self._node("LayerNormalization", x, scale, bias, axis=-1, epsilon=EPSILON)
        if self.spec.layer_norm == "rms":
            square = self._node("Pow", x, self._number(2.0))
            root = self._node("Sqrt", self._node("Add", self._mean(square), self._number(EPSILON)))
            normal = self._node("Mul", x, self._node("Reciprocal", root))
            return self._node("Mul", normal, self._weight(name))
        centred = self._node("Sub", x, self._mean(x))
        square = (
            self._node("Pow", centred, self._number(2.0))
            if self.spec.layer_norm == "pow"
            else self._node("Mul", centred, centred)
        )
        shifted = self._node("Add", self._mean(square), self._number(EPSILON))
        normal = self._node("Div", centred, self._node("Sqrt", shifted))
        return self._add(self._node("Mul", normal, scale), bias)

    def _mean(self, x: str) -> str:
        if self.spec.opset < 18:
            return self._node("ReduceMean", x, axes=[-1], keepdims=1)
        return self._node("ReduceMean", x, self._ints("last_axis", -1), keepdims=1)

    def _linear(self, x: str, name: str, rows: int) -> str:
        if not self.spec.gemm:
            return self._add(self._node("MatMul", x, self._weight(name)), self._weight(f"{name}.b"))
        weights = self.vit.weights[name]
        flat = self._node("Reshape", x, self._ints(f"flat_{rows}", -1, rows))
        transposed = self._constant(f"{name}.t", np.ascontiguousarray(weights.T))
        y = self._node("Gemm", flat, transposed, self._weight(f"{name}.b"), transB=1)
        return self._reshape(y, self.spec.tokens, weights.shape[1])

    def _attention(self, x: str, i: int) -> str:
        spec, head_dim = self.spec, self.spec.width // self.spec.heads
        if spec.attention == "einsum_all":
            return self._attention_of_einsums(x, i)
        if spec.qkv == "fused":
            weights = [self.vit.weights[f"{i}.{n}"] for n in "qkv"]
            biases = [self.vit.weights[f"{i}.{n}.b"] for n in "qkv"]
            packed = self._constant(f"{i}.qkv", np.concatenate(weights, axis=1))
            bias = self._constant(f"{i}.qkv.b", np.concatenate(biases))
            y = self._add(self._node("MatMul", x, packed), bias)
            y = self._reshape(y, spec.tokens, 3, spec.heads, head_dim)
            y = self._node("Transpose", y, perm=[2, 0, 3, 1, 4])
            q, k, v = (
                self._node("Gather", y, self._ints(f"index_{j}", j, scalar=True), axis=0)
                for j in range(3)
            )
        else:
            q, k, v = (
                self._node(
                    "Transpose",
                    self._reshape(
                        self._linear(x, f"{i}.{n}", spec.width), spec.tokens, spec.heads, head_dim
                    ),
                    perm=[0, 2, 1, 3],
                )
                for n in "qkv"
            )
        mixed = getattr(self, f"_mix_{spec.attention}")(q, k, v)
        return self._linear(self._reshape(mixed, spec.tokens, spec.width), f"{i}.out", spec.width)

    def _mix_matmul(self, q: str, k: str, v: str) -> str:
        """The scale on the queries, as most exporters write it."""
        q = self._node("Mul", q, self._number(1 / math.sqrt(self.spec.width // self.spec.heads)))
        scores = self._node("MatMul", q, self._node("Transpose", k, perm=[0, 1, 3, 2]))
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), v)
        return self._node("Transpose", mixed, perm=[0, 2, 1, 3])

    def _mix_sdpa(self, q: str, k: str, v: str) -> str:
        """torch's decomposition: the scale on both operands, an empty mask, a guard against NaN."""
        spec = self.spec
        root = self._number((spec.width // spec.heads) ** -0.25)
        merged = self._node(
            "Reshape", k, self._ints("merge", -1, spec.tokens, spec.width // spec.heads)
        )
        turned = self._node("Transpose", merged, perm=[0, 2, 1])
        back = self._ints("split", -1, spec.heads, spec.width // spec.heads, spec.tokens)
        k = self._node("Mul", self._node("Reshape", turned, back), root)
        scores = self._node("MatMul", self._node("Mul", q, root), k)
        true = self._constant("true", np.ones((1, 1, spec.tokens, 1), dtype=bool))
        shape = self._node(
            "Concat", self._batch_size(), self._ints("tt", 1, spec.tokens, spec.tokens), axis=0
        )
        allowed = self._node("Expand", true, shape)
        mask = self._node("Where", allowed, self._number(0.0), self._number(-math.inf))
        probs = self._node("Softmax", self._add(scores, mask), axis=-1)
        guarded = self._node("Where", self._node("IsNaN", probs), self._number(0.0), probs)
        return self._node("Transpose", self._node("MatMul", guarded, v), perm=[0, 2, 1, 3])

    def _mix_merged(self, q: str, k: str, v: str) -> str:
        """nn.MultiheadAttention's batched matmul over [B heads, T, D], scaling the scores."""
        spec, head_dim = self.spec, self.spec.width // self.spec.heads
        merge = self._ints("merge", -1, spec.tokens, head_dim)
        q, k, v = (self._node("Reshape", item, merge) for item in (q, k, v))
        scores = self._node("MatMul", q, self._node("Transpose", k, perm=[0, 2, 1]))
        scores = self._node("Mul", scores, self._number(head_dim**-0.5))
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), v)
        return self._node(
            "Transpose", self._reshape(mixed, spec.heads, spec.tokens, head_dim), perm=[0, 2, 1, 3]
        )

    def _mix_einsum(self, q: str, k: str, v: str) -> str:
        """The products of attention as Einsum, over [B, heads, T, D]."""
        scores = self._node("Einsum", q, k, equation="bhid,bhjd->bhij")
        root = math.sqrt(self.spec.width // self.spec.heads)
        probs = self._node("Softmax", self._node("Div", scores, self._number(root)), axis=-1)
        mixed = self._node("Einsum", probs, v, equation="bhij,bhjd->bhid")
        return self._node("Transpose", mixed, perm=[0, 2, 1, 3])

    def _attention_of_einsums(self, x: str, i: int) -> str:
        """Flax's spelling: projections to [B, T, heads, D] and back are Einsum as well."""
        heads, width = self.spec.heads, self.spec.width
        parts = []
        for n in "qkv":
            by_head = self.vit.weights[f"{i}.{n}"].reshape(width, heads, -1)
            weight = self._constant(f"{i}.{n}.by_head", by_head)
            y = self._node("Einsum", x, weight, equation="btc,chd->bthd")
            bias = self.vit.weights[f"{i}.{n}.b"].reshape(heads, -1)
            parts.append(self._add(y, self._constant(f"{i}.{n}.b.by_head", bias)))
        q = self._node("Mul", parts[0], self._number((width // heads) ** -0.5))
        scores = self._node("Einsum", q, parts[1], equation="bthd,bshd->bhts")
        probs = self._node("Softmax", scores, axis=-1)
        mixed = self._node("Einsum", probs, parts[2], equation="bhts,bshd->bthd")
        out = self.vit.weights[f"{i}.out"].reshape(heads, -1, width)
        weight = self._constant(f"{i}.out.by_head", out)
        y = self._node("Einsum", mixed, weight, equation="bthd,hdc->btc")
        return self._add(y, self._weight(f"{i}.out.b"))

    def _mix_op4(self, q: str, k: str, v: str) -> str:
        """ONNX's Attention on [B, heads, T, D]."""
        return self._node("Transpose", self._node("Attention", q, k, v), perm=[0, 2, 1, 3])

    def _mix_op3(self, q: str, k: str, v: str) -> str:
        """ONNX's Attention on [B, T, width]."""
        spec = self.spec
        q, k, v = (
            self._reshape(self._node("Transpose", item, perm=[0, 2, 1, 3]), spec.tokens, spec.width)
            for item in (q, k, v)
        )
        heads = {"q_num_heads": spec.heads, "kv_num_heads": spec.heads}
        return self._node("Attention", q, k, v, **heads)

    def _mlp(self, x: str, i: int) -> str:
        if self.spec.packed_gate:
            names = [f"{i}.gate", f"{i}.fc1"]
            packed = np.concatenate([self.vit.weights[name] for name in names], axis=1)
            bias = np.concatenate([self.vit.weights[f"{name}.b"] for name in names])
            both = self._node("MatMul", x, self._constant(f"{i}.packed", packed))
            both = self._add(both, self._constant(f"{i}.packed.b", bias))
            gate, inner = self._split(both)
            inner = self._node("Mul", self._node("Mul", gate, self._node("Sigmoid", gate)), inner)
            return self._linear(inner, f"{i}.fc2", self.spec.hidden)
        inner = self._linear(x, f"{i}.fc1", self.spec.width)
        if self.spec.activation == "swiglu":
            gate = self._linear(x, f"{i}.gate", self.spec.width)
            inner = self._node("Mul", self._node("Mul", gate, self._node("Sigmoid", gate)), inner)
        else:
            inner = self._activate(inner)
        return self._linear(inner, f"{i}.fc2", self.spec.hidden)

    def _split(self, x: str) -> list[str]:
        """Two halves of the last axis."""
        name = f"n{len(self.nodes)}_Split"
        outputs = [f"{name}_{half}" for half in range(2)]
        self.nodes.append(helper.make_node("Split", [x], outputs, name, axis=-1, num_outputs=2))
        return outputs

    def _activate(self, x: str) -> str:
        name, spelling = self.spec.activation, self.spec.gelu
        if name == "relu":
            return self._node("Relu", x)
        if name in {"silu", "quick_gelu"}:
            scaled = x if name == "silu" else self._node("Mul", x, self._number(1.702))
            return self._node("Mul", x, self._node("Sigmoid", scaled))
        if spelling == "node":
            return self._node("Gelu", x, approximate="tanh" if name == "gelu_tanh" else "none")
        if name == "gelu_tanh":
            cube = self._node(
                "Mul", self._node("Pow", x, self._number(3.0)), self._number(0.044715)
            )
            inner = self._add(x, cube) if spelling == "half_last" else self._add(cube, x)
            gate = self._node(
                "Tanh", self._node("Mul", inner, self._number(math.sqrt(2 / math.pi)))
            )
        elif spelling == "times_reciprocal":
            gate = self._node("Erf", self._node("Mul", x, self._number(math.sqrt(0.5))))
        else:
            gate = self._node("Erf", self._node("Div", x, self._number(math.sqrt(2))))
        shifted = self._add(gate, self._number(1.0))
        if spelling == "half_first":
            return self._node("Mul", self._node("Mul", x, self._number(0.5)), shifted)
        return self._node("Mul", self._node("Mul", x, shifted), self._number(0.5))

    def _scaled(self, x: str, name: str) -> str:
        return self._node("Mul", x, self._weight(name)) if self.spec.layer_scale else x

    def _pool(self, x: str) -> str:
        width = self.spec.width
        shape = self._node("Concat", self._batch_size(), self._ints("ones", 1, 1), axis=0)
        probe = self._node("Expand", self._weight("probe"), shape)
        query = self._node("MatMul", probe, self._weight("head.q"))
        key = self._node(
            "Transpose", self._node("MatMul", x, self._weight("head.k")), perm=[0, 2, 1]
        )
        scores = self._node(
            "Mul", self._node("MatMul", query, key), self._number(1 / math.sqrt(width))
        )
        value = self._node("MatMul", x, self._weight("head.v"))
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), value)
        return self._node("Gather", mixed, self._ints("first", 0, scalar=True), axis=1)
