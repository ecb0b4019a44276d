"""Linears of block-scaled floats: activations scaled as the engine runs, weights by their error."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import Array
from regcache.compiler.calibration.gptq import round_to
from regcache.compiler.calibration.number_format import (
    EVENLY,
    Emphasis,
    NumberFormat,
    Read,
    Rounded,
    Scale,
    Weight,
    joined_weights,
    parts_of,
)
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.ranges import ErrorMeasure
from regcache.compiler.job.options import Calibrator
from regcache.passes.base import Pass
from regcache.passes.block_floats import BlockFloat, BlockFloatWeight, BlockFormat, round_weight
from regcache.passes.correct_bias import CorrectBias
from regcache.passes.encoder import Linear
from regcache.passes.quantize_block_floats import QuantizeBlockFloats

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# What a block's largest weight is taken for: below 1 it is clipped; at 1.5, NVFP4's 4 stands for
# it, and 6 for nothing. MXFP8's scales are powers of two.
_PEAKS = {
    BlockFormat.NVFP4: (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 1.07, 1.15, 1.25, 1.35, 1.5),
    BlockFormat.MXFP8: (1.0, 0.5),
}
# Coarse steps overfit, and so does making up for rounded inputs: measured on DINOv2-S, on images
# that were not calibrated on.
_DAMPING, _DRAWN = 0.05, 1.0
# The embedding is made of the class token, and of what attention adds up of the others: measured
# in four bits alone.
_EMPHASIS = {BlockFormat.NVFP4: Emphasis(first=20.0, together=1.0)}
_TINY = float(np.finfo(np.float32).tiny)


class BlockFloats(NumberFormat):
    """NVFP4 or MXFP8: each block of input channels has a scale, of activations and of weights."""

    @property
    def kind(self) -> BlockFormat:
        """Which of the two."""
        assert self.target.blocks is not None
        return self.target.blocks

    @property
    def by_lost(self) -> bool:
        return True

    @property
    def emphasis(self) -> Emphasis:
        return _EMPHASIS.get(self.kind, EVENLY)

    def scale(
        self,
        calibrator: Calibrator,
        error: Callable[[], ErrorMeasure],
        statistics: ActivationStatistics,
    ) -> BlockFloat:
        return BlockFloat.from_range(self.kind, statistics.low, statistics.high)

    def nearest(self, weight: Array) -> Array:
        stored: Floats = self.algebra.get(weight)
        return self.algebra.put(round_weight(stored, self.kind).dequantized())

    def round(self, linears: Sequence[Linear], read: Read) -> dict[str, Weight]:
        kind, get = self.kind, self.algebra.get
        weight, gram = get(joined_weights(linears, self.algebra)), get(read.gram)
        weight = make_up(weight, gram, get(read.lost))
        # One for all that read the same, so that they can become one linear.
        whole = kind.tensor_scale(float(np.abs(weight).max(initial=0)))
        scales = choose_scales(weight, np.diag(gram) / read.rows, kind, whole)
        steps = scales * np.float32(whole)
        values = round_to(weight, gram, steps, kind.nearest, kind.block_size, damping=_DAMPING)
        return {
            linear.name: BlockFloatWeight(
                kind,
                np.ascontiguousarray(values[:, part]),
                np.ascontiguousarray(scales[:, part]),
                whole,
            )
            for linear, part in parts_of(linears)
        }

    def steps(
        self, scales: Mapping[str, Scale], rounded: Rounded, only: frozenset[str] | None = None
    ) -> list[Pass]:
        floats = {name: scale for name, scale in scales.items() if isinstance(scale, BlockFloat)}
        return [
            QuantizeBlockFloats(floats, only, rounded.by_block_float),
            CorrectBias(rounded.biases),
        ]


def make_up(weight: Floats, gram: Doubles, lost: Doubles) -> Floats:
    """The weight [K, N] that makes of the rounded input X what `weight` W makes of the float F.

    The least ||F W - X W'||^2, W' being drawn to W by a share of the mean second moment. `gram` is
    X^T X and `lost` X^T (F - X). What rounding adds is spread over all directions, and inputs lie
    in few: those that hold little else count less then.
    """
    damped = gram.copy()
    diagonal = np.einsum("kk->k", damped)
    diagonal += max(float(diagonal.mean()) * _DRAWN, _TINY)
    return np.asarray(weight + np.linalg.solve(damped, lost @ weight), np.float32)


def choose_scales(
    weight: Floats, moments: Doubles, kind: BlockFormat, tensor_scale: float
) -> Floats:
    """The scales [K / block size, N] that round a weight [K, N] with the least error at its output.

    Errors count by `moments` [K], the mean square of each input channel.
    """
    size, columns = kind.block_size, weight.shape[1]
    blocks = weight.reshape(-1, size, columns)
    counts = (moments / max(float(moments.mean()), _TINY)).astype(np.float32).reshape(-1, size, 1)
    peaks = np.abs(blocks).max(axis=1)
    best = kind.scales(peaks, tensor_scale)
    least = np.full(best.shape, np.inf, np.float32)
    for share in _PEAKS[kind]:
        scales = kind.scales(peaks * np.float32(share), tensor_scale)
        steps = (scales * np.float32(tensor_scale))[:, None]
        numbers = kind.nearest_scaled(blocks, steps)
        error = (np.square(numbers * steps - blocks) * counts).sum(axis=1)
        better = error < least
        best, least = np.where(better, scales, best), np.where(better, error, least)
    return best
