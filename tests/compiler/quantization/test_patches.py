"""Patch convolutions rounded by the patches of images: GPTQ's error is less than the nearest's."""

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.quantization.patches import PatchMoments, round_patches
from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.quantize_patches import QuantizePatches, patch_convolutions
from regcache.passes.walk import name_of


def smooth(count: int, side: int) -> np.ndarray:
    """Images whose neighbouring pixels are alike, as a photograph's."""
    coarse = np.random.default_rng(0).standard_normal((count, 3, side // 4, side // 4))
    noise = 0.05 * np.random.default_rng(1).standard_normal((count, 3, side, side))
    return (coarse.repeat(4, axis=2).repeat(4, axis=3) + noise).astype(np.float32)


@pytest.fixture(scope="module")
def encoder() -> gs.Graph:
    return canonical_graph(TinyVit(Spec(depth=1)).model())


def test_moments_are_those_of_the_patches(encoder: gs.Graph) -> None:
    (conv,) = patch_convolutions(encoder)
    name, (_, _, height, width) = conv.inputs[0].name, conv.inputs[1].shape
    moments = PatchMoments.of([conv])
    images = smooth(2, 16)
    moments.add(name, images[:1])
    # The edge that no whole patch fits into is not read.
    moments.add(name, np.pad(images[1:], ((0, 0), (0, 0), (0, height - 1), (0, 1))))
    rows = [
        images[one, :, y : y + height, x : x + width].ravel()
        for one in range(2)
        for y in range(0, 16, height)
        for x in range(0, 16, width)
    ]
    assert moments.rows == {name: len(rows)}
    np.testing.assert_allclose(moments.grams[name], np.transpose(rows) @ np.array(rows), rtol=1e-4)


@pytest.mark.parametrize("bits", [8, 7])
def test_errors_cancel_at_the_output(encoder: gs.Graph, bits: int) -> None:
    (conv,) = patch_convolutions(encoder)
    name = conv.inputs[0].name
    scales = {name: Affine.from_range(-4.0, 4.0, "uint8", symmetric=False)}
    moments = PatchMoments.of([conv])
    moments.add(name, smooth(16, 16))
    gram = moments.grams[name]
    weight = conv.inputs[1].values.reshape(len(conv.inputs[1].values), -1).T

    def error(given: PatchMoments | None) -> float:
        (rounded,) = round_patches([conv], scales, given, bits).values()
        assert np.abs(rounded.integers).max() <= 2 ** (bits - 1) - 1
        lost = rounded.dequantized() - weight
        return float(np.einsum("kn,kl,ln", lost, gram, lost))

    assert error(moments) < 0.5 * error(None)


def test_the_integers_are_what_is_written(encoder: gs.Graph) -> None:
    (conv,) = patch_convolutions(encoder)
    scales = {conv.inputs[0].name: Affine.from_range(-4.0, 4.0, "uint8", symmetric=False)}
    rounded = round_patches([conv], scales, None, 5)
    (weight,) = rounded.values()
    graph = run(QuantizePatches(scales, rounded), encoder).graph
    (written,) = patch_convolutions(graph)
    stored = written.inputs[1].inputs[0].inputs[0].values
    np.testing.assert_array_equal(stored.reshape(len(stored), -1).T, weight.integers)
    assert rounded.keys() == {name_of(conv)}
