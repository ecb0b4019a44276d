"""Q/DQ pairs before attention's matmuls: the numbers of a simulation, what fuses, what is left."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.attention_graphs import SPEC, prepared, spliced
from support.building import assert_builds, needs_tensorrt
from support.canonical import canonical_graph
from support.running import run_graph
from support.sample import sample_blocks
from support.scales import attention_scales, linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes import quantize_attention
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.observe import Observe
from regcache.passes.quantize_attention import (
    PROBABILITIES,
    QuantizeAttention,
    attention_operands,
)
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.splice_registers import SpliceRegisters
from regcache.runtime.engine_layers import products_by_precision

OPERATORS = [name for name in SPELLINGS if name.startswith("attention operator")]
MATMULS = [name for name in SPELLINGS if name not in OPERATORS]


def simulate(graph: gs.Graph, chosen: dict[str, Affine]) -> gs.Graph:
    """The operands rounded by Div, Round, Clip and Mul instead of QuantizeLinear."""
    copy = graph.copy()
    for block in view_encoder(copy).blocks:
        for node in (block.attention.scores, block.attention.context):
            for slot, operand in enumerate(node.inputs):
                step, scale = operand, chosen.get(operand.name, PROBABILITIES).scale
                name = f"{node.name}/{slot}"
                for op, numbers in (
                    ("Div", [scale]),
                    ("Round", []),
                    ("Clip", [-128, 127]),
                    ("Mul", [scale]),
                ):
                    constants = [
                        gs.Constant(f"{name}/{op}/{i}", np.array(value, dtype=np.float32))
                        for i, value in enumerate(numbers)
                    ]
                    output = gs.Variable(f"{name}/{op}/out", dtype=np.float32)
                    copy.nodes.append(gs.Node(op, f"{name}/{op}", {}, [step, *constants], [output]))
                    step = output
                node.inputs[slot] = step
    return copy.cleanup().toposort()


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("name", MATMULS)
def test_numbers_equal_fake_quantization(name: str, registers: int) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    if registers:
        graph = spliced(graph, vit.spec, registers)
    chosen = attention_scales(graph)
    result = run(QuantizeAttention(chosen), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(2)
    found = run_graph(result.graph, images)
    for one, other in zip(found, run_graph(simulate(graph, chosen), images), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    for one, other in zip(found, run_graph(graph, images), strict=True):
        assert 0 < np.abs(one - other).mean() < 0.1


@pytest.mark.parametrize("name", MATMULS)
def test_edits_and_nothing_else(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    old = view_encoder(graph)
    result = run(QuantizeAttention(attention_scales(graph)), graph)
    blocks = len(old.blocks)
    assert [edit.site for edit in result.log.edits] == [
        f"blocks.{index}.attention" for index in range(blocks)
    ]
    assert not result.log.skips
    assert ops(result.graph) - ops(graph) == Counter(
        QuantizeLinear=4 * blocks, DequantizeLinear=4 * blocks
    )
    new = view_encoder(result.graph)
    multiplied = {
        node.name
        for block in new.blocks
        for node in (block.attention.scores, block.attention.context)
    }
    by_name = {node.name: node for node in graph.nodes}
    for node in result.graph.nodes:
        if node.op in ("QuantizeLinear", "DequantizeLinear"):
            continue
        before = by_name.pop(node.name)
        assert (node.op, node.attrs) == (before.op, before.attrs)
        assert [item.name for item in node.outputs] == [item.name for item in before.outputs]
        if node.name not in multiplied:
            assert [item.name for item in node.inputs] == [item.name for item in before.inputs]
    assert not by_name
    assert [site.name for site in new.sites] == [site.name for site in old.sites]
    assert (new.heads, new.head_dim, new.tokens) == (old.heads, old.head_dim, old.tokens)
    again = run(QuantizeAttention(attention_scales(graph)), result.graph)
    assert not again.changed
    assert {skip.reason for skip in again.log.skips} == {"quantized already"}


def test_all_scales_are_int8_with_zero_point_0() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    operands = attention_operands(view_encoder(graph))[0]
    chosen = attention_scales(graph) | {operands[3]: Affine(0.5 / 127, 0, "int8")}
    result = run(QuantizeAttention(chosen), graph).graph
    pairs = [node for node in result.nodes if node.op == "QuantizeLinear"]
    assert {node.inputs[0].name: node.inputs[1].values.item() for node in pairs} == {
        name: np.float32(scale.scale) for name, scale in chosen.items()
    }
    for node in pairs:
        assert (node.inputs[2].dtype, node.inputs[2].values.item()) == (np.int8, 0)


@pytest.mark.parametrize("name", MATMULS)
def test_the_operands_to_calibrate(name: str) -> None:
    """Queries scaled, keys transposed, probabilities in [0, 1]."""
    vit = TinyVit(SPELLINGS[name])
    graph = spliced(canonical_graph(vit.model()), vit.spec, 2)
    operands = attention_operands(view_encoder(graph))
    assert list(operands) == list(range(vit.spec.depth))
    batch, head_dim, tokens = 2, vit.spec.width // vit.spec.heads, vit.spec.tokens
    for names in operands.values():
        observed = run(Observe(names), graph).graph
        seen: list[NDArray[np.float32]] = run_graph(observed, vit.images(batch))[-4:]
        query, key, value, probabilities = (
            item.reshape(batch, vit.spec.heads, *item.shape[-2:]) for item in seen
        )
        assert query.shape[2:] == (tokens, head_dim)
        assert key.shape[2:] == (head_dim, tokens + 2)
        assert value.shape[2:] == (tokens + 2, head_dim)
        assert probabilities.min() >= 0
        np.testing.assert_allclose(probabilities.sum(axis=-1), 1, rtol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_the_attention_operator_is_skipped(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    assert attention_operands(view_encoder(graph)) == {}
    result = run(QuantizeAttention({}), graph)
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == [
        "ONNX's Attention has no place for Q/DQ pairs"
    ] * 2


@pytest.mark.parametrize(("registers", "fits"), [(0, True), (27, True), (28, False)])
def test_registers_count_among_the_keys(registers: int, fits: bool) -> None:
    spec = Spec(depth=1, grid=22)
    graph = canonical_graph(TinyVit(spec).model())
    if registers:
        graph = spliced(graph, spec, registers)
    result = run(QuantizeAttention(attention_scales(graph)), graph)
    assert result.changed == fits
    if not fits:
        assert result.log.skips[0].reason == "513 keys; TensorRT fuses int8 attention up to 512"


def test_an_unknown_number_of_keys_is_skipped() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    key = view_encoder(graph).blocks[0].attention.key
    chosen = attention_scales(graph)
    key.shape = [*key.shape[:-1], "tokens"]
    result = run(QuantizeAttention(chosen), graph)
    assert [skip.reason for skip in result.log.skips] == ["the number of keys is not known"]


def test_a_block_without_a_scale_stays_float() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    chosen = attention_scales(graph)
    del chosen[attention_operands(view_encoder(graph))[1][2]]
    result = run(QuantizeAttention(chosen), graph)
    assert [edit.site for edit in result.log.edits] == ["blocks.0.attention"]
    assert [(skip.site, skip.reason) for skip in result.log.skips] == [
        ("blocks.1.attention", "no scale for its queries, keys or values")
    ]


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("name", MATMULS)
def test_only_scores(name: str, registers: int) -> None:
    """q k^T alone, of any number of keys; values and probabilities stay float."""
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    if registers:
        graph = spliced(graph, vit.spec, registers)
    chosen = attention_scales(graph)
    for block in view_encoder(graph).blocks:
        del chosen[block.attention.context.inputs[1].name]
        block.attention.key.shape = [*block.attention.key.shape[:-1], "tokens"]
    result = run(QuantizeAttention(chosen, only_scores=True), graph)
    blocks = vit.spec.depth
    assert len(result.log.edits) == blocks
    assert ops(result.graph) - ops(graph) == Counter(
        QuantizeLinear=2 * blocks, DequantizeLinear=2 * blocks
    )
    for block in view_encoder(result.graph).blocks:
        makers = [item.inputs[0].op for item in block.attention.scores.inputs]
        assert makers == ["DequantizeLinear"] * 2
        assert block.attention.context.inputs[0].inputs[0].op != "DequantizeLinear"
    for one, other in zip(
        run_graph(result.graph, vit.images(2)), run_graph(graph, vit.images(2)), strict=True
    ):
        assert 0 < np.abs(one - other).mean() < 0.1
    again = run(QuantizeAttention(chosen, only_scores=True), result.graph)
    assert not again.changed
    del chosen[attention_operands(view_encoder(graph))[0][1]]
    few = run(QuantizeAttention(chosen, only_scores=True), graph)
    assert [skip.reason for skip in few.log.skips] == ["no scale for its queries or keys"]


@pytest.mark.parametrize(
    "scale",
    [Affine(0.1, 1, "int8"), Affine(0.1, 128, "uint8"), Affine(0.1, 0, "int8", bits=4)],
)
def test_other_formats_are_refused(scale: Affine) -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    name = attention_operands(view_encoder(graph))[0][0]
    with pytest.raises(InputError, match="needs int8 of 8 bits and zero point 0"):
        run(QuantizeAttention({name: scale}), graph)
    with pytest.raises(InputError, match="no tensor 'nowhere'"):
        run(QuantizeAttention({"nowhere": Affine(0.1, 0, "int8")}), graph)


@needs_tensorrt
@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize(
    ("linears", "attention", "half", "products", "fused"),
    [
        (True, False, False, {"FP32": 5, "INT8": 8}, None),
        (True, True, False, {"FP32": 1, "INT8": 10}, "INT8"),
        (True, False, True, {"FP16": 3, "INT8": 8}, "FP16"),
        (True, True, True, {"FP16": 1, "INT8": 10}, "INT8"),
        (False, True, False, {"FP32": 9, "INT8": 4}, None),
        (False, True, True, {"FP16": 9, "INT8": 4}, None),
    ],
)
def test_what_tensorrt_fuses(
    linears: bool,
    attention: bool,
    half: bool,
    products: dict[str, int],
    fused: str | None,
    registers: int,
) -> None:
    """A fused attention counts as one product, else as two; the patches are one."""
    built = assert_builds(prepared(SPEC, linears, attention, half, registers))
    assert products_by_precision(built.layers) == products
    found = [layer.precision for layer in built.layers if layer.fused_attention]
    assert found == ([fused] * SPEC.depth if fused else [])


@needs_tensorrt
@pytest.mark.parametrize(("grid", "fused"), [(22, 1), (23, 0)])
def test_tensorrt_fuses_int8_up_to_512_keys(
    grid: int, fused: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_attention, "LONGEST", 10_000)
    spec = Spec(width=128, heads=2, hidden=256, depth=1, grid=grid)
    built = assert_builds(prepared(spec, True, True, True, 0))
    assert sum(layer.fused_attention for layer in built.layers) == fused


@needs_tensorrt
@pytest.mark.parametrize("name", ["sdpa", "merged heads", "swiglu", "registers", "fused qkv"])
def test_spellings_fuse(name: str) -> None:
    small = SPELLINGS[name]
    spec = Spec(**{**small.__dict__, "width": 128, "hidden": 256})
    built = assert_builds(prepared(spec, True, True, True, 0))
    assert [item.precision for item in built.layers if item.fused_attention] == ["INT8"] * 2


@needs_tensorrt
@pytest.mark.sample
@pytest.mark.xdist_group("sample")
def test_dinov2_fuses_in_int8(folder: Path) -> None:
    """Four of its blocks, with registers in half of them."""
    graph = sample_blocks(folder, 4)
    registers = np.ones((2, 2, 6, 4, 64), dtype=np.float32)
    graph = run(SpliceRegisters(2, 4, *registers), graph).graph
    graph = run(QuantizeLinears(linear_scales(graph, "int8")), graph).graph
    graph = run(QuantizeAttention(attention_scales(graph)), graph).graph
    built = assert_builds(run(HalfPrecision(), graph).graph)
    assert products_by_precision(built.layers) == {"INT8": 4 * 5, "FP16": 1}
    assert sum(layer.fused_attention for layer in built.layers) == 4
