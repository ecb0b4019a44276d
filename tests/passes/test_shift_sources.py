"""What takes an activation's shifts: values with registers, an Add of its own, or nothing."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.equalizing import UNFOLDED, assert_agree, graph_of, read_elsewhere, site_of, ways
from support.registers import random_kv, random_tokens
from support.running import run_graph
from support.scales import linear_scales
from support.shifting import ADD, CLOSE, SOME, VALUE, apply, one_site
from support.spellings import SPELLINGS
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.passes.base import Skip, run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.shift_activations import ShiftActivations
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters
from regcache.passes.strip_registers import StripRegisters
from regcache.passes.walk import is_constant, replace_everywhere

NO_BIAS = "its norm has no bias to move it into"


@pytest.mark.parametrize(
    ("name", "batch"), sorted(UNFOLDED | {(name, None) for name in SOME}, key=str)
)
def test_registers_in_keys_and_values(name: str, batch: int | None) -> None:
    vit = TinyVit(SPELLINGS[name])
    keys, values = random_kv(vit.spec, 2, 4)
    spliced = run(SpliceRegisters(0, 2, keys, values), graph_of(vit.spec, batch)).graph
    result = apply(spliced)
    assert len(result.log.edits) == len(view_encoder(spliced).sites)
    assert ways(result)["out"] == (ADD if (name, batch) in UNFOLDED else VALUE)
    pictures = vit.images(3)
    wanted = vit.reference(pictures, Registers(0, 2, keys, values))
    assert_agree(run_graph(result.graph, pictures), wanted, CLOSE)
    stripped = run(StripRegisters(), result.graph).graph
    assert_agree(run_graph(stripped, pictures), vit.reference(pictures), CLOSE)


@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu", "attention operator, rank 3"])
def test_register_tokens(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    tokens = random_tokens(vit.spec, 3)
    spliced = run(SpliceRegisterTokens(0, 2, tokens), graph_of(vit.spec)).graph
    result = apply(spliced)
    assert ways(result)["out"] == VALUE
    pictures = vit.images(3)
    wanted = vit.reference(pictures, Registers(0, 2, tokens=tokens))
    assert_agree(run_graph(result.graph, pictures), wanted, CLOSE)
    stripped = run(StripRegisters(), result.graph).graph
    assert_agree(run_graph(stripped, pictures), vit.reference(pictures), CLOSE)


def test_registers_of_one_block_are_shifted_in_that_block_only() -> None:
    vit = TinyVit(Spec())
    keys, values = random_kv(vit.spec, 2, 4)
    spliced = run(SpliceRegisters(0, 2, keys, values), graph_of(vit.spec)).graph
    shifts = one_site(spliced, "blocks.0.out")
    stored = [
        tensor.values[0]
        for tensor in apply(spliced, shifts).graph.tensors().values()
        if is_constant(tensor) and tensor.shape == (1, *values[0].shape)
    ]
    (moved,) = shifts.values()
    by_head = moved.reshape(vit.spec.heads, 1, -1)
    assert len(stored) == 2
    for wanted in (values[0] - by_head, values[1]):
        assert min(np.abs(wanted - found).max() for found in stored) < 1e-6


@pytest.mark.parametrize("tensor", ["projected", "product", "value", "context", "activated"])
def test_a_graph_output_on_the_way_stays_what_it_was(tensor: str) -> None:
    graph = graph_of(Spec())
    block = view_encoder(graph).blocks[0]
    value = block.attention.projections[2]
    found, site, way = {
        "projected": (value.output, "out", ADD),
        "product": (value.matmul.outputs[0], "out", ADD),
        "value": (block.attention.value, "out", ADD),
        "context": (block.attention.context.outputs[0], "out", ADD),
        "activated": (block.mlp.fc1[0].output, "fc2", ADD),
    }[tensor]
    observed = run(Observe((found.name,)), graph).graph
    pictures = TinyVit(Spec()).images(2)
    result = apply(observed, one_site(observed, f"blocks.0.{site}"))
    assert ways(result) == {site: way}
    whole = apply(observed)
    for one in (result.graph, whole.graph):
        assert_agree(run_graph(one, pictures), run_graph(observed, pictures), CLOSE)
    skips = {skip.site: skip.reason for skip in whole.log.skips}
    product = {"blocks.0.q+k+v": "its product is an output of the graph"}
    assert skips == (product if tensor == "product" else {})


@pytest.mark.parametrize("how", ["a head mask", "values read elsewhere", "one head's registers"])
def test_values_that_cannot_be_shifted_cost_an_add(how: str) -> None:
    """Behind a mask, the weights of attention no longer sum to 1."""
    spec = Spec(heads=1 if "registers" in how else 2)
    graph = graph_of(spec)
    attention = view_encoder(graph).blocks[0].attention
    if how == "a head mask":
        weights = attention.softmax.outputs[0]
        masked = gs.Variable("masked", dtype=np.float32, shape=weights.shape)
        mask = gs.Constant("mask", np.array([0.5, 1], np.float32).reshape(2, 1, 1))
        attention.context.inputs[0] = masked
        graph.nodes.append(gs.Node("Mul", "mask", {}, [weights, mask], [masked]))
        graph.toposort()
    elif how == "values read elsewhere":
        read_elsewhere(graph, attention.value)
    else:
        graph = run(SpliceRegisters(0, 2, *random_kv(spec, 2, 4)), graph).graph
    result = apply(graph, one_site(graph, "blocks.0.out"))
    assert ways(result) == {"out": ADD}
    pictures = TinyVit(spec).images(2)
    for one in (result, apply(graph)):
        assert_agree(run_graph(one.graph, pictures), run_graph(graph, pictures), CLOSE)


class TestRefusals:
    @pytest.mark.parametrize(
        "values",
        [
            np.ones(15),
            np.ones(()),
            np.ones((1, 16)),
            np.r_[np.ones(15), np.nan],
            np.r_[np.ones(15), np.inf],
        ],
    )
    def test_shifts(self, values: NDArray[np.float64]) -> None:
        graph = graph_of(Spec(depth=1))
        tensor = site_of(graph, "blocks.0.fc1").tensor.name
        with pytest.raises(InputError) as caught:
            run(ShiftActivations({tensor: values.astype(np.float32)}), graph)
        assert str(caught.value) == f"shift_activations: {tensor!r} needs 16 finite numbers"

    def test_a_tensor_that_feeds_no_linear(self) -> None:
        graph = graph_of(Spec(depth=1))
        for name in ("nowhere", view_encoder(graph).blocks[0].middle.name):
            with pytest.raises(InputError) as caught:
                run(ShiftActivations({name: np.ones(16, np.float32)}), graph)
            assert str(caught.value) == f"shift_activations: {name!r} is no activation of a linear"

    def refuse(self, graph: gs.Graph, *skips: Skip) -> None:
        """Skipped, and the rest of the encoder shifted all the same."""
        for skip in skips:
            refused = apply(graph, one_site(graph, skip.site))
            assert not refused.changed
            assert refused.log.skips == (skip,)
        result = apply(graph)
        assert result.log.skips == skips
        assert len(result.log.edits) == len(view_encoder(graph).sites) - len(skips)
        pictures = TinyVit(Spec()).images(2)
        assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures), CLOSE)

    def test_norms_without_bias(self) -> None:
        graph = graph_of(Spec())
        norm = view_encoder(graph).blocks[1].norm2
        norm.inputs = norm.inputs[:2]
        self.refuse(graph.cleanup(), Skip("blocks.1.fc1", NO_BIAS))

    def test_rms_norms(self) -> None:
        graph = graph_of(SPELLINGS["attention operator"])
        for node in graph.nodes:
            if node.op == "LayerNormalization":
                node.op, node.inputs = "RMSNormalization", node.inputs[:2]
        names = [f"blocks.{block}.{site}" for block in range(2) for site in ("q+k+v", "fc1")]
        self.refuse(graph, *(Skip(name, NO_BIAS) for name in names))

    @pytest.mark.parametrize("name", ["blocks.0.q+k+v", "blocks.0.out", "blocks.1.fc2"])
    def test_a_graph_output(self, name: str) -> None:
        graph = graph_of(Spec())
        observed = run(Observe((site_of(graph, name).tensor.name,)), graph).graph
        self.refuse(observed, Skip(name, "its activation is an output of the graph"))

    def test_a_product_that_is_a_graph_output(self) -> None:
        """Its bias would make the shift good only behind it."""
        graph = graph_of(Spec())
        (linear,) = site_of(graph, "blocks.0.fc1").linears
        observed = run(Observe((linear.matmul.outputs[0].name,)), graph).graph
        self.refuse(observed, Skip("blocks.0.fc1", "its product is an output of the graph"))

    def test_a_product_without_bias_may_be_a_graph_output(self) -> None:
        graph = graph_of(Spec())
        (linear,) = site_of(graph, "blocks.0.fc1").linears
        replace_everywhere(graph, linear.output, linear.matmul.outputs[0])
        observed = run(Observe((linear.matmul.outputs[0].name,)), graph.cleanup()).graph
        self.refuse(observed)

    def test_an_activation_that_is_read_elsewhere(self) -> None:
        graph = graph_of(Spec())
        read_elsewhere(graph, site_of(graph, "blocks.0.fc1").tensor)
        self.refuse(graph, Skip("blocks.0.fc1", "its activation is read elsewhere"))

    @pytest.mark.parametrize("name", ["blocks.1.fc2", "blocks.1.q+k+v"])
    def test_quantized_linears(self, name: str) -> None:
        graph = graph_of(Spec())
        only = frozenset(linear.name for linear in site_of(graph, name).linears)
        quantized = run(QuantizeLinears(linear_scales(graph), only=only), graph).graph
        self.refuse(quantized, Skip(name, "quantized already"))
