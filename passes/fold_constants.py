"""Compute what does not depend on the input (onnx-graphsurgeon's constant folding)."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from regcache.passes.base import Close, Edit, Log, Parity
from regcache.passes.fold_shapes import fold_shapes
from regcache.passes.quiet import quiet
from regcache.passes.walk import is_constant

# Larger results stay computed: a file that expands one number to gigabytes is no reason to.
_LARGEST_BYTES = 1 << 28
# Multiplications in one node, a second's worth; a weight is made of constants by fewer.
_MOST_WORK = 1 << 34
# What they make is of no more numbers than what they read, but for indices.
_NO_LARGER = frozenset(
    {"Cast", "Compress", "Flatten", "Identity", "NonZero", "Reshape", "Slice", "Squeeze"}
    | {"Transpose", "Unique", "Unsqueeze"}
)
_INDEX_BYTES = 64  # for each byte read, where NonZero writes eight numbers of eight
_PRODUCTS = frozenset(["Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"])
# They need not end, or give other numbers each time.
_NEVER = frozenset(["Loop", "Scan", "If", "SequenceMap", "Multinomial", "Bernoulli"])


@dataclass(frozen=True)
class FoldConstants:
    """Replace every node whose inputs are constant, Shape nodes of static tensors included.

    Matched: Constant nodes, shape arithmetic, positional embeddings resized in the graph. Refused:
    results of over 256 MB, or more of them at once than that and the weights; results of unknown
    size, which the next run may know; products that take seconds; loops, random numbers, operators
    of other domains, and nodes that ONNX Runtime cannot evaluate. They are left as they are.
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
        with quiet():
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
        names = _affordable(graph, allowed)
        if not names and not graph.functions and all(node.op != "Constant" for node in graph.nodes):
            return  # onnx-graphsurgeon would copy the graph to find that nothing is to fold
        try:
            graph.fold_constants(
                fold_shapes=False,
                flatten_subgraphs=False,
                recurse_subgraphs=False,
                error_ok=False,
                size_threshold=_LARGEST_BYTES,
                should_exclude_node=lambda node, names=names: (
                    not names.issuperset(item.name for item in node.outputs)
                ),
            )
        except Exception:  # ONNX Runtime's exceptions share no other base
            continue
        return


def _affordable(graph: gs.Graph, allowed: Callable[[gs.Node], bool]) -> set[str]:
    """Names of the tensors that constants make, in little memory and time, by allowed nodes."""
    sizes = {name: _bytes(item) for name, item in graph.tensors().items() if is_constant(item)}
    left = max(_LARGEST_BYTES, sum(size or 0 for size in sizes.values()))
    found = set[str]()
    for node in graph.nodes:
        read = [item for item in node.inputs if not item.is_empty()]
        if not all(item.name in sizes for item in read) or not allowed(node):
            continue
        made = {item.name: _bytes(item) for item in node.outputs}
        if None in made.values():
            if node.op not in _NO_LARGER:
                continue
            most = _INDEX_BYTES * sum(sizes[item.name] or 0 for item in read)
            made = {name: most if size is None else size for name, size in made.items()}
        total = sum(size or 0 for size in made.values())
        if total > min(left, _LARGEST_BYTES) or _work(node) > _MOST_WORK:
            continue
        left -= total
        sizes |= made
        found |= made.keys()
    return found


def _bytes(tensor: gs.Tensor) -> int | None:
    """The size of a tensor's numbers; None where its shape is not known."""
    if tensor.shape is None or not all(isinstance(dim, int) for dim in tensor.shape):
        return None
    size: int = prod(tensor.shape)
    return size * (8 if tensor.dtype is None else np.dtype(tensor.dtype).itemsize)


def _work(node: gs.Node) -> int:
    """About how many multiplications a product takes, or more; 0 for other nodes."""
    shape = node.outputs[0].shape if node.outputs else None
    if node.op not in _PRODUCTS or not shape:
        return 0
    most: int = max((prod(item.shape[:-1]) for item in node.inputs if item.shape), default=1)
    return most * int(prod(shape))


def _foldable(node: gs.Node) -> bool:
    if (
        node.op in _NEVER
        or node.op.startswith("Random")
        or node.domain not in (None, "", "ai.onnx")
    ):
        return False
    return all(
        item.dtype is None or np.dtype(item.dtype).name != "bfloat16" for item in node.inputs
    )


def _counts(node: gs.Node) -> bool:
    """Whether a node makes integers or truth values, as shape arithmetic does."""
    kinds = [item.dtype for item in node.outputs]
    return all(kind is not None and np.dtype(kind).kind in "iub" for kind in kinds)
