"""The kernels told from shapes, against the builder's own list and against sums done by hand."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.building import needs_tensorrt
from support.canonical import canonical_graph
from support.scales import linear_scales
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import Pass, run_all
from regcache.passes.find_blocks import view_encoder
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.merge_qkv import MergeQkv
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.runtime.block_kernels import BlockFormats, BlockShape, Front, encoder_kernels
from regcache.runtime.engine_cost import moved_bytes
from regcache.runtime.tensorrt_rtx import kernels_at

DEPTH, BATCH = 3, 8
SPEC = Spec(width=64, heads=1, hidden=256, depth=DEPTH, grid=8, patch=2, layer_scale=True)
SHAPE = BlockShape(tokens=65, keys=65, width=64, heads=64, inner=256, hidden=256)
FRONT = Front(pixels=16 * 16, patches=64, window=3 * 2 * 2, width=64)
ROLES = {"qkv": ("q", "k", "v"), "out": ("out",), "fc1": ("fc1",), "fc2": ("fc2",)}


@needs_tensorrt
@pytest.mark.parametrize("quantized", ["", "fc1 fc2", "qkv out fc1 fc2"])
def test_the_builder_lists_as_many_that_move_as_much(quantized: str, tmp_path: Path) -> None:
    graph = canonical_graph(TinyVit(SPEC).model())
    roles = [role for name in quantized.split() for role in ROLES[name]]
    only = frozenset(f"blocks.{i}.{role}" for i in range(DEPTH) for role in roles)
    step = QuantizeLinears(linear_scales(graph, "int8"), only=only)
    before: list[Pass] = [step, MergeQkv()] if only else []
    path = tmp_path / "model.onnx"
    save_graph(run_all([*before, FoldBiases(), HalfPrecision()], graph)[0], path)
    listed = kernels_at(path, ["8.9"], BATCH)
    formats = BlockFormats(**dict.fromkeys(quantized.split(), "INT8"))
    told = encoder_kernels(FRONT, [SHAPE] * DEPTH, [formats] * DEPTH)
    assert len(told) == pytest.approx(len(listed), abs=3)
    assert moved_bytes(told, BATCH) == pytest.approx(moved_bytes(listed, BATCH), rel=0.06)
    for kind in ("FP16", "INT8"):
        done = [
            sum(item.operations for item in some if item.format == kind) for some in (told, listed)
        ]
        assert done[0] == pytest.approx(done[1], rel=0.02)
    assert view_encoder(graph).tokens == SHAPE.tokens


def test_a_block_in_float_and_one_in_integers() -> None:
    """A wide and short one, so that every tensor has a size of its own."""
    shape = BlockShape(tokens=5, keys=7, width=32, heads=16, inner=64, hidden=64)
    tokens, width, heads, hidden = 5, 32, 16, 64
    front = Front(pixels=36, patches=4, window=27, width=32)

    def moved(formats: BlockFormats) -> float:
        whole = encoder_kernels(front, [shape], [formats])
        ends = 20 * 36 + 8 * 36 + 2 * 32 * 4  # the image, the patches
        norm = 2 if formats.fc2 == "FP16" else 6
        return sum(kernel.moved for kernel in whole) - ends - tokens * width * (norm + 2)

    attention = 2 * heads * (tokens + 2 * 7) + 2 * tokens * heads
    float_block = (
        tokens * (8 * width)  # the first norm: patches and positions, stream and output
        + tokens * (2 * width + 6 * heads) + attention
        + tokens * (2 * heads + 4 * width) + tokens * 4 * width
        + tokens * (2 * width + 2 * hidden) + tokens * (2 * hidden + 4 * width)
    )  # fmt: skip
    assert moved(BlockFormats()) == float_block
    with_biases = encoder_kernels(front, [replace(shape, biased=True)], [BlockFormats()])
    without = encoder_kernels(front, [shape], [BlockFormats()])
    added = [item for item in with_biases if item not in without]
    assert [kernel.moved for kernel in added] == [4 * tokens * heads] * 3
    integers = BlockFormats("INT8", "INT8", "INT8", "INT8")
    integer_block = (
        tokens * 7 * width
        + tokens * (width + 6 * heads) + 12 * tokens * heads + attention - tokens * heads
        + 2 * tokens * heads + tokens * (heads + 2 * width) + tokens * 7 * width
        + tokens * (width + 2 * hidden) + tokens * 3 * hidden + tokens * (hidden + 2 * width)
    )  # fmt: skip
    assert moved(integers) == integer_block
    whole = BlockFormats("INT8", "INT8", "INT8", "INT8", attention="INT8")
    assert moved(whole) < integer_block - 2 * tokens * heads


def test_attention_in_integers_ends_at_512_keys_and_is_all_or_nothing() -> None:
    whole = BlockFormats("INT8", "INT8", attention="INT8")
    assert whole.fused_in_8_bits(512)
    assert not whole.fused_in_8_bits(513)
    assert not BlockFormats("INT8", "FP16", attention="INT8").fused_in_8_bits(5)
    assert not BlockFormats("INT8", "INT8").fused_in_8_bits(5)
    assert not BlockFormats("FP8", "FP8", attention="FP8").fused_in_8_bits(5)


@needs_tensorrt
@pytest.mark.parametrize(
    "spec",
    [
        replace(SPEC, activation="gelu_tanh"),
        replace(SPEC, activation="quick_gelu"),
        replace(SPEC, activation="swiglu"),
    ],
    ids=lambda spec: str(spec.activation),
)
def test_what_float16_products_take_along(spec: Spec, tmp_path: Path) -> None:
    """Not what a sigmoid makes."""
    graph = canonical_graph(TinyVit(spec).model())
    view, path = view_encoder(graph), tmp_path / "model.onnx"
    save_graph(run_all([FoldBiases(), HalfPrecision()], graph)[0], path)
    listed = kernels_at(path, ["8.9"], BATCH)
    inner = sum(linear.weight_shape[1] for linear in view.blocks[0].mlp.fc1)
    shape = replace(SHAPE, inner=inner, activation=view.blocks[0].mlp.activation)
    told = encoder_kernels(FRONT, [shape] * DEPTH, [BlockFormats()] * DEPTH)
    assert len(told) == pytest.approx(len(listed), abs=3)
    assert moved_bytes(told, BATCH) == pytest.approx(moved_bytes(listed, BATCH), rel=0.06)
