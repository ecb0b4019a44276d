"""FP8 numbers of TensorRT's kind (ONNX QuantizeLinear to FLOAT8E4M3FN, opset 19).

E4M3: 4 bits of exponent, 3 of mantissa, NaN but no infinity, 448 the largest. ml_dtypes, which onnx
itself needs, gives numpy the type.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from regcache.passes.affine import Floats, check_scale

FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = 448.0
# A pass that stores scales in FP16 would flatten smaller ones. Numbers of the same 3 bits of
# mantissa reach down to 2 ** -6 of the scale, so that small ranges lose nothing that counts.
SMALLEST_SCALE = float(np.finfo(np.float16).tiny)


@dataclass(frozen=True)
class Float8:
    """real = E4M3 number * scale, one scale for the whole tensor, no zero point.

    Raises InputError where the scale is not positive and finite.
    """

    scale: float
    dtype: ClassVar[str] = "float8e4m3fn"
    zero_point: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @classmethod
    def from_range(cls, low: float, high: float) -> "Float8":
        """The scale that takes the larger magnitude of [low, high] to 448.

        Never under float16's smallest normal number: ranges within +-0.027 use fewer exponents.
        """
        return cls(max(max(-low, high) / LARGEST, SMALLEST_SCALE))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest real number that is not clipped."""
        return -LARGEST * self.scale, LARGEST * self.scale

    def round_trip(self, values: Floats) -> Floats:
        """float32 `values` as they come back from QuantizeLinear and DequantizeLinear."""
        scale = np.float32(self.scale)
        return np.asarray(_to_float8(values / scale).astype(np.float32) * scale)


@dataclass(frozen=True, eq=False)
class Float8Weight:
    """A weight as E4M3 numbers [K, N] (dtype FLOAT8), and a scale per output channel, float32 [N].

    TensorRT-RTX 1.7 multiplies in FP8 with these as with one scale for the whole weight.
    """

    values: NDArray[Any]
    scales: NDArray[np.float32]

    def dequantized(self) -> NDArray[np.float32]:
        """The float32 weight [K, N] that the numbers and scales stand for."""
        return np.asarray(self.values.astype(np.float32) * self.scales)


def round_weight(weight: NDArray[np.float32]) -> Float8Weight:
    """The nearest E4M3 numbers of a weight [K, N]; each output channel's peak goes to 448.

    Scales stay at or above float16's smallest normal number, as those of activations do.
    """
    peaks = np.abs(weight).max(axis=0).astype(np.float32)
    scales = np.maximum(peaks / np.float32(LARGEST), np.float32(SMALLEST_SCALE))
    return Float8Weight(_to_float8(weight / scales), scales)


def _to_float8(values: Floats) -> NDArray[Any]:
    """Round half to even, and saturate: numpy's own cast makes NaN of what is too large."""
    return np.clip(values, -LARGEST, LARGEST).astype(FLOAT8)
