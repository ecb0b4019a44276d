"""Give queries, keys and values a linear each where an exporter packed them into one."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

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
    head_dim] -> Gather, or Slice and Squeeze, of each third (timm). Refused: another order of the
    packed axes, a projection that is quantized already.
    """

    name: ClassVar[str] = "split_qkv"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-5)

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
            for index, tensor in enumerate(thirds):
                _project(graph, block, projections[0], index, tensor)
            edits.append(Edit(projections[0].name, "q, k and v"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Two linears more for every block that was split, none lost."""
        old, new = view_encoder(before), view_encoder(after)
        for one, other in zip(old.blocks, new.blocks, strict=True):
            assert len(other.linears) - len(one.linears) in (0, 2)


def packed_thirds(packed: Linear) -> list[gs.Variable] | None:
    """The tensors [B, heads, T, head_dim] that are the queries, keys and values."""
    following = consumers(packed.output)
    if packed.quantized or len(following) != 1 or following[0].op != "Reshape":
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
    weight = gs.Constant(f"{name}/weight", np.ascontiguousarray(packed.weight[:, columns]))
    target = gs.Constant(f"{name}/shape", np.array([0, 0, heads[1], heads[3]], dtype=np.int64))
    nodes = [gs.Node("MatMul", f"{name}/matmul", {}, [packed.input, weight], [product])]
    if packed.bias_add is not None:
        bias = next(item for item in packed.bias_add.inputs if is_constant(item))
        third = gs.Constant(f"{name}/bias/values", np.ascontiguousarray(bias.values[columns]))
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
