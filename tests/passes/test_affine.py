"""Affine scales of 2 to 8 bits against formulas in float64, and against ONNX's operators."""

import math

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from support.examples import examples

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.errors import InputError

BITS = st.integers(2, 8)
DTYPES = st.sampled_from(["int8", "uint8"])
ENDS = st.floats(-1e5, 1e5, width=32)


def lowest(dtype: IntegerType, bits: int) -> int:
    return 0 if dtype == "uint8" else -(2**bits) // 2


@pytest.mark.parametrize(
    ("dtype", "bits", "limits"),
    [
        ("uint8", 8, (0, 255)),
        ("int8", 8, (-128, 127)),
        ("uint8", 4, (0, 15)),
        ("int8", 4, (-8, 7)),
        ("uint8", 2, (0, 3)),
        ("int8", 2, (-2, 1)),
    ],
)
def test_limits(dtype: IntegerType, bits: int, limits: tuple[int, int]) -> None:
    affine = Affine(0.5, 1, dtype, bits)
    assert affine.limits == limits
    assert affine.range == ((limits[0] - 1) * 0.5, (limits[1] - 1) * 0.5)
    far = np.array([-1e6, 1e6], dtype=np.float32)
    assert tuple(affine.quantize(far)) == limits


@given(low=ENDS, high=ENDS, dtype=DTYPES, bits=BITS)
def test_symmetric_scales(low: float, high: float, dtype: IntegerType, bits: int) -> None:
    """One step is the largest magnitude over the steps on one side of the middle."""
    affine = Affine.from_range(low, high, dtype, symmetric=True, bits=bits)
    peak = max(-low, high, 0.0)
    assert affine.zero_point - lowest(dtype, bits) == 2**bits // 2
    if peak > 1e-30:
        assert affine.scale == peak / (2**bits // 2 - 1)
        ends = affine.quantize(np.array([-peak, peak], dtype=np.float32))
        assert ends[0] == affine.limits[0] + 1
        assert ends[1] == affine.limits[1]


@given(low=ENDS, high=ENDS, dtype=DTYPES, bits=BITS)
def test_asymmetric_scales(low: float, high: float, dtype: IntegerType, bits: int) -> None:
    """The range, widened to 0, over the number of steps; 0 is an integer within the limits."""
    low, high = min(low, high), max(low, high)
    affine = Affine.from_range(low, high, dtype, symmetric=False, bits=bits)
    width = max(high, 0.0) - min(low, 0.0)
    if width > 1e-30:
        assert math.isclose(affine.scale * (2**bits - 1), width, rel_tol=1e-12)
    values = np.array([low, 0.0, high], dtype=np.float32)
    restored = affine.round_trip(values)
    assert restored[1] == 0
    assert np.abs(restored.astype(np.float64) - values).max() <= affine.scale * 0.501 + 1e-30


@given(low=ENDS, high=ENDS, dtype=DTYPES, symmetric=st.booleans())
def test_eight_bits_are_the_default(
    low: float, high: float, dtype: IntegerType, symmetric: bool
) -> None:
    """Bit for bit the scales and limits of whole bytes."""
    affine = Affine.from_range(low, high, dtype, symmetric=symmetric)
    assert affine == Affine.from_range(low, high, dtype, symmetric=symmetric, bits=8)
    assert affine.limits == (np.iinfo(dtype).min, np.iinfo(dtype).max)
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low > 1e-30:
        assert affine.scale == (max(-low, high) / 127 if symmetric else (high - low) / 255)


@examples(60)
@given(
    values=hnp.arrays(np.float32, 40, elements=st.floats(-100, 100, width=32)),
    scale=st.floats(1e-2, 8),
    dtype=DTYPES,
    bits=BITS,
    data=st.data(),
)
def test_rounds_as_onnx_does(
    values: NDArray[np.float32],
    scale: float,
    dtype: IntegerType,
    bits: int,
    data: st.DataObject,
) -> None:
    """QuantizeLinear, Clip and DequantizeLinear of onnx's reference implementation."""
    first = lowest(dtype, bits)
    zero_point = data.draw(st.integers(first, first + 2**bits - 1))
    graph = onnx.parser.parse_graph(
        f"g (float[40] x, float s, {dtype} z, {dtype} a, {dtype} b)"
        f" => ({dtype}[40] c, float[40] y)"
        " { q = QuantizeLinear(x, s, z) c = Clip(q, a, b) y = DequantizeLinear(c, s, z) }"
    )
    numbers = {"z": zero_point, "a": first, "b": first + 2**bits - 1}
    integers, floats = ReferenceEvaluator(graph, opsets={"": 20}).run(
        None,
        {"x": values, "s": np.float32(scale)}
        | {name: np.array(number, dtype=dtype) for name, number in numbers.items()},
    )
    affine = Affine(scale, zero_point, dtype, bits)
    np.testing.assert_array_equal(affine.quantize(values), np.asarray(integers, np.float32))
    np.testing.assert_array_equal(affine.round_trip(values), floats)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_other_widths_are_refused(bits: int) -> None:
    with pytest.raises(InputError, match=f"2 to 8 bits, not {bits}"):
        Affine(1.0, 0, "int8", bits)
    with pytest.raises(InputError, match=f"2 to 8 bits, not {bits}"):
        Affine.from_range(-1.0, 1.0, "uint8", symmetric=True, bits=bits)


@pytest.mark.parametrize(("zero_point", "dtype"), [(16, "uint8"), (-1, "uint8"), (8, "int8")])
def test_a_zero_point_beyond_the_limits_is_refused(zero_point: int, dtype: IntegerType) -> None:
    with pytest.raises(InputError, match=f"{zero_point} does not fit {dtype} of 4 bits"):
        Affine(1.0, zero_point, dtype, 4)


@given(
    low=st.floats(-1e5, 1e5, width=32),
    high=st.floats(-1e5, 1e5, width=32),
    dtype=st.sampled_from(["int8", "uint8"]),
    symmetric=st.booleans(),
)
def test_a_range_is_covered_and_keeps_zero(
    low: float, high: float, dtype: IntegerType, symmetric: bool
) -> None:
    affine = Affine.from_range(min(low, high), max(low, high), dtype, symmetric=symmetric)
    values = np.array([min(low, high), 0.0, max(low, high)], dtype=np.float32)
    restored = affine.round_trip(values)
    assert restored[1] == 0
    assert np.abs(restored - values).max() <= affine.scale * 0.501 + 1e-30
    if symmetric:
        assert affine.zero_point == (0 if dtype == "int8" else 128)


@examples(50)
@given(
    values=hnp.arrays(np.float32, 50, elements=st.floats(-100, 100, width=32)),
    scale=st.floats(1e-3, 2),
    zero_point=st.integers(0, 255),
)
def test_eight_bits_round_as_onnx_does(values: np.ndarray, scale: float, zero_point: int) -> None:
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
