"""Equalized channels: the same outputs, divided activations, and nothing else changed."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support import zoo
from support.canonical import canonical_graph
from support.equalizing import (
    MUL,
    NORM,
    UP,
    VALUE,
    apply,
    assert_agree,
    graph_of,
    one_site,
    random_factors,
    site_of,
    ways,
)
from support.examples import examples
from support.families import EXPECTED, images, view
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit
from support.untouched import told

from regcache.passes.base import Skip, run
from regcache.passes.encoder import Linear
from regcache.passes.equalize import Equalize, foldable
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.walk import is_constant

Floats = NDArray[np.float32]


def expected_ways(linears: tuple[str, ...], *, packed_gate: bool = False) -> dict[str, str]:
    gated = "gate" in linears and not packed_gate
    return {
        "qkv" if "qkv" in linears else "q+k+v": NORM,
        "out": VALUE,
        "gate+up" if gated else "fc1": NORM,
        "fc2": UP if gated else MUL,
    }


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_encoder_computes_the_same(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    original = told(graph)
    result = apply(graph)
    assert not result.log.skips
    assert len(result.log.edits) == len(view_encoder(graph).sites)
    projections = ("qkv",) if vit.spec.qkv == "fused" else ("q", "k", "v")
    gate = ("gate",) if vit.spec.activation == "swiglu" else ()
    wanted = expected_ways((*projections, *gate), packed_gate=vit.spec.packed_gate)
    assert ways(result) == wanted
    muls = vit.spec.depth if wanted["fc2"] == MUL else 0
    assert ops(result.graph) - ops(graph) == ({"Mul": muls} if muls else {})
    for batch in (1, 3):
        pictures = vit.images(batch)
        found = run_graph(result.graph, pictures)
        assert_agree(found, run_graph(graph, pictures))
        assert_agree(found, vit.reference(pictures))
    assert told(graph) == original


@pytest.mark.parametrize("name", SPELLINGS)
def test_activations_are_divided(name: str) -> None:
    graph = graph_of(SPELLINGS[name])
    factors, after = random_factors(graph), apply(graph).graph
    observed = []
    for one in (graph, after):
        sites = [site.tensor.name for site in view_encoder(one).sites]
        pictures = TinyVit(SPELLINGS[name]).images(2)
        outputs = run_graph(run(Observe(tuple(sites)), one).graph, pictures)
        observed.append(dict(zip(sites, outputs[len(graph.outputs) :], strict=True)))
    assert len(observed[0]) == len(observed[1]) == len(factors)
    for (tensor, before), divided in zip(observed[0].items(), observed[1].values(), strict=True):
        peaks = np.abs(before).max(axis=tuple(range(before.ndim - 1)))
        assert (np.abs(divided * factors[tensor] - before) <= 2e-5 * (peaks + 1e-2)).all(), tensor


@pytest.mark.parametrize("name", SPELLINGS)
def test_weights_by_formula_and_nothing_else(name: str) -> None:
    graph = graph_of(SPELLINGS[name])
    factors, after = random_factors(graph), apply(graph).graph
    by_name, touched = {node.name: node for node in graph.nodes}, set[str]()
    for node in after.nodes:
        if node.name.startswith("equalize/"):
            continue
        old = by_name.pop(node.name)
        assert (node.op, node.attrs) == (old.op, old.attrs)
        assert [t.name for t in node.outputs] == [t.name for t in old.outputs]
        for ours, theirs in zip(node.inputs, old.inputs, strict=True):
            if not is_constant(theirs):
                assert ours.name in (theirs.name, f"{theirs.name}/equalized")
            elif ours.name == theirs.name:
                np.testing.assert_array_equal(ours.values, theirs.values)
            else:
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
                touched.add(node.name)
    assert not by_name
    wanted = set[str]()
    for block in view_encoder(graph).blocks:
        gated = len(block.mlp.fc1) == 2
        divided = [block.attention.projections[-1], *block.mlp.fc1[1:]]
        wanted |= {block.norm1.name, block.norm2.name}
        wanted |= {linear.matmul.name for linear in block.linears}
        wanted |= {linear.bias_add.name for linear in divided if linear.bias_add is not None}
        readers = {"out": divided[0], **({"fc2": divided[1]} if gated else {})}
        outgoing = {
            made.name: factors[site_of(graph, f"blocks.{block.index}.{name}").tensor.name]
            for name, made in readers.items()
        }
        for linear, new in zip(
            block.linears, view_encoder(after).blocks[block.index].linears, strict=True
        ):
            assert_scaled(linear, new, factors[linear.input.name], outgoing.get(linear.name))
    assert touched == wanted


def assert_scaled(old: Linear, new: Linear, incoming: Floats, outgoing: Floats | None) -> None:
    """The weight's rows times the one, its last columns and the bias over the other."""
    columns = np.ones(old.weight_shape[1])
    if outgoing is not None:
        columns[-len(outgoing) :] = outgoing
    weight = old.weight.astype(np.float64) * incoming[:, None] / columns
    np.testing.assert_allclose(new.weight, weight, rtol=1e-6)
    if old.bias_add is not None and new.bias_add is not None:
        biases = [
            next(item.values for item in add.inputs if is_constant(item))
            for add in (old.bias_add, new.bias_add)
        ]
        np.testing.assert_allclose(biases[1], biases[0] / columns, rtol=1e-6)


# Every way in which released encoders write queries, keys, values, norms and MLPs.
KINDS = (
    *("clip-b16", "siglip-b16", "dinov2-s14-swiglu", "dinov3-s16plus", "deit-s16"),
    *("timm-dinov2-s14-registers", "openclip-b16"),
)


@pytest.mark.parametrize("name", [zoo.family_param(name) for name in KINDS])
def test_every_family_stays_the_encoder(name: str, folder: Any) -> None:
    before = view(name, folder)
    factors = random_factors(before.graph, decades=2)
    result = apply(before.graph, factors)
    assert not result.log.skips
    assert len(result.log.edits) == len(before.sites)
    assert ways(result) == expected_ways(EXPECTED[name][-1])
    free = [foldable(before, site) for site in before.sites]
    assert free == [edit.what != MUL for edit in result.log.edits]
    for one, other in zip(before.blocks, view_encoder(result.graph).blocks, strict=True):
        assert one.mlp.activation == other.mlp.activation
    batch = images(2)
    found = run_graph(result.graph, batch, optimize=True)
    assert_agree(found, run_graph(before.graph, batch, optimize=True), 2e-5)


@pytest.mark.slow
@examples(20)
@given(
    heads=st.integers(1, 3),
    head_dim=st.integers(2, 7),
    activation=st.sampled_from(["gelu", "swiglu", "relu"]),
    qkv=st.sampled_from(["separate", "fused"]),
    decades=st.floats(0, 5),
    seed=st.integers(0, 1000),
)
def test_random_encoders_and_factors(
    heads: int, head_dim: int, activation: Any, qkv: Any, decades: float, seed: int
) -> None:
    # Of two channels a layer norm leaves a sign, which float32 may lose, equalized or not.
    assume(heads * head_dim > 3)
    spec = Spec(
        width=heads * head_dim, heads=heads, hidden=9, activation=activation, qkv=qkv, seed=seed
    )
    vit, graph = TinyVit(spec), graph_of(spec)
    result = apply(graph, random_factors(graph, seed, decades))
    pictures = vit.images(2, seed)
    assert_agree(run_graph(result.graph, pictures), vit.reference(pictures), 2e-5)


@pytest.mark.parametrize("name", ["plain", "tanh", "quick gelu", "relu", "swiglu", "packed swiglu"])
def test_the_activation_keeps_its_name(name: str) -> None:
    graph = graph_of(SPELLINGS[name])
    names = [block.mlp.activation for block in view_encoder(graph).blocks]
    after = view_encoder(apply(graph).graph).blocks
    assert "unknown" not in names
    assert [block.mlp.activation for block in after] == names


@pytest.mark.parametrize("name", ["swiglu", "plain"])
def test_a_second_run_divides_again(name: str) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    once = apply(graph).graph
    again = apply(once, random_factors(once, seed=1))
    assert len(again.log.edits) == len(view_encoder(graph).sites)
    assert len({node.name for node in again.graph.nodes}) == len(again.graph.nodes)
    blocks = view_encoder(again.graph).blocks
    assert {block.mlp.activation for block in blocks} == {vit.spec.activation}
    pictures = vit.images(2)
    assert_agree(run_graph(again.graph, pictures), vit.reference(pictures))


def test_the_reciprocals_undo_a_run() -> None:
    graph = graph_of(Spec(activation="swiglu"))
    factors = random_factors(graph)
    once = apply(graph, factors).graph
    back = apply(once, {name: np.float32(1) / values for name, values in factors.items()}).graph
    for one, other in zip(view_encoder(graph).linears, view_encoder(back).linears, strict=True):
        np.testing.assert_allclose(other.weight, one.weight, rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", "swiglu", "fused qkv"])
@pytest.mark.parametrize("site", range(4))
def test_one_site_leaves_the_others(name: str, site: int) -> None:
    vit, graph = TinyVit(SPELLINGS[name]), graph_of(SPELLINGS[name])
    chosen = view_encoder(graph).sites[site]
    result = apply(graph, one_site(graph, chosen.name))
    assert [edit.site for edit in result.log.edits] == [chosen.name]
    mine = {linear.name for linear in chosen.linears}
    if chosen.name.endswith("out"):
        mine.add(view_encoder(graph).blocks[0].attention.projections[-1].name)
    if name == "swiglu" and chosen.name.endswith("fc2"):
        mine.add("blocks.0.up")
    changed = {
        one.name
        for one, other in zip(
            view_encoder(graph).linears, view_encoder(result.graph).linears, strict=True
        )
        if not np.array_equal(one.weight, other.weight)
    }
    assert changed == mine
    pictures = vit.images(2)
    assert_agree(run_graph(result.graph, pictures), vit.reference(pictures))


def test_factors_of_one_change_no_bit() -> None:
    vit, graph = TinyVit(Spec()), graph_of(Spec())
    ones = {name: np.ones_like(values) for name, values in random_factors(graph).items()}
    pictures = vit.images(2)
    for found, wanted in zip(
        run_graph(apply(graph, ones).graph, pictures), run_graph(graph, pictures), strict=True
    ):
        np.testing.assert_array_equal(found, wanted)


def test_without_factors_the_graph_is_returned() -> None:
    graph = graph_of(Spec())
    result = run(Equalize({}), graph)
    assert not result.changed
    assert result.graph is graph


def test_shared_constants_are_not_written_into() -> None:
    """Linears with one weight, one bias, and norms with one scale, of which some are divided."""
    graph = graph_of(Spec())
    first, second = view_encoder(graph).blocks
    query, key, value = first.attention.projections
    for linear in (key, value, second.attention.projections[0]):
        linear.matmul.inputs[1] = query.matmul.inputs[1]
        assert linear.bias_add is not None
        assert query.bias_add is not None
        linear.bias_add.inputs[1] = query.bias_add.inputs[1]
    second.norm2.inputs = [second.norm2.inputs[0], *first.norm1.inputs[1:]]
    graph.cleanup()
    chosen = one_site(graph, "blocks.0.q+k+v") | one_site(graph, "blocks.0.out")
    result = apply(graph, chosen)
    blocks = view_encoder(result.graph).blocks
    kept = blocks[1].attention.projections[0]
    assert kept.matmul.inputs[1].name == query.matmul.inputs[1].name
    assert blocks[1].norm2.inputs[1].name == first.norm1.inputs[1].name
    adds = [linear.bias_add for linear in (*blocks[0].attention.projections, query)]
    biases = [add.inputs[1].name for add in adds if add is not None]
    assert biases[0] == biases[1] == biases[3] != biases[2]
    pictures = TinyVit(Spec()).images(2)
    for one in (result.graph, apply(graph).graph):
        assert_agree(run_graph(one, pictures), run_graph(graph, pictures))


def test_an_equalized_encoder_is_quantized_whole() -> None:
    """One scale fits every channel: evening out what factors tore apart loses nothing."""
    graph = graph_of(Spec())
    after = apply(graph).graph
    result = run(QuantizeLinears(linear_scales(after)), after)
    assert all(linear.quantized for linear in view_encoder(result.graph).linears)
    assert [edit.site for edit in result.log.edits] == [
        site.name for site in view_encoder(graph).sites
    ]


class TestRefusals:
    @pytest.mark.parametrize(
        ("values", "reason"),
        [
            (np.ones(15), r"has 16 channels, not \(15,\)"),
            (np.ones(()), r"has 16 channels, not \(\)"),
            (np.ones((1, 16)), r"has 16 channels, not \(1, 16\)"),
            (np.r_[np.ones(15), 0], "must be positive and finite"),
            (np.r_[np.ones(15), -1], "must be positive and finite"),
            (np.r_[np.ones(15), np.nan], "must be positive and finite"),
            (np.r_[np.ones(15), np.inf], "must be positive and finite"),
            (np.full(16, 1e-40), "must be positive and finite"),
        ],
    )
    def test_factors(self, values: NDArray[np.float64], reason: str) -> None:
        graph = graph_of(Spec(depth=1))
        tensor = site_of(graph, "blocks.0.fc1").tensor.name
        with pytest.raises(InputError, match=reason):
            run(Equalize({tensor: values.astype(np.float32)}), graph)

    def test_a_tensor_that_feeds_no_linear(self) -> None:
        graph = graph_of(Spec(depth=1))
        for name in ("nowhere", view_encoder(graph).blocks[0].middle.name):
            with pytest.raises(InputError, match=f"'{name}' is no activation that feeds a linear"):
                run(Equalize({name: np.ones(16, np.float32)}), graph)

    def refuse(self, graph: gs.Graph, name: str, reason: str) -> None:
        """Skipped, and the rest of the encoder equalized all the same."""
        refused = run(Equalize(one_site(graph, name)), graph)
        assert not refused.changed
        assert refused.log.skips == (Skip(name, reason),)
        result = apply(graph)
        assert result.log.skips == (Skip(name, reason),)
        assert len(result.log.edits) == len(view_encoder(graph).sites) - 1
        pictures = TinyVit(Spec()).images(2)
        assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))

    @pytest.mark.parametrize("name", ["blocks.0.q+k+v", "blocks.1.fc2"])
    def test_a_graph_output(self, name: str) -> None:
        graph = graph_of(Spec())
        observed = run(Observe((site_of(graph, name).tensor.name,)), graph).graph
        self.refuse(observed, name, "its activation is an output of the graph")

    def test_an_activation_that_is_read_elsewhere(self) -> None:
        graph = graph_of(Spec())
        tensor = site_of(graph, "blocks.0.fc1").tensor
        square = gs.Variable("square", dtype=np.float32, shape=tensor.shape)
        graph.nodes.append(gs.Node("Mul", "square", {}, [tensor, tensor], [square]))
        graph.outputs.append(square)
        self.refuse(graph, "blocks.0.fc1", "its activation is read elsewhere")

    def test_quantized_linears(self) -> None:
        graph = graph_of(Spec())
        step = QuantizeLinears(linear_scales(graph), only=frozenset({"blocks.1.fc2"}))
        self.refuse(run(step, graph).graph, "blocks.1.fc2", "quantized already")
