"""Biases of the linears: dropped, widened, read."""

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.encoder import Linear
from regcache.passes.find_blocks import view_encoder
from regcache.passes.walk import is_constant, replace_everywhere

Floats = NDArray[np.float32]


def drop_biases(graph: gs.Graph, *names: str) -> gs.Graph:
    for linear in view_encoder(graph).linears:
        if linear.name in names:
            replace_everywhere(graph, linear.output, linear.matmul.outputs[0])
    return graph.cleanup()


def widen_biases(graph: gs.Graph) -> gs.Graph:
    """Write the biases as [1, 1, N], as some exporters do."""
    for linear in view_encoder(graph).linears:
        assert linear.bias_add is not None
        slot = [is_constant(item) for item in linear.bias_add.inputs].index(True)
        values = linear.bias_add.inputs[slot].values
        linear.bias_add.inputs[slot] = gs.Constant(f"{linear.name}/wide", values[None, None])
    return graph


def bias_of(linear: Linear) -> Floats:
    assert linear.bias_add is not None
    values: Floats = next(item.values for item in linear.bias_add.inputs if is_constant(item))
    return values
