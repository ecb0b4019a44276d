"""Quantized weights as the float numbers that they stand for, the same arrays in every session."""

import threading
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.external_weights import keep_weights, let_go
from regcache.passes.walk import is_constant, replace_everywhere

Weight = NDArray[np.generic]


class SharedWeights:
    """The float weights of an encoder's quantized linears, computed once by the name of each.

    A session would make them of the integers anew, and hold a copy of its own. `folder`: where they
    are mapped from files, beside the float weights (see kept_folder); None: they stay in memory.
    Threads share the object. Whoever uses it quantizes one encoder, in one number format, so that a
    name always stands for the same numbers.
    """

    def __init__(self, folder: Path | None) -> None:
        self._lock, self._floats = threading.Lock(), dict[str, Weight]()
        self._folder = folder

    def put_into(self, graph: gs.Graph) -> gs.Graph:
        """The same graph, its DequantizeLinears of stored integers replaced by what they yield.

        Those of blocks (opset 21) and of types that are no integers stay as they are.
        """
        for node in list(filter(_dequantizes_integers, graph.nodes)):
            (output,) = node.outputs
            floats = self._numbers(output.name, node)
            replace_everywhere(graph, output, gs.Constant(f"{output.name}/shared", floats))
        return graph.cleanup()

    def let_go(self) -> None:
        """Give back the memory of mapped weights; they are read again where they are used."""
        with self._lock:
            for floats in self._floats.values():
                let_go(floats)

    def _numbers(self, name: str, node: gs.Node) -> Weight:
        with self._lock:
            if name not in self._floats:
                made: list[Weight] = [_dequantized(node)]
                if self._folder is not None:
                    made = keep_weights(made, self._folder)
                self._floats[name] = made[0]
            return self._floats[name]


def _dequantizes_integers(node: gs.Node) -> bool:
    if node.op != "DequantizeLinear" or node.attrs.get("block_size"):
        return False
    return all(map(is_constant, node.inputs)) and node.inputs[0].values.dtype.kind in "iu"


def _dequantized(node: gs.Node) -> NDArray[np.float32]:
    """(integers - zero point) * scale in float32, as ONNX's DequantizeLinear (opset 13)."""
    integers, scale, *zero_point = (tensor.values for tensor in node.inputs)
    shape = [1] * integers.ndim
    if scale.ndim:
        shape[node.attrs.get("axis", 1)] = -1
    floats: NDArray[np.float32] = integers.astype(np.float32)
    for middle in zero_point:
        floats -= middle.astype(np.float32).reshape(shape)
    floats *= scale.reshape(shape)
    return floats
