"""What benchmarks/clip_attention.py does to attention, on a tiny encoder, beside NumPy."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from benchmarks.clip_attention import Clip, clipped
from regcache.passes.copy_graph import copy_graph
from regcache.passes.find_blocks import view_encoder

pytestmark = [pytest.mark.torch, pytest.mark.slow]

SPEC = Spec(width=32, heads=4, hidden=64, depth=3, grid=5)
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def graph() -> gs.Graph:
    return canonical_graph(TinyVit(SPEC).model())


def tensors(graph: gs.Graph, images: NDArray[np.float32], *names: str) -> list[Floats]:
    copy = copy_graph(graph)
    copy.outputs = [copy.tensors()[name] for name in names]
    for output in copy.outputs:
        output.dtype = np.float32
    return [item.astype(np.float64) for item in run_graph(copy.cleanup(), images)]


@pytest.mark.parametrize(
    "clip", [Clip("clipped", 0.02), Clip("shared out", 0.02), Clip("lowered", 1.5)], ids=str
)
def test_sinks_get_less_and_no_other_token(graph: gs.Graph, clip: Clip) -> None:
    view, block = view_encoder(graph), 1  # of two blocks that are clipped the first, alike in both
    first = view.blocks[block]
    side = graph.inputs[0].shape[-1]
    images = np.random.default_rng(0).standard_normal((6, 3, side, side)).astype(np.float32)
    stream, given = tensors(
        graph, images, first.input.name, first.attention.softmax.outputs[0].name
    )
    norms = np.abs(stream).max(-1)[:, 1:]
    sinks = np.zeros(stream.shape[:2], bool)
    sinks[:, 1:] = norms > (norms.mean(1) + 3 * norms.std(1))[:, None]
    assert sinks.any()
    edited = clipped(view, graph, block - 1, clip)
    nodes = {node.name: node for node in edited.nodes}
    read = nodes[first.attention.context.name].inputs[0].name
    (found,) = tensors(edited, images, read)
    there = np.broadcast_to(sinks[:, None, None], given.shape)
    if clip.how == "lowered":
        wanted = given * np.where(there, np.exp(-clip.amount), 1)
    else:
        wanted = np.where(there, np.minimum(given, clip.amount), given)
    if clip.how != "clipped":
        wanted /= wanted.sum(-1, keepdims=True)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-6)
    assert (found[there] < given[there]).any()
