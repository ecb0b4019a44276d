"""Names and small pieces that the register passes share, so that strip_registers can undo them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.passes.marks import REGISTERS

LAST = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Writer:
    """Appends nodes whose names begin with REGISTERS and `prefix`."""

    graph: gs.Graph
    prefix: str

    def node(
        self, op: str, name: str, inputs: Sequence[gs.Tensor], dtype: Any = np.float32, **attrs: Any
    ) -> gs.Variable:
        """Append a node; returns its output (the last of two for TopK, whose indices matter)."""
        full = f"{REGISTERS}/{self.prefix}/{name}"
        outputs = [gs.Variable(f"{full}/out", dtype=dtype)]
        if op == "TopK":
            outputs.insert(0, gs.Variable(f"{full}/values", dtype=np.float32))
        self.graph.nodes.append(gs.Node(op, full, attrs, list(inputs), outputs))
        return outputs[-1]

    def ints(self, name: str, *values: int) -> gs.Constant:
        """A constant int64 vector."""
        return gs.Constant(f"{REGISTERS}/{self.prefix}/{name}", np.array(values, dtype=np.int64))

    def slice(
        self, name: str, tensor: gs.Tensor, start: int, end: int, axis: int = 1
    ) -> gs.Variable:
        """Tokens [start, end) of a sequence [B, T, C], or its channels where `axis` is 2."""
        bounds = [
            self.ints(f"{name}/start", start),
            self.ints(f"{name}/end", end),
            self.ints(f"{name}/axis", axis),
        ]
        return self.node("Slice", name, [tensor, *bounds])


def check_blocks(start: int, end: int, depth: int) -> None:
    """Raise InputError unless [start, end) is a range of blocks."""
    if not 0 <= start < end <= depth:
        raise InputError(f"registers: [{start}, {end}) is no range within {depth} blocks")


def over_batch(graph: gs.Graph, values: NDArray[Any], name: str) -> gs.Tensor:
    """`values` [1, ...] repeated over the batch of the graph's input: [B, ...].

    A fixed batch makes a constant, a dynamic one an Expand by the input's own batch dimension.
    """
    batch = graph.inputs[0].shape[0]
    if isinstance(batch, int):
        return gs.Constant(f"{REGISTERS}/{name}", np.repeat(values, batch, axis=0))
    output = gs.Variable(f"{REGISTERS}/{name}/expanded", dtype=values.dtype)
    inputs = [gs.Constant(f"{REGISTERS}/{name}", values), _batch_shape(graph, values.ndim)]
    graph.nodes.append(gs.Node("Expand", f"{REGISTERS}/{name}/expand", {}, inputs, [output]))
    return output


def _batch_shape(graph: gs.Graph, rank: int) -> gs.Tensor:
    """The shape [B, 1, ...] of a rank, computed once per graph."""
    name = f"{REGISTERS}/batch_{rank}"
    existing: dict[str, gs.Tensor] = graph.tensors()
    if name in existing:
        return existing[name]
    batch = gs.Variable(f"{name}/size", dtype=np.int64)
    shape = gs.Variable(name, dtype=np.int64)
    ones = gs.Constant(f"{name}/ones", np.ones(rank - 1, dtype=np.int64))
    source = graph.inputs[0]
    graph.nodes += [
        gs.Node("Shape", f"{name}/shape", {"start": 0, "end": 1}, [source], [batch]),
        gs.Node("Concat", f"{name}/concat", {"axis": 0}, [batch, ones], [shape]),
    ]
    return shape


def insert_concat(
    graph: gs.Graph, node: gs.Node, slot: int, registers: gs.Tensor, axis: int, name: str
) -> None:
    """Put registers in front of one input of a node: Concat([registers, input], axis)."""
    joined = gs.Variable(f"{REGISTERS}/{name}/joined", dtype=np.float32)
    source = node.inputs[slot]
    graph.nodes.append(
        gs.Node("Concat", f"{REGISTERS}/{name}", {"axis": axis}, [registers, source], [joined])
    )
    node.inputs[slot] = joined


def first_marked(nodes: Iterable[gs.Node], part: str) -> gs.Node | None:
    """The first node that a register pass named with `part`."""
    wanted = f"{REGISTERS}/{part}"
    return next((node for node in nodes if node.name.startswith(wanted)), None)
