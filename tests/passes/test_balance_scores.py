"""Queries and keys evened out: the same function, nothing but weights and biases changed."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.attention_graphs import spliced
from support.balancing import random_balances
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.running import run_graph
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.balance_scores import Balance, BalanceScores, ScoreLinears, score_linears
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe

SEPARATE = [
    name
    for name, spec in SPELLINGS.items()
    if spec.qkv == "separate" and spec.attention not in ("op3", "op4")
]


@pytest.mark.parametrize("name", SEPARATE)
def test_the_function_stays(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    result = run(BalanceScores(random_balances(graph)), graph)
    assert [edit.site for edit in result.log.edits] == ["blocks.0.attention", "blocks.1.attention"]
    images = vit.images(2)
    for found, truth in zip(run_graph(result.graph, images), vit.reference(images), strict=True):
        np.testing.assert_allclose(found, truth, rtol=2e-3, atol=2e-3)
    assert ops(result.graph) == ops(graph)
    for before, after in zip(graph.nodes, result.graph.nodes, strict=True):
        assert (before.op, before.attrs) == (after.op, after.attrs)
        names = [[item.name for item in node.outputs] for node in (before, after)]
        assert names[0] == names[1]


def test_queries_and_keys_become_what_was_asked() -> None:
    vit = TinyVit(SPELLINGS["plain"])
    graph = canonical_graph(vit.model())
    chosen = random_balances(graph)
    after = run(BalanceScores(chosen), graph).graph
    images = vit.images(2)
    for block in view_encoder(graph).blocks:
        pair = score_linears(block.attention)
        assert isinstance(pair, ScoreLinears)
        names = (pair.query.output.name, pair.key.output.name)
        old, new = (
            run_graph(run(Observe(names), one).graph, images)[-2:] for one in (graph, after)
        )
        balance = chosen[block.index]
        np.testing.assert_allclose(new[0], old[0] * balance.factor, rtol=1e-4, atol=1e-4)
        wanted = (old[1] - balance.shift) / balance.factor
        np.testing.assert_allclose(new[1], wanted, rtol=1e-4, atol=1e-4)


def test_no_integer_changes() -> None:
    graph = quantized(canonical_graph(TinyVit(SPELLINGS["plain"]).model()))
    after = run(BalanceScores(random_balances(graph)), graph).graph

    def integers(one: gs.Graph) -> list[np.ndarray]:
        tensors = one.tensors().values()
        return [item.values for item in tensors if item.name.endswith("/quantized")
                and isinstance(item, gs.Constant)]  # fmt: skip

    assert len(integers(graph)) == 12
    for one, other in zip(integers(graph), integers(after), strict=True):
        np.testing.assert_array_equal(one, other)


def _skips(graph: gs.Graph, balances: dict[int, Balance]) -> set[str]:
    result = run(BalanceScores(balances), graph)
    assert not result.changed
    return {skip.reason for skip in result.log.skips}


def test_what_is_left_alone() -> None:
    plain = canonical_graph(TinyVit(SPELLINGS["plain"]).model())
    balances = random_balances(plain)
    none = "its queries and keys have no linears of their own"
    for name in ("fused qkv", "attention operator"):
        assert _skips(canonical_graph(TinyVit(SPELLINGS[name]).model()), balances) == {none}
    registers = spliced(plain, SPELLINGS["plain"], 2)
    assert _skips(registers, balances) == {"Concat stands behind its queries or keys"}
    assert not run(BalanceScores({}), plain).changed
    narrow = {0: Balance(np.zeros(4, "f4"), np.ones(4, "f4"))}
    assert _skips(plain, narrow) == {"its balance is of another width"}


def test_a_rotation_of_queries_is_left_alone() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    for block in view_encoder(graph).blocks:
        query = block.attention.query
        made = gs.Variable(f"{query.name}/negated", np.float32, query.shape)
        graph.nodes.append(gs.Node("Neg", f"{query.name}/neg", {}, [query], [made]))
        block.attention.scores.inputs[0] = made
    graph.toposort()
    assert _skips(graph, random_balances(graph)) == {"Neg stands behind its queries or keys"}


def test_what_is_refused() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    with pytest.raises(InputError, match="no block 7"):
        run(BalanceScores({7: random_balances(graph)[0]}), graph)
    zero = Balance(np.zeros(16, "f4"), np.zeros(16, "f4"))
    with pytest.raises(InputError, match="a factor of block 0 is not positive"):
        run(BalanceScores({0: zero}), graph)
