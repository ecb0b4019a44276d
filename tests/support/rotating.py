"""What the tests of rotations share: a pass run and checked, tensors' values, what changed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.running import run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Pass, Result, run
from regcache.passes.observe import Observe
from regcache.passes.walk import is_constant

Floats = NDArray[Any]
SOME = ("plain", "swiglu", "packed swiglu", "gemm, dynamic")


class Changes(NamedTuple):
    """Names of nodes; `changed` have other inputs than before."""

    added: set[str]
    gone: set[str]
    changed: set[str]


def graph_of(spec: Spec) -> gs.Graph:
    """A canonical graph of one's own; only the weights' arrays are shared."""
    return _canonical(spec).copy()


@cache
def _canonical(spec: Spec) -> gs.Graph:
    return canonical_graph(TinyVit(spec).model())


def apply(step: Pass, graph: gs.Graph) -> Result:
    """Run a pass; the result is valid, of known shapes and unique names, its input untouched."""
    original = told(graph)
    result = run(step, graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert told(graph) == original
    names = [node.name for node in result.graph.nodes]
    assert len(set(names)) == len(names)
    assert all(tensor.shape is not None for tensor in result.graph.tensors().values())
    ends = [
        [(item.name, item.shape, item.dtype) for item in (*one.inputs, *one.outputs)]
        for one in (graph, result.graph)
    ]
    assert ends[0] == ends[1]
    return result


def observe(graph: gs.Graph, names: Sequence[str], pictures: Floats) -> list[Floats]:
    """The values of tensors that are no outputs of the graph."""
    outputs = run_graph(run(Observe(tuple(names)), graph).graph, pictures)
    return outputs[len(graph.outputs) :]


def changes(before: gs.Graph, after: gs.Graph) -> Changes:
    """What is not as it was; nodes that stay keep their op, attributes and outputs."""
    old = {node.name: node for node in before.nodes}
    new = {node.name: node for node in after.nodes}
    both = old.keys() & new.keys()
    for name in both:
        assert (new[name].op, new[name].attrs) == (old[name].op, old[name].attrs)
    return Changes(
        set(new.keys() - old.keys()),
        set(old.keys() - new.keys()),
        {name for name in both if not _same_ends(old[name], new[name])},
    )


def _same_ends(old: gs.Node, new: gs.Node) -> bool:
    if [item.name for item in old.outputs] != [item.name for item in new.outputs]:
        return False
    pairs = list(zip(old.inputs, new.inputs, strict=True))
    return all(
        one.name == other.name
        and (not is_constant(one) or np.array_equal(one.values, other.values))
        for one, other in pairs
    )


def wide(name: str) -> Spec:
    """A spelling of an encoder whose hidden channels every size divides."""
    return replace(SPELLINGS[name], hidden=64)
