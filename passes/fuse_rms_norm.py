"""Turn a decomposed RMS norm back into one node (ONNX RMSNormalization, opset 23)."""

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.errors import InputError
from regcache.passes.rms_norm_opset import RMS_NORM_OPSET, raise_for_rms_norm
from regcache.passes.root_mean_square import find_root_mean_square, subtracted_mean
from regcache.passes.walk import count_ops, name_of


@dataclass(frozen=True)
class FuseRmsNorm:
    """Replace x / sqrt(mean(x^2) + epsilon) over the last axis, with weights or without.

    Matched: what `find_root_mean_square` finds. The graph's opset becomes 23 where it is lower;
    a graph without an RMS norm keeps its own. Refused: a layer norm, whose mean is taken off
    before (see FuseLayerNorm).
    """

    name: ClassVar[str] = "fuse_rms_norm"
    parity: ClassVar[Parity] = Close(rtol=1e-4, atol=1e-5)

    def requires(self, graph: gs.Graph) -> None:
        """Opset 20, from which on the opset can be raised; without shapes nothing matches."""
        if graph.opset < 20:
            raise InputError(f"fuse_rms_norm needs opset 20, the graph has {graph.opset}")

    def rewrite(self, graph: gs.Graph) -> Log:
        """Insert the RMSNormalization nodes; the old ones fall to the clean-up."""
        edits = []
        for node in list(graph.nodes):
            found = find_root_mean_square(graph, node)
            if found is None or subtracted_mean(found.source) is not None:
                continue
            raise_for_rms_norm(graph)
            found.output.inputs.clear()
            graph.nodes.append(
                gs.Node(
                    "RMSNormalization",
                    f"{name_of(node)}/rms_norm",
                    {"axis": -1, "epsilon": found.epsilon},
                    [found.source, found.scale],
                    [found.output],
                )
            )
            edits.append(Edit(name_of(node), f"RMSNormalization(epsilon={found.epsilon:g})"))
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Every new RMSNormalization stands for a reduction of its own."""
        grown = count_ops(after, "RMSNormalization") - count_ops(before, "RMSNormalization")
        assert grown > 0
        assert after.opset == max(before.opset, RMS_NORM_OPSET)
