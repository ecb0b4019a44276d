"""Biases of q, k and v fold into their weights: the same numbers, and fewer kernels in TensorRT."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.biases import drop_biases
from support.building import needs_tensorrt
from support.canonical import canonical_graph
from support.quantized_graphs import signed_linears
from support.registers import with_registers
from support.running import run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.onnx_file import save_graph
from regcache.runtime.engine_cost import moved_bytes
from regcache.runtime.tensorrt_rtx import kernels_at


def tiny(spec: Spec | None = None) -> gs.Graph:
    return canonical_graph(TinyVit(spec or Spec()).model())


@pytest.mark.parametrize("name", SPELLINGS)
def test_numbers_and_counts(name: str) -> None:
    """Against the encoder in float64; ONNX's Attention and packed projections included."""
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = run(FoldBiases(), graph)
    folded = vit.spec.layer_norm != "rms"
    assert len(result.log.edits) == (vit.spec.depth if folded else 0)
    assert len(result.log.skips) == (0 if folded else vit.spec.depth)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(3)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    assert not run(FoldBiases(), result.graph).changed


def test_only_the_projections_and_their_norm_change() -> None:
    graph = tiny()
    folded = run(FoldBiases(), graph).graph
    for one, other in zip(view_encoder(graph).blocks, view_encoder(folded).blocks, strict=True):
        assert all(linear.bias_add is None for linear in other.attention.projections)
        changed = [not np.array_equal(a.values, b.values) for a, b in
                   zip(one.norm1.inputs[1:], other.norm1.inputs[1:], strict=True)]  # fmt: skip
        assert changed == [False, True]
        count = len(one.attention.projections)
        for old, new in zip(one.linears[count:], other.linears[count:], strict=True):
            assert new.bias_add is not None
            np.testing.assert_array_equal(old.weight, new.weight)
        np.testing.assert_array_equal(*(item.norm2.inputs[2].values for item in (one, other)))
    assert len(folded.nodes) == len(graph.nodes) - 3 * Spec().depth


@pytest.mark.parametrize("kind", ["no bias", "dead", "tiny", "against"])
def test_norms_of_every_kind(kind: str) -> None:
    """Without a bias; with a channel that is scaled by 0 or next to it; with a bias along -n."""
    graph = tiny(Spec(depth=1))
    norm = view_encoder(graph).blocks[0].norm1
    scale, bias = (item.values.copy() for item in norm.inputs[1:])
    if kind == "no bias":
        norm.inputs = norm.inputs[:2]
    if kind in ("dead", "tiny"):
        scale[3] = 0 if kind == "dead" else 1e-4
        norm.inputs[1] = gs.Constant("another scale", scale)
    if kind == "against":
        norm.inputs[2] = gs.Constant("another bias", (-2 / scale).astype(bias.dtype))
    images = TinyVit(Spec(depth=1)).images(3)
    before = run_graph(graph, images)
    result = run(FoldBiases(), graph)
    assert len(result.log.edits) == 1
    for found, wanted in zip(run_graph(result.graph, images), before, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=2e-4)


def test_keys_alone_without_a_bias_and_registers() -> None:
    graph = with_registers(view_encoder(drop_biases(tiny(), "blocks.0.k", "blocks.1.k")), "kv")
    images = TinyVit(Spec()).images(2)
    result = run(FoldBiases(), graph)
    assert len(result.log.edits) == 2
    for found, wanted in zip(
        run_graph(result.graph, images), run_graph(graph, images), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_quantized_and_unbiased_linears_are_left_alone() -> None:
    names = [f"blocks.{index}.{letter}" for index in range(2) for letter in "qkv"]
    for graph in (signed_linears(tiny()), drop_biases(tiny(), *names)):
        result = run(FoldBiases(), graph)
        assert result.graph is graph
        assert not result.log.skips


def test_a_norm_that_something_else_reads_is_refused() -> None:
    graph = tiny(Spec(depth=1))
    norm = view_encoder(graph).blocks[0].norm1.outputs[0]
    norm.dtype, norm.shape = np.dtype(np.float32), ["batch", 10, 16]
    graph.outputs.append(norm)
    (skip,) = run(FoldBiases(), graph).log.skips
    assert (skip.site, skip.reason) == ("blocks.0.q+k+v", "something else reads the norm")
    assert skip.slower is not None


@needs_tensorrt
def test_attention_reads_what_the_product_wrote(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Three kernels a block less, and the bytes that they moved."""
    spec, batch = Spec(width=64, heads=1, hidden=256, depth=3, grid=8, patch=2), 8
    graph, kernels = tiny(spec), []
    for one in (graph, run(FoldBiases(), graph).graph):
        path = tmp_path_factory.mktemp("built") / "model.onnx"
        save_graph(run(HalfPrecision(), one).graph, path)
        kernels.append(kernels_at(path, ["8.6", "8.9", "12.0"], batch))
    before, after = kernels
    assert len(after) == len(before) - 3 * spec.depth
    saved = moved_bytes(before, batch) - moved_bytes(after, batch)
    assert saved == pytest.approx(spec.depth * 12 * spec.tokens * 64 * batch, rel=0.05)
