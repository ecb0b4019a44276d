"""Keep what an MLP's first linear computes from falling far below where its activation is zero."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity, Skip
from regcache.passes.encoder import Linear, Mlp
from regcache.passes.find_blocks import view_encoder
from regcache.passes.marks import BOUNDED
from regcache.passes.walk import count_ops

# Where an activation is 0 within 2e-8, and stays there below.
_ZERO_BELOW = {"gelu": -6.0, "gelu_tanh": -6.0, "quick_gelu": -12.0, "silu": -24.0, "relu": 0.0}


@dataclass(frozen=True)
class BoundHidden:
    """Clip what fc1 multiplies, before its bias, where the activation behind it is zero anyway.

    Registers may hold hidden units back by far more than it takes, and a quantizer that rounds what
    linears compute would spend its integers on that. The bound is low enough for every bias. ONNX
    Runtime's quantizer takes it into the range of the product and drops the Clip.

    Refused: gated MLPs, and activations that never are zero for good.
    """

    name: ClassVar[str] = "bound_hidden"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: an encoder without such MLPs is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the Clips."""
        edits, skips = [], []
        for linear, mlp in _bounded(graph):
            if len(mlp.fc1) > 1 or mlp.activation not in _ZERO_BELOW:
                skips.append(Skip(linear.name, f"{mlp.activation} is not zero below a bound"))
                continue
            bound = _ZERO_BELOW[mlp.activation] - max(float(linear.bias.max()), 0.0)
            _clip(graph, linear, bound)
            edits.append(Edit(linear.name, f"at least {bound:.3g} before its bias"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Clips, and nothing else, are new."""
        added = len(after.nodes) - len(before.nodes)
        assert added == count_ops(after, "Clip") - count_ops(before, "Clip") > 0


def _bounded(graph: gs.Graph) -> Iterator[tuple[Linear, Mlp]]:
    """The first linear of each block's MLP, but for those that have their Clip already."""
    for block in view_encoder(graph).blocks:
        linear = block.mlp.fc1[0]
        if not any(node.name.startswith(BOUNDED) for node in linear.matmul.outputs[0].outputs):
            yield linear, block.mlp


def _clip(graph: gs.Graph, linear: Linear, bound: float) -> None:
    product, name = linear.matmul.outputs[0], f"{BOUNDED}/{linear.name}"
    readers = list(product.outputs)
    clipped = gs.Variable(name, dtype=np.float32, shape=product.shape)
    low = gs.Constant(f"{name}/low", np.array(bound, np.float32))
    for node in readers:
        node.inputs = [clipped if item is product else item for item in node.inputs]
    graph.nodes.append(gs.Node("Clip", f"{name}/clip", {}, [product, low], [clipped]))
