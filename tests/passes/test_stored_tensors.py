"""Numbers in an ONNX message, whatever the message says of them."""

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from support.examples import examples

from regcache.passes.errors import InputError
from regcache.passes.stored_tensors import check_finite, read_tensor, shape_and_type

TYPES = [
    *(np.float16, np.float32, np.float64, ml_dtypes.bfloat16, np.bool_),
    *(np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64),
]


def refusal(tensor: onnx.TensorProto) -> str:
    with pytest.raises(InputError) as caught:
        read_tensor(tensor, "weight 'w'")
    message = str(caught.value)
    assert message.startswith("weight 'w' ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 4), (2, 3, 4)])
def test_every_type_is_read(dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = numpy_helper.from_array(values, "w")
    assert shape_and_type(tensor, "weight") == (shape, np.dtype(dtype))
    found = read_tensor(tensor, "weight")
    assert found.dtype == values.dtype
    np.testing.assert_array_equal(found, values)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.INT64, TensorProto.FLOAT16])
def test_numbers_in_fields_of_their_own_type(kind: int) -> None:
    """As older exporters store them: float_data, int64_data, int32_data."""
    tensor = helper.make_tensor("w", kind, [2, 2], [1, 2, 3, 4])
    assert not tensor.HasField("raw_data")
    np.testing.assert_array_equal(read_tensor(tensor, "weight"), [[1, 2], [3, 4]])


@examples(60)
@given(
    kind=st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64]),
    dims=st.lists(st.integers(0, 4), max_size=3),
    size=st.integers(0, 70),
)
def test_bytes_that_do_not_fit_the_shape(kind: int, dims: list[int], size: int) -> None:
    tensor = TensorProto(data_type=kind, dims=dims, raw_data=bytes(size))
    width = np.dtype(helper.tensor_dtype_to_np_dtype(kind)).itemsize
    if size == int(np.prod(dims)) * width:
        assert read_tensor(tensor, "weight").shape == tuple(dims)
    else:
        assert "cannot be read" in refusal(tensor)


@pytest.mark.parametrize("dims", [[-1], [2, -3], [2**62, 8], [2**31, 2**31], [2**63 - 1]])
def test_sizes_that_there_are_not(dims: list[int]) -> None:
    """Said at once: nothing of that size is made."""
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=dims)
    assert "has no such shape" in refusal(tensor)


def test_a_size_without_numbers() -> None:
    tensor = TensorProto(data_type=TensorProto.FLOAT, dims=[1 << 30])
    assert "cannot be read" in refusal(tensor)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (0, "unknown data type: 0"),
        (77, "unknown data type: 77"),
        (TensorProto.STRING, "is of type STRING, which no float encoder computes with"),
        (TensorProto.COMPLEX64, "is of type COMPLEX64"),
        (TensorProto.INT4, "is of type INT4"),
        (TensorProto.FLOAT8E4M3FN, "is of type FLOAT8E4M3FN"),
        (TensorProto.FLOAT8E5M2, "is of type FLOAT8E5M2"),
    ],
)
def test_types_that_no_encoder_has(kind: int, reason: str) -> None:
    tensor = TensorProto(data_type=kind, dims=[2], raw_data=bytes(2))
    assert reason in refusal(tensor)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_numbers_that_are_none(dtype: Any, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever they stand; pieces are made small here."""
    monkeypatch.setattr("regcache.passes.stored_tensors._PIECE", 4)
    for place in range(9):
        values = np.ones((3, 3), dtype)
        check_finite(values, "weight 'w'")
        values.flat[place] = bad
        with pytest.raises(InputError, match=r"^weight 'w' holds NaN or infinity$"):
            check_finite(values, "weight 'w'")


def test_infinities_that_are_meant() -> None:
    """What a mask adds, and a limit that nothing reaches."""
    check_finite(np.array([0, -np.inf], np.float32), "mask")
    check_finite(np.array(np.inf, np.float32), "limit")
    check_finite(np.array([2**62]), "end of a Slice")
