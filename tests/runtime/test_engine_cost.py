"""Bytes, operations and predicted times of kernels, against sums done by hand."""

import pytest

from regcache.passes.errors import InputError
from regcache.runtime.engine_cost import (
    Kernel,
    beside,
    kernels_of,
    moved_bytes,
    multiplies_on,
    predict,
)
from regcache.runtime.engine_layers import EngineLayer, EngineTensor
from regcache.runtime.gpu_rates import GPUS, GpuRates, find_rates, gpus_of

BATCH, TOKENS, WIDTH, HEADS = 2, 5, 8, 2
GPU = GpuRates("a", "8.9", {"FP16": 1e9, "INT8": 4e9}, 1e9, "made up", between_kernels=1e-6)


def tensor(kind: str, *shape: int) -> EngineTensor:
    return EngineTensor(kind, shape)


def layer(
    kind: str,
    inputs: list[EngineTensor],
    output: EngineTensor,
    constants: tuple[EngineTensor, ...] = (),
    name: str = "a",
) -> EngineLayer:
    return EngineLayer(name, kind, tuple(inputs), (output,), (), constants)


def one(item: EngineLayer) -> Kernel:
    (kernel,) = kernels_of([item], BATCH)
    return kernel


def test_a_product_multiplies_every_row_by_every_column() -> None:
    rows = BATCH * TOKENS
    weight, scale = tensor("INT8", WIDTH, 12), tensor("FP32", 1)
    kernel = one(layer("gemm", [tensor("INT8", rows, WIDTH)], tensor("FP16", rows, 12),
                       (weight, scale)))  # fmt: skip
    assert kernel.operations == 2 * TOKENS * WIDTH * 12
    assert kernel.moved == TOKENS * (WIDTH + 2 * 12)
    assert kernel.constants == WIDTH * 12 + 4
    assert kernel.format == "INT8"


def test_three_products_in_one_each_sum_over_their_own_rows() -> None:
    rows = BATCH * TOKENS
    weights, made = tensor("FP16", 3, WIDTH, 4), tensor("FP16", 3, rows, 4)
    kernel = one(layer("gemm", [tensor("FP16", rows, WIDTH)], made, (weights,)))
    assert kernel.operations == 3 * 2 * TOKENS * WIDTH * 4


def test_a_convolution_sums_over_its_window() -> None:
    images, patches = tensor("FP16", BATCH, 4, 6, 6), tensor("FP16", BATCH, 8, 2, 2)
    kernel = one(layer("correlation", [images], patches, (tensor("FP16", 8, 4, 3, 3),)))
    assert kernel.operations == 2 * (8 * 2 * 2) * (4 * 3 * 3)


def test_a_fused_attention_multiplies_twice() -> None:
    """More keys than queries, as registers make them."""
    keys, head = TOKENS + 2, WIDTH // HEADS
    query, key, value = (
        tensor("FP16", BATCH * HEADS, *sides)
        for sides in ((TOKENS, head), (head, keys), (keys, head))
    )
    made = tensor("FP16", BATCH * HEADS, TOKENS, head)
    kernel = one(layer("kgen", [query, key, value], made, name="_gemm_mha_v2_a"))
    assert kernel.operations == 2 * (2 * HEADS * TOKENS * keys * head)
    assert kernel.moved == 2 * HEADS * head * 2 * (TOKENS + keys)


def test_a_product_of_two_activations_sums_over_what_they_share() -> None:
    scores = layer(
        "gemm",
        [tensor("FP16", BATCH * HEADS, TOKENS, 4), tensor("FP16", BATCH * HEADS, 4, TOKENS)],
        tensor("FP16", BATCH * HEADS, TOKENS, TOKENS),
    )
    assert one(scores).operations == 2 * HEADS * TOKENS * TOKENS * 4


def test_what_moves_nothing_is_no_kernel_and_what_only_moves_multiplies_nothing() -> None:
    wait = EngineLayer("wait", "wait", (), (), ())
    gelu = layer("kgen", [tensor("FP16", 4, 8)], tensor("INT8", 4, 8), (tensor("FP16", 1, 8),))
    (kernel,) = kernels_of([wait, gelu], 4)
    assert kernel == Kernel(moved=8 * 3, constants=16, format="FP16")
    assert moved_bytes([kernel, kernel], 3) == 2 * (3 * 24 + 16)


def test_an_open_shape_and_an_unknown_format_are_refused() -> None:
    for read in (tensor("FP16", -1, 8), tensor("FP6", 2, 8)):
        with pytest.raises(ValueError, match=r"open|FP6"):
            kernels_of([layer("kgen", [read], tensor("FP16", 2, 8))], 2)


def test_a_kernel_takes_its_memory_or_its_arithmetic_whichever_is_longer() -> None:
    slow_memory = Kernel(moved=4e6, constants=1_000_000, operations=2e6)
    slow_product = Kernel(moved=1e6, operations=3e7, format="INT8")
    found = predict([slow_memory, slow_product], GPU, 2)
    assert found.memory_ms == pytest.approx(9 + 2)
    assert found.arithmetic_ms == pytest.approx(4 + 15)
    assert found.launches_ms == pytest.approx(0.002)
    assert found.total_ms == pytest.approx(9 + 15 + 0.002)
    assert found.ratio is None
    half = predict([slow_memory], GPU, 2)
    assert beside(found, half).ratio == pytest.approx(24.002 / 9.001, abs=1e-4)
    assert not multiplies_on([Kernel(1, operations=1, format="FP8")], GPU)
    assert multiplies_on([slow_memory, slow_product, Kernel(1, format="FP8")], GPU)


def test_gpus_are_found_by_the_drivers_names_and_by_capability() -> None:
    for name in ("RTX 4090", "rtx4090", "NVIDIA GeForce RTX 4090", "nvidia rtx 4090"):
        assert find_rates(name).name == "RTX 4090"
    assert find_rates("NVIDIA A10").name == "A10"
    assert find_rates("NVIDIA A100-SXM4-80GB").name == "A100"
    for name in ("RTX 4090 Laptop GPU", "RTX 4080", "", "A1"):
        with pytest.raises(InputError, match="L4, A10, RTX 4090, RTX 5090, A100, H100, Orin"):
            find_rates(name)
    assert [gpu.name for gpu in gpus_of(["8.9", "12.0"])] == ["L4", "RTX 4090", "RTX 5090"]
    assert all(gpu.source for gpu in GPUS)
    assert all(gpu.operations["INT8"] >= 2 * gpu.operations["FP16"] * 0.999 for gpu in GPUS)
