"""Integers that are moved in place of floats for OpenVINO: the same bits, in another order."""

from collections.abc import Callable

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.quantized_graphs import quantized
from support.running import run_graph
from support.scales import attention_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import Pass, run, run_all
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.round_before_moving import RoundBeforeMoving
from regcache.passes.turn_keys_last import TurnKeysLast


def in_integers(vit: TinyVit) -> gs.Graph:
    """With Q/DQ pairs around the linears and before q k^T."""
    graph = canonical_graph(vit.model())
    scores = QuantizeAttention(attention_scales(graph), only_scores=True)
    return run_all([scores], quantized(graph))[0]


@pytest.mark.parametrize(
    "spelling", ["plain", "fused qkv", "einsum linears", "merged heads", "sdpa"]
)
def test_bytes_are_moved(spelling: str) -> None:
    vit = TinyVit(SPELLINGS[spelling])
    graph = in_integers(vit)
    blocks = len(view_encoder(graph).blocks)
    moved, ran = run_all([RoundBeforeMoving(), TurnKeysLast()], graph)
    assert [len(one.log.edits) for one in ran] == [blocks, blocks]
    onnx.checker.check_model(gs.export_onnx(moved), full_check=True)
    # Heads come to the front in a Transpose of their own, where one step did both.
    new = blocks if spelling == "einsum linears" else 0
    assert ops(moved)["Transpose"] - ops(graph)["Transpose"] == new
    assert len(moved.nodes) - len(graph.nodes) == new
    images = vit.images(3)
    for found, wanted in zip(*(run_graph(one, images) for one in (moved, graph)), strict=True):
        np.testing.assert_array_equal(found, wanted)
    rounded = [node for node in moved.nodes if node.op == "QuantizeLinear"]
    behind = [node.inputs[0].inputs[0].op for node in rounded]
    assert behind.count("MatMul") == blocks
    for block in view_encoder(moved).blocks:
        (turn,) = block.attention.key.inputs
        assert (turn.op, turn.inputs[0].inputs[0].op) == ("Transpose", "DequantizeLinear")
        perm = turn.attrs["perm"]
        assert perm == [*range(len(perm) - 2), len(perm) - 1, len(perm) - 2]


def read_twice(graph: gs.Graph, tensor: gs.Variable) -> None:
    """Let something else read a tensor, too."""
    output = gs.Variable("copy", tensor.dtype, tensor.shape)
    graph.nodes.append(gs.Node("Identity", "copy", {}, [tensor], [output]))
    graph.outputs.append(output)


def context_of(graph: gs.Graph) -> gs.Variable:
    """Probabilities times values, as MatMul leaves it."""
    output: gs.Variable = view_encoder(graph).blocks[0].attention.context.outputs[0]
    return output


def keys_of(graph: gs.Graph) -> gs.Variable:
    """The keys [B, heads, D, T] before they are rounded."""
    tensor: gs.Variable = view_encoder(graph).blocks[0].attention.key
    while tensor.inputs[0].op != "Transpose":
        tensor = tensor.inputs[0].inputs[0]
    return tensor


@pytest.mark.parametrize(
    ("step", "tensor_of"),
    [(RoundBeforeMoving(), context_of), (TurnKeysLast(), keys_of)],
    ids=["context", "keys"],
)
@pytest.mark.parametrize("form", ["read elsewhere", "an output"])
def test_what_something_else_reads_is_left_alone(
    step: Pass, tensor_of: Callable[[gs.Graph], gs.Variable], form: str
) -> None:
    graph = in_integers(TinyVit(Spec(depth=1)))
    tensor = tensor_of(graph)
    if form == "an output":
        graph.outputs.append(tensor)
    else:
        read_twice(graph, tensor)
    assert not run(step, graph.cleanup().toposort()).changed


def test_keys_that_are_not_rounded_are_left_alone() -> None:
    graph = quantized(canonical_graph(TinyVit(Spec(depth=1)).model()))
    assert not run(TurnKeysLast(), graph).changed


def test_attention_in_float_hands_on_integers_all_the_same() -> None:
    graph = quantized(canonical_graph(TinyVit(Spec(depth=1)).model()))
    assert len(run(RoundBeforeMoving(), graph).log.edits) == 1
