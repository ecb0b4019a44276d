"""The domain of TensorRT's own operators, and those that block-scaled floats are written with."""

import onnx
import onnx_graphsurgeon as gs

DOMAIN = "trt"
QUANTIZE_FP4 = "TRT_FP4DynamicQuantize"
QUANTIZE_MXFP8 = "TRT_MXFP8DynamicQuantize"
DEQUANTIZE_MXFP8 = "TRT_MXFP8DequantizeLinear"
QUANTIZERS = frozenset({QUANTIZE_FP4, QUANTIZE_MXFP8})
OPERATORS = QUANTIZERS | {DEQUANTIZE_MXFP8}
DEQUANTIZERS = frozenset({"DequantizeLinear", DEQUANTIZE_MXFP8})


def runs_in_tensorrt(graph: gs.Graph) -> bool:
    """Whether a graph holds operators that nothing but TensorRT runs."""
    return any(node.domain == DOMAIN for node in graph.nodes)


def import_tensorrt(graph: gs.Graph, opset: int, ir_version: int) -> None:
    """Name the domain, and an opset that has the types; in a list of the graph's own."""
    opset = max(opset, graph.opset)
    others = [item for item in graph.import_domains or [] if item.domain not in {"", DOMAIN}]
    known = [("", opset), *((item.domain, item.version) for item in others), (DOMAIN, 1)]
    graph.import_domains = [onnx.helper.make_opsetid(*item) for item in known]
    graph.opset = opset
    graph.ir_version = max(graph.ir_version or 0, ir_version)
