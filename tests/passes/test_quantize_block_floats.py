"""Block-scaled floats in a graph: valid, the reference's numbers, and nothing else changed."""

from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import block_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.graph_session import open_graph
from regcache.passes.base import run
from regcache.passes.block_floats import BlockFloat, BlockFormat, round_weight
from regcache.passes.detach_weights import pack_graph, unpack_graph
from regcache.passes.errors import InputError
from regcache.passes.expand_block_floats import ExpandBlockFloats
from regcache.passes.find_blocks import view_encoder
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.observe import Observe
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_block_floats import QuantizeBlockFloats
from regcache.runtime.session import OrtSession

WIDE = Spec(width=32, hidden=64)
KINDS = pytest.mark.parametrize("kind", BlockFormat)


def quantized(graph: gs.Graph, kind: BlockFormat) -> gs.Graph:
    return run(QuantizeBlockFloats(block_scales(graph, kind)), graph).graph


@KINDS
@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu", "attention operator"])
def test_every_linear_is_read_as_before(name: str, kind: BlockFormat) -> None:
    spec = Spec(**{**SPELLINGS[name].__dict__, "width": 32, "hidden": 64})
    graph = canonical_graph(TinyVit(spec).model())
    result = run(QuantizeBlockFloats(block_scales(graph, kind)), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    before, after = view_encoder(graph), view_encoder(result.graph)
    assert [edit.site for edit in result.log.edits] == [site.name for site in before.sites]
    assert all(linear.quantized for linear in after.linears)
    assert result.graph.opset == 23
    added = ops(result.graph) - ops(graph)
    sites, linears = len(before.sites), len(before.linears)
    if kind is BlockFormat.NVFP4:
        wanted = {"TRT_FP4DynamicQuantize": sites, "DequantizeLinear": 2 * (sites + linears)}
    else:
        both = {"TRT_MXFP8DequantizeLinear": sites + linears}
        wanted = {"TRT_MXFP8DynamicQuantize": sites} | both
    assert added == wanted
    assert not ops(graph) - ops(result.graph)


@KINDS
def test_a_linear_multiplies_the_reference(kind: BlockFormat) -> None:
    """One linear alone: what it reads and makes is seen, and is the product of rounded numbers."""
    vit = TinyVit(WIDE)
    graph = canonical_graph(vit.model())
    linear = view_encoder(graph).linears[-1]
    scale = block_scales(graph, kind)[linear.input.name]
    step = QuantizeBlockFloats({linear.input.name: scale}, frozenset({linear.name}))
    result = run(ExpandBlockFloats(), run(step, graph).graph).graph
    names = (linear.input.name, linear.matmul.outputs[0].name)
    *_, read, made = run_graph(run(Observe(names), result).graph, vit.images(2))
    weight = round_weight(linear.weight, kind).dequantized()
    np.testing.assert_allclose(made, scale.round_trip(read) @ weight, rtol=1e-5, atol=1e-5)
    assert np.abs(made - read @ linear.weight).max() > 1e-3


@KINDS
def test_arithmetic_is_the_reference_bit_by_bit(kind: BlockFormat) -> None:
    """At ties, at powers of two, beyond the range and at zero."""
    graph = canonical_graph(TinyVit(WIDE).model())
    site = view_encoder(graph).sites[0]
    scale = BlockFloat(kind, 2.0**-7 if kind is BlockFormat.NVFP4 else 1.0)
    random = np.random.default_rng(1)
    rows = random.standard_normal((64, 32)).astype(np.float32)
    rows *= np.float32(2) ** random.integers(-12, 9, (64, 1))
    rows[::4] = np.round(rows[::4] * 4) / 4
    rows[1] = 0
    rows[2, 0], rows[3, 0] = 448, np.nextafter(np.float32(448), np.float32(999))
    whole = run(QuantizeBlockFloats({site.tensor.name: scale}), graph).graph
    quantizer = next(node for node in whole.nodes if node.op.endswith("DynamicQuantize"))
    reader = view_encoder(whole).sites[0].tensor
    x = gs.Variable("x", np.float32, ["n", 32])
    cut = gs.Graph(
        nodes=[node for node in whole.nodes if str(node.name).startswith(site.tensor.name)],
        inputs=[x],
        outputs=[reader],
        opset=whole.opset,
        import_domains=whole.import_domains,
    )
    quantizer.inputs[0] = x
    reader.shape = ["n", 32]
    expanded = run(ExpandBlockFloats(), cut).graph
    (found,) = run_graph(expanded, rows)
    np.testing.assert_array_equal(found, scale.round_trip(rows))


@KINDS
def test_a_file_is_run_as_the_graph_is(kind: BlockFormat, tmp_path: Path) -> None:
    """Before and after what is not quantized becomes FP16, weights in the file or beside it."""
    vit = TinyVit(WIDE)
    graph = quantized(canonical_graph(vit.model()), kind)
    images = vit.images(2)
    for step, largest in ((None, None), (HalfPrecision(), None), (HalfPrecision(), 0)):
        made = graph if step is None else run(step, graph).graph
        path = tmp_path / f"{largest}-{step is None}.onnx"
        save_graph(made, path, largest=largest)
        with OrtSession(path, integers=False, threads=1) as one, open_graph(made) as other:
            for found, wanted in zip(one.run(images), other.run(images), strict=True):
                np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_four_bits_lie_in_half_a_byte(tmp_path: Path) -> None:
    graph = quantized(canonical_graph(TinyVit(WIDE).model()), BlockFormat.NVFP4)
    save_graph(graph, tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    weights = [item for item in stored if item.data_type == onnx.TensorProto.FLOAT4E2M1]
    assert len(weights) == len(view_encoder(graph).linears)
    assert all(len(item.raw_data) * 2 == np.prod(item.dims) for item in weights)
    again = unpack_graph(*pack_graph(graph))
    assert gs.export_onnx(again).graph.initializer == gs.export_onnx(graph).graph.initializer


@KINDS
def test_half_precision_leaves_no_product_in_float(kind: BlockFormat) -> None:
    graph = quantized(canonical_graph(TinyVit(WIDE).model()), kind)
    names = {linear.matmul.name for linear in view_encoder(graph).linears}
    half = run(HalfPrecision(), graph).graph
    products = [node for node in half.nodes if node.name in names]
    assert len(products) == len(names)
    for product in products:
        assert product.outputs[0].dtype == np.float16
        for maker in (item.inputs[0] for item in product.inputs):
            assert maker.op in {"DequantizeLinear", "TRT_MXFP8DequantizeLinear"}
            told = maker.attrs.get("output_dtype", onnx.TensorProto.FLOAT16)
            assert told == onnx.TensorProto.FLOAT16


def test_given_weights_are_stored() -> None:
    graph = canonical_graph(TinyVit(WIDE).model())
    linear = view_encoder(graph).linears[0]
    weight = round_weight(np.negative(linear.weight), BlockFormat.NVFP4)
    step = QuantizeBlockFloats(
        block_scales(graph, BlockFormat.NVFP4), frozenset({linear.name}), {linear.name: weight}
    )
    expanded = run(ExpandBlockFloats(), run(step, graph).graph).graph
    (product,) = [node for node in expanded.nodes if node.name == linear.matmul.name]
    found = product.inputs[1].values
    np.testing.assert_array_equal(found, weight.dequantized())


def test_channels_that_fill_no_block_stay_float() -> None:
    graph = canonical_graph(TinyVit(Spec(width=24, hidden=32)).model())
    result = run(QuantizeBlockFloats(block_scales(graph, BlockFormat.NVFP4)), graph)
    view = view_encoder(result.graph)
    assert {linear.role.value for linear in view.linears if linear.quantized} == {"fc2"}
    reasons = {skip.reason for skip in result.log.skips}
    assert reasons == {"24 channels fill no whole blocks of 16"}


def test_refusals() -> None:
    graph = canonical_graph(TinyVit(WIDE).model())
    scales = block_scales(graph, BlockFormat.NVFP4)
    linear = view_encoder(graph).linears[0]
    small = round_weight(np.ones((16, 4), np.float32), BlockFormat.NVFP4)
    for step, why in (
        (QuantizeBlockFloats({"nothing": BlockFloat(BlockFormat.NVFP4)}), "no tensor 'nothing'"),
        (QuantizeBlockFloats(scales, frozenset({"no"})), "no linear 'no'"),
        (QuantizeBlockFloats(scales, None, {linear.name: small}), "has another shape"),
    ):
        with pytest.raises(InputError, match=why):
            run(step, graph)


def test_what_only_tensorrt_runs_is_refused() -> None:
    graph = canonical_graph(TinyVit(WIDE).model())
    graph.nodes[0].domain, graph.nodes[0].op = "trt", "TRT_Other"
    with pytest.raises(InputError, match="nothing but TensorRT runs it"):
        ExpandBlockFloats().requires(graph)
