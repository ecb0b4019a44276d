"""Large graphs whose weights lie on disk and are mapped, so that memory holds those in use."""

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.passes.external_weights import keep_weights, kept_at, let_go, mapping
from regcache.passes.onnx_file import constant_bytes
from regcache.runtime.session import LARGE

Array = NDArray[np.generic]

# A smaller constant is not worth a mapping of its own.
_LEAST = 1 << 20
# Bytes of weights of the smallest graph behind which memory is looked for to give back.
_LEAST_RETURNED = 1 << 24


def go_on_with(after: gs.Graph, before: gs.Graph, folder: Path) -> None:
    """Take the weights of two large graphs out of memory; a stage made `after` of `before`.

    Weights that only `after` has go to a file in `folder` (see keep_on_disk).
    """
    keep_on_disk(after, folder)
    let_graph_go(before)
    return_memory(before)


def keep_on_disk(graph: gs.Graph, folder: Path) -> None:
    """Move what a large graph's constants hold in memory to a file in `folder`, and map it.

    Sessions read it without a copy of their own. It goes with the last array that is mapped from it
    (see keep_weights).
    """
    if constant_bytes(graph) < LARGE:
        return
    moving = dict[int, Array]()
    for constant in _large_constants(graph):
        if mapping(constant.values) is not None:
            let_go(constant.values)
        else:
            moving[id(constant.values)] = constant.values
    if not moving:
        return
    mapped = dict(zip(moving, keep_weights(list(moving.values()), folder), strict=True))
    for constant in _large_constants(graph):
        constant.values = mapped.get(id(constant.values), constant.values)


def kept_folder(graph: gs.Graph) -> Path | None:
    """The folder of the files that a large graph's weights are mapped from; None: of none."""
    places = (kept_at(constant.values) for constant in _large_constants(graph))
    return next((file.parent for file, _ in filter(None, places)), None)


def gather(parts: Iterable[Sequence[NDArray[Any]]], *, on_disk: bool = False) -> list[NDArray[Any]]:
    """The arrays [N, ...] whose rows come a few at a time: each part holds some of every array.

    `on_disk`: whether they are mapped from files without a name, which go with the arrays. Their
    memory is not held while they are written, nor once `let_go` was called for them.
    """
    if not on_disk:
        return [np.concatenate(rows) for rows in zip(*parts, strict=True)]
    with ExitStack() as opened:
        files, count = list[BinaryIO](), 0
        shapes: list[tuple[np.dtype[Any], tuple[int, ...]]] = []
        for part in parts:
            if not files:
                files = [opened.enter_context(TemporaryFile()) for _ in part]
                shapes = [(rows.dtype, rows.shape[1:]) for rows in part]
            for file, rows in zip(files, part, strict=True):
                np.ascontiguousarray(rows).tofile(file)
            count += len(part[0])
        for file in files:
            file.flush()
        return [
            np.memmap(file, dtype, "r", 0, (count, *shape))
            for file, (dtype, shape) in zip(files, shapes, strict=True)
        ]


def let_graph_go(graph: gs.Graph) -> None:
    """Let the system take back the memory of a graph's mapped weights (see let_go)."""
    for constant in _large_constants(graph):
        let_go(constant.values)


def return_memory(graph: gs.Graph) -> None:
    """Give freed memory back to the system: glibc keeps what many threads freed in pieces.

    `graph`: what was worked on; behind a small one there is nothing worth the time.
    """
    if constant_bytes(graph) < _LEAST_RETURNED:
        return
    gc.collect()  # graphs are cycles of nodes and tensors
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _large_constants(graph: gs.Graph) -> Iterator[gs.Constant]:
    for tensor in graph.tensors().values():
        if isinstance(tensor, gs.Constant) and tensor.values.nbytes >= _LEAST:
            yield tensor
