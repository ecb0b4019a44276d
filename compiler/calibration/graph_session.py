"""Sessions of graphs in memory, and hidden states that stream through them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray

from regcache.compiler.calibration.mapped import gather
from regcache.compiler.calibration.statistics import tokens_per_image
from regcache.passes.base import run
from regcache.passes.detach_weights import lend_weights
from regcache.passes.expand_block_floats import ExpandBlockFloats
from regcache.passes.tensorrt_operators import runs_in_tensorrt
from regcache.runtime.device import CPU, Device
from regcache.runtime.map_ahead import map_ahead
from regcache.runtime.session import OrtSession

Floats = NDArray[np.float32]


def open_graph(
    graph: gs.Graph,
    *,
    threads: int | None = None,
    integers: bool = False,
    brief: bool = False,
    device: Device = CPU,
) -> OrtSession:
    """A session of a graph, which shares its weights. `brief`: see OrtSession."""
    if runs_in_tensorrt(graph):
        graph = run(ExpandBlockFloats(), graph).graph
    lent = lend_weights(graph)
    return OrtSession(
        lent.content,
        threads=threads,
        integers=integers,
        inputs=len(graph.inputs),
        weights=lent.weights,
        folder=lent.folder,
        in_files=lent.in_files,
        brief=brief,
        device=device,
    )


def stream(
    session: OrtSession,
    inputs: Floats,
    batch: int,
    workers: int = 1,
    others: Sequence[Floats] = (),
) -> Iterator[list[NDArray[Any]]]:
    """The outputs for `inputs` [N, ...], `batch` images at a time, in order.

    `workers` runs share the session; on a GPU, one. Where the graph fixes its batch, that size is
    used instead. `others`: the session's further inputs, [N, ...] each.
    """
    size = session.fixed_batch or batch
    yield from _map_chunks(session.run, size, (inputs, *others), session.at_once(workers))


def stream_tokens(session: OrtSession, inputs: Floats, workers: int = 1) -> Iterator[list[Floats]]:
    """As `stream`, for outputs that hold sequences: each comes as [B, T, K] (see tokens_per_image).

    One image at a time: all activations of an encoder together are large.
    """

    def run(chunk: Floats) -> list[Floats]:
        full = session.filled(chunk)
        return [tokens_per_image(item, len(full))[: len(chunk)] for item in session.run(full)]

    yield from _map_chunks(run, session.fixed_batch or 1, (inputs,), session.at_once(workers))


def _map_chunks(
    run: Callable[..., list[NDArray[Any]]], size: int, inputs: Sequence[Floats], workers: int
) -> Iterator[list[NDArray[Any]]]:
    chunks = [
        [item[start : start + size] for item in inputs] for start in range(0, len(inputs[0]), size)
    ]
    if workers == 1:
        yield from (run(*chunk) for chunk in chunks)
        return
    # No further ahead than workers, for what a run yields is large.
    yield from map_ahead(lambda chunk: run(*chunk), chunks, ahead=workers, workers=workers)


def run_all(
    session: OrtSession,
    inputs: Floats,
    batch: int,
    workers: int = 1,
    others: Sequence[Floats] = (),
    *,
    on_disk: bool = False,
) -> list[Floats]:
    """All outputs for `inputs` [N, ...], one array each; see stream. `on_disk`: see gather."""
    return gather(stream(session, inputs, batch, workers, others), on_disk=on_disk)
