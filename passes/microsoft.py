"""The domain of ONNX Runtime's own operators, which every full build of it runs."""

import onnx
import onnx_graphsurgeon as gs

DOMAIN = "com.microsoft"


def import_microsoft(graph: gs.Graph) -> None:
    """Name the domain in a list of the graph's own: copies share theirs."""
    known = graph.import_domains or [onnx.helper.make_opsetid("", graph.opset)]
    if DOMAIN not in {item.domain for item in known}:
        graph.import_domains = [*known, onnx.helper.make_opsetid(DOMAIN, 1)]
