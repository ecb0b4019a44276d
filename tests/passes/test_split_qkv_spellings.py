"""Packed projections however an exporter parts them: a linear each, the weights of the encoder."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.packed_vit import ORDERS, PackedVit
from support.running import run_graph
from support.tiny_vit import Spec

from regcache.passes.base import run
from regcache.passes.equalize_sources import find_source
from regcache.passes.find_blocks import view_encoder
from regcache.passes.split_qkv import SplitQkv


@pytest.mark.slow
@pytest.mark.parametrize("batch", [None, 1])
@pytest.mark.parametrize("spelling", ORDERS)
def test_every_spelling_is_split(spelling: str, batch: int | None) -> None:
    vit = PackedVit(Spec(width=24, heads=3), spelling=spelling, batch=batch)
    graph = canonical_graph(vit.model())
    result = run(SplitQkv(for_tensorrt=False), graph)
    assert not result.log.skips
    assert len(result.log.edits) == vit.spec.depth
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(batch or 2)
    for found, wanted in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    view = view_encoder(result.graph)
    for block in view.blocks:
        for letter, linear in zip("qkv", block.attention.projections, strict=True):
            assert linear.name == f"blocks.{block.index}.{letter}"
            # The columns of a head may be in another order than those of the encoder.
            wanted = np.sort(vit.weights[f"{block.index}.{letter}"], axis=1)
            np.testing.assert_array_equal(np.sort(linear.weight, axis=1), wanted)
    # Values can be equalized in the projection wherever heads come one after the other.
    ways = {find_source(view, site).where for site in view.sites if site.name.endswith(".out")}
    mixed = spelling == "channels first"
    assert ways == {"a Mul of its own" if mixed else "folded into the value projection"}
