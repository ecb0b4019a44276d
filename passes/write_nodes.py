"""Append nodes to a graph, for passes that write one operator as several."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class NodeWriter:
    """Appends nodes whose names begin with `prefix`; types and shapes are left to inference."""

    graph: gs.Graph
    prefix: str

    def node(
        self,
        op: str,
        name: str,
        inputs: Sequence[gs.Tensor],
        output: gs.Variable | None = None,
        **attributes: Any,
    ) -> gs.Variable:
        """Append a node that makes `output`, or a tensor of its own; returns what it makes.

        A tensor that another node makes is taken from it.
        """
        full = f"{self.prefix}/{name}"
        made = gs.Variable(f"{full}/out") if output is None else output
        made.inputs.clear()
        self.graph.nodes.append(gs.Node(op, full, attributes, list(inputs), [made]))
        return made

    def constant(self, name: str, values: ArrayLike) -> gs.Constant:
        """A constant of any type."""
        return gs.Constant(f"{self.prefix}/{name}", np.asarray(values))

    def floats(self, name: str, values: ArrayLike, like: gs.Tensor) -> gs.Constant:
        """A constant of the float type that `like` has; FLOAT where it is not known."""
        dtype = np.float32 if like.dtype is None else like.dtype
        return gs.Constant(f"{self.prefix}/{name}", np.asarray(values, dtype))

    def ints(self, name: str, *values: int) -> gs.Constant:
        """A constant int64 vector."""
        return self.constant(name, np.array(values, np.int64))

    def reshape(
        self, name: str, tensor: gs.Tensor, *dims: int, output: gs.Variable | None = None
    ) -> gs.Variable:
        """The tensor in another shape: 0 keeps a dimension, -1 is what is left."""
        return self.node("Reshape", name, [tensor, self.ints(f"{name}/shape", *dims)], output)

    def transpose(
        self, name: str, tensor: gs.Tensor, *perm: int, output: gs.Variable | None = None
    ) -> gs.Variable:
        """The tensor with its axes in another order."""
        return self.node("Transpose", name, [tensor], output, perm=list(perm))
