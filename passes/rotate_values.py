"""Rotate attention's values within each head, so that no channel of its output holds an outlier.

Attention adds up tokens, each channel by itself. A rotation of a head's channels therefore passes
through it: it goes into the weights that make the values, and its transpose into those of the
output projection. It costs nothing when the encoder runs.
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Attention, Linear, Role
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import consumers, is_output, producer

Doubles = NDArray[np.float64]

_BY_HEAD = [0, 2, 1, 3]


@dataclass(frozen=True)
class RotateValues:
    """Rotate what each head's values are, and take it back in the output projection.

    `seed` draws a random orthogonal matrix for each head of each block.
    Matched: values with a linear of their own, [B, T, heads D] reshaped to heads and transposed,
    their weighted sums transposed and reshaped back to what the output projection alone reads.
    Skipped: packed projections, registers in front, ONNX's Attention, quantized linears, values or
    sums that something else reads.
    """

    seed: int = 0
    name: ClassVar[str] = "rotate_values"
    parity: ClassVar[Parity] = Close(rtol=1e-3, atol=1e-4)

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder."""
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Turn the columns that make values and the rows that read their sums."""
        edits, skips = [], []
        random = np.random.default_rng(self.seed)
        for block in view_encoder(graph).blocks:
            site, found = f"blocks.{block.index}.values", _match(graph, block.attention)
            if isinstance(found, str):
                skips.append(Skip(site, found))
                continue
            value, heads = found
            size = value.weight_shape[1] // heads
            turns = np.linalg.qr(random.standard_normal((heads, size, size)))[0]
            _turn_columns(value, turns)
            _turn_rows(block.attention.out, turns)
            edits.append(Edit(site, f"{heads} heads of {size} channels"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same nodes, and linears of the same shapes."""
        assert [(node.op, node.name) for node in before.nodes] == [
            (node.op, node.name) for node in after.nodes
        ]
        old, new = view_encoder(before), view_encoder(after)
        assert old.linear_shapes == new.linear_shapes


def _match(graph: gs.Graph, attention: Attention) -> tuple[Linear, int] | str:
    """The linear that makes the values, and how many heads they have; or why there is none."""
    value = next((one for one in attention.projections if one.role is Role.V), None)
    if value is None or attention.scores is attention.context:
        return "its values have no linear of their own"
    if value.quantized or attention.out.quantized:
        return "quantized already"
    apart = _steps(graph, value.output, attention.value)
    together = _steps(graph, attention.context.outputs[0], attention.out.input)
    ops = [[node.op for node in steps or ()] for steps in (apart, together)]
    if ops != [["Reshape", "Transpose"], ["Transpose", "Reshape"]] or not apart or not together:
        return "more than heads that come apart and together stands around its values"
    if any(list(node.attrs.get("perm", ())) != _BY_HEAD for node in (apart[1], together[0])):
        return "its heads come in another order"
    width, shape = value.weight_shape[1], apart[0].outputs[0].shape
    if shape is None or len(shape) != 4 or not all(isinstance(dim, int) for dim in shape[2:]):
        return "its heads are not known"
    if shape[2] * shape[3] != width or attention.out.weight_shape[0] != width:
        return "its values and their sums differ in width"
    return value, int(shape[2])


def _steps(graph: gs.Graph, source: gs.Tensor, tensor: gs.Tensor) -> list[gs.Node] | None:
    """The nodes from a source to a tensor, of which all but these have one reader; None: none."""
    steps = list[gs.Node]()
    while True:
        if len(consumers(tensor)) != 1 or is_output(graph, tensor):
            return None
        if tensor is source:
            return steps
        node = producer(tensor)
        if node is None:
            return None
        steps.insert(0, node)
        tensor = node.inputs[0]


def _turn_columns(linear: Linear, turns: Doubles) -> None:
    """Multiply each head's columns of a weight [K, heads D], and its bias, by its matrix [D, D]."""
    weight = linear.weight.astype(np.float64)
    heads, size = turns.shape[:2]
    turned = np.einsum("khd,hde->khe", weight.reshape(-1, heads, size), turns).reshape(weight.shape)
    _set_weight(linear, turned)
    if linear.bias_add is not None:
        bias = np.einsum("hd,hde->he", linear.bias.astype(np.float64).reshape(heads, size), turns)
        values = np.asarray(bias.ravel(), np.float32)
        linear.replace_bias(gs.Constant(f"{linear.name}/bias/turned", values))


def _turn_rows(linear: Linear, turns: Doubles) -> None:
    """Multiply each head's rows of a weight [heads D, N] by the transpose of its matrix."""
    weight = linear.weight.astype(np.float64)
    heads, size = turns.shape[:2]
    rows = weight.reshape(heads, size, -1)
    _set_weight(linear, np.einsum("hde,hdn->hen", turns, rows).reshape(weight.shape))


def _set_weight(linear: Linear, weight: Doubles) -> None:
    values = np.ascontiguousarray(weight, np.float32)
    linear.matmul.inputs[1] = gs.Constant(f"{linear.name}/turned", values)
