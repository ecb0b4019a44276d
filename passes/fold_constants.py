"""Compute what does not depend on the input (onnx-graphsurgeon's constant folding)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.fold_shapes import fold_shapes
from regcache.passes.walk import is_constant

# Larger results stay computed: a file that expands one number to gigabytes is no reason to.
_LARGEST_BYTES = 1 << 28
# The result's size is a value among the inputs: nothing else bounds it.
_SIZED_BY_VALUES = frozenset(
    ["ConstantOfShape", "Expand", "OneHot", "Pad", "Range", "Resize", "Tile", "Upsample"]
)
# They need not end, or give other numbers each time.
_NEVER = frozenset(["Loop", "Scan", "If", "SequenceMap", "Multinomial", "Bernoulli"])


@dataclass(frozen=True)
class FoldConstants:
    """Replace every node whose inputs are constant, Shape nodes of static tensors included.

    Matched: Constant nodes, shape arithmetic, positional embeddings resized in the graph. Refused:
    results of over 256 MB, loops, random numbers, operators of other domains, and nodes that ONNX
    Runtime cannot evaluate, left as they are.
    Needs shapes on the graph (check_and_infer) to fold Shape nodes.
    """

    name: ClassVar[str] = "fold_constants"
    parity: ClassVar[Parity] = Close(rtol=1e-5, atol=1e-6)

    def requires(self, graph: gs.Graph) -> None:
        """Nothing: every graph has constants to look at."""

    def rewrite(self, graph: gs.Graph) -> Log:
        """Fold in place; the nodes that are left without consumers fall to the clean-up."""
        _write_floats(graph)
        before = [(node.op, node.name, node.outputs[0]) for node in graph.nodes if node.outputs]
        fold_shapes(graph)
        with _silent():
            _fold(graph)
        tensors = graph.tensors()
        edits = [
            Edit(name or output.name, f"{op} folded")
            for op, name, output in before
            if output.name in tensors and is_constant(tensors[output.name])
        ]
        return Log(tuple(edits))

    def ensures(self, before: gs.Graph, after: gs.Graph) -> None:
        """Folding only removes nodes."""
        assert len(after.nodes) <= len(before.nodes)


def _write_floats(graph: gs.Graph) -> None:
    """Give Constant nodes of plain floats a tensor; onnx-graphsurgeon takes them for FP64."""
    for node in graph.nodes:
        for key in ("value_float", "value_floats") if node.op == "Constant" else ():
            if key in node.attrs:
                values = np.array(node.attrs.pop(key), np.float32)
                node.attrs["value"] = gs.Constant(f"{node.outputs[0].name}/value", values)


def _fold(graph: gs.Graph) -> None:
    """Fold all at once; where ONNX Runtime refuses, the integers alone that shapes are made of."""
    for allowed in (_foldable, lambda node: _foldable(node) and _counts(node)):
        try:
            graph.fold_constants(
                fold_shapes=False,
                flatten_subgraphs=False,
                recurse_subgraphs=False,
                error_ok=False,
                size_threshold=_LARGEST_BYTES,
                should_exclude_node=lambda node, allowed=allowed: not allowed(node),
            )
        except Exception:  # ONNX Runtime's exceptions share no other base
            continue
        return


def _foldable(node: gs.Node) -> bool:
    if (
        node.op in _NEVER
        or node.op.startswith("Random")
        or node.domain not in (None, "", "ai.onnx")
    ):
        return False
    for item in node.outputs:
        shape = item.shape
        known = shape is not None and all(isinstance(dim, int) for dim in shape)
        if node.op in _SIZED_BY_VALUES and not known:
            return False  # not before what it is sized by is folded
        if known:
            size = 4 if item.dtype is None else np.dtype(item.dtype).itemsize
            if prod(shape) * size > _LARGEST_BYTES:
                return False
    return all(
        item.dtype is None or np.dtype(item.dtype).name != "bfloat16" for item in node.inputs
    )


def _counts(node: gs.Node) -> bool:
    """Whether a node makes integers or truth values, as shape arithmetic does."""
    kinds = [item.dtype for item in node.outputs]
    return all(kind is not None and np.dtype(kind).kind in "iub" for kind in kinds)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep onnx-graphsurgeon's log off the terminal: it prints whole graphs to stdout."""
    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = severity
