"""What the installed TensorRT-RTX makes of a transformer block in different forms of graph.

For every form and compute capability: kernels, matrix products and bytes of one block, by the
builder's list, so that a new version's fusions are noticed. No GPU is needed, and nothing is timed.

    python benchmarks/engine_forms.py [--width 384] [--heads 6] [--tokens 257] [--json FILE]
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper

from regcache.passes.temporary import temporary_folder
from regcache.runtime.engine_cost import moved_bytes
from regcache.runtime.tensorrt_network import RefusedGraphError
from regcache.runtime.tensorrt_rtx import COMPUTE_CAPABILITIES, kernels_at, library_version

BATCH = 32


@dataclass(frozen=True)
class Form:
    """How a block is written. `kind`: FP16, INT8 or FP8, of the linears that `linears` names.

    `scales`: FP16 or FP32 of the Q/DQ pairs; `channels`: whether weights have a scale for each
    column. `packed`: one product for q, k and v; `apart`: queries halved behind it. `biases`:
    whether q, k and v have any. `moved`: attention's output is quantized before its transpose.
    `rounded`: products are quantized again before their bias. `stream`: the residual stream is
    int8. `attention`: its operands are int8. `convolution`: linears are 1x1 convolutions.
    `activation`: erf, tanh, sigmoid, relu or none.
    """

    kind: str = "INT8"
    linears: str = "qkv out fc1 fc2"
    scales: str = "FP16"
    channels: bool = True
    packed: bool = False
    apart: bool = False
    biases: bool = True
    moved: bool = False
    rounded: bool = False
    stream: bool = False
    attention: bool = False
    convolution: bool = False
    activation: str = "erf"


FORMS: Mapping[str, Form] = {
    "FP16": Form("FP16"),
    "FP16, q, k, v packed": Form("FP16", packed=True),
    "FP16, q, k, v without biases": Form("FP16", biases=False),
    "INT8": Form(),
    "INT8, scales in FP32": Form(scales="FP32"),
    "INT8, weights per tensor": Form(channels=False),
    "INT8, q, k, v packed": Form(packed=True, biases=True),
    "INT8, q, k, v packed, q apart": Form(packed=True, apart=True),
    "INT8, Q before attention's transpose": Form(packed=True, apart=True, moved=True),
    "INT8, attention too": Form(packed=True, apart=True, attention=True),
    "INT8, residual in int8": Form(packed=True, apart=True, stream=True),
    "INT8, products rounded, weights per tensor": Form(
        packed=True, apart=True, rounded=True, channels=False
    ),
    "INT8, per tensor, no biases": Form(packed=True, biases=False, channels=False),
    "INT8, MLP alone": Form(linears="fc1 fc2", biases=False),
    "INT8, qkv alone": Form(linears="qkv", packed=True, apart=True),
    "INT8, tanh GELU": Form(packed=True, apart=True, activation="tanh"),
    "INT8, sigmoid GELU": Form(packed=True, apart=True, activation="sigmoid"),
    "INT8, ReLU": Form(packed=True, apart=True, activation="relu"),
    "INT8, no activation": Form(packed=True, apart=True, activation="none"),
    "INT8, 1x1 convolutions": Form(linears="fc1 fc2", convolution=True, biases=False),
    "FP8": Form("FP8"),
    "FP8, q, k, v packed, q apart": Form("FP8", packed=True, apart=True),
}


class BlockWriter:
    """Writes blocks of one form into an ONNX graph in FP16."""

    def __init__(self, form: Form, width: int, heads: int, tokens: int) -> None:
        self.form, self.width, self.heads, self.tokens = form, width, heads, tokens
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(0)

    def model(self, blocks: int) -> onnx.ModelProto:
        """A graph of some blocks [batch, tokens, width]."""
        x = "x"
        for _ in range(blocks):
            x = self._block(x)
        shape: list[str | int | None] = ["batch", self.tokens, self.width]
        ends = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in ("x", x)
        ]
        graph = helper.make_graph(self.nodes, "blocks", ends[:1], ends[1:], self.constants)
        opset = helper.make_opsetid("", 21)
        return helper.make_model(graph, opset_imports=[opset], ir_version=10)

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def _constant(self, values: Any) -> str:
        name = f"constant_{len(self.constants)}"
        array = np.asarray(values)
        if array.dtype == np.float64:
            array = array.astype(np.float16)
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def _scale(self, values: Any) -> str:
        single = self.form.scales == "FP32"
        return self._constant(np.asarray(values, np.float32 if single else np.float16))

    def _quantized(self, x: str, scale: float = 0.03) -> str:
        """A Q/DQ pair behind a tensor."""
        single = self.form.scales == "FP32"
        kind = TensorProto.FLOAT8E4M3FN if self.form.kind == "FP8" else TensorProto.INT8
        floats = self._node("Cast", x, to=TensorProto.FLOAT) if single else x
        rounded = self._node("QuantizeLinear", floats, self._scale(scale), output_dtype=kind)
        back = self._node("DequantizeLinear", rounded, self._scale(scale))
        return self._node("Cast", back, to=TensorProto.FLOAT16) if single else back

    def _weight(self, rows: int, columns: int, quantized: bool) -> str:
        values = self.random.integers(-127, 128, (rows, columns))
        if not quantized:
            return self._constant(values * 0.003)
        if self.form.kind == "FP8":
            cast = self._constant((values / 127).astype(np.float32))
            stored = self._node(
                "QuantizeLinear", cast, self._constant(np.float32(1)),
                output_dtype=TensorProto.FLOAT8E4M3FN,
            )  # fmt: skip
        else:
            stored = self._constant(values.astype(np.int8))
        if not self.form.channels:
            back = self._node("DequantizeLinear", stored, self._scale(0.003))
        else:
            scales = self._scale(0.001 + 0.01 * self.random.random(columns))
            back = self._node("DequantizeLinear", stored, scales, axis=1)
        single = self.form.scales == "FP32"
        return self._node("Cast", back, to=TensorProto.FLOAT16) if single else back

    def _linear(self, name: str, x: str, rows: int, columns: int, biased: bool = True) -> str:
        form = self.form
        quantized = name in form.linears.split() if form.kind != "FP16" else False
        given = self._quantized(x) if quantized else x
        if form.convolution and quantized:
            made = self._convolved(given, rows, columns)
        else:
            made = self._node("MatMul", given, self._weight(rows, columns, quantized))
        if form.rounded and quantized:
            made = self._quantized(made)
        if not biased:
            return made
        return self._node("Add", made, self._constant(self.random.standard_normal(columns)))

    def _convolved(self, x: str, rows: int, columns: int) -> str:
        turned = self._node("Transpose", x, perm=[0, 2, 1])
        image = self._node("Unsqueeze", turned, self._constant(np.array([3])))
        values = self.random.integers(-127, 128, (columns, rows, 1, 1)).astype(np.int8)
        scales = self._scale(0.001 + 0.01 * self.random.random(columns))
        weight = self._node("DequantizeLinear", self._constant(values), scales, axis=0)
        made = self._node("Conv", image, weight)
        flat = self._node("Squeeze", made, self._constant(np.array([3])))
        return self._node("Transpose", flat, perm=[0, 2, 1])

    def _norm(self, x: str) -> str:
        floats = self._node("Cast", x, to=TensorProto.FLOAT)
        numbers = [
            self._constant(self.random.random(self.width).astype(np.float32)) for _ in range(2)
        ]
        normed = self._node("LayerNormalization", floats, *numbers, axis=-1)
        return self._node("Cast", normed, to=TensorProto.FLOAT16)

    def _block(self, x: str) -> str:
        width = self.width
        made = self._linear("out", self._attended(self._norm(x)), width, width)
        x = self._added(x, made)
        inner = self._activated(self._linear("fc1", self._norm(x), width, 4 * width))
        return self._added(x, self._linear("fc2", inner, 4 * width, width))

    def _added(self, x: str, made: str) -> str:
        total = self._node("Add", x, made)
        return self._quantized(total) if self.form.stream else total

    def _attended(self, x: str) -> str:
        width, head = self.width, self.width // self.heads
        query, key, value = self._parts(x)
        query = self._node("Mul", query, self._constant(head**-0.5))
        sides = self._constant(np.array([0, 0, self.heads, head]))
        query, key, value = (
            self._node("Transpose", self._node("Reshape", part, sides), perm=perm)
            for part, perm in ((query, [0, 2, 1, 3]), (key, [0, 2, 3, 1]), (value, [0, 2, 1, 3]))
        )
        if self.form.attention:
            query, key, value = map(self._quantized, (query, key, value))
        scores = self._node("Cast", self._node("MatMul", query, key), to=TensorProto.FLOAT)
        softmax = self._node("Softmax", scores, axis=-1)
        shares = self._node("Cast", softmax, to=TensorProto.FLOAT16)
        if self.form.attention:
            shares = self._quantized(shares, 1 / 127)
        mixed = self._node("MatMul", shares, value)
        if self.form.moved:
            mixed = self._quantized(mixed)
        turned = self._node("Transpose", mixed, perm=[0, 2, 1, 3])
        return self._node("Reshape", turned, self._constant(np.array([0, 0, width])))

    def _parts(self, x: str) -> list[str]:
        """Queries, keys and values [batch, tokens, width]."""
        form, width = self.form, self.width
        if not form.packed:
            return [self._linear("qkv", x, width, width, form.biases) for _ in range(3)]
        packed = self._linear("qkv", x, width, 3 * width, form.biases)
        found = []
        for part in range(3):
            ends = [self._constant(np.array([at])) for at in (part * width, (part + 1) * width, 2)]
            found.append(self._node("Slice", packed, *ends))
        if form.apart:
            found[0] = self._node("Mul", found[0], self._constant(0.5))
        return found

    def _activated(self, x: str) -> str:
        kind = self.form.activation
        if kind in ("erf", "tanh"):
            return self._node("Gelu", x, approximate="tanh" if kind == "tanh" else "none")
        if kind == "sigmoid":
            larger = self._node("Mul", x, self._constant(1.702))
            return self._node("Mul", x, self._node("Sigmoid", larger))
        return self._node("Relu", x) if kind == "relu" else x


@dataclass(frozen=True)
class Row:
    """One form on one compute capability: what a block takes."""

    form: str
    compute_capability: str
    kernels: int
    products: dict[str, int]
    bytes_per_token: float


def main(
    width: int = 384,
    heads: int = 6,
    tokens: int = 257,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the table, a line for each form and compute capability."""
    print(f"TensorRT-RTX {library_version()}, one block of width {width}, {tokens} tokens")
    rows = []
    for row in _rows(width, heads, tokens):
        products = ", ".join(f"{count} {kind}" for kind, count in row.products.items())
        print(
            f"{row.form:44} {row.compute_capability:>5} {row.kernels:3} kernels, "
            f"{row.bytes_per_token / width:6.1f} x width bytes a token; {products}"
        )
        rows.append(asdict(row))
    if json_file is not None:
        json_file.write_text(json.dumps({"version": library_version(), "rows": rows}, indent=2))


def _rows(width: int, heads: int, tokens: int) -> Iterator[Row]:
    """What the fourth block adds to three, for every form that the builder takes."""
    with temporary_folder() as folder:
        path = folder / "blocks.onnx"
        for name, form in FORMS.items():
            for capability in COMPUTE_CAPABILITIES:
                if form.kind == "FP8" and capability == "8.6":
                    continue
                lists = []
                try:
                    for blocks in (3, 4):
                        onnx.save(BlockWriter(form, width, heads, tokens).model(blocks), path)
                        lists.append(kernels_at(path, [capability], BATCH))
                except RefusedGraphError as error:
                    print(f"{name:44} {capability:>5} refused: {error}")
                    continue
                few, many = (Counter(k.format for k in some if k.operations) for some in lists)
                moved = [moved_bytes(some, BATCH) for some in lists]
                yield Row(
                    form=name,
                    compute_capability=capability,
                    kernels=len(lists[1]) - len(lists[0]),
                    products=dict(many - few),
                    bytes_per_token=(moved[1] - moved[0]) / (BATCH * tokens),
                )


if __name__ == "__main__":
    typer.run(main)
