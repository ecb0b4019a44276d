"""Fold shape arithmetic until nothing of it is left to fold."""

from collections.abc import Iterator

import onnx
import onnx_graphsurgeon as gs

from regcache.passes.base import Pass, run_all
from regcache.passes.check import check_and_infer
from regcache.passes.drop_identities import DropIdentities
from regcache.passes.errors import InputError, first_line
from regcache.passes.fold_constants import FoldConstants
from regcache.passes.fold_if import FoldIf
from regcache.passes.lower_sequences import LowerSequences
from regcache.passes.resolve_shapes import ResolveShapes
from regcache.passes.walk import name_of

_STEPS: tuple[Pass, ...] = (
    FoldConstants(),
    FoldIf(),
    LowerSequences(),
    DropIdentities(),
    ResolveShapes(),
)
# Every round knows more shapes than the one before; exporters nest them a few levels deep.
_MOST_ROUNDS = 24


def settle(graph: gs.Graph) -> gs.Graph:
    """Infer shapes and fold what they decide, again until nothing changes.

    Returns a graph with shapes on its tensors. Raises InputError where shapes contradict one
    another, or an operator is none of ONNX's.
    """
    try:
        check_and_infer(graph)
        for _ in range(_MOST_ROUNDS):
            before, (graph, _) = graph, run_all(_STEPS, graph)
            if graph is before:
                return graph
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise InputError(f"the graph's shapes do not fit: {first_line(error)}") from error
    return graph


def check_settled(graph: gs.Graph) -> None:
    """Raise InputError, naming it, for a loop that is left, or an output of unknown rank."""
    loop = next(loops(graph), None)
    if loop is not None:
        raise InputError(
            f"{loop.op} {name_of(loop)!r} runs as often as its input says; export it unrolled"
        )
    for output in graph.outputs:
        if output.shape is None:
            raise InputError(f"how many dimensions its output {output.name!r} has is not known")


def loops(graph: gs.Graph) -> Iterator[gs.Node]:
    """The Loop and Scan nodes of a graph and of its subgraphs: they need not end."""
    for part in (graph, *graph.subgraphs(recursive=True)):
        yield from (node for node in part.nodes if node.op in {"Loop", "Scan"})
