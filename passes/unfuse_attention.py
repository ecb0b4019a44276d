"""ONNX Runtime's attention operators, in ONNX's."""

from collections.abc import Sequence

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.drop_masks import uniform_value
from regcache.passes.known_shape import rank_of, width_of
from regcache.passes.unfused import (
    CannotUnfuseError,
    given,
    refuse_attributes,
    refuse_inputs,
    refuse_outputs,
)
from regcache.passes.walk import is_constant
from regcache.passes.write_nodes import NodeWriter


def unfuse_attention(write: NodeWriter, node: gs.Node) -> None:
    """Attention: one projection [B, T, C] -> q, k and v side by side, and attention of the heads.

    An attention bias is added to the scores. Refused: a mask that is not 1 everywhere, a causal
    one, a past, rotation, and sizes that nothing tells.
    """
    refuse_attributes(node, "unidirectional", "do_rotary", "past_present_share_buffer")
    refuse_inputs(node, past=4, past_sequence_length=6)
    refuse_outputs(write.graph, node, present=1)
    _check_mask(given(node, 3))
    heads, sizes = int(node.attrs["num_heads"]), _hidden_sizes(node)
    if heads < 1 or len(sizes) != 3 or any(size < 1 or size % heads for size in sizes):
        raise CannotUnfuseError(f"{heads} heads do not fit the widths {sizes}")
    weight, bias = node.inputs[1], given(node, 2)
    if len(set(sizes)) == 1:
        packed = _linear(write, "qkv", node.inputs[0], weight, bias)
        apart = write.reshape("qkv/apart", packed, 0, 0, 3, heads, sizes[0] // heads)
        turned = write.transpose("qkv/heads", apart, 2, 0, 3, 1, 4)
        q, k, v = (
            write.node(
                "Gather",
                name,
                [turned, write.constant(f"{name}/index", np.array(index, np.int64))],
                axis=0,
            )
            for index, name in enumerate("qkv")
        )
    else:
        if not is_constant(weight) or not (bias is None or is_constant(bias)):
            raise CannotUnfuseError("its weights are not constant")
        columns = _columns(write, weight, bias, sizes)
        q, k, v = (
            _by_head(write, name, _linear(write, name, node.inputs[0], *own), heads, size // heads)
            for name, size, own in zip("qkv", sizes, columns, strict=True)
        )
    scale = float(node.attrs.get("scale", 0)) or (sizes[0] // heads) ** -0.5
    _attend(write, node.outputs[0], (q, k, v), scale, given(node, 5))


def unfuse_multi_head_attention(write: NodeWriter, node: gs.Node) -> None:
    """MultiHeadAttention: attention of projected q, k and v [B, T, C], with their biases.

    Keys and values may come packed [B, T, heads, 2, D], all three [B, T, heads, 3, D], and keys and
    values apart by head [B, heads, T, D]. An attention bias is added to the scores. Refused: a mask
    that is not 1 everywhere, a causal one, a past, and sizes that nothing tells.
    """
    refuse_attributes(node, "unidirectional")
    refuse_inputs(node, past_key=6, past_value=7, past_sequence_length=8, cache_indirection=9)
    refuse_outputs(write.graph, node, present_key=1, present_value=2, qk=3)
    _check_mask(given(node, 4))
    heads, query, key, value = int(node.attrs["num_heads"]), *(given(node, i) for i in range(3))
    if query is None:
        raise CannotUnfuseError("it has no queries")
    width = width_of(query)
    packed = key is None or value is None
    if width is None:
        raise CannotUnfuseError("the size of its heads is not known")
    if heads < 1 or (key is not None and width % heads):
        raise CannotUnfuseError(f"{heads} heads do not fit a width of {width}")
    size = width if key is None else width // heads
    if given(node, 3) is not None:
        if packed or rank_of(key) == 4:
            raise CannotUnfuseError("it has a bias, and its operands are by head already")
        query, key, value = _biased(write, node, width)
    if key is None:
        parts = _unpacked(write, "qkv", query)
    elif value is None:
        parts = [_by_head(write, "q", query, heads, size), *_unpacked(write, "kv", key)]
    else:
        parts = [_by_head(write, "q", query, heads, size)]
        for name, tensor in (("k", key), ("v", value)):
            rank = rank_of(tensor)
            if rank not in (3, 4):
                raise CannotUnfuseError(f"the rank of {tensor.name!r} is not known")
            parts.append(tensor if rank == 4 else _by_head(write, name, tensor, heads, None))
    scale = float(node.attrs.get("scale", 0)) or size**-0.5
    _attend(write, node.outputs[0], parts, scale, given(node, 5))


def _hidden_sizes(node: gs.Node) -> list[int]:
    """The widths of q, k and v in Attention's packed weight."""
    sizes = [int(size) for size in node.attrs.get("qkv_hidden_sizes", [])]
    if sizes:
        return sizes
    packed = width_of(node.inputs[1])
    if packed is None and given(node, 2) is not None:
        packed = width_of(node.inputs[2])
    if packed is None:
        raise CannotUnfuseError("the width of its heads is not known")
    return [packed // 3] * 3


def _check_mask(mask: gs.Tensor | None) -> None:
    """Raise CannotUnfuseError unless a mask lets every token see every other."""
    if mask is None:
        return
    rank = rank_of(mask)
    # A mask of one number for each sequence holds its length, which may be any.
    if rank is None or rank < 2 or uniform_value(mask) != 1:
        raise CannotUnfuseError("it has a mask that is not 1 everywhere")


def _linear(
    write: NodeWriter, name: str, data: gs.Tensor, weight: gs.Tensor, bias: gs.Tensor | None
) -> gs.Variable:
    product = write.node("MatMul", f"{name}/matmul", [data, weight])
    return product if bias is None else write.node("Add", f"{name}/bias", [product, bias])


def _columns(
    write: NodeWriter, weight: gs.Constant, bias: gs.Constant | None, sizes: Sequence[int]
) -> list[tuple[gs.Constant, gs.Constant | None]]:
    """A packed weight and bias cut into those of q, k and v."""
    found = []
    ends = np.cumsum([0, *sizes])
    for name, start, end in zip("qkv", ends[:-1], ends[1:], strict=True):
        columns = np.ascontiguousarray(weight.values[:, start:end])
        part = None if bias is None else write.constant(f"{name}/values", bias.values[start:end])
        found.append((write.constant(f"{name}/weight", columns), part))
    return found


def _biased(write: NodeWriter, node: gs.Node, width: int) -> list[gs.Variable]:
    """q, k and v with their biases, which lie side by side in one vector."""
    bias = node.inputs[3]
    if not is_constant(bias):
        raise CannotUnfuseError("its bias is not constant")
    parts = np.split(bias.values, [width, 2 * width])
    return [
        write.node("Add", f"{name}/bias", [tensor, write.constant(f"{name}/values", values)])
        for name, tensor, values in zip("qkv", node.inputs[:3], parts, strict=True)
    ]


def _by_head(
    write: NodeWriter, name: str, tensor: gs.Tensor, heads: int, size: int | None
) -> gs.Variable:
    """[B, T, heads D] -> [B, heads, T, D]."""
    apart = write.reshape(f"{name}/apart", tensor, 0, 0, heads, size or -1)
    return write.transpose(f"{name}/heads", apart, 0, 2, 1, 3)


def _unpacked(write: NodeWriter, names: str, packed: gs.Tensor) -> list[gs.Variable]:
    """[B, T, heads, N, D] -> N times [B, heads, T, D]."""
    found = []
    for index, name in enumerate(names):
        place = write.constant(f"{name}/index", np.array(index, np.int64))
        part = write.node("Gather", name, [packed, place], axis=3)
        found.append(write.transpose(f"{name}/heads", part, 0, 2, 1, 3))
    return found


def _attend(
    write: NodeWriter,
    output: gs.Variable,
    parts: Sequence[gs.Tensor],
    scale: float,
    bias: gs.Tensor | None,
) -> None:
    """Scores, softmax, context and the heads side by side again, as exporters write them."""
    query, key, value = parts
    scaled = write.node("Mul", "scaled", [query, write.floats("scale", scale, query)])
    scores = write.node("MatMul", "scores", [scaled, write.transpose("keys", key, 0, 1, 3, 2)])
    if bias is not None:
        scores = write.node("Add", "attention_bias", [scores, bias])
    weights = write.node("Softmax", "softmax", [scores], axis=-1)
    context = write.node("MatMul", "context", [weights, value])
    turned = write.transpose("tokens", context, 0, 2, 1, 3)
    write.reshape("together", turned, 0, 0, -1, output=output)
