"""Arrays of 4-bit floats that ONNX files take: two of the numbers in a byte."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.passes.block_floats import FLOAT4


class PackedFloat4(np.ndarray[Any, Any]):
    """An array of E2M1 numbers whose bytes are those of a file, the earlier number in the low half.

    numpy itself has a byte for each number, and so would what graphsurgeon writes.
    """

    @property
    def nbytes(self) -> int:
        """Bytes in a file."""
        return -(-self.size // 2)

    def tobytes(self, *_: Any) -> bytes:
        """The bytes of a file."""
        numbers = np.ascontiguousarray(self).view(np.uint8).reshape(-1) & 15
        padded = np.append(numbers, np.zeros(self.size % 2, np.uint8))
        return bytes(padded[0::2] | padded[1::2] << 4)


def packed(values: NDArray[Any]) -> NDArray[Any]:
    """The array as ONNX files take it: itself unless it holds 4-bit floats."""
    return values.view(PackedFloat4) if values.dtype == FLOAT4 else values
