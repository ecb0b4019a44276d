"""Q/DQ insertion: valid graphs, the numbers of a numpy simulation, and nothing else changed."""

import os
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx.reference import ReferenceEvaluator
from running import run_graph
from test_passes_canonicalize import SPELLINGS, ops
from tiny_vit import Spec, TinyVit

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_linears import QuantizeLinears, quantize_weight

GOLDEN = Path(__file__).parent / "golden" / "quantize_linears.txt"


def scales(graph: gs.Graph, dtype: IntegerType = "uint8") -> dict[str, Affine]:
    """A scale per site that covers what a tiny encoder computes."""
    return {
        site.tensor.name: Affine.from_range(-4.0 - i / 8, 5.0, dtype, symmetric=dtype == "int8")
        for i, site in enumerate(view_encoder(graph).sites)
    }


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"), [("uint8", "int8"), ("uint8", "uint8"), ("int8", "int8")]
)
def test_numbers_equal_fake_quantization(
    name: str, dtype: IntegerType, weight_dtype: IntegerType
) -> None:
    """The same graph in float, its weights and activations rounded by numpy, node by node."""
    vit = TinyVit(SPELLINGS[name])
    graph = canonicalize(vit.model())
    chosen = scales(graph, dtype)
    result = run(QuantizeLinears(chosen, weight_dtype), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    images = vit.images(2)
    quantized = run_graph(result.graph, images)
    simulated = run_graph(_simulate(graph, chosen), images)
    for found, wanted in zip(quantized, simulated, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    # Coarse, but the encoder it was: an error in the wiring is far larger than one of rounding.
    for found, truth in zip(quantized, vit.reference(images), strict=True):
        assert np.abs(found - truth).mean() < 0.1


def _simulate(graph: gs.Graph, chosen: dict[str, Affine]) -> gs.Graph:
    """Round trips spelled with Div, Round, Clip and Mul instead of QuantizeLinear."""
    copy = graph.copy()
    for site in view_encoder(copy).sites:
        affine = chosen[site.tensor.name]
        limits = np.iinfo(affine.dtype)
        low, high = limits.min - affine.zero_point, limits.max - affine.zero_point
        step = site.tensor
        for op, numbers in (
            ("Div", [affine.scale]),
            ("Round", []),
            ("Clip", [low, high]),
            ("Mul", [affine.scale]),
        ):
            output = gs.Variable(f"{site.name}/{op}", dtype=np.float32)
            constants = [
                gs.Constant(f"{site.name}/{op}/{i}", np.array(value, dtype=np.float32))
                for i, value in enumerate(numbers)
            ]
            copy.nodes.append(gs.Node(op, f"{site.name}/{op}", {}, [step, *constants], [output]))
            step = output
        for linear in site.linears:
            weight = linear.weight
            peaks = np.abs(weight).max(axis=0) / np.float32(127)
            rounded = (np.rint(weight / peaks) * peaks).astype(np.float32)
            linear.matmul.inputs = [step, gs.Constant(f"{linear.name}/rounded", rounded)]
    return copy.toposort()


@pytest.mark.parametrize("name", SPELLINGS)
def test_edits_and_nothing_else(name: str) -> None:
    graph = canonicalize(TinyVit(SPELLINGS[name]).model())
    view = view_encoder(graph)
    result = run(QuantizeLinears(scales(graph)), graph)
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
    graph = canonicalize(TinyVit(Spec()).model())
    step = QuantizeLinears(scales(graph))
    once = run(step, graph).graph
    twice = run(step, once)
    assert not twice.changed
    assert {skip.reason for skip in twice.log.skips} == {"quantized already"}


def test_a_site_without_a_scale_stays_float() -> None:
    graph = canonicalize(TinyVit(Spec(depth=1)).model())
    chosen = scales(graph)
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
    graph = canonicalize(TinyVit(Spec(depth=1)).model())
    step = QuantizeLinears({"nowhere": Affine(0.1, 0, "int8")})
    with pytest.raises(InputError, match="no tensor 'nowhere'"):
        run(step, graph)


def test_linears_that_share_a_weight_share_its_integers() -> None:
    graph = canonicalize(TinyVit(Spec(depth=1)).model())
    linears = view_encoder(graph).blocks[0].attention.projections
    linears[1].matmul.inputs[1] = linears[0].matmul.inputs[1]
    result = run(QuantizeLinears(scales(graph)), graph)
    weights = [linear.matmul.inputs[1] for linear in view_encoder(result.graph).linears]
    assert weights[0] is weights[1]
    assert ops(result.graph)["DequantizeLinear"] == 4 + 5


def test_golden_text() -> None:
    """One quantized block as text; set REGCACHE_GOLDEN=1 to write it anew after a wanted change."""
    graph = canonicalize(TinyVit(Spec(depth=1)).model())
    quantized = run(QuantizeLinears(scales(graph)), graph).graph
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


@given(weight=WEIGHTS)
def test_weights_round_to_within_half_a_step(weight: np.ndarray) -> None:
    integers, steps = quantize_weight(weight)
    assert integers.dtype == np.int8
    assert integers.min(initial=0) >= -127
    assert (steps > 0).all()
    error = np.abs(integers.astype(np.float64) * steps - weight)
    assert (error <= steps.astype(np.float64) * 0.5001 + 1e-37).all()


@given(
    low=st.floats(-1e5, 1e5, width=32),
    high=st.floats(-1e5, 1e5, width=32),
    dtype=st.sampled_from(["int8", "uint8"]),
    symmetric=st.booleans(),
)
def test_affine_covers_its_range_and_keeps_zero(
    low: float, high: float, dtype: IntegerType, symmetric: bool
) -> None:
    affine = Affine.from_range(min(low, high), max(low, high), dtype, symmetric=symmetric)
    values = np.array([min(low, high), 0.0, max(low, high)], dtype=np.float32)
    restored = affine.round_trip(values)
    assert restored[1] == 0
    assert np.abs(restored - values).max() <= affine.scale * 0.501 + 1e-30
    if symmetric:
        assert affine.zero_point == (0 if dtype == "int8" else 128)


@settings(max_examples=50)
@given(
    values=hnp.arrays(np.float32, 50, elements=st.floats(-100, 100, width=32)),
    scale=st.floats(1e-3, 2),
    zero_point=st.integers(0, 255),
)
def test_affine_rounds_as_onnx_does(values: np.ndarray, scale: float, zero_point: int) -> None:
    affine = Affine(scale, zero_point, "uint8")
    evaluator = ReferenceEvaluator(
        onnx.parser.parse_graph(
            "g (float[50] x, float s, uint8 z) => (uint8[50] y) { y = QuantizeLinear(x, s, z) }"
        ),
        opsets={"": 20},
    )
    (wanted,) = evaluator.run(
        None, {"x": values, "s": np.float32(scale), "z": np.uint8(zero_point)}
    )
    np.testing.assert_array_equal(affine.quantize(values), np.asarray(wanted, np.float32))


@pytest.mark.parametrize(
    ("scale", "zero_point"), [(0.0, 0), (-1.0, 0), (float("nan"), 0), (float("inf"), 0), (1.0, 300)]
)
def test_impossible_numbers_are_refused(scale: float, zero_point: int) -> None:
    with pytest.raises(InputError):
        Affine(scale, zero_point, "uint8")
