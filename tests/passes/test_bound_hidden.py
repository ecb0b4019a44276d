"""fc1 bounded below where its activation is zero: the same outputs, a smaller range."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.running import run_graph
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.bound_hidden import BoundHidden
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe

_LOWEST = {"gelu": -6, "gelu_tanh": -6, "quick_gelu": -12, "silu": -24, "relu": 0}


def held_back(activation: Any) -> TinyVit:
    """An encoder one of whose hidden units is driven far below zero, and one above."""
    vit = TinyVit(Spec(activation=activation))
    vit.weights["1.fc1"][:, :8] *= 400
    vit.weights["1.fc1.b"][3] = 2.5
    return vit


def products(graph: gs.Graph, images: Any) -> Any:
    """What fc1 of block 1 computes, before its bias and behind the Clip."""
    add = view_encoder(graph).blocks[1].mlp.fc1[0].matmul.outputs[0]
    (reader,) = add.outputs
    name = reader.outputs[0].name if reader.op == "Clip" else add.name
    return run_graph(run(Observe((name,)), graph).graph, images)[-1]


@pytest.mark.parametrize("activation", list(_LOWEST))
def test_outputs_stay_and_the_range_shrinks(activation: str) -> None:
    vit = held_back(activation)
    graph, images = canonical_graph(vit.model()), vit.images(3)
    result = run(BoundHidden(), graph)
    assert [edit.site for edit in result.log.edits] == ["blocks.0.fc1", "blocks.1.fc1"]
    for found, wanted in zip(
        *(run_graph(one, images) for one in (result.graph, graph)), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    before, after = products(graph, images), products(result.graph, images)
    bound = _LOWEST[activation] - 2.5
    assert before.min() < 4 * bound - 40
    assert after.min() == np.float32(bound)
    assert after.max() == before.max()


def test_it_still_reads_as_an_encoder_and_is_bounded_once() -> None:
    graph = canonical_graph(held_back("gelu").model())
    bounded = run(BoundHidden(), graph).graph
    names = [[linear.name for linear in view_encoder(one).linears] for one in (graph, bounded)]
    assert names[0] == names[1]
    assert not run(BoundHidden(), bounded).changed


def test_a_gate_is_left_alone() -> None:
    result = run(BoundHidden(), canonical_graph(TinyVit(Spec(activation="swiglu")).model()))
    assert not result.changed
    assert {skip.reason for skip in result.log.skips} == {"swiglu is not zero below a bound"}
