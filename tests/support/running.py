"""Run a graph as it is written: ONNX Runtime without its optimisations."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray


def run_graph(
    graph: gs.Graph, images: NDArray[np.float32], *, optimize: bool = False
) -> list[NDArray[Any]]:
    """The outputs of a graph with one input, in graph order."""
    return run_feeds(graph, {graph.inputs[0].name: images}, optimize=optimize)


def run_feeds(
    graph: gs.Graph, feeds: Mapping[str, NDArray[Any]], *, optimize: bool = False
) -> list[NDArray[Any]]:
    """The outputs of a graph of any inputs, in graph order."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        gs.export_onnx(graph).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    outputs: list[NDArray[Any]] = session.run(None, dict(feeds))
    return outputs
