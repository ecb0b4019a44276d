"""Keep ONNX Runtime from merging a residual add and a norm into SkipLayerNormalization."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Edit, Exact, Log, Parity
from regcache.passes.walk import data_inputs, is_output, name_of


@dataclass(frozen=True)
class KeepNormApart:
    """Write an Add that a LayerNormalization alone reads as a Sum of the two (opset 13).

    ONNX Runtime (1.32) makes SkipLayerNormalization of the pair, whose kernel for CPUs takes 8 x
    the time of both. It looks for Add and not for Sum, which computes the same.
    Left alone: an Add of a constant, one that something else reads, or that is a graph output.
    """

    name: ClassVar[str] = "keep_norm_apart"
    parity: ClassVar[Parity] = Exact()

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: a graph without norms is left alone."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Rename the operators."""
        edits = []
        for node in _merged(graph):
            node.op = "Sum"
            edits.append(Edit(name_of(node), "a Sum before its norm"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Sums where Adds were, and nothing else."""
        assert not list(_merged(after))
        old, new = (Counter(node.op for node in graph.nodes) for graph in (before, after))
        assert (new - old).keys() == {"Sum"}
        assert (old - new).keys() == {"Add"}


def _merged(graph: gs.Graph) -> Iterator[gs.Node]:
    """The Adds of two activations that ONNX Runtime would merge with the norm behind."""
    for node in graph.nodes:
        if node.op != "Add" or len(data_inputs(node)) != 2:
            continue
        (total,) = node.outputs
        if len(total.outputs) == 1 and not is_output(graph, total):
            (reader,) = total.outputs
            if reader.op == "LayerNormalization" and reader.inputs[0] is total:
                yield node
