"""Turn a decomposed layer norm back into one node (ONNX LayerNormalization, opset 17)."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.root_mean_square import find_root_mean_square, subtracted_mean
from regcache.passes.walk import consumers, count_ops, is_constant, is_output, name_of


@dataclass(frozen=True)
class FuseLayerNorm:
    """Replace ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div (, Mul, Add) over the last axis.

    Matched: every spelling that `find_root_mean_square` reads of what is left when the mean is
    taken off, with or without scale and bias. Refused: another axis, a scale that is no vector of
    the width, an unknown width. A bias that is no vector of the width stays an Add.
    """

    name: ClassVar[str] = "fuse_layer_norm"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 17, which introduced LayerNormalization."""
        if graph.opset < 17:
            raise InputError(f"fuse_layer_norm needs opset 17, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the LayerNormalization nodes; the old ones fall to the clean-up."""
        edits = []
        for node in list(graph.nodes):
            found = find_root_mean_square(graph, node)
            source = None if found is None else subtracted_mean(found.source)
            if found is None or source is None:
                continue
            width = found.scale.values.shape[0]
            bias, output = (
                _bias(graph, found.output, width) if found.weighted else (None, found.output)
            )
            output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    "LayerNormalization",
                    name=f"{name_of(node)}/layer_norm",
                    attrs={"axis": -1, "epsilon": found.epsilon},
                    inputs=[source, found.scale] + ([bias] if bias else []),
                    outputs=[output],
                )
            )
            edits.append(Edit(name_of(node), f"LayerNormalization(epsilon={found.epsilon:g})"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Every new LayerNormalization took the place of at least one ReduceMean."""
        count = count_ops(after, "LayerNormalization") - count_ops(before, "LayerNormalization")
        assert count <= count_ops(before, "ReduceMean") - count_ops(after, "ReduceMean")


def _bias(
    graph: gs.Graph, tensor: gs.Variable, width: int
) -> tuple[gs.Constant | None, gs.Variable]:
    """The [width] constant that the only reader adds, and what that makes."""
    following = consumers(tensor)
    if len(following) == 1 and following[0].op == "Add" and not is_output(graph, tensor):
        for item in following[0].inputs:
            if is_constant(item) and item.values.shape == (width,):
                return item, following[0].outputs[0]
    return None, tensor
