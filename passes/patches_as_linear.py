"""Compute a quantized patch convolution as a linear, which ONNX Runtime has integer kernels for."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.qdq_nodes import insert_weight
from regcache.passes.quantize_patches import patch_convolutions
from regcache.passes.walk import is_constant, is_output, name_of, producer


@dataclass(frozen=True)
class PatchesAsLinear:
    """Cut integer images into rows of patches, and multiply these by the convolution's weight.

    ONNX Runtime (1.32) computes a convolution between Q/DQ pairs in float where floats are what it
    hands on. A MatMul between such pairs it computes in integers, and bytes are cut in little time.
    Matched: a Conv that QuantizePatches has quantized, of images of a known size, whose output a
    Reshape to [B, channels, patches] and a Transpose to [B, patches, channels] alone read.
    Left alone: all else.
    """

    name: ClassVar[str] = "patches_as_linear"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without quantized patches is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Append the linear; the convolution and what moved its output fall to the clean-up."""
        edits = []
        for conv, tokens in list(_found(graph)):
            images, weight = (producer(item) for item in conv.inputs[:2])
            assert images is not None
            assert weight is not None
            name = name_of(conv)
            rows = _cut(graph, images, conv, name)
            stored = weight.inputs[0].values
            turned = np.ascontiguousarray(stored.reshape(len(stored), -1).T)
            scales = weight.inputs[1].values
            right = insert_weight(graph, f"{name}/as_linear/weight", turned, scales, 0)
            biased = len(conv.inputs) > 2 and not conv.inputs[2].is_empty()
            tokens.inputs.clear()
            product = gs.Variable(f"{name}/product", np.float32, tokens.shape) if biased else tokens
            graph.nodes.append(gs.Node("MatMul", f"{name}/as_linear", {}, [rows, right], [product]))
            if biased:
                add = [product, conv.inputs[2]]
                graph.nodes.append(gs.Node("Add", f"{name}/as_linear/bias", {}, add, [tokens]))
            edits.append(Edit(name, f"{tokens.shape[1]} patches of {len(turned)} numbers"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Nothing left to rewrite; a MatMul in the place of each convolution."""
        assert not list(_found(after))
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        assert old["Conv"] - new["Conv"] == new["MatMul"] - old["MatMul"]
        assert (new - old).keys() <= {"MatMul", "Add", "Reshape"}


def as_rows(graph: gs.Graph, conv: gs.Node) -> gs.Variable | None:
    """A patch convolution's output as rows [B, patches, channels]; None where it is used otherwise.

    Its images have a known size, which patches fill.
    """
    tensor, shape, images = conv.outputs[0], conv.outputs[0].shape, conv.inputs[0].shape
    if shape is None or images is None or not all(isinstance(dim, int) for dim in images[1:]):
        return None
    if [a * b for a, b in zip(shape[2:], conv.attrs["strides"], strict=True)] != list(images[2:]):
        return None
    channels, patches = shape[1], shape[2] * shape[3]
    for op, wanted in (("Reshape", [channels, patches]), ("Transpose", [patches, channels])):
        if len(tensor.outputs) != 1 or is_output(graph, tensor):
            return None
        (node,) = tensor.outputs
        tensor = node.outputs[0]
        if node.op != op or tensor.shape is None or list(tensor.shape[1:]) != wanted:
            return None
    return None if is_output(graph, tensor) else tensor


def _found(graph: gs.Graph) -> Iterator[tuple[gs.Node, gs.Variable]]:
    """The quantized patch convolutions, and the rows that they make."""
    for conv in patch_convolutions(graph):
        makers = [producer(item) for item in conv.inputs[:2]]
        if any(maker is None or maker.op != "DequantizeLinear" for maker in makers):
            continue
        weight = makers[1]
        assert weight is not None
        rows = as_rows(graph, conv)
        signed = is_constant(weight.inputs[0]) and weight.inputs[0].values.dtype == np.int8
        if rows is not None and signed:
            yield conv, rows


def _cut(graph: gs.Graph, images: gs.Node, conv: gs.Node, name: str) -> gs.Variable:
    """Dequantized rows [B, patches, channels height width], of the integers that `images` reads."""
    _, channels, rows, columns = conv.inputs[0].shape
    height, width = (int(side) for side in conv.attrs["strides"])
    down, across = rows // height, columns // width
    steps = (
        ("Reshape", "parts", [0, channels, down, height, across, width]),
        ("Transpose", "turned", [0, 2, 4, 1, 3, 5]),
        ("Reshape", "rows", [0, down * across, channels * height * width]),
    )
    tensor = images.inputs[0]
    for op, what, numbers in steps:
        output = gs.Variable(f"{name}/{what}", dtype=tensor.dtype)
        inputs, attrs = [tensor], {"perm": numbers}
        if op == "Reshape":
            attrs = {}
            inputs.append(gs.Constant(f"{name}/{what}/shape", np.array(numbers, np.int64)))
        graph.nodes.append(gs.Node(op, f"{name}/{what}/{op}", attrs, inputs, [output]))
        tensor = output
    floats = gs.Variable(f"{name}/rows/dequantized", dtype=np.float32)
    graph.nodes.append(
        gs.Node("DequantizeLinear", f"{name}/rows/dq", {}, [tensor, *images.inputs[1:]], [floats])
    )
    return floats
