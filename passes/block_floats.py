"""Numbers that share a scale in blocks of channels: NVFP4 and MXFP8, as TensorRT multiplies them.

NVFP4: E2M1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives) in blocks of 16, a scale of E4M3 for
each and one for the whole tensor. MXFP8: E4M3 in blocks of 32, a power of two (E8M0) for each.
A block's scale takes its largest magnitude to the largest number; all is rounded half to even, and
saturates. ml_dtypes, which onnx itself needs, gives numpy the types.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from regcache.passes.affine import Floats, check_scale
from regcache.passes.float8 import FLOAT8, LARGEST, SMALLEST_SCALE

FLOAT4 = np.dtype(ml_dtypes.float4_e2m1fn)
EXPONENTS = np.dtype(ml_dtypes.float8_e8m0fnu)
LARGEST_FLOAT4 = 6.0
# E8M0 stores an exponent from -127 on with this added.
EXPONENT_BIAS = 127


class BlockFormat(StrEnum):
    """A number format whose scales are those of blocks of consecutive channels."""

    NVFP4 = "nvfp4"
    MXFP8 = "mxfp8"

    @property
    def block_size(self) -> int:
        """Channels of a block."""
        return 16 if self is BlockFormat.NVFP4 else 32

    @property
    def largest(self) -> float:
        """The largest number, before it is scaled."""
        return LARGEST_FLOAT4 if self is BlockFormat.NVFP4 else LARGEST

    @property
    def dtype(self) -> np.dtype[Any]:
        """The numbers' type."""
        dtype: np.dtype[Any] = FLOAT4 if self is BlockFormat.NVFP4 else FLOAT8
        return dtype

    @property
    def onnx_name(self) -> str:
        """ONNX's name of that type."""
        return "float4e2m1fn" if self is BlockFormat.NVFP4 else "float8e4m3fn"

    def tensor_scale(self, peak: float) -> float:
        """The scale of a whole tensor whose largest magnitude is `peak`: of MXFP8 always 1.

        A power of two, so that nothing is rounded where it multiplies, in FP16 neither, and not
        below FP16's smallest normal number. Scales of E4M3 are left room for twice the peak.
        """
        if self is BlockFormat.MXFP8:
            return 1.0
        wanted = 2 * peak / (LARGEST_FLOAT4 * LARGEST)
        return max(2.0 ** math.ceil(math.log2(wanted)), SMALLEST_SCALE) if wanted > 0 else 1.0

    def nearest(self, values: Floats) -> Floats:
        """Scaled float32 values as the numbers nearest to them."""
        clipped = np.clip(values, -self.largest, self.largest)
        return np.asarray(clipped.astype(self.dtype), np.float32)

    def scales(self, peaks: Floats, tensor_scale: float) -> Floats:
        """The scales of blocks by their largest magnitudes, float32, before `tensor_scale`.

        NVFP4: E4M3, 0 where the block is too small for one. MXFP8: powers of two, rounded up so
        that nothing is clipped (OCP's own rule rounds down, and clips what lies above 448).
        """
        if self is BlockFormat.NVFP4:
            wanted = peaks / np.float32(LARGEST_FLOAT4 * tensor_scale)
            return np.asarray(np.minimum(wanted, LARGEST).astype(FLOAT8), np.float32)
        fraction, exponent = np.frexp(peaks.astype(np.float64) / LARGEST)
        up = np.where(fraction == 0.5, exponent - 1, exponent)  # a power of two stays itself
        lowest, highest = -EXPONENT_BIAS, EXPONENT_BIAS
        up = np.where(peaks > 0, np.clip(up, lowest, highest), lowest)
        return np.ldexp(np.float32(1), up).astype(np.float32)

    def nearest_scaled(self, blocks: Floats, steps: Floats) -> Floats:
        """The numbers that times `steps` are nearest to values; 0 where a step is."""
        divisors = np.where(steps > 0, steps, np.float32(1))
        return self.nearest(np.asarray(blocks / divisors, np.float32))

    def round_trip(self, values: Floats, tensor_scale: float) -> Floats:
        """float32 `values` [..., K] rounded in blocks along K, a multiple of their size."""
        blocks = values.reshape(-1, self.block_size)
        peaks = np.abs(blocks).max(axis=1, keepdims=True)
        steps = self.scales(peaks, tensor_scale) * np.float32(tensor_scale)
        rounded = self.nearest_scaled(blocks, steps) * steps
        return rounded.reshape(values.shape)


@dataclass(frozen=True)
class BlockFloat:
    """How an activation is rounded: each block of channels by its own largest magnitude.

    `scale`: of the whole tensor, a power of two. Raises InputError where that is not positive.
    """

    kind: BlockFormat
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_scale(self.scale)

    @classmethod
    def from_range(cls, kind: BlockFormat, low: float, high: float) -> "BlockFloat":
        """The format of an activation that was observed between `low` and `high`."""
        return cls(kind, kind.tensor_scale(max(-low, high)))

    @property
    def dtype(self) -> str:
        """ONNX's name of the numbers' type."""
        return self.kind.onnx_name

    @property
    def zero_point(self) -> int:
        """There is none."""
        return 0

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest real number that is not clipped."""
        scale = self.scale * LARGEST if self.kind is BlockFormat.NVFP4 else 2.0**EXPONENT_BIAS
        end = min(self.kind.largest * scale, float(np.finfo(np.float32).max))
        return -end, end

    def round_trip(self, values: Floats) -> Floats:
        """float32 `values` [..., K] as the products read them."""
        return self.kind.round_trip(values, self.scale)


@dataclass(frozen=True, eq=False)
class BlockFloatWeight:
    """A weight in blocks of input channels.

    `values`: float32 [K, N], numbers of the format. `scales`: float32 [K / block size, N], E4M3 or
    powers of two. `scale`: of the whole tensor, a power of two.
    """

    kind: BlockFormat
    values: NDArray[np.float32]
    scales: NDArray[np.float32]
    scale: float = 1.0

    def dequantized(self) -> NDArray[np.float32]:
        """The float32 weight [K, N] that the numbers and scales stand for."""
        steps = np.repeat(self.scales, self.kind.block_size, axis=0)
        return np.asarray(self.values * (steps * np.float32(self.scale)))


def round_weight(weight: NDArray[np.float32], kind: BlockFormat) -> BlockFloatWeight:
    """The nearest numbers of a weight [K, N]; each block's largest goes to the largest of them."""
    rows, columns = weight.shape
    scale = kind.tensor_scale(float(np.abs(weight).max(initial=0)))
    blocks = weight.reshape(rows // kind.block_size, kind.block_size, columns)
    scales = kind.scales(np.abs(blocks).max(axis=1), scale)
    steps = (scales * np.float32(scale))[:, None]
    values = kind.nearest_scaled(blocks, steps)
    return BlockFloatWeight(kind, values.reshape(weight.shape), scales, scale)
