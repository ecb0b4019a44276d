"""Give queries, keys and values a linear each where an exporter packed them into one."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Linear
from regcache.passes.find_blocks import view_encoder
from regcache.passes.follow_axes import (
    ColumnPart,
    axes_of,
    factors_of,
    indices,
    moved,
    parts,
    way_to,
)
from regcache.passes.walk import consumers, is_constant, producer

# Nodes between a packed projection and where its parts go apart.
_MOVES = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class SplitQkv:
    """Replace a packed projection by linears that make queries, keys and values directly.

    TensorRT moves the reshape and the slices of a packed projection into its matmul and then
    computes it in float, Q/DQ or not; three linears on one Q/DQ pair it fuses again, in INT8.

    Matched: a projection [..., 3 C] that makes q, k and v, or [..., 2 C] that makes two of them,
    moved about by Reshape, Transpose, Squeeze and Unsqueeze nodes until Gather, Slice or Split
    nodes pick its equal parts: one behind the other, as timm and nn.MultiheadAttention pack them,
    or head by head. Of a projection that is quantized, the integers, scales and zero points are
    split; the activation's pair is shared.
    Left whole `for_tensorrt`: one whose thirds a Gather or Slice picks while all heads are
    together, as nn.MultiheadAttention does: TensorRT computes that in INT8 as it is, with two
    kernels fewer than three linears.
    Refused: parts that cannot be followed, scales for rows or blocks of the weight or that are not
    constant.
    """

    for_tensorrt: bool = True
    name: ClassVar[str] = "split_qkv"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-5)
    version: ClassVar[int] = 2
    """Goes up when the pass comes to write other graphs: engines are built again then."""

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder."""
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Add the linears; the packed one falls to the clean-up."""
        edits, skips = [], []
        for block in view_encoder(graph).blocks:
            for packed in block.attention.projections:
                letters = packed.role.value
                if len(letters) == 1:
                    continue
                found = _packed_parts(packed)
                rank = len(packed.output.shape or ())
                if self.for_tensorrt and found and all(_in_place(part, rank) for part in found):
                    continue
                if found is None or not _scaled_by_column(packed):
                    lost = "the way to its parts is none that is known"
                    reason = lost if found is None else "its weight is not scaled by column"
                    slower = "TensorRT computes it in float" if self.for_tensorrt else None
                    skips.append(Skip(packed.name, reason, slower))
                    continue
                for letter, part in zip(letters, found, strict=True):
                    _project(graph, f"blocks.{block.index}/{letter}", packed, part)
                edits.append(Edit(packed.name, f"{', '.join(letters[:-1])} and {letters[-1]}"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """One linear for each letter of a projection that was split, quantized where it was."""
        old, new = view_encoder(before), view_encoder(after)
        for one, other in zip(old.blocks, new.blocks, strict=True):
            assert len(other.linears) >= len(one.linears)
            packed, split = one.attention.projections, other.attention.projections
            assert len(split) <= 3
            assert {item.quantized for item in packed} == {item.quantized for item in split}


def packed_thirds(packed: Linear) -> list[gs.Variable] | None:
    """The tensors that are queries, keys and values, where each is a third of the columns."""
    found = _packed_parts(packed)
    if found is None or len(found) != 3:
        return None
    width = packed.weight_shape[1] // 3
    whole = all(part.factor.stride == width for part in found)
    return [part.tensor for part in found] if whole else None


def _packed_parts(packed: Linear) -> list[ColumnPart] | None:
    """The equal parts of a projection's columns, in order; None where they cannot be followed."""
    count = len(packed.role.value)
    tensor, axes = packed.output, axes_of(packed.output)
    while axes is not None:
        following = consumers(tensor)
        if len(following) != 1 or following[0].op not in _MOVES:
            break
        axes, tensor = moved(following[0], axes), following[0].outputs[0]
    if axes is None:
        return None
    picked = [parts(node, axes, count) for node in consumers(tensor)]
    found = sorted((_squeezed(part) for some in picked for part in some), key=lambda one: one.index)
    if not all(picked) or [part.index for part in found] != list(range(count)):
        return None
    rank = len(packed.output.shape)
    alike = len({part.factor for part in found}) == 1 and found[0].factor.axis == rank - 1
    laid_out = all(way_to(part.axes, rank) is not None for part in found)
    return found if alike and laid_out else None


def _in_place(part: ColumnPart, rank: int) -> bool:
    """Whether a Gather or Slice picks the part as its linear would make it, heads together."""
    picker = producer(part.tensor)
    if picker is not None and picker.op == "Squeeze":
        picker = producer(picker.inputs[0])
    picked = picker is not None and picker.op in {"Gather", "Slice"}
    return picked and way_to(part.axes, rank) == []


def _squeezed(part: ColumnPart) -> ColumnPart:
    """The part behind the Squeeze that alone reads it."""
    following = consumers(part.tensor)
    if len(following) != 1 or following[0].op != "Squeeze":
        return part
    axes = moved(following[0], part.axes)
    return part if axes is None else replace(part, tensor=following[0].outputs[0], axes=axes)


def _scaled_by_column(packed: Linear) -> bool:
    """Whether the weight, if it is quantized, has constant scales: one, or one for each column."""
    dequantize = producer(packed.matmul.inputs[1])
    if dequantize is None:
        return True
    if dequantize.attrs.get("block_size") or not all(map(is_constant, dequantize.inputs)):
        return False
    by_column = dequantize.attrs.get("axis", 1) in (1, -1)
    return by_column or all(item.values.size == 1 for item in dequantize.inputs[1:])


def _project(graph: gs.Graph, name: str, packed: Linear, part: ColumnPart) -> None:
    """Let a part come from a linear with its columns of the packed weight."""
    inner = factors_of(part.axes, part.factor.axis)
    columns = indices(inner, part.index * part.factor.stride)
    product, biased = (gs.Variable(f"{name}/{step}", np.float32) for step in ("matmul", "bias"))
    weight = _weight_columns(graph, packed, f"{name}/weight", columns)
    nodes = [gs.Node("MatMul", f"{name}/matmul", {}, [packed.input, weight], [product])]
    if packed.bias_add is not None:
        bias = next(item for item in packed.bias_add.inputs if is_constant(item))
        values = gs.Constant(f"{name}/bias/values", _columns(bias.values, columns))
        nodes.append(gs.Node("Add", f"{name}/bias", {}, [product, values], [biased]))
    way = way_to(part.axes, len(packed.output.shape))
    assert way is not None
    for step, op, target in way:
        attributes, inputs = {"perm": target}, nodes[-1].outputs[:]
        if op == "Reshape":
            attributes = {}
            inputs.append(gs.Constant(f"{name}/{step}/shape", np.array(target, np.int64)))
        made = gs.Variable(f"{name}/{step}/made", np.float32)
        nodes.append(gs.Node(op, f"{name}/{step}", attributes, inputs, [made]))
    old = producer(part.tensor)
    assert old is not None
    old.outputs = [item for item in old.outputs if item is not part.tensor]
    nodes[-1].outputs = [part.tensor]
    graph.nodes += nodes


def _weight_columns(
    graph: gs.Graph, packed: Linear, name: str, columns: NDArray[np.int64]
) -> gs.Tensor:
    """Columns of the packed weight: a constant, or behind a DequantizeLinear of their own."""
    dequantize = producer(packed.matmul.inputs[1])
    if dequantize is None:
        return gs.Constant(name, _columns(packed.weight, columns))
    inputs = [
        gs.Constant(f"{name}/{part}", _columns(item.values, columns))
        for part, item in zip(("quantized", "scale", "zero_point"), dequantize.inputs, strict=False)
    ]
    floats = gs.Variable(f"{name}/dequantized", dtype=np.float32)
    attributes = dict(dequantize.attrs)
    graph.nodes.append(gs.Node("DequantizeLinear", f"{name}/dq", attributes, inputs, [floats]))
    return floats


def _columns(values: NDArray[Any], columns: NDArray[np.int64]) -> NDArray[Any]:
    """Columns of a weight [K, N] or of what it has for each [N]; one number is for all of them."""
    return np.ascontiguousarray(values[..., columns]) if values.size > 1 else values
