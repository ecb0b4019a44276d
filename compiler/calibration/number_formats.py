"""The number formats of linears: integers of 8 bits or fewer, floats, and weights alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array, nearest_blocks
from regcache.compiler.calibration.block_floats import BlockFloats
from regcache.compiler.calibration.calibrators import (
    ScaleByValues,
    entropy_scale,
    min_max_scale,
    mse_scale,
    percentile_scale,
)
from regcache.compiler.calibration.number_format import (
    NumberFormat,
    Read,
    Rounded,
    Scale,
    Weight,
    joined_weights,
    parts_of,
)
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.ranges import ErrorMeasure, choose_float8, choose_scale
from regcache.compiler.job.options import FLOAT8_CALIBRATORS, Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.base import Pass
from regcache.passes.correct_bias import CorrectBias
from regcache.passes.encoder import Linear, Role
from regcache.passes.float8 import Float8, round_weight
from regcache.passes.pack_weights import BlockWeight, PackWeights
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears, RoundedWeight
from regcache.passes.round_weights import RoundWeights

_BY_VALUES: Mapping[Calibrator, ScaleByValues] = {
    Calibrator.MIN_MAX: min_max_scale,
    Calibrator.PERCENTILE: percentile_scale,
    Calibrator.ENTROPY: entropy_scale,
    Calibrator.MSE: mse_scale,
}
# Coarse steps overfit: measured on DINOv2-S, on images not calibrated on.
_BLOCK_DAMPING = 0.05
# A sixth of a block's weights; at 4 bits they do as much damage as the others together (DINOv2-S).
_WIDE, _WIDE_BITS = (Role.V, Role.OUT), 8


class Int8(NumberFormat):
    """Integers of 8 bits, or of fewer stored in 8: activations per tensor, weights per channel."""

    @property
    def symmetric(self) -> bool:
        return self.target.activation_symmetric

    def scale(
        self,
        calibrator: Calibrator,
        error: Callable[[], ErrorMeasure],
        statistics: ActivationStatistics,
    ) -> Affine:
        target = self.target
        symmetric, bits = target.activation_symmetric, target.activation_bits
        assert bits is not None
        low, high, dtype = statistics.low, statistics.high, target.activation_dtype
        if calibrator in _BY_VALUES:
            by_values, values = _BY_VALUES[calibrator], self.algebra.get(statistics.rows)
            return by_values(values, low, high, dtype, symmetric=symmetric, bits=bits)
        rows = self.algebra.put(statistics.rows)
        return choose_scale(rows, error(), low, high, dtype, symmetric=symmetric, bits=bits)

    def nearest(self, weight: Array) -> Array:
        return self.algebra.nearest(weight, self.target.weight_bits)

    def round(self, linears: Sequence[Linear], read: Read) -> dict[str, Weight]:
        algebra, last = self.algebra, 2 ** (self.target.weight_bits - 1) - 1
        weight, gram = joined_weights(linears, algebra), read.gram
        steps = algebra.choose_steps(weight, algebra.diagonal(gram) / read.rows, last)
        integers = algebra.round_by_error(weight, gram, steps, last)
        return {
            linear.name: RoundedWeight(np.ascontiguousarray(integers[:, part]), steps[0, part])
            for linear, part in parts_of(linears)
        }

    def steps(
        self, scales: Mapping[str, Scale], rounded: Rounded, only: frozenset[str] | None = None
    ) -> list[Pass]:
        affine = {name: scale for name, scale in scales.items() if isinstance(scale, Affine)}
        dtype, bits = self.target.weight_dtype, self.target.weight_bits
        return [
            QuantizeLinears(affine, dtype, bits, only, rounded.by_channel),
            CorrectBias(rounded.biases),
        ]


class Float8Linears(NumberFormat):
    """FP8 numbers (E4M3), rounded to the nearest: activations per tensor, weights per channel."""

    def scale(
        self,
        calibrator: Calibrator,
        error: Callable[[], ErrorMeasure],
        statistics: ActivationStatistics,
    ) -> Float8:
        if calibrator is Calibrator.MIN_MAX:
            return Float8.from_range(statistics.low, statistics.high)
        assert calibrator in FLOAT8_CALIBRATORS
        rows = self.algebra.put(statistics.rows)
        return choose_float8(rows, error(), statistics.low, statistics.high)

    def nearest(self, weight: Array) -> Array:
        return self.algebra.nearest_float8(weight)

    @property
    def by_gram(self) -> bool:
        return False

    def round(self, linears: Sequence[Linear], read: Read) -> dict[str, Weight]:
        return {linear.name: round_weight(linear.weight) for linear in linears}

    def steps(
        self, scales: Mapping[str, Scale], rounded: Rounded, only: frozenset[str] | None = None
    ) -> list[Pass]:
        floats = {name: scale for name, scale in scales.items() if isinstance(scale, Float8)}
        return [QuantizeFloat8(floats, only), CorrectBias(rounded.biases)]


class WeightsAlone(NumberFormat):
    """Weights of few bits, rounded to the nearest and stored as float; activations stay float."""

    @property
    def by_error(self) -> bool:
        return False

    def scale(
        self,
        calibrator: Calibrator,
        error: Callable[[], ErrorMeasure],
        statistics: ActivationStatistics,
    ) -> Scale:
        raise AssertionError("activations stay float")

    def nearest(self, weight: Array) -> Array:
        return self.algebra.nearest(weight, self.target.weight_bits)

    def round(self, linears: Sequence[Linear], read: Read) -> dict[str, Weight]:
        raise AssertionError("weights are rounded to the nearest, by the pass")

    def steps(
        self, scales: Mapping[str, Scale], rounded: Rounded, only: frozenset[str] | None = None
    ) -> list[Pass]:
        return [RoundWeights(self.target.weight_bits)]


class BlockWeights(WeightsAlone):
    """Weights of few bits in blocks of input channels, stored as integers (MatMulNBits)."""

    @property
    def by_error(self) -> bool:
        return True

    def nearest(self, weight: Array) -> Array:
        return self.algebra.nearest_blocks(weight, self.target.weight_bits, self._size)

    def nearest_weights(self, linears: Iterable[Linear]) -> Rounded:
        return Rounded(
            {
                linear.name: nearest_blocks(linear.weight, self._bits(linear), self._size)
                for linear in linears
            }
        )

    def round(self, linears: Sequence[Linear], read: Read) -> dict[str, Weight]:
        rounded = dict[str, Weight]()
        for bits in dict.fromkeys(map(self._bits, linears)):
            alike = [linear for linear in linears if self._bits(linear) == bits]
            whole = self._round(joined_weights(alike, self.algebra), bits, read)
            for linear, part in parts_of(alike):
                integers = np.ascontiguousarray(whole.integers[:, part])
                steps = np.ascontiguousarray(whole.scales[:, part])
                rounded[linear.name] = BlockWeight(integers, steps, whole.block_size, bits)
        return rounded

    def _round(self, weight: Array, bits: int, read: Read) -> BlockWeight:
        algebra, size, gram = self.algebra, self._size, read.gram
        first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        moments = algebra.diagonal(gram) / read.rows
        steps = algebra.choose_steps(weight, moments, last, size, first=first)
        integers = algebra.round_by_error(
            weight, gram, steps, last, size, first=first, damping=_BLOCK_DAMPING
        )
        steps = algebra.refit_steps(weight, gram, integers, steps, size, _BLOCK_DAMPING)
        return BlockWeight(integers, steps, size, bits)

    def steps(
        self, scales: Mapping[str, Scale], rounded: Rounded, only: frozenset[str] | None = None
    ) -> list[Pass]:
        return [CorrectBias(rounded.biases), PackWeights(rounded.by_block)]

    @property
    def _size(self) -> int:
        assert self.target.block_size is not None
        return self.target.block_size

    def _bits(self, linear: Linear) -> int:
        return block_bits(linear, self.target.weight_bits)


def block_bits(linear: Linear, bits: int) -> int:
    """The bits of a weight that is stored in blocks: 8 for the value and output projections."""
    return _WIDE_BITS if linear.role in _WIDE else bits


def number_format(target: Target, algebra: Algebra = NUMPY) -> NumberFormat:
    """The number format that a target's linears are quantized to."""
    if target.float8:
        return Float8Linears(target, algebra)
    if target.blocks is not None:
        return BlockFloats(target, algebra)
    if target.block_size is not None:
        return BlockWeights(target, algebra)
    kind = Int8 if target.activation_bits is not None else WeightsAlone
    return kind(target, algebra)
