"""Everything that a graph says, to see that nothing of it was changed: no export, which is slow."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.walk import tensors_of


def told(graph: gs.Graph) -> Any:
    """All that an ONNX file of it would hold, and what it leaves out: types and shapes included."""
    return (
        (graph.name, graph.doc_string, graph.opset, graph.ir_version),
        _opsets(graph),
        [item.name for item in graph.inputs],
        [item.name for item in graph.outputs],
        [_node(node) for node in graph.nodes],
        {name: _tensor(item) for name, item in tensors_of(graph).items()},
        [
            (item.domain, item.name, [_node(node) for node in item.nodes])
            for item in graph.functions
        ],
    )


def _opsets(graph: gs.Graph) -> list[tuple[str, int]]:
    """The operator sets that a file says it needs; an export writes the graph's own down in it."""
    known = [(item.domain, item.version) for item in graph.import_domains or ()]
    return known or [("", graph.opset)]


def _node(node: gs.Node) -> Any:
    return (
        node.op,
        node.name,
        node.domain,
        [item.name for item in node.inputs],
        [item.name for item in node.outputs],
        [(name, _attribute(value)) for name, value in node.attrs.items()],
    )


def _attribute(value: Any) -> Any:
    if isinstance(value, gs.Graph):
        return told(value)
    return _tensor(value) if isinstance(value, gs.Tensor) else (type(value), repr(value))


def _tensor(tensor: gs.Tensor) -> Any:
    shape = None if tensor.shape is None else tuple(tensor.shape)
    known = (tensor.name, type(tensor), tensor.dtype, shape)
    return (*known, _values(tensor)) if isinstance(tensor, gs.Constant) else known


def _values(tensor: gs.Constant) -> bytes:
    """The numbers, without reading for good what lies in a message yet: that would be a change."""
    kept = tensor._values
    return bytes((kept if isinstance(kept, np.ndarray) else kept.load()).tobytes())
