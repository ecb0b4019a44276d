"""The encoder view: the same blocks, whatever the exporter's spelling, or a named refusal."""

import itertools

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.encoder import EncoderView, by_tensor
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder


def view(spec: Spec) -> EncoderView:
    return view_encoder(canonical_graph(TinyVit(spec).model()))


@pytest.mark.parametrize("name", SPELLINGS)
def test_facts_of_the_encoder(name: str) -> None:
    spec = SPELLINGS[name]
    found = view(spec)
    assert len(found.blocks) == spec.depth
    assert (found.width, found.heads, found.head_dim) == (16, 2, 8)
    assert (found.tokens, found.patches, found.prefix_tokens) == (
        spec.tokens,
        spec.grid**2,
        spec.prefix,
    )
    assert {block.mlp.activation for block in found.blocks} == {spec.activation}


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_linear_is_found_with_its_own_weight(name: str) -> None:
    spec = SPELLINGS[name]
    vit = TinyVit(spec)
    for linear in view(spec).linears:
        _, block, letter = linear.name.split(".")
        stored = "fc1" if letter == "up" else letter
        if spec.packed_gate and letter == "fc1":
            wanted = np.concatenate([vit.weights[f"{block}.{n}"] for n in ("gate", "fc1")], axis=1)
        elif letter == "qkv":
            wanted = np.concatenate([vit.weights[f"{block}.{n}"] for n in "qkv"], axis=1)
        else:
            wanted = vit.weights[f"{block}.{stored}"]
        np.testing.assert_array_equal(linear.weight, wanted)
        assert linear.bias_add is not None


def test_names_and_sites() -> None:
    found = view(Spec(depth=2))
    assert [linear.name for linear in found.blocks[1].linears] == [
        f"blocks.1.{name}" for name in ("q", "k", "v", "out", "fc1", "fc2")
    ]
    assert [site.name for site in found.sites[:4]] == [
        "blocks.0.q+k+v",
        "blocks.0.out",
        "blocks.0.fc1",
        "blocks.0.fc2",
    ]
    assert [len(site.linears) for site in found.sites] == [3, 1, 1, 1] * 2
    assert (
        next(linear.name for linear in view(Spec(qkv="fused", depth=1)).linears) == "blocks.0.qkv"
    )
    gated = view(Spec(activation="swiglu", depth=1))
    assert [linear.name.rpartition(".")[2] for linear in gated.blocks[0].mlp.fc1] == ["gate", "up"]
    assert gated.sites[2].name == "blocks.0.gate+up"


def test_values_of_sites_by_their_tensors() -> None:
    first, second, *others = view_encoder(canonical_graph(TinyVit(Spec()).model())).sites
    values = {second.name: 2, first.name: 1, "blocks.9.fc1": 3}
    found = by_tensor((first, second, *others), values)
    assert list(found.items()) == [(first.tensor.name, 1), (second.tensor.name, 2)]


def test_residual_stream_is_a_chain() -> None:
    blocks = view(Spec(depth=3, layer_scale=True)).blocks
    for block, following in itertools.pairwise(blocks):
        assert following.input is block.output
    for block in blocks:
        assert block.norm1.inputs[0] is block.input
        assert block.norm2.inputs[0] is block.middle
        assert block.attention.softmax.op == "Softmax"
        assert block.attention.query.shape[1:] == [2, 10, 8]
        assert block.attention.value.shape[1:] == [2, 10, 8]
        assert block.attention.key.shape[1:] == [2, 8, 10]


def test_the_pooling_head_is_no_block() -> None:
    found = view(Spec(pooling_head=True, prefix=0, depth=2))
    assert len(found.blocks) == 2
    assert sum(node.op == "Softmax" for node in found.graph.nodes) == 3


def edited(spec: Spec) -> tuple[gs.Graph, list[gs.Node]]:
    graph = canonical_graph(TinyVit(spec).model())
    return graph, list(graph.nodes)


def test_a_graph_without_attention_is_refused() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=0)).model())
    with pytest.raises(InputError, match="no transformer block"):
        view_encoder(graph)


def test_a_classifier_softmax_is_no_block() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=0)).model())
    pooled = graph.outputs[0].inputs[0]
    probabilities = gs.Variable("probabilities", dtype=np.float32)
    graph.nodes.append(gs.Node("Softmax", "head", {}, [pooled.inputs[0]], [probabilities]))
    graph.outputs.append(probabilities)
    with pytest.raises(InputError, match="no transformer block"):
        view_encoder(graph)


def test_a_post_norm_block_names_the_node() -> None:
    graph, nodes = edited(Spec(depth=1))
    norm = next(node for node in nodes if node.op == "LayerNormalization")
    # Attention reads the residual stream itself.
    for consumer in list(norm.outputs[0].outputs):
        consumer.inputs[0] = norm.inputs[0]
    with pytest.raises(InputError, match=r"Softmax 'n\d+_Softmax'.*not a layer norm"):
        view_encoder(graph.cleanup().toposort())


def test_a_foreign_residual_names_the_node() -> None:
    graph, nodes = edited(Spec(depth=1))
    block = view_encoder(graph).blocks[0]
    add = block.middle.inputs[0]
    other = next(node for node in nodes if node.op == "Concat").outputs[0]
    add.inputs = [other if item is block.input else item for item in add.inputs]
    with pytest.raises(InputError, match=rf"Add {add.name!r}: does not add"):
        view_encoder(graph.cleanup().toposort())


def test_blocks_that_do_not_follow_each_other_name_the_node() -> None:
    graph, _ = edited(Spec(depth=2))
    first = view_encoder(graph).blocks[0]
    doubled = gs.Variable("doubled", dtype=np.float32, shape=first.output.shape)
    readers = list(first.output.outputs)
    graph.nodes.append(gs.Node("Neg", "between", {}, [first.output], [doubled]))
    for reader in readers:
        reader.inputs = [doubled if item is first.output else item for item in reader.inputs]
    with pytest.raises(InputError, match="Neg 'between': stands between the end of block 0"):
        view_encoder(graph.cleanup().toposort())


def test_an_unknown_activation_is_called_so() -> None:
    graph, nodes = edited(Spec(depth=1, activation="relu"))
    relu = next(node for node in nodes if node.op == "Relu")
    relu.op = "Softplus"
    assert view_encoder(graph).blocks[0].mlp.activation == "unknown"
