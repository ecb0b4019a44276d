"""The numbers of a tensor in an ONNX message, checked against its declared shape and type."""

import numpy as np
import onnx
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line

# More numbers than any weight has: a declared size beyond it is a broken or hostile file.
_MOST_VALUES = 1 << 36
_TYPES = frozenset(
    [
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("float16", "bfloat16", "float32", "float64"),
    ]
)

_PIECE = 1 << 22


def shape_and_type(
    tensor: onnx.TensorProto, where: str
) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """The shape and numpy type that a tensor declares.

    Raises InputError, beginning with `where`, for a negative or absurd size and for a type that
    ONNX does not know, or that no encoder computes with: text, complex numbers, and those of less
    than a byte or of FP8, which quantized files hold.
    """
    shape = tuple(tensor.dims)
    count = 1
    for dim in shape:
        count *= dim
        if dim < 0 or count > _MOST_VALUES:
            raise InputError(f"{where} has no such shape: {list(shape)}")
    dtype = known_type(tensor.data_type, where)
    return shape, dtype


def known_type(number: int, where: str) -> np.dtype[np.generic]:
    """The numpy type of one of ONNX's data types, given by its number.

    Raises InputError, beginning with `where`, as shape_and_type does.
    """
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{where} has an unknown data type: {number}") from error
    if dtype.name not in _TYPES:
        kind = onnx.TensorProto.DataType.Name(number)
        raise InputError(f"{where} is of type {kind}, which no float encoder computes with")
    return dtype


def read_tensor(tensor: onnx.TensorProto, where: str) -> NDArray[np.generic]:
    """The numbers of a tensor stored in the message itself.

    Raises InputError, beginning with `where`, when they do not fit the declared shape and type.
    """
    shape_and_type(tensor, where)
    try:
        values = onnx.numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, NotImplementedError, OverflowError) as error:
        raise InputError(f"{where} cannot be read: {first_line(error)}") from error
    return np.asarray(values)


def check_finite(values: NDArray[np.generic], where: str) -> None:
    """Raise InputError where a float is no number; piece by piece, in little memory."""
    if values.dtype.kind in "iub":
        return
    flat = values.reshape(-1)
    for start in range(0, flat.size, _PIECE):
        piece = flat[start : start + _PIECE]
        floats = piece.astype(np.float32) if piece.dtype.itemsize < 4 else piece
        # A mask constant may hold -inf on purpose; a weight matrix or vector may not.
        if np.isnan(floats).any() or (flat.size > 1 and (floats == np.inf).any()):
            raise InputError(f"{where} holds NaN or infinity")
