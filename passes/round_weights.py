"""Round the weights of a vision encoder's linears to few bits and leave everything in float."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.affine import check_bits
from regcache.passes.base import Edit, Log, Lossy, Parity, Skip
from regcache.passes.encoder import Linear
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder


@dataclass(frozen=True)
class RoundWeights:
    """Replace each block linear's weight by its symmetric rounding: weight-only quantization.

    The float weight [K, N] gets one scale for each output channel and group of `block_size`
    consecutive input channels (the last may be shorter); it stays a float constant, so the graph
    computes in float what a kernel with packed weights would. Linears that share a weight share
    the rounded one. A second run with the same fields edits nothing.
    Refused: a linear that is quantized already, a weight that its rounding leaves as it is.
    """

    bits: int = 4
    block_size: int = 32
    name: ClassVar[str] = "round_weights"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, 2 to 8 bits, and groups that are not empty."""
        check_bits(self.bits)
        if self.block_size < 1:
            raise InputError(f"round_weights: a group of {self.block_size} input channels")
        view_encoder(graph)

    def rewrite(self, graph: gs.Graph) -> Log:
        """Put new constants into the linears' matmuls; the old ones fall to the clean-up."""
        edits, skips = [], []
        rounded: dict[int, gs.Constant | None] = {}
        for linear in view_encoder(graph).linears:
            old = linear.matmul.inputs[1]
            if linear.quantized:
                skips.append(Skip(linear.name, "quantized already"))
                continue
            if id(old) not in rounded:
                rounded[id(old)] = self._rounded(linear, old.name)
            new = rounded[id(old)]
            if new is None:
                skips.append(Skip(linear.name, "its weight is rounded already"))
            else:
                linear.matmul.inputs[1] = new
                edits.append(Edit(linear.name, f"{self.bits} bits, groups of {self.block_size}"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same nodes, and linears of the same shapes, those in float still in float."""
        assert sorted((node.op, node.name) for node in before.nodes) == sorted(
            (node.op, node.name) for node in after.nodes
        )
        old, new = view_encoder(before), view_encoder(after)
        for one, other in zip(old.linears, new.linears, strict=True):
            assert (one.weight_shape, one.quantized) == (other.weight_shape, other.quantized)

    def _rounded(self, linear: Linear, name: str) -> gs.Constant | None:
        """The constant with a linear's rounded weight; None where rounding changes nothing."""
        values = round_weight(linear.weight, self.bits, self.block_size)
        if np.array_equal(values, linear.weight):
            return None
        return gs.Constant(f"{name}/rounded", values)


def round_weight(
    weight: NDArray[np.float32], bits: int = 4, block_size: int = 32
) -> NDArray[np.float32]:
    """A weight [K, N] rounded to +-(2 ** (bits - 1) - 1) steps of max|w| / (2 ** (bits - 1) - 1).

    Each output channel has one step for every `block_size` consecutive input channels.
    """
    last = 2 ** (bits - 1) - 1
    rounded = np.empty_like(weight)
    for start in range(0, len(weight), block_size):
        # In float64 the largest value comes back exactly, so that rounding twice changes nothing.
        group = weight[start : start + block_size].astype(np.float64)
        peaks = np.abs(group).max(axis=0)
        steps = np.where(peaks > 0, peaks / last, 1.0)
        rounded[start : start + block_size] = np.rint(group / steps) * steps
    return rounded
