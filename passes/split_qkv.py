"""Give queries, keys and values a linear each where an exporter packed them into one."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Block, Linear
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import consumers, is_constant, producer

_PERM = [2, 0, 3, 1, 4]


@dataclass(frozen=True)
class SplitQkv:
    """Replace a packed qkv linear by three that make [B, heads, T, head_dim] directly.

    TensorRT moves the reshape and the slices of a packed projection into its matmul and then
    computes it in float, Q/DQ or not; three linears on one Q/DQ pair it fuses again, in INT8.

    Matched: [B, T, 3 C] -> Reshape [B, T, 3, heads, head_dim] -> Transpose [3, B, heads, T,
    head_dim] -> Gather, or Slice and Squeeze, of each third (timm). Of a projection that is
    quantized, the integers, scales and zero points are split; the activation's pair is shared.
    Refused: another order of the packed axes, scales for rows or blocks of the weight or that are
    not constant.
    """

    name: ClassVar[str] = "split_qkv"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-5)
    version: ClassVar[int] = 1
    """Goes up when the pass comes to write other graphs: engines are built again then."""

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder."""
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Add the linears; the packed one falls to the clean-up."""
        edits, skips = [], []
        for block in view_encoder(graph).blocks:
            projections = block.attention.projections
            if len(projections) != 1:
                continue
            thirds = packed_thirds(projections[0])
            if thirds is None:
                skips.append(Skip(projections[0].name, "the packed axes are not in timm's order"))
                continue
            if not _scaled_by_column(projections[0]):
                skips.append(Skip(projections[0].name, "its weight is not scaled by column"))
                continue
            for index, tensor in enumerate(thirds):
                _project(graph, block, projections[0], index, tensor)
            edits.append(Edit(projections[0].name, "q, k and v"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Two linears more for every block that was split, quantized where it was."""
        old, new = view_encoder(before), view_encoder(after)
        for one, other in zip(old.blocks, new.blocks, strict=True):
            assert len(other.linears) - len(one.linears) in (0, 2)
            packed, split = one.attention.projections, other.attention.projections
            assert {item.quantized for item in packed} == {item.quantized for item in split}


def packed_thirds(packed: Linear) -> list[gs.Variable] | None:
    """The tensors [B, heads, T, head_dim] that are the queries, keys and values."""
    following = consumers(packed.output)
    if len(following) != 1 or following[0].op != "Reshape":
        return None
    dims = following[0].outputs[0].shape
    turned = consumers(following[0].outputs[0])
    if not dims or len(dims) != 5 or dims[2] != 3 or len(turned) != 1:
        return None
    if turned[0].op != "Transpose" or list(turned[0].attrs.get("perm", [])) != _PERM:
        return None
    found: dict[int, gs.Variable] = {}
    for node in consumers(turned[0].outputs[0]):
        place = _third(node)
        if place is None:
            return None
        found[place[0]] = place[1]
    return [found[index] for index in range(3)] if found.keys() == {0, 1, 2} else None


def _third(node: gs.Node) -> tuple[int, gs.Variable] | None:
    """(index, tensor) of a Gather, or of a Slice and Squeeze, along the first axis."""
    if node.op == "Gather" and node.attrs.get("axis", 0) == 0 and is_constant(node.inputs[1]):
        index = node.inputs[1].values
        return (int(index), node.outputs[0]) if index.ndim == 0 else None
    if node.op != "Slice" or not all(map(is_constant, node.inputs[1:])):
        return None
    start, end, axis = (tensor.values.tolist() for tensor in node.inputs[1:4])
    squeezed = consumers(node.outputs[0])
    if axis != [0] or end[0] - start[0] != 1 or len(squeezed) != 1 or squeezed[0].op != "Squeeze":
        return None
    return start[0], squeezed[0].outputs[0]


def _scaled_by_column(packed: Linear) -> bool:
    """Whether the weight, if it is quantized, has constant scales: one, or one for each column."""
    dequantize = producer(packed.matmul.inputs[1])
    if dequantize is None:
        return True
    if dequantize.attrs.get("block_size") or not all(map(is_constant, dequantize.inputs)):
        return False
    by_column = dequantize.attrs.get("axis", 1) in (1, -1)
    return by_column or all(item.values.size == 1 for item in dequantize.inputs[1:])


def _project(
    graph: gs.Graph, block: Block, packed: Linear, index: int, tensor: gs.Variable
) -> None:
    """Let `tensor` come from a linear with its third of the packed weight."""
    name = f"blocks.{block.index}/{'qkv'[index]}"
    width = packed.weight_shape[1] // 3
    columns = slice(index * width, (index + 1) * width)
    heads = tensor.shape
    product, biased, split = (
        gs.Variable(f"{name}/{step}", dtype=np.float32) for step in ("matmul", "bias", "heads")
    )
    weight = _weight_columns(graph, packed, f"{name}/weight", columns)
    target = gs.Constant(f"{name}/shape", np.array([0, 0, heads[1], heads[3]], dtype=np.int64))
    nodes = [gs.Node("MatMul", f"{name}/matmul", {}, [packed.input, weight], [product])]
    if packed.bias_add is not None:
        bias = next(item for item in packed.bias_add.inputs if is_constant(item))
        third = gs.Constant(f"{name}/bias/values", _columns(bias.values, columns))
        nodes.append(gs.Node("Add", f"{name}/bias", {}, [product, third], [biased]))
    source = nodes[-1].outputs[0]
    nodes.append(gs.Node("Reshape", f"{name}/reshape", {}, [source, target], [split]))
    old = producer(tensor)
    assert old is not None
    old.outputs.clear()
    nodes.append(
        gs.Node("Transpose", f"{name}/transpose", {"perm": [0, 2, 1, 3]}, [split], [tensor])
    )
    graph.nodes += nodes


def _weight_columns(graph: gs.Graph, packed: Linear, name: str, columns: slice) -> gs.Tensor:
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


def _columns(values: NDArray[Any], columns: slice) -> NDArray[Any]:
    """Columns of a weight [K, N] or of what it has for each [N]; one number is for all of them."""
    return np.ascontiguousarray(values[..., columns]) if values.size > 1 else values
