"""Graphs with FP8 Q/DQ pairs build with TensorRT-RTX, and what it makes of them."""

from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from support.building import needs_tensorrt
from support.canonical import canonical_graph
from support.sample import sample_blocks
from support.scales import float8_scales
from support.spellings import SPELLINGS
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.split_qkv import SplitQkv
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_layers import products_by_precision
from regcache.runtime.tensorrt_rtx import build_engine


def build(graph: gs.Graph, folder: Path, *capabilities: str) -> EngineBuild:
    path = folder / "model.onnx"
    save_graph(graph, path)
    built = build_engine(path, compute_capabilities=capabilities)
    assert not built.warnings
    return built


def halved(graph: gs.Graph) -> gs.Graph:
    """All that is float32 as float16, scales included."""
    copy = graph.copy()
    for name, tensor in list(copy.tensors().items()):
        if tensor.dtype != np.float32:
            continue
        if isinstance(tensor, gs.Variable):
            tensor.dtype = np.float16
        else:
            half = gs.Constant(name, tensor.values.astype(np.float16))
            for node in list(tensor.outputs):
                node.inputs = [half if item is tensor else item for item in node.inputs]
    return copy


@needs_tensorrt
@pytest.mark.parametrize("name", ["plain", "fused qkv", "swiglu", "attention operator"])
def test_tensorrt_multiplies_in_float8(name: str, tmp_path: Path) -> None:
    """The rest in FP32: the patches' convolution, and attention as two products a block."""
    graph = run(SplitQkv(), canonical_graph(TinyVit(SPELLINGS[name]).model())).graph
    view = view_encoder(graph)
    quantized = run(QuantizeFloat8(float8_scales(graph)), graph).graph
    # Linears that read one tensor become one product for 8.9, and stay apart for 12.0.
    for capability, products in (("8.9", len(view.sites)), ("12.0", len(view.linears))):
        built = build(quantized, tmp_path, capability)
        assert products_by_precision(built.layers) == {"FP8": products, "FP32": 5}


@needs_tensorrt
def test_tensorrt_multiplies_a_packed_projection_in_float(tmp_path: Path) -> None:
    """As it does with INT8: SplitQkv comes first."""
    graph = canonical_graph(TinyVit(SPELLINGS["fused qkv"]).model())
    built = build(run(QuantizeFloat8(float8_scales(graph)), graph).graph, tmp_path, "8.9")
    assert products_by_precision(built.layers) == {"FP8": 3 * 2, "FP32": 1 + 3 * 2}


@needs_tensorrt
@pytest.mark.parametrize("capability", ["8.9", "12.0"])
def test_tensorrt_fuses_attention_where_the_rest_is_float16(
    capability: str, tmp_path: Path
) -> None:
    graph = canonical_graph(TinyVit(Spec(width=64, hidden=128)).model())
    quantized = run(QuantizeFloat8(float8_scales(graph)), graph).graph
    single, half = (build(item, tmp_path, capability) for item in (quantized, halved(quantized)))
    assert sum(layer.fused_attention for layer in single.layers) == 0
    assert sum(layer.fused_attention for layer in half.layers) == 2
    found = [products_by_precision(item.layers) for item in (single, half)]
    assert found[0]["FP8"] == found[1]["FP8"]
    assert found[1].keys() == {"FP8", "FP16"}


@needs_tensorrt
def test_tensorrt_refuses_float8_before_compute_capability_8_9(tmp_path: Path) -> None:
    graph = canonical_graph(TinyVit(Spec(depth=1)).model())
    quantized = run(QuantizeFloat8(float8_scales(graph)), graph).graph
    with pytest.raises(InputError, match="HW-specific datatypes: fp8_e4m3"):
        build(quantized, tmp_path, "8.6", "8.9")


@needs_tensorrt
@pytest.mark.sample
@pytest.mark.xdist_group("sample")
def test_the_sample_is_small_and_float8(folder: Path, tmp_path: Path) -> None:
    """6 blocks; q, k and v as one product for 8.9 and as three for 12.0."""
    graph, path = sample_blocks(folder, 6), tmp_path / "float.onnx"
    save_graph(graph, path)
    quantized = run(QuantizeFloat8(float8_scales(graph)), graph).graph
    for capability, a_block in (("8.9", 4), ("12.0", 6)):
        built = build(quantized, tmp_path, capability)
        assert products_by_precision(built.layers) == {"FP8": 6 * a_block, "FP32": 1 + 6 * 2}
        assert len(built.engine) < 0.4 * path.stat().st_size
