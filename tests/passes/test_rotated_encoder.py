"""Rotations among the other passes: registers, equalized channels, integers, FP16, refusals."""

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.equalizing import assert_agree, random_factors, read_elsewhere, site_of
from support.registers import random_kv, random_tokens
from support.rotating import SOME, apply, graph_of, wide
from support.running import run_graph
from support.scales import linear_scales
from support.shifting import random_shifts
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Registers, Spec, TinyVit

from regcache.passes.base import Pass, Skip, run
from regcache.passes.delete_sinks import DeleteSinks
from regcache.passes.equalize import Equalize
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.marks import rotates
from regcache.passes.observe import Observe
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.rotate_hidden import RotateHidden, rotated_channels, rotation
from regcache.passes.rotate_stream import RotateStream
from regcache.passes.rotated_stream import rotated_stream
from regcache.passes.shift_activations import ShiftActivations
from regcache.passes.splice_register_tokens import SpliceRegisterTokens
from regcache.passes.splice_registers import SpliceRegisters

STREAM = "the residual stream"


def fold(kind: str, graph: gs.Graph) -> Pass:
    """A pass that changes no output, for the graph as it is."""
    if kind == "shift":
        return ShiftActivations(random_shifts(graph))
    if kind == "equalize":
        return Equalize(random_factors(graph, decades=1))
    return RotateHidden(16) if kind == "hidden" else RotateStream()


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        *((name, "hidden equalize shift") for name in SOME),
        ("plain", "hidden shift equalize"),
        ("swiglu", "equalize hidden shift"),
        ("plain", "shift equalize hidden"),
        ("plain", "stream hidden shift equalize"),
        ("fused qkv", "stream hidden equalize shift"),
        ("packed swiglu", "stream hidden equalize shift"),
        ("plain", "equalize hidden stream shift"),
    ],
)
def test_what_changes_no_output(name: str, kinds: str) -> None:
    vit, graph = TinyVit(wide(name)), graph_of(wide(name))
    for kind in kinds.split():
        result = apply(fold(kind, graph), graph)
        assert result.changed
        assert not result.log.skips
        graph = result.graph
    view = view_encoder(graph)
    assert [rotated_channels(block.mlp.fc2) for block in view.blocks] == [16, 16]
    assert rotated_stream(view) is ("stream" in kinds)
    if kinds.startswith(("hidden", "stream")):
        assert {block.mlp.activation for block in view.blocks} == {vit.spec.activation}
    pictures = vit.images(2)
    assert_agree(run_graph(graph, pictures), vit.reference(pictures), 1e-4)
    again = run(RotateHidden(4), graph)
    assert again.graph is graph
    assert [skip.reason for skip in again.log.skips] == ["rotated already"] * 2


@pytest.mark.parametrize("name", ["plain", "swiglu", "packed swiglu"])
def test_quantized_whole_and_half_the_rest(name: str) -> None:
    """Each fc2 reads integers of what is rotated; the rotations themselves stay float."""
    vit = TinyVit(wide(name))
    stream = apply(RotateStream(), graph_of(vit.spec)).graph
    graph = apply(RotateHidden(16), stream).graph
    quantized = apply(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    view = view_encoder(quantized)
    assert all(linear.quantized for linear in view.linears)
    assert {block.mlp.activation for block in view.blocks} == {vit.spec.activation}
    assert [rotated_channels(block.mlp.fc2) for block in view.blocks] == [16, 16]
    halved = run(HalfPrecision(), quantized).graph
    for one, kind in ((quantized, np.float32), (halved, np.float16)):
        products = [node for node in one.nodes if node.op == "MatMul" and rotates(node)]
        assert [product.inputs[1].dtype for product in products] == [kind] * 4
        hidden = [product for product in products if "fc2" in product.name]
        assert len(hidden) == 2
        for product in hidden:
            np.testing.assert_array_equal(product.inputs[1].values, rotation(16))
            assert product.inputs[0].inputs[0].op == "Reshape"
        pictures = vit.images(2)
        for found, truth in zip(run_graph(one, pictures), vit.reference(pictures), strict=True):
            assert np.abs(found - truth).mean() < 0.1
    RotateHidden(16).ensures(quantized, quantized)


def test_quantized_behind_factors_of_its_own() -> None:
    graph = graph_of(wide("plain"))
    for kind in ("hidden", "equalize", "shift"):
        graph = run(fold(kind, graph), graph).graph
    graph = apply(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    linears = [block.mlp.fc2 for block in view_encoder(graph).blocks]
    assert [(one.quantized, rotated_channels(one)) for one in linears] == [(True, 16)] * 2


def test_half_precision_alone() -> None:
    vit, graph = TinyVit(wide("plain")), graph_of(wide("plain"))
    for step in (RotateStream(), RotateHidden(64), HalfPrecision()):
        graph = run(step, graph).graph
    pictures = vit.images(2)
    assert_agree(run_graph(graph, pictures), vit.reference(pictures), 1e-2)


class TestRegisters:
    @pytest.mark.parametrize("name", ["plain", "merged heads", "attention operator, rank 3"])
    def test_in_keys_and_values(self, name: str) -> None:
        vit = TinyVit(SPELLINGS[name])
        keys, values = random_kv(vit.spec, 2, 4)
        spliced = run(SpliceRegisters(0, 2, keys, values), graph_of(vit.spec)).graph
        result = apply(RotateStream(), spliced)
        assert result.changed
        pictures = vit.images(2)
        wanted = vit.reference(pictures, Registers(0, 2, keys, values))
        assert_agree(run_graph(result.graph, pictures), wanted)

    @pytest.mark.parametrize("sinks", [False, True])
    def test_that_join_before_the_first_block(self, sinks: bool) -> None:
        vit, tokens = TinyVit(Spec()), random_tokens(Spec(), 3)
        step: Pass = DeleteSinks(0, 2) if sinks else SpliceRegisterTokens(0, 2, tokens)
        result = apply(RotateStream(), run(step, graph_of(vit.spec)).graph)
        assert result.changed
        pictures = vit.images(2)
        plan = Registers(sinks=2) if sinks else Registers(0, 2, tokens=tokens)
        found = run_graph(result.graph, pictures)
        if sinks:  # patches come in another order, and their outputs go back to their places
            wanted = run_graph(run(step, graph_of(vit.spec)).graph, pictures)
        else:
            wanted = list(vit.reference(pictures, plan))
        assert_agree(found, wanted)


class TestStreamRefusals:
    def refuse(self, graph: gs.Graph, reason: str) -> None:
        result = run(RotateStream(), graph)
        assert result.graph is graph
        assert result.log.edits == ()
        assert result.log.skips == (Skip(STREAM, reason),)

    def test_a_graph_without_blocks(self) -> None:
        with pytest.raises(InputError, match="no transformer block"):
            run(RotateStream(), graph_of(Spec(depth=0)))

    def test_a_single_block(self) -> None:
        self.refuse(graph_of(Spec(depth=1)), "there is one block")

    def test_what_is_rotated_already(self) -> None:
        once = apply(RotateStream(), graph_of(Spec())).graph
        self.refuse(once, "rotated already")
        tokens = SpliceRegisterTokens(0, 2, random_tokens(Spec(), 3))
        self.refuse(run(tokens, once).graph, "rotated already")

    @pytest.mark.parametrize("where", ["middle", "output"])
    @pytest.mark.parametrize("index", [0, 1])
    def test_a_stream_that_is_given_away(self, where: str, index: int) -> None:
        """Only the last block's may be: it is not rotated."""
        graph = graph_of(Spec())
        tensor = getattr(view_encoder(graph).blocks[index], where)
        given = run(Observe((tensor.name,)), graph).graph
        read_elsewhere(graph, tensor)
        for one in (given, graph):
            if index == 0:
                self.refuse(one, f"{tensor.name} is read elsewhere")
                continue
            result = apply(RotateStream(), one)
            assert result.changed
            pictures = TinyVit(Spec()).images(2)
            assert_agree(run_graph(result.graph, pictures), run_graph(one, pictures))

    def test_what_the_first_block_reads_may_be_given_away(self) -> None:
        graph = graph_of(Spec())
        graph = run(Observe((view_encoder(graph).blocks[0].input.name,)), graph).graph
        result = apply(RotateStream(), graph)
        pictures = TinyVit(Spec()).images(2)
        assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))

    @pytest.mark.parametrize(
        "step",
        [
            SpliceRegisterTokens(0, 1, random_tokens(Spec(), 3)),
            SpliceRegisterTokens(1, 2, random_tokens(Spec(), 3)),
            DeleteSinks(1, 2),
        ],
    )
    def test_registers_and_sinks_between_the_blocks(self, step: Pass) -> None:
        graph = run(step, graph_of(Spec())).graph
        stream = view_encoder(graph).blocks[0].output.name
        self.refuse(graph, f"something stands between {stream} and the next block")

    @pytest.mark.parametrize("name", ["blocks.0.q+k+v", "blocks.1.q+k+v", "blocks.0.fc1"])
    def test_a_norm_that_is_read_elsewhere(self, name: str) -> None:
        graph = graph_of(Spec())
        tensor = site_of(graph, name).tensor
        given = run(Observe((tensor.name,)), graph).graph
        self.refuse(given, f"{name}: its activation is an output of the graph")
        read_elsewhere(graph, tensor)
        self.refuse(graph, f"{name}: its activation is read elsewhere")

    def test_a_norm_without_a_number_for_each_channel(self) -> None:
        graph = graph_of(Spec())
        norm = view_encoder(graph).blocks[0].norm2
        norm.inputs[1] = gs.Constant("one", np.ones(1, np.float32))
        reason = "something else reads it, or it has no weight for each channel"
        self.refuse(graph, f"{norm.name}: {reason}")

    def test_a_product_that_is_given_away_before_its_bias(self) -> None:
        graph = graph_of(Spec())
        product = view_encoder(graph).blocks[0].mlp.fc1[0].matmul.outputs[0].name
        given = run(Observe((product,)), graph).graph
        self.refuse(given, "blocks.0.fc1: its product is an output of the graph")

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("blocks.0.fc1", "blocks.0.fc1: quantized already"),
            ("blocks.0.out", "blocks.0.out is quantized already"),
            ("blocks.0.fc2", "blocks.0.fc2 is quantized already"),
        ],
    )
    def test_quantized_linears(self, name: str, reason: str) -> None:
        graph = graph_of(Spec())
        step = QuantizeLinears(linear_scales(graph), only=frozenset({name}))
        self.refuse(run(step, graph).graph, reason)

    @pytest.mark.parametrize("what", ["add", "product", "output"])
    def test_a_branch_with_something_else(self, what: str) -> None:
        graph = graph_of(Spec(layer_scale=True))
        block = view_encoder(graph).blocks[0]
        out = block.attention.out.output
        constants: dict[str, NDArray[Any]] = {
            "add": np.ones(16, np.float32),
            "product": np.ones((10, 1), np.float32),
        }
        if what in constants:
            op = {"add": "Add", "product": "Mul"}[what]
            insert(graph, op, out, constants[what])
        else:
            graph = run(Observe((out.name,)), graph).graph
        self.refuse(graph, "more than a bias and a layer scale follows blocks.0.out")


@pytest.mark.parametrize("values", [np.array(0.5), np.array([2.0]), np.full(16, 3.0)])
def test_more_factors_go_into_the_linear(values: NDArray[np.float64]) -> None:
    vit = TinyVit(Spec(layer_scale=True))
    graph = graph_of(vit.spec)
    insert(graph, "Mul", view_encoder(graph).blocks[0].mlp.fc2.output, values.astype(np.float32))
    result = apply(RotateStream(), graph)
    assert ops(result.graph)["Mul"] == ops(graph)["Mul"] - 3
    pictures = vit.images(2)
    assert_agree(run_graph(result.graph, pictures), run_graph(graph, pictures))


def insert(graph: gs.Graph, op: str, tensor: gs.Variable, values: NDArray[Any]) -> None:
    """Put a node with a constant between a tensor and what reads it."""
    made, readers = gs.Variable("made", dtype=np.float32, shape=tensor.shape), list(tensor.outputs)
    constant = gs.Constant("constant", values)
    graph.nodes.append(gs.Node(op, "inserted", {}, [tensor, constant], [made]))
    for reader in readers:
        reader.inputs = [made if item is tensor else item for item in reader.inputs]
    graph.toposort()


def test_the_postcondition_of_a_rotated_stream() -> None:
    step, graph = RotateStream(), graph_of(Spec(layer_scale=True))
    after = apply(step, graph).graph
    step.ensures(graph, after)
    unnamed, more, scaled, larger = after.copy(), after.copy(), after.copy(), graph.copy()
    next(node for node in unnamed.nodes if rotates(node)).name = "in"
    insert(scaled, "Mul", view_encoder(scaled).blocks[0].mlp.fc2.output, np.full(1, 2, np.float32))
    for one in (more, larger):  # `larger` by as much as `scaled`
        spare = gs.Variable("spare", dtype=np.float32)
        one.nodes.append(gs.Node("Neg", "spare", {}, [one.outputs[0]], [spare]))
    wrong = [(graph, one) for one in (graph, unnamed, more, graph_of(Spec(depth=1)))]
    for old, new in (*wrong, (larger, scaled)):
        with pytest.raises(AssertionError):
            step.ensures(old, new)
