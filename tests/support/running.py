"""Run a graph as it is written: ONNX Runtime without its optimisations."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnxruntime as ort
from numpy.typing import NDArray

from regcache.passes.detach_weights import Weights, detach_weights

_LARGE = 1 << 14  # numbers


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
    model, weights = _lend_weights(graph)
    lent = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w)) for w in weights.values()]
    if lent:
        options.add_external_initializers(list(weights), lent)
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    session.lent = lent  # it reads them while it lives
    return session


def _lend_weights(graph: gs.Graph) -> tuple[onnx.ModelProto, Weights]:
    """A graph's message without its large weights, and these, which are copied four times else."""
    bare, weights = detach_weights(graph, _LARGE)
    if not weights or any(values.dtype.kind not in "fiu" for values in weights.values()):
        return gs.export_onnx(graph), {}
    model = gs.export_onnx(bare)
    inputs = [item for item in model.graph.input if item.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    for name, values in weights.items():
        stored = model.graph.initializer.add(
            name=name,
            dims=values.shape,
            data_type=onnx.helper.np_dtype_to_tensor_dtype(values.dtype),
            data_location=onnx.TensorProto.EXTERNAL,
        )
        stored.external_data.add(key="location", value="lent")
    return model, weights
