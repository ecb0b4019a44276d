"""NVFP4 and MXFP8 against their numbers spelled out, and against a slow reference in float64."""

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from support import float8_numbers
from support.examples import examples

from regcache.passes.block_floats import (
    EXPONENTS,
    FLOAT4,
    BlockFloat,
    BlockFormat,
    round_weight,
)
from regcache.passes.errors import InputError
from regcache.passes.float4 import PackedFloat4, packed

Floats = NDArray[np.float32]
# In the order of their bits.
NUMBERS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
MAGNITUDES = st.floats(2**-20, 1000, width=32)
VALUES = hnp.arrays(
    np.float32,
    (3, 64),
    elements=st.one_of(MAGNITUDES, MAGNITUDES.map(lambda value: -value), st.just(0.0)),
)
KINDS = pytest.mark.parametrize("kind", BlockFormat)


def nearest_float4(value: float) -> float:
    """The number nearest to a value, of two as near the one whose last bit is 0."""
    size = min(abs(value), NUMBERS[-1])
    code = min(range(len(NUMBERS)), key=lambda i: (abs(NUMBERS[i] - size), i % 2))
    return math.copysign(NUMBERS[code], value)


def slow(values: Floats, kind: BlockFormat, tensor_scale: float) -> Floats:
    """Block by block and number by number; steps in float32, as the kernels have them."""
    found = np.empty_like(values)
    for row, numbers in enumerate(values):
        for start in range(0, len(numbers), kind.block_size):
            block = numbers[start : start + kind.block_size]
            peak = float(np.abs(block).max())
            if kind is BlockFormat.NVFP4:
                wanted = np.float32(peak) / np.float32(6 * tensor_scale)
                step = float8_numbers.nearest(float(wanted)) * tensor_scale
                round_one = nearest_float4
            else:
                step = 2.0**-127
                while step < 2.0**127 and step * 448 < peak:
                    step *= 2
                round_one = float8_numbers.nearest
            found[row, start : start + len(block)] = [
                round_one(float(one / np.float32(step))) * step if step else 0 for one in block
            ]
    return found


def test_the_types_are_those_of_the_numbers() -> None:
    codes = np.arange(16, dtype=np.uint8).view(FLOAT4).astype(np.float64)
    np.testing.assert_array_equal(codes[:8], NUMBERS)
    np.testing.assert_array_equal(codes[8:], [-number for number in NUMBERS])
    powers = np.arange(255, dtype=np.uint8).view(EXPONENTS).astype(np.float64)
    np.testing.assert_array_equal(powers, 2.0 ** np.arange(-127, 128))


@KINDS
@examples(60)
@given(VALUES, st.integers(-12, 3))
def test_round_trip_is_the_slow_reference(kind: BlockFormat, values: Floats, power: int) -> None:
    scale = 2.0**power if kind is BlockFormat.NVFP4 else 1.0
    found = BlockFloat(kind, scale).round_trip(values)
    np.testing.assert_array_equal(found, slow(values, kind, scale))


@KINDS
@examples(40)
@given(VALUES)
def test_rounding_once_is_enough(kind: BlockFormat, values: Floats) -> None:
    """What comes out comes out again, but where a block's largest became smaller than its step."""
    peak = float(np.abs(values).max())
    assume(peak > 0)
    made = BlockFloat.from_range(kind, -peak, peak)
    once = made.round_trip(values)
    if kind is BlockFormat.MXFP8:
        np.testing.assert_array_equal(made.round_trip(once), once)
    # Nothing is further off than half the widest gap of its block, in which 6 follows on 4.
    blocks = np.abs(values).reshape(-1, kind.block_size).max(axis=1, keepdims=True)
    gap = blocks / 6 if kind is BlockFormat.NVFP4 else blocks / 448 * 32
    least = 2.0**-9 * made.scale * 6 if kind is BlockFormat.NVFP4 else 0
    error = np.abs(once - values).reshape(-1, kind.block_size)
    assert (error <= gap * (1 + 2**-3) + least).all()


@examples(60)
@given(hnp.arrays(np.float32, 24, elements=st.floats(-8, 8, width=32)))
def test_nearest_saturates_and_rounds_half_to_even(values: Floats) -> None:
    found = BlockFormat.NVFP4.nearest(values)
    np.testing.assert_array_equal(found, [nearest_float4(float(one)) for one in values])


def test_ties_go_to_the_even_code() -> None:
    ties = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 99.0], np.float32)
    wanted = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0]
    np.testing.assert_array_equal(BlockFormat.NVFP4.nearest(ties), wanted)
    np.testing.assert_array_equal(BlockFormat.NVFP4.nearest(-ties), np.negative(wanted))


def test_exponents_are_rounded_up() -> None:
    """At 448 a step of 1 fits; a little more takes one of 2, and nothing is clipped."""
    peaks = np.array([448, np.nextafter(np.float32(448), np.float32(999)), 224, 0], np.float32)
    found = BlockFormat.MXFP8.scales(peaks, 1.0)
    np.testing.assert_array_equal(found, [1, 2, 0.5, 2.0**-127])
    np.testing.assert_array_equal(found.astype(ml_dtypes.float8_e8m0fnu).astype("f4"), found)


@pytest.mark.parametrize("peak", [1e-9, 0.01, 1.0, 2688.0, 3e4])
def test_the_scale_of_a_tensor_is_a_power_of_two_with_room(peak: float) -> None:
    scale = BlockFormat.NVFP4.tensor_scale(peak)
    assert math.frexp(scale)[0] == 0.5
    assert scale >= 2.0**-14
    assert peak * 2 <= BlockFloat(BlockFormat.NVFP4, scale).range[1]


@KINDS
def test_a_weight_is_rounded_along_its_input_channels(kind: BlockFormat) -> None:
    weight = np.random.default_rng(0).standard_normal((96, 5)).astype(np.float32)
    found = round_weight(weight, kind)
    assert found.scales.shape == (96 // kind.block_size, 5)
    np.testing.assert_array_equal(found.values, kind.nearest(found.values))
    across = BlockFloat(kind, found.scale).round_trip(np.ascontiguousarray(weight.T)).T
    np.testing.assert_array_equal(found.dequantized(), across)


@KINDS
def test_zeros_stay_zeros(kind: BlockFormat) -> None:
    zeros = np.zeros((2, 64), np.float32)
    assert not BlockFloat.from_range(kind, 0, 0).round_trip(zeros).any()
    assert not round_weight(zeros.T.copy(), kind).dequantized().any()


@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_scales_that_are_none(scale: float) -> None:
    with pytest.raises(InputError):
        BlockFloat(BlockFormat.NVFP4, scale)


class TestPacked:
    def test_two_numbers_share_a_byte(self) -> None:
        values = packed(np.array([0.5, -6, 1], np.float32).astype(FLOAT4))
        assert isinstance(values, PackedFloat4)
        assert values.tobytes() == bytes([0x1 | 0xF << 4, 0x2])
        assert values.nbytes == 2

    def test_other_arrays_are_themselves(self) -> None:
        plain = np.zeros(3, np.float32)
        assert packed(plain) is plain
