"""Q/DQ pairs around the patch convolution: a simulation's numbers, and nothing else."""

from collections import Counter

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from support.canonical import canonical_graph
from support.running import run_graph
from support.scales import image_scales
from support.spellings import SPELLINGS, ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.affine import Affine
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.quantize_patches import QuantizePatches, patch_convolutions

CHOSEN = ["plain", "opset 17", "fused qkv", "attention operator"]


@pytest.mark.parametrize("name", CHOSEN)
def test_numbers_equal_fake_quantization(name: str) -> None:
    vit = TinyVit(SPELLINGS[name])
    graph = canonical_graph(vit.model())
    scales = image_scales(graph)
    result = run(QuantizePatches(scales), graph)
    onnx.checker.check_model(gs.export_onnx(result.graph), full_check=True)
    rounded = graph.copy()
    (node,) = patch_convolutions(rounded)
    weight = node.inputs[1].values
    peaks = np.abs(weight).max(axis=(1, 2, 3), keepdims=True) / np.float32(127)
    node.inputs[1] = gs.Constant("rounded", np.rint(weight / peaks) * peaks)
    images = vit.images(2)
    (scale,) = scales.values()
    integers = np.clip(np.rint(images / np.float32(scale.scale)) + scale.zero_point, 0, 255)
    floats = ((integers - scale.zero_point) * scale.scale).astype(np.float32)
    found = run_graph(result.graph, images)
    for one, other in zip(found, run_graph(rounded, floats), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    for one, other in zip(found, run_graph(graph, images), strict=True):
        assert 0 < np.abs(one - other).mean() < 0.1


def test_edits_and_nothing_else() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    result = run(QuantizePatches(image_scales(graph)), graph)
    (edit,), (node,) = result.log.edits, patch_convolutions(graph)
    assert (edit.site, edit.what) == (node.name or node.outputs[0].name, "uint8 x int8")
    assert ops(result.graph) - ops(graph) == Counter(QuantizeLinear=1, DequantizeLinear=2)
    stored = result.graph.tensors()[f"{node.inputs[1].name}/quantized"]
    assert (stored.values.dtype, stored.values.shape) == (np.int8, node.inputs[1].values.shape)
    again = run(QuantizePatches(image_scales(result.graph)), result.graph)
    assert not again.changed
    assert [skip.reason for skip in again.log.skips] == ["quantized already"]


def test_what_is_left_alone() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    result = run(QuantizePatches({}), graph)
    assert not result.changed
    assert [skip.reason for skip in result.log.skips] == ["no scale for its images"]
    (node,) = patch_convolutions(graph)
    scales = image_scales(graph)
    for attribute, value in (("strides", [2, 2]), ("pads", [1, 1, 1, 1])):
        kept = dict(node.attrs)
        node.attrs[attribute] = value
        assert patch_convolutions(graph) == []
        node.attrs = kept
    assert image_scales(graph) == scales


def test_other_scales_are_refused() -> None:
    graph = canonical_graph(TinyVit(Spec()).model())
    with pytest.raises(InputError, match="no tensor 'nowhere' in the graph"):
        run(QuantizePatches({"nowhere": Affine(0.1, 0, "uint8")}), graph)
    (name,) = image_scales(graph)
    with pytest.raises(InputError, match="needs 8 bits, not 4"):
        run(QuantizePatches({name: Affine(0.1, 0, "uint8", bits=4)}), graph)
