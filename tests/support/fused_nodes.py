"""One fused operator of ONNX Runtime as a graph, and its unfused form beside it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from support.running import run_feeds

from regcache.passes.base import run
from regcache.passes.onnx_file import import_graph
from regcache.passes.unfuse_microsoft import UnfuseMicrosoft

Array = NDArray[Any]
MICROSOFT = "com.microsoft"


def draw_array(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def fused_graph(
    op: str,
    inputs: Mapping[str, Array | None],
    constants: Sequence[str] = (),
    outputs: Sequence[tuple[str, int]] = (("y", 3),),
    domain: str = MICROSOFT,
    **attributes: Any,
) -> gs.Graph:
    """A node with named inputs, None for what is left out; outputs as (name, rank)."""
    names = [name if value is not None else "" for name, value in inputs.items()]
    while names and not names[-1]:
        names.pop()
    node = helper.make_node(
        op, names, [name for name, _ in outputs], "fused", domain=domain, **attributes
    )
    given = {name: value for name, value in inputs.items() if value is not None}
    graph = helper.make_graph(
        [node],
        "fused",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(value.dtype), list(value.shape)
            )
            for name, value in given.items()
            if name not in constants
        ],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank)
            for name, rank in outputs
            if name
        ],
        [numpy_helper.from_array(given[name], name) for name in constants if name in given],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid(MICROSOFT, 1)]
    return import_graph(helper.make_model(graph, opset_imports=opsets, ir_version=9))


def unfused(graph: gs.Graph) -> gs.Graph:
    """The graph without the operator, valid, a second run changing nothing."""
    result = run(UnfuseMicrosoft(), graph)
    assert len(result.log.edits) == 1
    model = gs.export_onnx(result.graph)
    onnx.checker.check_model(model, full_check=True)
    assert [item.domain for item in model.opset_import] == [""]
    assert not run(UnfuseMicrosoft(), result.graph).changed
    return result.graph


def assert_unfused(
    op: str, inputs: Mapping[str, Array | None], constants: Sequence[str] = (), **changes: Any
) -> gs.Graph:
    """ONNX Runtime computes the same of the operator itself and of what takes its place."""
    graph = fused_graph(op, inputs, constants, **changes)
    after = unfused(graph)
    feeds = {item.name: inputs[item.name] for item in graph.inputs}
    given = {name: value for name, value in feeds.items() if value is not None}
    for found, wanted in zip(run_feeds(after, given), run_feeds(graph, given), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-5)
    return after
