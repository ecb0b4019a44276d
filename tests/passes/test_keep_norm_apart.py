"""Residual adds that ONNX Runtime does not merge with a norm: the same bits, fewer slow kernels."""

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.keep_norm_apart import KeepNormApart
from regcache.runtime.optimised_graph import optimised_ops


@pytest.mark.parametrize("spelling", ["plain", "fused qkv", "registers"])
def test_the_last_norm_reads_a_sum(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = quantized(canonical_graph(vit.model()))
    result = run(KeepNormApart(), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    assert (ops(graph)["Sum"], ops(result.graph)["Sum"], len(result.log.edits)) == (0, 1, 1)
    assert not run(KeepNormApart(), result.graph).changed
    images = vit.images(3)
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, graph)), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)
    merged = [
        optimised_ops(gs.export_onnx(one).SerializeToString(), threads=1)
        for one in (graph, result.graph)
    ]
    assert [found.get("SkipLayerNormalization", 0) for found in merged] == [1, 0]
    names = [[linear.name for linear in view_encoder(one).linears] for one in (graph, result.graph)]
    assert names[0] == names[1]


@pytest.mark.parametrize("form", ["an output", "a constant"])
def test_what_is_left_alone(form: str) -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    last = view_encoder(graph).blocks[-1].output
    if form == "an output":
        graph.outputs.append(last)
    else:
        (add,) = last.inputs
        add.inputs[1] = gs.Constant("c", np.ones((1, 1, 16), np.float32))
    result = run(KeepNormApart(), graph.cleanup().toposort())
    assert not result.changed
