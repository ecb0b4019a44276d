"""Values that are rotated within each head: the same encoder, outliers spread over their head."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.running import run_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.rotate_values import RotateValues


@pytest.mark.parametrize("spelling", ["plain", "einsum linears", "sdpa", "rms norm"])
def test_the_encoder_computes_the_same(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = canonical_graph(vit.model())
    result = run(RotateValues(), graph)
    assert (len(result.log.edits), result.log.skips) == (SPELLINGS[spelling].depth, ())
    images = vit.images(3)
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, graph)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    for one, other in zip(
        view_encoder(graph).blocks, view_encoder(result.graph).blocks, strict=True
    ):
        assert not np.allclose(one.attention.out.weight, other.attention.out.weight, atol=0.01)
        np.testing.assert_array_equal(one.mlp.fc2.weight, other.mlp.fc2.weight)


def context(graph: gs.Graph, images: np.ndarray) -> np.ndarray:
    """What the first block's output projection reads, [tokens, channels]."""
    name = view_encoder(graph).blocks[0].attention.out.input.name
    found = run_graph(run(Observe((name,)), graph).graph, images)[-1]
    return found.reshape(-1, found.shape[-1])


def test_an_outlier_is_spread_over_its_head_and_no_other() -> None:
    spec = Spec(depth=1)
    vit = TinyVit(spec)
    graph = canonical_graph(vit.model())
    value = view_encoder(graph).blocks[0].attention.projections[2]
    weight = value.weight.copy()
    weight[:, 1] *= 50
    value.matmul.inputs[1] = gs.Constant("outlier", weight)
    before = context(graph, vit.images(2))
    after = context(run(RotateValues(), graph).graph, vit.images(2))
    size = spec.width // spec.heads
    assert np.abs(after).max() < np.abs(before).max()
    old, new = (np.linalg.norm(one.reshape(len(one), -1, size), axis=2) for one in (before, after))
    np.testing.assert_allclose(new, old, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("spelling", "reason"),
    [
        ("fused qkv", "no linear of their own"),
        ("attention operator", "no linear of their own"),
        ("merged heads", "more than heads"),
    ],
)
def test_what_is_skipped(spelling: str, reason: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[spelling]).model())
    result = run(RotateValues(), graph)
    assert not result.changed
    assert all(reason in skip.reason for skip in result.log.skips)
    assert len(result.log.skips) == SPELLINGS[spelling].depth


def test_quantized_linears_are_skipped() -> None:
    graph = quantized(canonical_graph(TinyVit(Spec(depth=1)).model()))
    assert [skip.reason for skip in run(RotateValues(), graph).log.skips] == ["quantized already"]


def test_values_that_are_an_output_are_skipped() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    graph.outputs.append(view_encoder(graph).blocks[0].attention.value)
    assert not run(RotateValues(), graph).changed
