"""Write attention in float as one node of ONNX Runtime: MultiHeadAttention."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.microsoft import DOMAIN, import_microsoft
from regcache.passes.walk import is_constant, is_output, name_of

OP = "MultiHeadAttention"
# From [B, T, heads, D]: how queries and values stand in their products, and how keys do.
_BY_HEAD, _KEYS = (0, 2, 1, 3), (0, 2, 3, 1)
# From [B, heads, L, D].
_AS_IT_IS, _TURNED = (0, 1, 2, 3), (0, 1, 3, 2)


@dataclass(frozen=True)
class FuseAttention:
    """Make one com.microsoft MultiHeadAttention of q k^T, softmax, times v and what moves heads.

    ONNX Runtime (1.32) then never writes the scores, and transposes no keys. `scale` is the product
    of the numbers that queries and keys are multiplied by.

    Matched: softmax over the last axis between two MatMuls that nothing else reads, its queries
    [B, T, C] reshaped to heads and transposed, its context transposed and reshaped back. Keys and
    values come the same way, or by head [B, heads, L, D], as registers in front leave them.
    Refused: a mask or bias on the scores, products of quantized operands, queries with anything but
    numbers between them and their linear (rotary positions), sizes that are not known.
    `view_encoder` does not read the result: this pass is one of the last.
    """

    name: ClassVar[str] = "fuse_attention"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: what cannot be fused is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Put one node in the place of each attention; what it replaces falls to the clean-up."""
        edits, skips = [], []
        for softmax in [node for node in graph.nodes if node.op == "Softmax"]:
            try:
                found = _match(graph, softmax)
            except _CannotFuseError as error:
                skips.append(Skip(name_of(softmax), str(error)))
                continue
            keys = found.keys
            if found.turned:
                keys = gs.Variable(f"{found.output.name}/keys", np.float32)
                turn = gs.Node(
                    "Transpose", keys.name, {"perm": list(_TURNED)}, [found.keys], [keys]
                )
                graph.nodes.append(turn)
            found.output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    OP,
                    f"fuse_attention/{name_of(softmax)}",
                    {"num_heads": found.heads, "scale": found.scale},
                    [found.queries, keys, found.values],
                    [found.output],
                    domain=DOMAIN,
                )
            )
            edits.append(Edit(name_of(softmax), f"{OP} of {found.heads} heads"))
        if edits:
            import_microsoft(graph)
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """For each new node two products and a softmax less; what moved numbers is less or as much.

        Keys by head may be transposed alone.
        """
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        fused = new[OP] - old[OP]
        assert (new - old).keys() == {OP}
        assert old["Softmax"] - new["Softmax"] == fused
        assert old["MatMul"] - new["MatMul"] == 2 * fused
        assert (old - new).keys() <= {"MatMul", "Softmax", "Mul", "Reshape", "Transpose"}


class _CannotFuseError(Exception):
    """Why attention cannot be one node."""


@dataclass(frozen=True)
class _Attention:
    """What a MultiHeadAttention reads and writes.

    `turned`: whether `keys` are [B, heads, D, L].
    """

    queries: gs.Tensor
    keys: gs.Tensor
    values: gs.Tensor
    turned: bool
    heads: int
    scale: float
    output: gs.Variable


@dataclass(frozen=True)
class _Operand:
    """Where an operand of a product comes from: a tensor of four axes, `perm` and times `scale`.

    `tokens`: the tensor [B, T, heads D] that it was reshaped from; None where it was not.
    """

    tensor: gs.Tensor
    perm: tuple[int, ...]
    scale: float
    tokens: gs.Tensor | None


def _match(graph: gs.Graph, softmax: gs.Node) -> _Attention:
    """The attention around a softmax. Raises _CannotFuseError, the reason, where there is none."""
    scores, context = _products(graph, softmax)
    query, key = (_operand(tensor) for tensor in scores.inputs)
    value = _operand(context.inputs[1])
    if query.tokens is None or query.perm != _BY_HEAD:
        raise _CannotFuseError("its queries are not a linear's alone")
    if value.scale != 1:
        raise _CannotFuseError("its values are multiplied by a number")
    heads, size = query.tensor.shape[2:]
    output = _together(graph, context, heads * size)
    keys, values, turned = _keys_and_values(query, key, value)
    scale = query.scale * key.scale
    return _Attention(query.tokens, keys, values, turned, heads, scale, output)


def _products(graph: gs.Graph, softmax: gs.Node) -> tuple[gs.Node, gs.Node]:
    """The MatMuls before and behind a softmax, where nothing else reads what stands between."""
    before, after = softmax.inputs[0], softmax.outputs[0]
    alone = all(len(item.outputs) == 1 and not is_output(graph, item) for item in (before, after))
    around = [*before.inputs, *after.outputs]
    if not alone or [node.op for node in around] != ["MatMul", "MatMul"]:
        raise _CannotFuseError("it does not stand between two products alone")
    scores, context = around
    if context.inputs[0] is not after or softmax.attrs.get("axis", -1) not in (-1, 3):
        raise _CannotFuseError("it is not over the keys")
    return scores, context


def _keys_and_values(
    query: _Operand, key: _Operand, value: _Operand
) -> tuple[gs.Tensor, gs.Tensor, bool]:
    """Keys and values, and whether the keys are [B, heads, D, L].

    Both are tokens [B, T, C] where they can be, else by head.
    """
    tokens = [item.tokens for item in (query, key, value) if item.tokens is not None]
    alike = len(tokens) == 3 and len({tuple(item.shape[::2]) for item in tokens}) == 1
    if (key.perm, value.perm) == (_KEYS, _BY_HEAD) and alike:
        return tokens[1], tokens[2], False
    heads, size = query.tensor.shape[2:]
    turned, shape = key.perm == _AS_IT_IS, key.tensor.shape
    if key.perm not in (_AS_IT_IS, _TURNED) or value.perm != _AS_IT_IS or shape is None:
        raise _CannotFuseError("its keys or values come in another order")
    if len(shape) != 4 or (shape[1], shape[2 if turned else 3]) != (heads, size):
        raise _CannotFuseError("its keys have other heads than its queries")
    return key.tensor, value.tensor, turned


def _operand(tensor: gs.Tensor) -> _Operand:
    """Walk back through transposes of four axes and products with one number."""
    perm: tuple[int, ...] = _AS_IT_IS
    scale = 1.0
    for node, source in _back(tensor):
        if node.op == "Mul":
            (number,) = (item for item in node.inputs if item is not source)
            scale *= float(number.values.reshape(()))
        elif node.op == "Transpose":
            inner = tuple(int(axis) for axis in node.attrs.get("perm", ()))
            if len(inner) != len(perm):
                break
            perm = tuple(inner[axis] for axis in perm)
        else:
            apart = node.outputs[0].shape
            whole = source.shape is not None and apart is not None and len(source.shape) == 3
            same = whole and len(apart) == 4 and list(apart[:2]) == list(source.shape[:2])
            sized = same and all(isinstance(item, int) for item in apart[2:])
            if sized and apart[2] * apart[3] == source.shape[2]:
                return _Operand(node.outputs[0], perm, scale, source)
            break
        tensor = source
    return _Operand(tensor, perm, scale, None)


def _back(tensor: gs.Tensor) -> Iterator[tuple[gs.Node, gs.Tensor]]:
    """The nodes that make a tensor of one other, each with that: up to and with a Reshape."""
    while tensor.inputs:
        node = tensor.inputs[0]
        data = [item for item in node.inputs if not is_constant(item)]
        numbers = [item for item in node.inputs if is_constant(item)]
        scales = node.op == "Mul" and len(numbers) == 1 and numbers[0].values.size == 1
        if len(data) != 1 or not (scales or node.op in ("Reshape", "Transpose")):
            return
        yield node, data[0]
        if node.op == "Reshape":
            return
        tensor = data[0]


def _together(graph: gs.Graph, context: gs.Node, width: int) -> gs.Variable:
    """The context [B, T, `width`] with its heads side by side."""
    tensor, way = context.outputs[0], list[gs.Node]()
    while len(way) < 2 and len(tensor.outputs) == 1 and not is_output(graph, tensor):
        way.append(tensor.outputs[0])
        tensor = way[-1].outputs[0]
    if [node.op for node in way] == ["Transpose", "Reshape"]:
        apart, together = (node.outputs[0].shape for node in way)
        turned = tuple(way[0].attrs.get("perm", ())) == _BY_HEAD
        known = turned and apart is not None and together is not None
        if known and [*apart[:2], width] == list(together):
            return tensor
    raise _CannotFuseError("its context is not put together again")
