"""The numbers of a tensor in an ONNX message, read without trusting what it says of itself."""

import numpy as np
import onnx
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line

# More numbers than any weight has: a declared size beyond it is a broken or hostile file.
_MOST_VALUES = 1 << 36


def shape_and_type(
    tensor: onnx.TensorProto, where: str
) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
    """The shape and numpy type that a tensor declares.

    Raises InputError, beginning with `where`, for a negative or absurd size and for a type that
    numpy has no name for, or that holds no numbers (strings).
    """
    shape = tuple(tensor.dims)
    count = 1
    for dim in shape:
        count *= dim
        if dim < 0 or count > _MOST_VALUES:
            raise InputError(f"{where} has no such shape: {list(shape)}")
    try:
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{where} has an unknown data type: {tensor.data_type}") from error
    if dtype == np.dtype(object):
        raise InputError(f"{where} holds text, not numbers")
    return shape, dtype


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
