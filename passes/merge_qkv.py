"""Give quantized queries, keys and values one linear, in a form that TensorRT leaves whole."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Linear
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import is_constant, producer

# A power of two, so that every number stays exactly what it was.
_FACTOR = 2.0


@dataclass(frozen=True)
class MergeQkv:
    """Replace the three quantized linears of q, k and v by one and a Slice for each.

    TensorRT-RTX 1.7 makes one product of them in any case for INT8, but not for FP8 on compute
    capability 12.0, and prepares q, k and v for attention in three kernels; behind one linear it
    takes a single kernel. That is so only where one part is not treated like the others, else it
    moves their reshapes into the product and multiplies in float: so queries come out of the linear
    twice as large and are halved behind their Slice, which changes no number.

    Matched: q, k and v on one Q/DQ pair, weights behind a DequantizeLinear scaled by column, of
    integers or E4M3, with biases or without.
    Left as they are: float and packed linears. Refused: linears of which some are quantized only,
    weights scaled otherwise, or of different types or zero points.
    """

    name: ClassVar[str] = "merge_qkv"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder."""
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Add the packed linear and the slices; the three linears fall to the clean-up."""
        edits, skips = [], []
        for block in view_encoder(graph).blocks:
            linears = block.attention.projections
            if len(linears) != 3 or not any(linear.quantized for linear in linears):
                continue
            site = f"blocks.{block.index}.q+k+v"
            reason = _refusal(linears)
            if reason is not None:
                skips.append(Skip(site, reason, "TensorRT takes two kernels more"))
                continue
            _merge(graph, f"blocks.{block.index}/qkv", linears)
            edits.append(Edit(site, "one linear"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """One quantized linear where there were three, and as many columns."""
        old, new = view_encoder(before), view_encoder(after)
        for one, other in zip(old.blocks, new.blocks, strict=True):
            few, many = other.attention.projections, one.attention.projections
            assert len(few) in (1, len(many))
            assert [linear.quantized for linear in few] == [many[0].quantized] * len(few)
            columns = [sum(item.weight_shape[1] for item in some) for some in (few, many)]
            assert columns[0] == columns[1]


def _refusal(linears: tuple[Linear, ...]) -> str | None:
    if len({id(linear.input) for linear in linears}) > 1:
        return "they do not read one tensor"
    if not all(linear.quantized for linear in linears):
        return "some are float"
    kinds = set()
    for linear in linears:
        dequantize = _dequantize(linear)
        stored, *numbers = dequantize.inputs
        by_column = dequantize.attrs.get("axis", 1) in (1, -1)
        if dequantize.attrs.get("block_size") or not all(map(is_constant, dequantize.inputs)):
            return "a weight is scaled by blocks, or not by constants"
        if not by_column or any(item.values.shape != stored.shape[1:] for item in numbers):
            return "a weight is not scaled by column"
        kinds.add((stored.dtype, len(numbers)))
    return None if len(kinds) == 1 else "their weights are of different types"


def _dequantize(linear: Linear) -> gs.Node:
    node = producer(linear.matmul.inputs[1])
    assert node is not None
    return node


def _merge(graph: gs.Graph, name: str, linears: tuple[Linear, ...]) -> None:
    """Write the linear and its parts; queries are doubled in the scales, and halved behind."""
    factors = [_FACTOR if linear.role.value == "q" else 1.0 for linear in linears]
    packed = _product(graph, name, linears, factors)
    start = 0
    for linear, factor in zip(linears, factors, strict=True):
        end = start + linear.weight_shape[1]
        role, result = linear.role.value, linear.output
        (linear.bias_add or linear.matmul).outputs.clear()
        part = result
        if factor != 1.0:
            part = gs.Variable(f"{name}/{role}/doubled", np.float32)
            half = gs.Constant(f"{name}/{role}/half", np.array(1 / factor, np.float32))
            graph.nodes.append(gs.Node("Mul", f"{name}/{role}/mul", {}, [part, half], [result]))
        ends = [
            gs.Constant(f"{name}/{role}/{what}", np.array([at], np.int64))
            for what, at in (("start", start), ("end", end), ("axis", -1))
        ]
        graph.nodes.append(gs.Node("Slice", f"{name}/{role}", {}, [packed, *ends], [part]))
        start = end


def _product(
    graph: gs.Graph, name: str, linears: tuple[Linear, ...], factors: list[float]
) -> gs.Variable:
    """The packed linear [..., 3 C], its bias added where any linear has one."""
    dequantizers = [_dequantize(linear) for linear in linears]
    stored, scales, *points = (
        [node.inputs[slot].values for node in dequantizers]
        for slot in range(len(dequantizers[0].inputs))
    )
    larger = [values * np.float32(factor) for values, factor in zip(scales, factors, strict=True)]
    constants = {"quantized": np.concatenate(stored, axis=1), "scale": np.concatenate(larger)}
    if points:
        constants["zero_point"] = np.concatenate(points[0])
    weight, product, biased = (
        gs.Variable(f"{name}/{what}", np.float32) for what in ("dequantized", "matmul", "bias")
    )
    inputs = [gs.Constant(f"{name}/{what}", values) for what, values in constants.items()]
    graph.nodes += [
        gs.Node("DequantizeLinear", f"{name}/dq", {"axis": 1}, inputs, [weight]),
        gs.Node("MatMul", f"{name}/matmul", {}, [linears[0].input, weight], [product]),
    ]
    if not any(linear.bias_add for linear in linears):
        return product
    biases = [linear.bias * np.float32(by) for linear, by in zip(linears, factors, strict=True)]
    values = gs.Constant(f"{name}/bias/values", np.concatenate(biases))
    graph.nodes.append(gs.Node("Add", f"{name}/bias", {}, [product, values], [biased]))
    return biased
