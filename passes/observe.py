"""Make chosen tensors of a graph its outputs, so that a session returns them."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity, Skip
from regcache.passes.errors import InputError


@dataclass(frozen=True)
class Observe:
    """Append tensors, by name, to the graph's outputs in the given order.

    Refused: a tensor that is an output already, which stays in its place.
    """

    tensors: tuple[str, ...]
    name: ClassVar[str] = "observe"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Every tensor is in the graph, with its rank known (see check_and_infer)."""
        tensors = graph.tensors()
        for name in self.tensors:
            if name not in tensors:
                raise InputError(f"observe: no tensor {name!r} in the graph")
            if tensors[name].shape is None:
                raise InputError(f"observe: the rank of {name!r} is not known")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Append the outputs."""
        edits, skips = [], []
        tensors = graph.tensors()
        present = {output.name for output in graph.outputs}
        for name in self.tensors:
            if name in present:
                skips.append(Skip(name, "an output already"))
                continue
            tensor = tensors[name]
            tensor.dtype = tensor.dtype or np.dtype(np.float32)
            graph.outputs.append(tensor)
            present.add(name)
            edits.append(Edit(name, "observed"))
        return Log(tuple(edits), tuple(skips))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """The old outputs first, in their order; the nodes as they were."""
        count = len(before.outputs)
        assert [o.name for o in after.outputs[:count]] == [o.name for o in before.outputs]
        assert len(after.nodes) == len(before.nodes)
