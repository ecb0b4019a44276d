"""A quantized patch convolution as a linear: the same numbers, in ONNX Runtime's integers."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import image_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run, run_all
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.patches_as_linear import PatchesAsLinear, as_rows
from regcache.passes.quantize_patches import QuantizePatches, patch_convolutions
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops


def in_integers(vit: TinyVit) -> gs.Graph:
    graph = canonical_graph(vit.model())
    return run(QuantizePatches(image_scales(graph)), graph).graph


@pytest.mark.parametrize("spelling", ["plain", "opset 17", "fused qkv", "no prefix, pooled"])
def test_patches_are_multiplied_in_integers(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = in_integers(vit)
    result = run(PatchesAsLinear(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert (ops(result.graph)["Conv"], len(result.log.edits)) == (0, 1)
    images = vit.images(3)
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, graph)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    fused = run_all([FuseBiases()], result.graph)[0]
    kernels = [
        integer_matmuls(optimised_ops(gs.export_onnx(one).SerializeToString(), threads=1))
        for one in (graph, result.graph, fused)
    ]
    assert kernels == [0, 1, 1]


def test_what_cannot_be_rows_is_left_alone() -> None:
    graph = in_integers(TinyVit(Spec(depth=1)))
    (conv,) = patch_convolutions(graph)
    assert as_rows(graph, conv) is not None
    graph.outputs.append(conv.outputs[0])
    assert as_rows(graph, conv) is None
    assert not run(PatchesAsLinear(), graph).changed


def test_a_convolution_in_float_is_left_alone() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    assert not run(PatchesAsLinear(), graph).changed
