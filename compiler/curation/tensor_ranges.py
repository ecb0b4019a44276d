"""The range of every tensor of a graph, found in one run over images."""

from collections.abc import Collection, Iterable

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.graph_session import open_graph
from regcache.passes.copy_graph import copy_graph

Floats = NDArray[np.float32]


def tensor_ranges(
    graph: gs.Graph,
    batches: Iterable[Floats],
    threads: int | None = None,
    names: Collection[str] | None = None,
) -> dict[str, tuple[Floats, Floats]]:
    """The least and the largest value [1] of each float32 tensor that is no constant, by name.

    `names`: of those that are wanted; None for all. `batches`: images [B, ...] each, B as the graph
    fixes it, at least one batch. Raises InputError where the graph cannot be run.
    """
    part = copy_graph(graph)
    tensors = [
        tensor
        for tensor in part.tensors().values()
        if isinstance(tensor, gs.Variable)
        and tensor.dtype == np.float32
        and (names is None or tensor.name in names)
    ]
    part.outputs = [
        _reduce(part, tensor, op) for op in ("ReduceMin", "ReduceMax") for tensor in tensors
    ]
    with open_graph(part, threads=threads) as session:
        found = np.array([session.run(images) for images in batches])[..., None]
    lows, highs = np.split(found, 2, axis=1)
    ranges = zip(lows.min(axis=0), highs.max(axis=0), strict=True)
    return {tensor.name: pair for tensor, pair in zip(tensors, ranges, strict=True)}


def _reduce(graph: gs.Graph, tensor: gs.Variable, op: str) -> gs.Variable:
    """The output of a new node that reduces a tensor to one number."""
    number = gs.Variable(f"{tensor.name}/{op}", dtype=np.float32, shape=[])
    graph.nodes.append(gs.Node(op, number.name, {"keepdims": 0}, [tensor], [number]))
    return number
