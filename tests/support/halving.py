"""Graphs before and after HalfPrecision, run and compared."""

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from support.spellings import ops

from regcache.passes.base import Result, run
from regcache.passes.check import check_and_infer
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import import_graph

Array = NDArray[Any]
STEPS = [HalfPrecision(), HalfPrecision(float_stream=True)]


def parse(text: str, opset: int = 20) -> gs.Graph:
    """A graph from ONNX's text form, typed."""
    header = f'<ir_version: 10, opset_import: ["": {opset}, "com.microsoft": 1]>'
    graph = import_graph(onnx.parser.parse_model(f"{header} {text}"))
    check_and_infer(graph)
    for node in graph.nodes:
        node.name = node.outputs[0].name
    return graph


def run_half(graph: gs.Graph, values: Array) -> list[Array]:
    """The outputs of a graph with one input, every tensor stored in its own type.

    By onnx's evaluator: ONNX Runtime's CPU drops Casts to FLOAT16 that it would have to undo.
    """
    evaluator = ReferenceEvaluator(gs.export_onnx(graph))
    outputs = evaluator.run(None, {graph.inputs[0].name: values})
    return [np.asarray(item) for item in outputs]


def halved(graph: gs.Graph, step: HalfPrecision = STEPS[0]) -> Result:
    """The pass run and what holds for every graph: valid, nothing else changed, idle when rerun."""
    result = run(step, graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert_same_but_types(graph, result.graph)
    again = run(step, result.graph)
    assert not again.changed
    return result


def assert_same_but_types(before: gs.Graph, after: gs.Graph) -> None:
    """Without its Casts and with constants as FLOAT, the new graph is the old one."""
    casts = ops(after)["Cast"] - ops(before)["Cast"]
    assert len(after.nodes) - len(before.nodes) == casts
    old = {node.name: node for node in before.nodes}
    names = frozenset(old)
    for node in after.nodes:
        if node.op == "Cast" and node.name not in names:
            continue
        one = old.pop(node.name)
        assert (node.op, node.attrs, len(node.inputs)) == (one.op, one.attrs, len(one.inputs))
        for slot, wanted in enumerate(one.inputs):
            item = node.inputs[slot]
            while item.inputs and item.inputs[0].name not in names:  # a new Cast
                (item,) = item.inputs[0].inputs
            assert item.name.removesuffix("/float16") == wanted.name
            if isinstance(wanted, gs.Constant):
                half = wanted.dtype == np.float32 and item.dtype == np.float16
                assert half or item.dtype == wanted.dtype
                np.testing.assert_array_equal(item.values, wanted.values.astype(item.dtype))
    assert not old


def types(graph: gs.Graph, op: str) -> set[str]:
    """The types of all floats that the nodes of one op read and make."""
    return {
        np.dtype(item.dtype).name
        for node in graph.nodes
        if node.op == op
        for item in (*node.inputs, *node.outputs)
        if np.dtype(item.dtype).name.startswith("float")
    }
