"""Q/DQ insertion: valid graphs, the numbers of a numpy simulation, and nothing else changed."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import linear_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears, quantize_weight

GOLDEN = Path(__file__).parents[1] / "golden" / "quantize_linears.txt"


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")]
)
def test_numbers_equal_fake_quantization(
    name: str, dtype: IntegerType, weight_dtype: IntegerType
) -> None:
    """The same graph in float, its weights and activations rounded by numpy, node by node."""
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    chosen = linear_scales(graph, dtype)
    result = run(QuantizeLinears(chosen, weight_dtype), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(2)
    quantized = run_graph(result.graph, images)
    simulated = run_graph(_simulate(graph, _recipes(graph, chosen)), images)
    for found, wanted in zip(quantized, simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # Coarse, but the encoder it was: an error in the wiring is far larger than one of rounding.
    for found, truth in zip(quantized, vit.reference(images), strict=True):
        assert np.abs(found - truth).mean() < 0.1


@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu", "gemm, dynamic"])
@pytest.mark.parametrize(
    ("dtype", "bits", "weight_dtype", "weight_bits"),
    [
        ("uint8", 4, "int8", 8),
        ("uint8", 8, "uint8", 5),
        ("uint8", 6, "uint8", 6),
        ("int8", 5, "int8", 4),
    ],
)
def test_fewer_bits_equal_fake_quantization(
    name: str, dtype: IntegerType, bits: int, weight_dtype: IntegerType, weight_bits: int
) -> None:
    """As written and with ONNX Runtime's integer kernels."""
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    chosen = linear_scales(graph, dtype, bits)
    result = run(QuantizeLinears(chosen, weight_dtype, weight_bits), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(1)
    simulated = run_graph(_simulate(graph, _recipes(graph, chosen, weight_bits)), images)
    for found, wanted in zip(run_graph(result.graph, images), simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    fused = run_graph(result.graph, images, optimize=True)
    for found, wanted in zip(fused, simulated, strict=True):
        # Other kernels may round a number to the other side of a tie, which moves a few others.
        assert np.abs(found - wanted).mean() < 0.01


def _recipes(
    graph: gs.Graph,
    chosen: dict[str, Affine],
    weight_bits: int = 8,
    only: frozenset[str] | None = None,
) -> dict[str, tuple[Affine, int]]:
    """The scale of the activation and the bits of the weight, by the linear's name."""
    return {
        linear.name: (chosen[site.tensor.name], weight_bits)
        for site in view_encoder(graph).sites
        for linear in site.linears
        if only is None or linear.name in only
    }


def _simulate(graph: gs.Graph, recipes: dict[str, tuple[Affine, int]]) -> gs.Graph:
    """Round trips spelled with Div, Round, Clip and Mul instead of QuantizeLinear."""
    copy = graph.copy()
    for linear in view_encoder(copy).linears:
        if linear.name not in recipes:
            continue
        affine, weight_bits = recipes[linear.name]
        low = -affine.zero_point - (2 ** (affine.bits - 1) if affine.dtype == "int8" else 0)
        step = linear.input
        for op, numbers in (
            ("Div", [affine.scale]),
            ("Round", []),
            ("Clip", [low, low + 2**affine.bits - 1]),
            ("Mul", [affine.scale]),
        ):
            output = gs.Variable(f"{linear.name}/{op}", dtype=np.float32)
            constants = [
                gs.Constant(f"{linear.name}/{op}/{i}", np.array(value, dtype=np.float32))
                for i, value in enumerate(numbers)
            ]
            copy.nodes.append(gs.Node(op, f"{linear.name}/{op}", {}, [step, *constants], [output]))
            step = output
        peaks = np.abs(linear.weight).max(axis=0) / np.float32(2 ** (weight_bits - 1) - 1)
        rounded = (np.rint(linear.weight / peaks) * peaks).astype(np.float32)
        linear.matmul.inputs = [step, gs.Constant(f"{linear.name}/rounded", rounded)]
    return copy.cleanup().toposort()


@pytest.mark.parametrize("name", SPELLINGS)
def test_edits_and_nothing_else(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    view = view_encoder(graph)
    result = run(QuantizeLinears(linear_scales(graph)), graph)
    assert len(result.log.edits) == len(view.sites)
    added = ops(result.graph) - ops(graph)
    assert added == {
        "QuantizeLinear": len(view.sites),
        "DequantizeLinear": len(view.sites) + len(view.linears),
    }
    assert not ops(graph) - ops(result.graph)
    untouched = [
        n for n in result.graph.nodes if "Quantize" not in n.op and "Dequantize" not in n.op
    ]
    by_name = {node.name: node for node in graph.nodes}
    quantized = {id(linear.matmul) for linear in view_encoder(result.graph).linears}
    for node in untouched:
        old = by_name[node.name]
        assert node.attrs == old.attrs
        assert [t.name for t in node.outputs] == [t.name for t in old.outputs]
        if id(node) not in quantized:
            assert [t.name for t in node.inputs] == [t.name for t in old.inputs]


def test_a_second_run_edits_nothing() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    step = QuantizeLinears(linear_scales(graph))
    once = run(step, graph).graph
    twice = run(step, once)
    assert not twice.changed
    assert {skip.reason for skip in twice.log.skips} == {"quantized already"}


def test_a_site_without_a_scale_stays_float() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    chosen = linear_scales(graph)
    left_out = view_encoder(graph).sites[3]
    del chosen[left_out.tensor.name]
    result = run(QuantizeLinears(chosen), graph)
    assert [(s.site, s.reason) for s in result.log.skips] == [
        ("blocks.0.fc2", "no scale for its activation")
    ]
    assert [linear.quantized for linear in view_encoder(result.graph).linears] == [True] * 5 + [
        False
    ]


def test_a_scale_for_no_tensor_is_refused() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    step = QuantizeLinears({"nowhere": Affine(0.1, 0, "int8")})
    with pytest.raises(InputError, match="no tensor 'nowhere'"):
        run(step, graph)


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_clip_of_integers_stays_unseen_by_the_view(name: str) -> None:
    graph = canonical_graph(TinyVit(SPELLINGS[name]).model())
    old = view_encoder(graph)
    result = run(QuantizeLinears(linear_scales(graph, "int8", 4), weight_bits=4), graph)
    assert {edit.what for edit in result.log.edits} == {"int8 of 4 bits x int8 of 4 bits"}
    assert ops(result.graph) - ops(graph) == {
        "QuantizeLinear": len(old.sites),
        "Clip": len(old.sites),
        "DequantizeLinear": len(old.sites) + len(old.linears),
    }
    new = view_encoder(result.graph)
    assert [site.name for site in new.sites] == [site.name for site in old.sites]
    assert (new.heads, new.head_dim, new.width) == (old.heads, old.head_dim, old.width)
    assert (new.tokens, new.prefix_tokens) == (old.tokens, old.prefix_tokens)
    for one, other in zip(old.blocks, new.blocks, strict=True):
        assert one.mlp.activation == other.mlp.activation
        assert (one.norm1.name, one.norm2.name) == (other.norm1.name, other.norm2.name)
        assert one.output.name == other.output.name
    again = run(QuantizeLinears(linear_scales(graph, "int8", 4), weight_bits=4), result.graph)
    assert not again.changed


def test_only_scales_of_fewer_bits_get_a_clip() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    chosen = linear_scales(graph)
    narrow = view_encoder(graph).sites[2].tensor.name
    chosen[narrow] = Affine.from_range(-4.0, 5.0, "uint8", symmetric=False, bits=3)
    result = run(QuantizeLinears(chosen), graph)
    (clip,) = [node for node in result.graph.nodes if node.op == "Clip"]
    assert clip.inputs[0].inputs[0].inputs[0].name == narrow
    assert [(item.dtype, int(item.values)) for item in clip.inputs[1:]] == [
        (np.uint8, 0),
        (np.uint8, 7),
    ]
    assert [edit.what for edit in result.log.edits] == [
        "uint8 x int8",
        "uint8 x int8",
        "uint8 of 3 bits x int8",
        "uint8 x int8",
    ]


def test_a_clip_of_floats_is_an_activation_of_its_own() -> None:
    """ReLU6 is not ReLU: the view looks through a Clip of integers only."""
    graph = canonical_graph(TinyVit(Spec(depth=1, activation="relu")).model())
    assert view_encoder(graph).blocks[0].mlp.activation == "relu"
    fc2 = view_encoder(graph).blocks[0].mlp.fc2
    clipped = gs.Variable("clipped", dtype=np.float32, shape=fc2.input.shape)
    limits = [gs.Constant(f"limit{end}", np.array(end, dtype=np.float32)) for end in (0, 6)]
    graph.nodes.append(gs.Node("Clip", "relu6", {}, [fc2.input, *limits], [clipped]))
    fc2.matmul.inputs[0] = clipped
    graph.toposort()
    view = view_encoder(graph)
    assert view.blocks[0].mlp.activation == "unknown"
    assert view.sites[-1].tensor is clipped


@pytest.mark.parametrize(
    ("spec", "only"),
    [
        (Spec(), {"blocks.0.q", "blocks.0.v", "blocks.1.fc2"}),
        (Spec(qkv="fused", activation="swiglu"), {"blocks.1.qkv", "blocks.0.up"}),
        (Spec(depth=1), {"blocks.0.fc1"}),
    ],
)
def test_the_linears_not_named_stay_float(spec: Spec, only: set[str]) -> None:
    vit = TinyVit(spec)
    graph = canonical_graph(vit.model())
    named = frozenset(only)
    result = run(QuantizeLinears(linear_scales(graph), only=named), graph)
    linears = view_encoder(result.graph).linears
    assert {linear.name for linear in linears if linear.quantized} == only
    before = {linear.name: linear for linear in view_encoder(graph).linears}
    for linear in linears:
        if linear.name not in only:
            assert [item.name for item in linear.matmul.inputs] == [
                item.name for item in before[linear.name].matmul.inputs
            ]
    edited = {edit.site for edit in result.log.edits}
    assert {name.rpartition(".")[2] for name in only} == {
        name for site in edited for name in site.rpartition(".")[2].split("+")
    }
    assert {skip.reason for skip in result.log.skips} == {"not among those to quantize"}
    images = vit.images(2)
    simulated = run_graph(
        _simulate(graph, _recipes(graph, linear_scales(graph), only=named)), images
    )
    for found, wanted in zip(run_graph(result.graph, images), simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_runs_for_different_linears_mix_widths() -> None:
    """Also where linears of the two runs read one tensor and share one weight."""
    vit = TinyVit(Spec(depth=1))
    graph = canonical_graph(vit.model())
    projections = view_encoder(graph).blocks[0].attention.projections
    projections[1].matmul.inputs[1] = projections[0].matmul.inputs[1]
    graph.cleanup()
    names = {linear.name for linear in view_encoder(graph).linears}
    narrow = frozenset({"blocks.0.k", "blocks.0.fc2"})
    first = run(
        QuantizeLinears(linear_scales(graph, bits=4), weight_bits=4, only=narrow), graph
    ).graph
    wide = QuantizeLinears(linear_scales(graph), only=frozenset(names - narrow))
    result = run(wide, first).graph
    assert all(linear.quantized for linear in view_encoder(result).linears)
    assert ops(result)["Clip"] == 2
    recipes = _recipes(graph, linear_scales(graph)) | _recipes(
        graph, linear_scales(graph, bits=4), 4, narrow
    )
    images = vit.images(2)
    simulated = run_graph(_simulate(graph, recipes), images)
    for found, wanted in zip(run_graph(result, images), simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_unknown_linear_and_an_impossible_width_are_refused() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    with pytest.raises(InputError, match=r"no linear 'blocks\.1\.q'"):
        run(
            QuantizeLinears(linear_scales(graph), only=frozenset({"blocks.0.q", "blocks.1.q"})),
            graph,
        )
    with pytest.raises(InputError, match="2 to 8 bits, not 9"):
        run(QuantizeLinears(linear_scales(graph), weight_bits=9), graph)


def test_linears_that_share_a_weight_share_its_integers() -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    linears = view_encoder(graph).blocks[0].attention.projections
    linears[1].matmul.inputs[1] = linears[0].matmul.inputs[1]
    result = run(QuantizeLinears(linear_scales(graph)), graph)
    weights = [linear.matmul.inputs[1] for linear in view_encoder(result.graph).linears]
    assert weights[0] is weights[1]
    assert ops(result.graph)["DequantizeLinear"] == 4 + 5


def test_golden_text() -> None:
    """One quantized block as text; set REGCACHE_GOLDEN=1 to write it anew after a wanted change."""
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    quantized = run(QuantizeLinears(linear_scales(graph)), graph).graph
    text = onnx.printer.to_text(gs.export_onnx(quantized).graph)
    lines = [line.strip() for line in text.splitlines() if " = " in line and "{" not in line]
    if os.environ.get("REGCACHE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert lines == GOLDEN.read_text(encoding="utf-8").splitlines()


WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e6, 1e6, width=32),
)


@given(weight=WEIGHTS, bits=st.integers(2, 8))
def test_weights_round_to_within_half_a_step(weight: np.ndarray, bits: int) -> None:
    rounded = quantize_weight(weight, bits)
    integers, steps = rounded.integers, rounded.scales
    assert integers.dtype == np.int8
    last = 2**bits // 2 - 1
    assert np.abs(integers.astype(int)).max(initial=0) <= last
    peaks = np.abs(weight).max(axis=0).astype(np.float64)
    used = peaks > 1e-30
    np.testing.assert_allclose(steps[used], peaks[used] / last, rtol=1e-6)
    assert (steps > 0).all()
    error = np.abs(integers.astype(np.float64) * steps - weight)
    assert (error <= steps.astype(np.float64) * 0.5001 + 1e-37).all()
