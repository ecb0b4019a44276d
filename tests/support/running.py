"""Run a graph as it is written: ONNX Runtime without its optimisations."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray

from regcache.passes.detach_weights import lend_weights


def run_graph(
    graph: gs.Graph, images: NDArray[np.float32], *, optimize: bool = False
) -> list[NDArray[Any]]:
    """The outputs of a graph with one input, in graph order."""
    return run_feeds(graph, {graph.inputs[0].name: images}, optimize=optimize)


def run_feeds(
    graph: gs.Graph, feeds: Mapping[str, NDArray[Any]], *, optimize: bool = False
) -> list[NDArray[Any]]:
    """The outputs of a graph of any inputs, in graph order."""
    outputs: list[NDArray[Any]] = _open(graph, optimize).run(None, dict(feeds))
    return outputs


def run_batches(
    graph: gs.Graph, batches: Iterable[NDArray[np.float32]]
) -> list[list[NDArray[Any]]]:
    """The outputs of a graph with one input for each of several batches, which share a session."""
    session, name = _open(graph, optimize=False), graph.inputs[0].name
    return [session.run(None, {name: images}) for images in batches]


def _open(graph: gs.Graph, optimize: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    lent = lend_weights(graph)
    arrays = map(np.ascontiguousarray, lent.weights.values())
    values = list(map(ort.OrtValue.ortvalue_from_numpy, arrays))
    if values:
        options.add_external_initializers(list(lent.weights), values)
    session = ort.InferenceSession(lent.content, options, providers=["CPUExecutionProvider"])
    session.lent = values  # it reads them while it lives
    return session
