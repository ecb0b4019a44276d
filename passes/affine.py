"""Affine quantization of a tensor to 8 bits or fewer (ONNX QuantizeLinear, opset 13)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError

IntegerType = Literal["int8", "uint8"]
Floats = NDArray[np.float32]

# The finest scale whose steps are normal numbers, short of a few bits.
_FINEST = float(np.finfo(np.float32).tiny) * 256


def check_bits(bits: int) -> None:
    """Raise InputError where `bits` is not from 2 to 8."""
    if not 2 <= bits <= 8:
        raise InputError(f"quantization takes 2 to 8 bits, not {bits}")


def check_scale(scale: float) -> None:
    """Raise InputError where `scale`, as float32, is not positive and finite."""
    if not (np.isfinite(np.float32(scale)) and np.float32(scale) > 0):
        raise InputError(f"a quantization scale must be positive and finite, not {scale}")


@dataclass(frozen=True)
class Affine:
    """real = (integer - zero_point) * scale, one pair for the whole tensor.

    With fewer than 8 `bits` the integers are stored in `dtype` all the same, but stay within
    `limits`. Raises InputError where the numbers make no quantization.
    """

    scale: float
    zero_point: int
    dtype: IntegerType
    bits: int = 8

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_scale(self.scale)
        low, high = self.limits
        if not low <= self.zero_point <= high:
            kind = self.dtype if self.bits == 8 else f"{self.dtype} of {self.bits} bits"
            raise InputError(f"zero point {self.zero_point} does not fit {kind}")

    @classmethod
    def from_range(
        cls, low: float, high: float, dtype: IntegerType, *, symmetric: bool, bits: int = 8
    ) -> "Affine":
        """The finest scale that covers [low, high], widened to hold 0, which stays exact.

        `symmetric` puts the zero point in the middle (0 for int8, 2 ** (bits - 1) for uint8) and
        leaves out the lowest integer, as TensorRT does. Raises InputError unless `bits` is 2 to 8.
        """
        check_bits(bits)
        first, last = _limits(dtype, bits)
        low, high = min(low, 0.0), max(high, 0.0)
        if symmetric:
            middle = (first + last + 1) // 2
            return cls(max(-low, high, _FINEST) / (last - middle), middle, dtype, bits)
        scale = max(high - low, _FINEST) / (last - first)
        return cls(scale, int(np.clip(round(first - low / scale), first, last)), dtype, bits)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest integer: (0, 255) for uint8 of 8 bits, (-8, 7) for int8 of 4."""
        return _limits(self.dtype, self.bits)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest real number that the integers stand for."""
        first, last = self.limits
        return (first - self.zero_point) * self.scale, (last - self.zero_point) * self.scale

    def quantize(self, values: Floats) -> NDArray[np.float32]:
        """The integers of float32 `values`, as floats: round half to even, then saturate."""
        rounded = np.rint(values / np.float32(self.scale)) + np.float32(self.zero_point)
        return np.asarray(np.clip(rounded, *self.limits), dtype=np.float32)

    def round_trip(self, values: Floats) -> Floats:
        """`values` as they come back from QuantizeLinear and DequantizeLinear, in a new array."""
        scale = np.float32(self.scale)
        first, last = (np.float32(limit - self.zero_point) for limit in self.limits)
        # Calibration does this more often than anything else: all steps in the array of the first.
        back = np.asarray(values / scale, dtype=np.float32)
        np.rint(back, out=back)
        np.clip(back, first, last, out=back)
        back *= scale
        return back


def _limits(dtype: IntegerType, bits: int) -> tuple[int, int]:
    half = 2 ** (bits - 1)
    return (0, 2 * half - 1) if dtype == "uint8" else (-half, half - 1)
