"""E4M3 round trips against ONNX Runtime's operators and a slow reference in float64."""

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from onnx import TensorProto, helper
from support.examples import examples
from support.float8_numbers import NUMBERS, nearest

from regcache.passes.errors import InputError
from regcache.passes.float8 import FLOAT8, LARGEST, SMALLEST_SCALE, Float8, round_weight

Floats = NDArray[np.float32]
SCALES = st.floats(SMALLEST_SCALE, 100, width=32)
VALUES = hnp.arrays(np.float32, 40, elements=st.floats(-5e4, 5e4, width=32))
WEIGHTS = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-1e6, 1e6, width=32),
)


def onnx_round_trip(values: Floats, scale: float, opset: int) -> Floats:
    """QuantizeLinear and DequantizeLinear as ONNX Runtime runs them, saturating by default."""
    size = [len(values)]
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["y"]),
        ],
        "round_trip",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, size)],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (result,) = session.run(None, {"x": values})
    return np.asarray(result, dtype=np.float32)


def test_the_type_is_the_one_of_the_numbers() -> None:
    bytes_ = np.arange(0x7F, dtype=np.uint8)
    np.testing.assert_array_equal(bytes_.view(FLOAT8).astype(np.float64), NUMBERS)
    assert max(NUMBERS) == LARGEST


def hard_values() -> Floats:
    """Every number, every tie between two, its neighbours in float32, and what saturates."""
    numbers = np.array(NUMBERS, dtype=np.float32)
    ties = (numbers[1:] + numbers[:-1]) / 2
    far = np.array([464, 480, 1e4, np.finfo(np.float32).max, np.inf, 1e-30], dtype=np.float32)
    positive = np.concatenate([numbers, ties, np.nextafter(ties, 0), np.nextafter(ties, 1e9), far])
    return np.concatenate([positive, -positive]).astype(np.float32)


@pytest.mark.parametrize("opset", [19, 20, 21, 23])
def test_hard_values_round_as_onnx_runtime_does(opset: int) -> None:
    """Bit for bit, signs of zeros included."""
    values = hard_values()
    found = Float8(1.0).round_trip(values)
    wanted = onnx_round_trip(values, 1.0, opset)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))
    assert np.isnan(Float8(1.0).round_trip(np.array([np.nan], dtype=np.float32))).all()


def test_hard_values_round_to_the_nearest() -> None:
    values = hard_values()
    wanted = [nearest(float(value)) for value in values]
    np.testing.assert_array_equal(Float8(1.0).round_trip(values), wanted)


@examples(50)
@given(values=VALUES, scale=SCALES)
def test_values_round_as_onnx_runtime_does(values: Floats, scale: float) -> None:
    wanted = onnx_round_trip(values, scale, 19)
    found = Float8(scale).round_trip(values)
    np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))


@given(values=VALUES, scale=SCALES)
def test_values_round_to_the_nearest(values: Floats, scale: float) -> None:
    """The quotient is float32's; what follows is exact but for the last product."""
    quotients = (values / np.float32(scale)).astype(np.float64)
    wanted = [nearest(float(value)) * scale for value in quotients]
    np.testing.assert_allclose(Float8(scale).round_trip(values), wanted, rtol=1e-6, atol=0)


@given(low=st.floats(-1e5, 1e5, width=32), high=st.floats(-1e5, 1e5, width=32))
def test_ranges_are_covered(low: float, high: float) -> None:
    scale = Float8.from_range(min(low, high), max(low, high))
    peak = max(-low, -high, low, high)
    assert scale.scale == max(peak / 448, SMALLEST_SCALE)
    assert scale.range == (-448 * scale.scale, 448 * scale.scale)
    values = np.array([low, high, 0, -0.0], dtype=np.float32)
    restored = scale.round_trip(values)
    # Half of a step of 1/8 where 3 bits of mantissa are there, half of 2 ** -9 scales below.
    errors = np.abs(restored.astype(np.float64) - values)
    assert (errors <= np.maximum(np.abs(values) / 16, 2**-10 * scale.scale) * (1 + 1e-6)).all()
    assert not restored[2:].any()


def test_ranges_of_one_sign_and_of_nothing() -> None:
    assert Float8.from_range(2.0, 7.0).scale == 7 / 448
    assert Float8.from_range(-7.0, -2.0).scale == 7 / 448
    assert Float8.from_range(0.0, 0.0).scale == SMALLEST_SCALE


@given(weight=WEIGHTS)
def test_weights_round_to_the_nearest(weight: Floats) -> None:
    rounded = round_weight(weight)
    assert rounded.values.dtype == FLOAT8
    assert rounded.values.shape == weight.shape
    assert rounded.scales.dtype == np.float32
    peaks = np.abs(weight).max(axis=0).astype(np.float64)
    np.testing.assert_allclose(rounded.scales, np.maximum(peaks / 448, SMALLEST_SCALE), rtol=1e-6)
    # Also FP16 can hold the scales of weights.
    np.testing.assert_allclose(rounded.scales.astype(np.float16), rounded.scales, rtol=1e-3)
    wanted = [[nearest(float(item)) for item in row] for row in weight / rounded.scales]
    np.testing.assert_array_equal(rounded.values.astype(np.float64), wanted)
    exact = np.array(wanted) * rounded.scales
    np.testing.assert_allclose(rounded.dequantized(), exact, rtol=1e-6, atol=0)


def test_a_channel_of_zeros_and_one_of_tiny_numbers() -> None:
    weight = np.array([[0, 1e-5], [0, -2e-5]], dtype=np.float32)
    rounded = round_weight(weight)
    assert not rounded.dequantized()[:, 0].any()
    np.testing.assert_allclose(rounded.dequantized()[:, 1], weight[:, 1], rtol=1 / 16)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-60])
def test_impossible_scales_are_refused(scale: float) -> None:
    with pytest.raises(InputError, match="scale must be positive and finite"):
        Float8(scale)
