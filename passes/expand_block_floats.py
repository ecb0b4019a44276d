"""Write TensorRT's block-scaled floats in ONNX's operators, for ONNX Runtime, which has none."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.block_floats import (
    EXPONENT_BIAS,
    EXPONENTS,
    FLOAT4,
    LARGEST_FLOAT4,
    BlockFloatWeight,
    BlockFormat,
)
from regcache.passes.errors import InputError
from regcache.passes.float8 import LARGEST
from regcache.passes.tensorrt_operators import DEQUANTIZE_MXFP8, DOMAIN, QUANTIZE_FP4, QUANTIZERS
from regcache.passes.walk import is_constant, name_of, producer
from regcache.passes.write_nodes import NodeWriter

_FLOAT = int(onnx.TensorProto.FLOAT)
_FLOAT8 = int(onnx.TensorProto.FLOAT8E4M3FN)


@dataclass(frozen=True)
class ExpandBlockFloats:
    """Round activations in blocks by arithmetic, and store weights as the floats they stand for.

    The numbers are those of BlockFormat.round_trip; TensorRT's kernels multiply the same, and sum
    in another order. Reads what QuantizeBlockFloats writes, before or after HalfPrecision.
    Refused: operators of TensorRT in another form.
    """

    name: ClassVar[str] = "expand_block_floats"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """Every operator of TensorRT is one of those, with what reads it."""
        for node in graph.nodes:
            if node.domain != DOMAIN:
                continue
            if node.op in QUANTIZERS:
                _reader(node.outputs[0], node)
            elif node.op != DEQUANTIZE_MXFP8:
                raise InputError(f"{node.op} {name_of(node)!r}: nothing but TensorRT runs it")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Replace the operators; the weights' own fall to the clean-up."""
        edits = []
        for node in list(graph.nodes):
            if node.domain == DOMAIN and node.op in QUANTIZERS:
                _expand(graph, node)
                edits.append(Edit(name_of(node), "arithmetic"))
            elif _stores(node):
                _densify(node)
                edits.append(Edit(name_of(node), "floats"))
        if edits:
            known = graph.import_domains or []
            graph.import_domains = [item for item in known if item.domain != DOMAIN]
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """No operator of TensorRT is left, and inputs and outputs are what they were."""
        assert not any(node.domain == DOMAIN for node in after.nodes)
        for one, other in zip(before.outputs, after.outputs, strict=True):
            assert (one.name, one.dtype) == (other.name, other.dtype)


def _reader(numbers: gs.Tensor, quantizer: gs.Node) -> gs.Node:
    """The node that dequantizes what a quantizer makes."""
    readers = list(numbers.outputs)
    if len(readers) != 1 or readers[0].op not in {"DequantizeLinear", DEQUANTIZE_MXFP8}:
        raise InputError(f"{quantizer.op} {name_of(quantizer)!r}: its numbers are not dequantized")
    reader: gs.Node = readers[0]
    return reader


def _stores(node: gs.Node) -> bool:
    """Whether a node dequantizes a weight of block-scaled floats."""
    if node.op == DEQUANTIZE_MXFP8:
        return is_constant(node.inputs[0])
    if node.op != "DequantizeLinear" or not is_constant(node.inputs[0]):
        return False
    return bool(node.inputs[0].values.dtype == FLOAT4)


def _densify(node: gs.Node) -> None:
    """Let a weight's readers read the floats that it stands for."""
    numbers, scales = node.inputs[:2]
    output, values = node.outputs[0], numbers.values.astype(np.float32)
    if node.op == DEQUANTIZE_MXFP8:
        steps = scales.values.view(EXPONENTS).astype(np.float32)
        weight = BlockFloatWeight(BlockFormat.MXFP8, values, steps)
    else:
        maker = producer(scales)
        assert maker is not None
        steps, whole = (item.values.astype(np.float32) for item in maker.inputs[:2])
        weight = BlockFloatWeight(BlockFormat.NVFP4, values, steps, float(whole))
    dense = gs.Constant(f"{output.name}/floats", _as_type(weight, output))
    for reader in list(output.outputs):
        reader.inputs = [dense if item is output else item for item in reader.inputs]


def _as_type(weight: BlockFloatWeight, output: gs.Tensor) -> NDArray[np.floating]:
    return np.asarray(weight.dequantized(), output.dtype or np.float32)


def _expand(graph: gs.Graph, quantizer: gs.Node) -> None:
    """Write the arithmetic between what a quantizer reads and what its dequantizer makes."""
    reader = _reader(quantizer.outputs[0], quantizer)
    source, result = quantizer.inputs[0], reader.outputs[0]
    kind = BlockFormat.NVFP4 if quantizer.op == QUANTIZE_FP4 else BlockFormat.MXFP8
    write = NodeWriter(graph, f"{result.name}/expanded")
    read = source
    if source.dtype == np.float16:
        read = write.node("Cast", "float", [source], to=_FLOAT)
    blocks = write.reshape("blocks", read, -1, kind.block_size)
    sizes = write.node("Abs", "sizes", [blocks])
    peaks = write.node("ReduceMax", "peaks", [sizes, write.ints("axes", 1)], keepdims=1)
    if kind is BlockFormat.NVFP4:
        whole = np.asarray(quantizer.inputs[1].values, np.float32)
        rounded = _nvfp4(write, blocks, peaks, whole)
    else:
        rounded = _mxfp8(write, blocks, peaks)
    back = [rounded, write.node("Shape", "shape", [read])]
    half = result.dtype == np.float16
    floats = write.node("Reshape", "whole", back, None if half else result)
    if half:
        to = int(onnx.TensorProto.FLOAT16)
        write.node("Cast", "half", [floats], result, to=to)


def _nvfp4(
    write: NodeWriter, blocks: gs.Tensor, peaks: gs.Tensor, whole: NDArray[np.float32]
) -> gs.Variable:
    def number(name: str, value: float) -> gs.Constant:
        return write.constant(name, np.float32(value))

    wanted = write.node("Div", "wanted", [peaks, number("peak", LARGEST_FLOAT4 * float(whole))])
    most = write.node("Min", "most", [wanted, number("largest", LARGEST)])
    eights = write.node("Cast", "eights", [most], to=_FLOAT8)
    scales = write.node("Cast", "scales", [eights], to=_FLOAT)
    steps = write.node("Mul", "steps", [scales, write.constant("tensor", whole)])
    values = write.node("Div", "values", [blocks, _not_zero(write, steps)])
    # E2M1: steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6; Round takes halves to even.
    ends = [number("least", -LARGEST_FLOAT4), number("greatest", LARGEST_FLOAT4)]
    clipped = write.node("Clip", "clipped", [values, *ends])
    size = write.node("Abs", "size", [clipped])
    below = [write.node("Less", f"below{end}", [size, number(f"end{end}", end)]) for end in (2, 4)]
    coarse = write.node("Where", "coarse", [below[1], number("one", 1), number("two", 2)])
    grid = write.node("Where", "grid", [below[0], number("half", 0.5), coarse])
    counts = write.node("Round", "counts", [write.node("Div", "in_grid", [clipped, grid])])
    numbers = write.node("Mul", "numbers", [counts, grid])
    return write.node("Mul", "rounded", [numbers, steps])


def _mxfp8(write: NodeWriter, blocks: gs.Tensor, peaks: gs.Tensor) -> gs.Variable:
    def number(name: str, value: float) -> gs.Constant:
        return write.constant(name, np.float32(value))

    # Log may err by a step where a power of two is near: of three neighbours, the least that fits.
    least = number("tiny", float(np.finfo(np.float32).tiny))
    over = write.node(
        "Max", "over", [write.node("Div", "over_448", [peaks, number("e4m3", LARGEST)]), least]
    )
    log = write.node("Div", "log2", [write.node("Log", "log", [over]), number("ln2", np.log(2))])
    exponent = write.node("Round", "exponent", [log])
    steps = write.node("Pow", "guess", [number("base", 2), exponent])
    limit = write.node("Min", "limit", [exponent, number("highest", EXPONENT_BIAS - 1)])
    low, high = (
        write.node(
            "Pow",
            name,
            [
                number(f"base_{name}", 2),
                write.node(op, f"to_{name}", [limit, number(f"by_{name}", 1)]),
            ],
        )
        for name, op in (("below", "Sub"), ("above", "Add"))
    )
    fits = [
        write.node("GreaterOrEqual", f"fits{i}", [one, over]) for i, one in enumerate((low, steps))
    ]
    found = write.node("Where", "no_lower", [fits[1], steps, high])
    found = write.node("Where", "scales", [fits[0], low, found])
    values = write.node("Div", "values", [blocks, found])
    eights = write.node("Cast", "eights", [values], to=_FLOAT8)
    numbers = write.node("Cast", "numbers", [eights], to=_FLOAT)
    return write.node("Mul", "rounded", [numbers, found])


def _not_zero(write: NodeWriter, steps: gs.Tensor) -> gs.Variable:
    """Steps to divide by: blocks too small for a scale are rounded to zero by any of 1."""
    zero = write.node("Equal", "no_step", [steps, write.constant("zero", np.float32(0))])
    return write.node("Where", "divisors", [zero, write.constant("any", np.float32(1)), steps])
