"""What ONNX Runtime runs of an artifact for `ort-cpu`, at the sizes of CLIP and SigLIP B/16."""

from dataclasses import replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.attention_graphs import spliced
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run_all
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fuse_attention import FuseAttention
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.keep_norm_apart import KeepNormApart
from regcache.runtime.optimised_graph import optimised_ops

pytestmark = pytest.mark.slow

# A block of each.
CLIP = Spec(width=768, heads=12, hidden=3072, depth=1, patch=16, grid=14, activation="quick_gelu")
SIGLIP = replace(CLIP, activation="gelu_tanh", prefix=0)
PACKED = replace(SIGLIP, qkv="fused")


def of_one_block(spec: Spec, registers: int) -> tuple[TinyVit, gs.Graph, gs.Graph]:
    """An encoder, its Q/DQ graph, and that as `ort-cpu` has it."""
    vit = TinyVit(spec)
    graph = canonical_graph(vit.model())
    graph = quantized(spliced(graph, spec, registers) if registers else graph)
    return vit, graph, run_all([FuseAttention(), FuseBiases(), KeepNormApart()], graph)[0]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("spec", [CLIP, SIGLIP, PACKED], ids=["clip", "siglip", "siglip, packed"])
def test_everything_is_fused(spec: Spec, registers: int) -> None:
    vit, graph, fused = of_one_block(spec, registers)
    found = optimised_ops(gs.export_onnx(fused).SerializeToString(), threads=1)
    linears = len(view_encoder(graph).linears)
    assert found["MatMulIntegerToFloat"] == linears
    biased = [node for node in fused.nodes if node.op == "MatMulIntegerToFloat"]
    assert [len(node.inputs) for node in biased] == [7] * linears
    packed = spec.qkv == "fused"  # its thirds are taken by head: no queries [B, T, C]
    assert found.get("MultiHeadAttention", 0) == (0 if packed else 1)
    assert found.get("Softmax", 0) == (1 if packed else 0)
    # The position, and the first of the two residual adds; the second is a Sum.
    assert found["Add"] == 2
    assert found["Sum"] == 1
    slow = {"BiasGelu", "SkipLayerNormalization", "FastGelu"}
    assert not slow & found.keys()
    images = vit.images(1).astype(np.float32)
    for ours, theirs in zip(run_graph(fused, images), run_graph(graph, images), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.05)
