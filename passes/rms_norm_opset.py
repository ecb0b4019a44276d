"""Raise a graph's opset to that of RMSNormalization."""

import onnx
import onnx_graphsurgeon as gs

# IR version 11 came with opset 23.
RMS_NORM_OPSET, _RMS_NORM_IR = 23, 11


def raise_for_rms_norm(graph: gs.Graph) -> None:
    """Raise a graph of opset 20 or later to that of RMSNormalization.

    From 20 to 23 no operator came to mean anything else: their types grew, and some attributes.
    """
    assert graph.opset >= 20
    if graph.opset >= RMS_NORM_OPSET:
        return
    graph.opset = RMS_NORM_OPSET
    graph.ir_version = max(graph.ir_version or 0, _RMS_NORM_IR)
    others = [item for item in graph.import_domains or [] if item.domain not in {"", "ai.onnx"}]
    graph.import_domains = [onnx.helper.make_opsetid("", RMS_NORM_OPSET), *others]
    for subgraph in graph.subgraphs(recursive=True):
        subgraph.opset = RMS_NORM_OPSET
