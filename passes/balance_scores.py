"""Even out the channels of queries and keys, so that few bits fit them; softmax stays the same."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Attention, Linear, Role
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import consumers, is_constant, producer

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Balance:
    """What is done to one block: `shift` [N] is taken off keys, `factor` [N] goes from k to q.

    Queries are multiplied by `factor`, keys divided by it, which q k^T does not see. A shift of
    keys adds one number to all scores of a query, which softmax does not see.
    """

    shift: Floats
    factor: Floats


@dataclass(frozen=True)
class BalanceScores:
    """Fold a shift of keys, and a factor between queries and keys, into what makes them.

    `balances`: by the block's number. The weights' columns are scaled, or their scales where they
    stand behind a DequantizeLinear, so that no integer changes; biases are shifted and scaled.
    Matched: q and k with a linear each, between it and the scores only Reshape, Transpose and Mul
    by a number. Without a bias, keys are not shifted.
    Skipped: packed projections, keys with registers among them, rotated or normed queries and keys,
    a linear that something else reads too or whose weight has no scale for each column.
    """

    balances: Mapping[int, Balance]
    name: ClassVar[str] = "balance_scores"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder with these blocks, and positive factors of their width."""
        blocks = {block.index: block for block in view_encoder(graph).blocks}
        for index, balance in self.balances.items():
            if index not in blocks:
                raise InputError(f"balance_scores: no block {index}")
            if not (np.isfinite(balance.factor) & (balance.factor > 0)).all():
                raise InputError(f"balance_scores: a factor of block {index} is not positive")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Replace weights, or their scales, and biases."""
        edits, skips = [], []
        for block in view_encoder(graph).blocks:
            site, balance = f"blocks.{block.index}.attention", self.balances.get(block.index)
            if balance is None:
                continue
            pair = score_linears(block.attention)
            if isinstance(pair, str):
                skips.append(Skip(site, pair))
            elif balance.factor.shape != pair.query.weight_shape[1:]:
                skips.append(Skip(site, "its balance is of another width"))
            else:
                _scale(pair.query, balance.factor, np.zeros_like(balance.shift))
                _scale(pair.key, np.reciprocal(balance.factor), balance.shift)
                edits.append(Edit(site, "keys shifted, queries and keys scaled"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same nodes in the same places."""
        assert [(node.op, node.name) for node in before.nodes] == [
            (node.op, node.name) for node in after.nodes
        ]


@dataclass(frozen=True)
class ScoreLinears:
    """The linears of queries and keys, and the number that each is multiplied by on the way."""

    query: Linear
    key: Linear
    query_times: float
    key_times: float


def score_linears(attention: Attention) -> ScoreLinears | str:
    """The linears that alone make queries and keys, column by column; or why there are none."""
    roles = {linear.role: linear for linear in attention.projections}
    if not {Role.Q, Role.K} <= roles.keys() or attention.scores is attention.context:
        return "its queries and keys have no linears of their own"
    query, key = roles[Role.Q], roles[Role.K]
    if query.weight_shape[1] != key.weight_shape[1]:
        return "its queries and keys differ in width"
    ways = [
        _way(tensor, linear) for tensor, linear in ((attention.query, query), (attention.key, key))
    ]
    if any(isinstance(way, str) for way in ways):
        return next(way for way in ways if isinstance(way, str))
    (query_times, query_shapes), (key_times, key_shapes) = (
        way for way in ways if not isinstance(way, str)
    )
    if query_shapes[:1] != key_shapes[:1]:
        return "its queries and keys are laid out differently"
    for linear in (query, key):
        maker = producer(linear.matmul.inputs[1])
        if maker is not None and not _has_columns(maker, linear.weight_shape[1]):
            return f"the weight of {linear.name} has no scale for each column"
    return ScoreLinears(query, key, query_times, key_times)


def _way(tensor: gs.Tensor, linear: Linear) -> tuple[float, list[list[int]]] | str:
    """From a linear to an operand of the scores: what it is multiplied by, and how it is reshaped.

    Only the last two numbers of a shape count: how columns become heads and channels.
    """
    times, shapes = 1.0, list[list[int]]()
    while tensor is not linear.output:
        node = producer(tensor)
        if node is None:
            return "its queries or keys are made by more than a linear"
        tensor = node.inputs[0]
        if node.op == "Mul":
            number = next((item for item in node.inputs if is_constant(item)), None)
            if number is None or number.values.size != 1:
                return "a Mul stands behind its queries or keys"
            times *= float(number.values.reshape(()))
            tensor = next(item for item in node.inputs if item is not number)
        elif node.op == "Reshape" and is_constant(node.inputs[1]):
            shapes.insert(0, [int(dim) for dim in node.inputs[1].values[-2:]])
        elif node.op != "Transpose":
            return f"{node.op} stands behind its queries or keys"
        if len(consumers(tensor)) != 1:
            return "something else reads its queries or keys"
    if times <= 0:
        return "its queries or keys are multiplied by a number that is not positive"
    return times, shapes


def _has_columns(dequantize: gs.Node, width: int) -> bool:
    scale = dequantize.inputs[1]
    plain = dequantize.op == "DequantizeLinear" and not dequantize.attrs.get("block_size")
    columns = dequantize.attrs.get("axis", 1) in (1, -1) and is_constant(scale)
    return plain and columns and scale.values.shape == (width,)


def _scale(linear: Linear, factor: Floats, shift: Floats) -> None:
    """(x - shift) * factor of a linear's output, folded into its weight and bias."""
    weight = linear.matmul.inputs[1]
    dequantize = producer(weight)
    if dequantize is None:
        values = np.asarray(weight.values * factor, np.float32)
        linear.matmul.inputs[1] = gs.Constant(f"{linear.name}/balanced", values)
    else:
        scales = np.asarray(dequantize.inputs[1].values * factor, np.float32)
        dequantize.inputs[1] = gs.Constant(f"{linear.name}/balanced/scale", scales)
    if linear.bias_add is None:
        return
    slot = next(slot for slot, item in enumerate(linear.bias_add.inputs) if is_constant(item))
    bias = linear.bias_add.inputs[slot].values
    values = np.asarray((bias - shift) * factor, np.float32)
    linear.bias_add.inputs[slot] = gs.Constant(f"{linear.name}/balanced/bias", values)
