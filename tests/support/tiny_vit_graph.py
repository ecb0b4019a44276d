"""The graph of a tiny ViT in many exporters' spellings, node by node."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

if TYPE_CHECKING:
    from support.tiny_vit import TinyVit

Array = NDArray[Any]
EPSILON = 1e-6


class Builder:
    """Writes the nodes one by one, as an exporter does."""

    def __init__(self, vit: "TinyVit") -> None:
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
