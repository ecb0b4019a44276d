"""What OpenVINO computes in, read from what it executed: nothing that multiplies stays float."""

from pathlib import Path

import numpy as np
import pytest
from support.attention_graphs import spliced
from support.balancing import random_balances
from support.canonical import canonical_graph
from support.scales import attention_scales, image_scales, linear_scales
from support.tiny_vit import Spec, TinyVit

from regcache.passes.balance_scores import BalanceScores
from regcache.passes.base import Pass, run_all
from regcache.passes.onnx_file import save_graph
from regcache.passes.quantize_attention import QuantizeAttention
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.quantize_patches import QuantizePatches
from regcache.passes.round_before_moving import RoundBeforeMoving
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.turn_keys_last import TurnKeysLast
from regcache.runtime.openvino_options import InferencePrecision, OpenVinoOptions
from regcache.runtime.openvino_primitives import Primitives, count_primitives
from regcache.runtime.openvino_session import OpenVinoSession

# The sizes of CLIP ViT-B/16 and SigLIP-B/16, a block of each.
WIDE = Spec(width=768, heads=12, hidden=3072, depth=1, patch=16, grid=14)
CLIP = Spec(**{**vars(WIDE), "activation": "quick_gelu"})
SIGLIP = Spec(**{**vars(WIDE), "activation": "gelu_tanh", "prefix": 0, "qkv": "fused"})


def executed(spec: Spec, path: Path, registers: int) -> tuple[list[tuple[str, str]], Primitives]:
    """What OpenVINO ran of an encoder that is quantized as for the target `openvino`."""
    vit = TinyVit(spec)
    graph = canonical_graph(vit.model())
    if registers:
        graph = spliced(graph, spec, registers)
    split = run_all([SplitQkv(for_tensorrt=False)], graph)[0]
    steps: list[Pass] = [
        QuantizeLinears(linear_scales(split)),
        BalanceScores({} if registers else random_balances(split)),
        QuantizeAttention(attention_scales(split), only_scores=True),
        QuantizePatches(image_scales(split)),
        RoundBeforeMoving(),
        TurnKeysLast(),
    ]
    save_graph(run_all(steps, split)[0], path)
    options = OpenVinoOptions(InferencePrecision.F32)
    with OpenVinoSession(path, threads=1, openvino=options, profiled=True) as session:
        session.run(vit.images(2).astype(np.float32))
        return session.executed(), Primitives.of(session)


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("spec", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.slow
def test_everything_that_multiplies_is_fused_in_int8(
    spec: Spec, registers: int, tmp_path: Path
) -> None:
    layers, counts = executed(spec, tmp_path / "model.onnx", registers)
    kernels = [
        (layer, kernel.rpartition("_")[2].lower())
        for layer, kernel in layers
        if layer.startswith(("FullyConnected", "Convolution", "MatMul", "Subgraph"))
    ]
    linears = [kind for layer, kind in kernels if layer.startswith("FullyConnected")]
    assert linears == ["i8"] * 6
    assert [kind for layer, kind in kernels if layer == "Convolution"] == ["i8"]
    attention = [kind for layer, kind in kernels if layer in ("Subgraph", "MatMul")]
    assert attention[:1] == ["i8"]
    assert counts.float_products == 0
    moved = {kernel for layer, kernel in layers if layer == "Transpose" and registers == 0}
    assert {kernel.rpartition("_")[2].lower() for kernel in moved} <= {"i8", "u8", "f32"}
    assert sum(layer == "FakeQuantize" for layer, _ in layers) <= 1  # the image's
    assert counts.precision == "f32"
    assert (counts.bf16, counts.f16) == (0, 0)
    assert counts.int8 + counts.f32 == sum(layer != "Reshape" for layer, _ in layers)


def test_counting_goes_by_the_kernel_s_name() -> None:
    layers = [
        ("FullyConnected", "brgemm_avx512_I8"),
        ("FullyConnectedQuantizedLegacy", "brgemm_avx512_i8"),
        ("FullyConnected", "gemm_mlas_f32"),
        ("Convolution", "brgconv_avx512_amx_bf16"),
        ("Transpose", "unknown_u8"),
        ("MVN", "jit_avx512_FP16"),
        ("Gather", "ref_any_f32"),
        ("Convert", "unknown_i32"),
        ("Reshape", "unknown_f32"),
        ("Input", "unknown_f32"),
    ]
    found = count_primitives(layers, "bf16")
    assert found == Primitives(precision="bf16", int8=3, bf16=1, f16=1, f32=3, float_products=2)
