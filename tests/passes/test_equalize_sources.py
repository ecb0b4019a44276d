"""What takes an activation's factors: norms, value projections with registers, up projections."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.biases import widen_biases
from support.canonical import canonical_graph
from support.equalizing import (
    MUL,
    NORM,
    UNFOLDED,
    VALUE,
    apply,
    assert_agree,
    graph_of,
    one_site,
    read_elsewhere,
    site_of,
    ways,
)
from support.registers import FREE, random_kv, random_tokens
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.check import check_and_infer
from regcache.passes.equalize import foldable
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.strip_registers import StripRegisters
from regcache.passes.walk import replace_everywhere


def test_rms_norms_have_no_bias() -> None:
    spec = SPELLINGS["attention operator"]
    graph = graph_of(spec)
    for node in graph.nodes:
        if node.op == "LayerNormalization":
            node.op, node.inputs = "RMSNormalization", node.inputs[:2]
    result = apply(graph)
    assert ways(result)["q+k+v"] == ways(result)["fc1"] == NORM
    pictures = TinyVit(spec).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu"])
@pytest.mark.parametrize("norms", [False, True])
def test_biases_may_be_absent(name: str, norms: bool) -> None:
    graph = graph_of(SPELLINGS[name])
    blocks = view_encoder(graph).blocks
    for linear in blocks[0].linears:
        replace_everywhere(graph, linear.output, linear.matmul.outputs[0])
    for norm in (blocks[0].norm1, blocks[1].norm2) if norms else ():
        norm.inputs = norm.inputs[:2]
    graph.cleanup()
    assert [linear.bias_add for linear in view_encoder(graph).blocks[0].linears].count(None) > 3
    result = apply(graph)
    assert ways(result) == ways(apply(graph_of(SPELLINGS[name])))
    pictures = TinyVit(SPELLINGS[name]).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


@pytest.mark.parametrize("name", ["plain", "fused qkv"])
def test_biases_with_leading_dimensions(name: str) -> None:
    graph = widen_biases(graph_of(SPELLINGS[name]))
    result = apply(graph)
    assert ways(result) == ways(apply(graph_of(SPELLINGS[name])))
    pictures = TinyVit(SPELLINGS[name]).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


def test_a_packed_projection_may_be_split_before_and_after() -> None:
    vit = TinyVit(Spec(qkv="fused"))
    graph = canonical_graph(vit.model())
    before = apply(run(SplitQkv(), graph).graph).graph
    after = run(SplitQkv(), apply(graph).graph)
    assert len(after.log.edits) == 2
    pictures = vit.images(2)
    for one in (before, after.graph):
        assert_agree(run_graph(one, pictures), vit.reference(pictures))


UNFOLDED |= {("merged heads", 3)}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("batch", [None, 3])
def test_registers_in_keys_and_values(name: str, batch: int | None) -> None:
    vit = TinyVit(SPELLINGS[name])
    keys, values = random_kv(vit.spec, 2, 4)
    spliced = run(SpliceRegisters(0, 2, keys, values), graph_of(vit.spec, batch)).graph
    result = apply(spliced)
    assert len(result.log.edits) == len(view_encoder(spliced).sites)
    assert ways(result)["out"] == (MUL if (name, batch) in UNFOLDED else VALUE)
    pictures = vit.images(3)
    found = run_graph(result.graph, pictures)
    assert_agree(found, run_graph(spliced, pictures))
    assert_agree(found, vit.reference(pictures, Registers(0, 2, keys, values)))
    stripped = run(StripRegisters(), result.graph).graph
    assert_agree(run_graph(stripped, pictures), vit.reference(pictures))


@pytest.mark.parametrize("name", FREE)
def test_register_tokens(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    tokens = random_tokens(vit.spec, 3)
    spliced = run(SpliceRegisterTokens(0, 2, tokens), canonical_graph(vit.model())).graph
    result = apply(spliced)
    assert ways(result)["out"] == VALUE
    pictures = vit.images(3)
    wanted = vit.reference(pictures, Registers(0, 2, tokens=tokens))
    assert_agree(run_graph(result.graph, pictures), wanted)


def test_registers_of_one_block_are_divided_in_that_block_only() -> None:
    vit = TinyVit(Spec())
    keys, values = random_kv(vit.spec, 2, 4)
    spliced = run(SpliceRegisters(0, 2, keys, values), canonical_graph(vit.model())).graph
    factors = one_site(spliced, "blocks.0.out")
    after = apply(spliced, factors).graph
    before = {name: t.values for name, t in spliced.tensors().items() if isinstance(t, gs.Constant)}
    replaced = {
        name: tensor.values
        for name, tensor in after.tensors().items()
        if isinstance(tensor, gs.Constant) and name not in before
    }
    (divided,) = [item for item in replaced.values() if item.shape == (1, *values[0].shape)]
    (by_channel,) = factors.values()
    np.testing.assert_allclose(
        divided[0], values[0] / by_channel.reshape(vit.spec.heads, 1, -1), rtol=1e-6
    )
    assert len(replaced) == 4  # v's weight and bias, out's weight, the registers


def unfoldable(how: str) -> tuple[Spec, gs.Graph]:
    """An encoder whose blocks.0.out has values that a division does not fit into."""
    spec = Spec(heads=1 if how == "one head" else 2, qkv="fused" if "packed" in how else "separate")
    graph = graph_of(spec)
    attention = view_encoder(graph).blocks[0].attention
    if how == "one head":
        return spec, run(SpliceRegisters(0, 2, *random_kv(spec, 2, 4)), graph).graph
    if how == "quantized":
        step = QuantizeLinears(linear_scales(graph), only=frozenset({"blocks.0.v"}))
        return spec, run(step, graph).graph
    if how == "one bias for all channels":
        add = attention.projections[2].bias_add
        assert add is not None
        add.inputs[1] = gs.Constant("one bias", np.array(0.7, np.float32))
    if how == "read elsewhere":
        read_elsewhere(graph, attention.value)
    return spec, graph


@pytest.mark.parametrize(
    "how", ["one head", "quantized", "one bias for all channels", "read elsewhere"]
)
def test_values_that_cannot_be_divided_cost_a_mul(how: str) -> None:
    spec, graph = unfoldable(how)
    assert not foldable(view_encoder(graph), site_of(graph, "blocks.0.out"))
    result = apply(graph, one_site(graph, "blocks.0.out"))
    assert ways(result) == {"out": MUL}
    pictures = TinyVit(spec).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


def test_heads_in_another_order_are_told_apart() -> None:
    """The value's channels are read dim by dim, the output projection's head by head."""
    graph = graph_of(Spec())
    value = view_encoder(graph).blocks[0].attention.value
    turned = value.inputs[0]
    split = turned.inputs[0].inputs[0]
    assert (split.op, turned.op) == ("Reshape", "Transpose")
    split.inputs[1] = gs.Constant("dims first", np.array([-1, 10, 8, 2], np.int64))
    turned.attrs["perm"] = [0, 3, 1, 2]
    check_and_infer(graph)
    result = apply(graph, one_site(graph, "blocks.0.out"))
    pictures = TinyVit(Spec()).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


@pytest.mark.parametrize("tensor", ["norm", "projected", "value", "context", "up"])
def test_a_graph_output_on_the_way_stays_what_it_was(tensor: str) -> None:
    spec = Spec(activation="swiglu")
    graph = graph_of(spec)
    block = view_encoder(graph).blocks[0]
    normed = block.norm1.outputs[0]
    found, site = {
        "norm": (normed, "q+k+v"),
        "projected": (block.attention.projections[2].output, "out"),
        "value": (block.attention.value, "out"),
        "context": (block.attention.context.outputs[0], "out"),
        "up": (block.mlp.fc1[1].output, "fc2"),
    }[tensor]
    if tensor == "norm":
        same = gs.Variable("same", dtype=np.float32)
        graph.nodes.append(gs.Node("Identity", "same", {}, [normed], [same]))
        for linear in block.attention.projections:
            linear.matmul.inputs[0] = same
        graph.toposort()
        check_and_infer(graph)
    observed = run(Observe((found.name,)), graph).graph
    result = apply(observed, one_site(observed, f"blocks.0.{site}"))
    if tensor == "norm":
        assert [skip.reason for skip in result.log.skips] == ["its norm is read elsewhere"]
    else:
        assert ways(result) == {site: MUL}
    pictures = TinyVit(spec).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(observed, pictures))


@pytest.mark.parametrize("how", ["quantized", "one bias for all channels", "read elsewhere"])
def test_up_projections_that_cannot_be_divided_cost_a_mul(how: str) -> None:
    spec = Spec(activation="swiglu")
    graph = graph_of(spec)
    up = view_encoder(graph).blocks[0].mlp.fc1[1]
    assert up.bias_add is not None
    if how == "quantized":
        step = QuantizeLinears(
            linear_scales(graph), only=frozenset({"blocks.0.gate", "blocks.0.up"})
        )
        graph = run(step, graph).graph
    elif how == "read elsewhere":
        read_elsewhere(graph, up.output)
    else:
        up.bias_add.inputs[1] = gs.Constant("one bias", np.array([0.7], np.float32))
    result = apply(graph, one_site(graph, "blocks.0.fc2"))
    assert ways(result) == {"fc2": MUL}
    assert view_encoder(result.graph).blocks[0].mlp.activation == "swiglu"
    pictures = TinyVit(spec).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


def test_a_gate_without_sigmoid_is_not_mistaken_for_the_value() -> None:
    """GEGLU: which of the two linears is gated cannot be told by a Sigmoid."""
    spec = Spec(activation="swiglu")
    graph = graph_of(spec)
    for node in [node for node in graph.nodes if node.op == "Sigmoid"]:
        (silu,) = node.outputs[0].outputs
        gate = node.inputs[0]
        gelu = gs.Variable(f"{node.name}/gelu", dtype=np.float32)
        graph.nodes.append(gs.Node("Gelu", f"{node.name}/gelu", {}, [gate], [gelu]))
        replace_everywhere(graph, silu.outputs[0], gelu)
    graph.cleanup().toposort()
    check_and_infer(graph)
    result = apply(graph)
    assert ways(result)["fc2"] == MUL
    pictures = TinyVit(spec).images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))
