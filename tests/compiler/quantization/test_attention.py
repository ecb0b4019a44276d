"""Scales of attention's operands, against queries, keys and values in float64 numpy."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from numpy.typing import NDArray
from support.canonical import canonical_graph
from support.running import run_graph
from support.tiny_vit import Array, Registers, Spec, TinyVit

from regcache.compiler.quantization.attention import attention_scales
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.find_blocks import view_encoder
from regcache.passes.quantize_attention import QuantizeAttention, attention_operands
from regcache.passes.splice_registers import SpliceRegisters

Floats = NDArray[np.float32]
SPEC = Spec(width=24, heads=3, depth=3)
DIM = SPEC.width // SPEC.heads


@dataclass
class Recording(TinyVit):
    """Keeps what each block's attention read, from `reference`."""

    read: list[Array] = field(default_factory=list)

    def _attention(self, x: Array, w: dict[str, Array], i: int, plan: Registers) -> Array:
        self.read.append(x)
        return super()._attention(x, w, i, plan)

    def peaks(self, images: Floats, registers: Registers | None = None) -> list[Array]:
        """The largest magnitude among queries, keys and values, by block."""
        self.read.clear()
        self.reference(images, registers)
        w, found = self.weights, []
        for i, x in enumerate(self.read):
            products = (x @ w[f"{i}.{n}"] + w[f"{i}.{n}.b"] for n in "qkv")
            found.append(np.array([np.abs(product).max() for product in products]))
        return found


def by_two(images: Floats) -> Iterator[Floats]:
    return (images[start : start + 2] for start in range(0, len(images), 2))


def assert_scales(graph: gs.Graph, scales: dict[str, Affine], peaks: list[Array]) -> None:
    """Those of all blocks, by the names of the tensors that the pass asks for."""
    operands = attention_operands(view_encoder(graph))
    assert list(operands) == list(range(len(peaks)))
    assert scales.keys() == {name for names in operands.values() for name in names[:3]}
    for block, names in operands.items():
        for name, peak in zip(names[:3], peaks[block], strict=True):
            scale = scales[name]
            assert (scale.dtype, scale.zero_point, scale.bits) == ("int8", 0, 8)
            assert scale.scale == pytest.approx(peak / 127, rel=1e-4)
    assert len({scale.scale for scale in scales.values()}) == len(scales)


# The constants that each spelling multiplies queries and keys by before the product.
FACTORS = {
    "matmul": (DIM**-0.5, 1),
    "sdpa": (DIM**-0.25, DIM**-0.25),
    "merged": (1, 1),
}


@pytest.mark.parametrize("qkv", ["separate", "fused"])
@pytest.mark.parametrize("attention", FACTORS)
def test_scales_cover_what_numpy_finds(qkv: str, attention: str) -> None:
    vit = Recording(replace(SPEC, qkv=qkv, attention=attention))  # type: ignore[arg-type]
    graph, images = canonical_graph(vit.model()), vit.images(7)
    scales = attention_scales(view_encoder(graph), by_two(images), threads=1)
    factors = np.array([*FACTORS[attention], 1])
    assert_scales(graph, scales, [peaks * factors for peaks in vit.peaks(images)])


@pytest.mark.parametrize("size", [0.01, 30.0])
def test_registers_are_covered_too(size: float) -> None:
    """Where they are larger than the keys and values of the tokens, they decide."""
    vit = Recording(SPEC)
    random = np.random.default_rng(0)
    shape = (2, SPEC.depth, SPEC.heads, 4, DIM)
    keys, values = (size * random.standard_normal(shape)).astype(np.float32)
    graph = run(SpliceRegisters(0, SPEC.depth, keys, values), canonical_graph(vit.model())).graph
    images = vit.images(4)
    scales = attention_scales(view_encoder(graph), by_two(images), threads=1)
    plan = Registers(0, SPEC.depth, keys, values)
    spliced = np.abs(np.stack([keys, values])).max(axis=(2, 3, 4)).T
    factors = np.array([*FACTORS["matmul"], 1])
    wanted = [peaks * factors for peaks in vit.peaks(images, plan)]
    for peaks, others in zip(wanted, spliced, strict=True):
        assert (others > peaks[1:]).all() == (size > 1)
        peaks[1:] = np.maximum(peaks[1:], others)
    assert_scales(graph, scales, wanted)


def test_the_pass_takes_the_scales_and_loses_little() -> None:
    vit = TinyVit(SPEC)
    graph, images = canonical_graph(vit.model()), vit.images(6)
    scales = attention_scales(view_encoder(graph), by_two(images), threads=1)
    result = run(QuantizeAttention(scales), graph)
    assert len(result.log.edits) == SPEC.depth
    found, wanted = run_graph(result.graph, images)[1], vit.reference(images)[1]
    lost = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
    assert 1e-4 < lost < 0.02


@pytest.mark.parametrize("attention", ["op4", "op3"])
def test_the_attention_operator_has_none(attention: str) -> None:
    vit = TinyVit(replace(SPEC, attention=attention, opset=23))  # type: ignore[arg-type]
    view = view_encoder(canonical_graph(vit.model()))
    assert attention_scales(view, by_two(vit.images(2)), threads=1) == {}
