"""Turn a decomposed layer norm back into one node (ONNX LayerNormalization, opset 17)."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.moments import find_moments
from regcache.passes.root_mean_square import find_root_mean_square, subtracted_mean
from regcache.passes.walk import consumers, count_ops, is_constant, is_output, name_of


@dataclass(frozen=True)
class FuseLayerNorm:
    """Replace ReduceMean, Sub, Pow, ReduceMean, Add, Sqrt, Div (, Mul, Add) over the last axis.

    Matched: every spelling that `find_root_mean_square` reads of what is left when the mean is
    taken off, with or without scale and bias, and what `find_moments` reads. Refused: another axis,
    a scale that is no vector of the width, an unknown width. A bias that is no vector of the width
    stays an Add.
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
            norm = _norm(graph, node)
            if norm is None:
                continue
            site, bias = name_of(node), [] if norm.bias is None else [norm.bias]
            norm.output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    "LayerNormalization",
                    name=f"{site}/layer_norm",
                    attrs={"axis": -1, "epsilon": norm.epsilon},
                    inputs=[norm.source, norm.scale, *bias],
                    outputs=[norm.output],
                )
            )
            edits.append(Edit(site, f"LayerNormalization(epsilon={norm.epsilon:g})"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Every new LayerNormalization took the place of at least one ReduceMean."""
        count = count_ops(after, "LayerNormalization") - count_ops(before, "LayerNormalization")
        assert count <= count_ops(before, "ReduceMean") - count_ops(after, "ReduceMean")


@dataclass(frozen=True)
class _LayerNorm:
    source: gs.Tensor
    output: gs.Variable
    epsilon: float
    scale: gs.Constant
    bias: gs.Constant | None


def _norm(graph: gs.Graph, reduction: gs.Node) -> _LayerNorm | None:
    """The layer norm that a mean of squares is part of."""
    moments = find_moments(graph, reduction)
    if moments is not None:
        bias: gs.Constant | None = moments.bias
        return _LayerNorm(moments.source, moments.output, moments.epsilon, moments.scale, bias)
    found = find_root_mean_square(graph, reduction)
    source = None if found is None else subtracted_mean(found.source)
    if found is None or source is None:
        return None
    bias, output = None, found.output
    if found.weighted:
        bias, output = _bias(graph, output, found.scale.values.shape[0])
    return _LayerNorm(source, output, found.epsilon, found.scale, bias)


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
