"""Affine quantization of a tensor to 8 bits (ONNX QuantizeLinear, opset 13)."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError

IntegerType = Literal["int8", "uint8"]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Affine:
    """real = (integer - zero_point) * scale, one pair for the whole tensor."""

    scale: float
    zero_point: int
    dtype: IntegerType

    def __post_init__(self) -> None:
        if not (np.isfinite(np.float32(self.scale)) and np.float32(self.scale) > 0):
            raise InputError(f"a quantization scale must be positive and finite, not {self.scale}")
        limits = np.iinfo(self.dtype)
        if not limits.min <= self.zero_point <= limits.max:
            raise InputError(f"zero point {self.zero_point} does not fit {self.dtype}")

    @classmethod
    def from_range(
        cls, low: float, high: float, dtype: IntegerType, *, symmetric: bool
    ) -> "Affine":
        """The finest scale that covers [low, high], widened to hold 0, which stays exact.

        `symmetric` puts the zero point in the middle (0 for int8, 128 for uint8) and leaves out
        the lowest integer, as TensorRT does.
        """
        limits = np.iinfo(dtype)
        low, high = min(low, 0.0), max(high, 0.0)
        tiny = float(np.finfo(np.float32).tiny) * 256
        if symmetric:
            middle = (limits.min + limits.max + 1) // 2
            return cls(max(-low, high, tiny) / 127, middle, dtype)
        scale = max(high - low, tiny) / 255
        return cls(
            scale, int(np.clip(round(limits.min - low / scale), limits.min, limits.max)), dtype
        )

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest real number that the integers stand for."""
        limits = np.iinfo(self.dtype)
        low, high = int(limits.min) - self.zero_point, int(limits.max) - self.zero_point
        return low * self.scale, high * self.scale

    def quantize(self, values: Floats) -> NDArray[np.float32]:
        """The integers of float32 `values`, as floats: round half to even, then saturate."""
        limits = np.iinfo(self.dtype)
        rounded = np.rint(values / np.float32(self.scale)) + np.float32(self.zero_point)
        return np.asarray(np.clip(rounded, limits.min, limits.max), dtype=np.float32)

    def round_trip(self, values: Floats) -> Floats:
        """`values` as they come back from QuantizeLinear and DequantizeLinear."""
        scale, zero_point = np.float32(self.scale), np.float32(self.zero_point)
        return np.asarray((self.quantize(values) - zero_point) * scale, dtype=np.float32)
