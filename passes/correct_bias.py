"""Add what quantization shifts on average to the biases of a vision encoder's linears."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.base import Edit, Log, Lossy, Parity
from regcache.passes.encoder import Linear
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import is_constant

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class CorrectBias:
    """Add `corrections` [N], by the name of the linear, to what the linears add to their products.

    A linear without a bias gets one. The linear may be quantized or not.
    """

    corrections: Mapping[str, Floats]
    name: ClassVar[str] = "correct_bias"
    parity: ClassVar[Parity] = Lossy()

    def requires(self, graph: gs.Graph) -> None:
        """A readable encoder, and finite corrections that fit its linears."""
        linears = {linear.name: linear for linear in view_encoder(graph).linears}
        for name, correction in self.corrections.items():
            if name not in linears:
                raise InputError(f"correct_bias: no linear {name!r}")
            columns = linears[name].weight_shape[1:]
            if correction.shape != columns or not np.isfinite(correction).all():
                raise InputError(f"correct_bias: {name} needs {columns[0]} finite numbers")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Replace the biases' constants; a constant that linears share is left to the others."""
        edits = []
        for linear in view_encoder(graph).linears:
            correction = self.corrections.get(linear.name)
            if correction is not None:
                edits.append(Edit(linear.name, add_to_bias(graph, linear, correction)))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The same linears, and an Add more for each that had no bias."""
        old, new = view_encoder(before), view_encoder(after)
        added = 0
        for one, other in zip(old.linears, new.linears, strict=True):
            assert (one.name, one.quantized) == (other.name, other.quantized)
            added += one.bias_add is None and one.name in self.corrections
        assert len(after.nodes) == len(before.nodes) + added


def add_to_bias(graph: gs.Graph, linear: Linear, correction: Floats) -> str:
    """Add a correction [N] to a linear's bias, or give it one; returns which for a log."""
    add = linear.bias_add
    if add is not None:
        old = next(item for item in add.inputs if is_constant(item))
        values = np.asarray(old.values + correction, np.float32)
        linear.replace_bias(gs.Constant(f"{linear.name}/bias/corrected", values))
        return "corrected"
    output = linear.matmul.outputs[0]
    product = gs.Variable(f"{output.name}/uncorrected", dtype=np.float32, shape=output.shape)
    linear.matmul.outputs = [product]
    bias = gs.Constant(f"{output.name}/bias", np.asarray(correction, np.float32))
    graph.nodes.append(gs.Node("Add", f"correct_bias/{linear.name}", {}, [product, bias], [output]))
    return "added"
