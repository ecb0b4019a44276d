"""The number formats of linears: each chooses scales, rounds weights and makes its pass."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array, nearest_blocks
from regcache.compiler.calibration.calibrators import (
    ScaleByValues,
    entropy_scale,
    min_max_scale,
    mse_scale,
    percentile_scale,
)
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.ranges import ErrorMeasure, choose_float8, choose_scale
from regcache.compiler.job.options import FLOAT8_CALIBRATORS, Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.base import Pass
from regcache.passes.correct_bias import CorrectBias
from regcache.passes.encoder import Linear, Role
from regcache.passes.float8 import Float8, Float8Weight, round_weight
from regcache.passes.pack_weights import BlockWeight, PackWeights
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears, RoundedWeight
from regcache.passes.round_weights import RoundWeights

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Scale = Affine | Float8
"""How one activation is rounded: `scale`, `zero_point`, `dtype`, `range` and `round_trip`."""
Weight = RoundedWeight | BlockWeight | Float8Weight

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


@dataclass(frozen=True)
class Rounded:
    """Rounded weights of linears and corrections of their biases [N], by the linear's name.

    A linear that `weights` does not name gets its nearest weights from the pass.
    """

    weights: dict[str, Weight] = field(default_factory=dict)
    biases: dict[str, Floats] = field(default_factory=dict)

    @property
    def by_channel(self) -> dict[str, RoundedWeight]:
        """The weights with one step for each output channel."""
        return {
            name: weight
            for name, weight in self.weights.items()
            if isinstance(weight, RoundedWeight)
        }

    @property
    def by_block(self) -> dict[str, BlockWeight]:
        """The weights with one step for each output channel and block of input channels."""
        return {
            name: weight for name, weight in self.weights.items() if isinstance(weight, BlockWeight)
        }


class Read(Protocol):
    """Second moments of the rounded input of linears."""

    @property
    def rows(self) -> int:
        """Over how many rows."""

    @property
    def gram(self) -> Array:
        """X^T X of the rows X, float64 [K, K], where the format's algebra computes."""


@dataclass(frozen=True)
class NumberFormat(ABC):
    """The number formats of a target's activations and weights; `algebra` tries them."""

    target: Target
    algebra: Algebra = NUMPY

    @property
    def symmetric(self) -> bool:
        """Whether activations are integers with zero point 0, so that shifting channels helps."""
        return False

    @property
    def by_error(self) -> bool:
        """Whether weights, or biases, are chosen by the error at the layers' outputs."""
        return True

    @property
    def by_gram(self) -> bool:
        """Whether weights are rounded by the Gram matrix of what their linears read."""
        return True

    @abstractmethod
    def scale(
        self,
        calibrator: Calibrator,
        error: Callable[[], ErrorMeasure],
        statistics: ActivationStatistics,
    ) -> Scale:
        """The scale of an activation, by its statistics.

        `error` makes the measure of how much rounding the activation changes its layers' outputs;
        it is called where the calibrator needs one.
        """

    @abstractmethod
    def nearest(self, weight: Array) -> Array:
        """The weight [K, N] after rounding to the nearest and dequantizing, where it lives."""

    @abstractmethod
    def round(self, linears: Sequence[Linear], read: Read) -> dict[str, Weight]:
        """The weights of a site's linears, by name, rounded by GPTQ where the format allows that.

        `read`: what they all read.
        """

    @abstractmethod
    def steps(
        self, scales: Mapping[str, Scale], rounded: Rounded, only: frozenset[str] | None = None
    ) -> list[Pass]:
        """The passes that quantize the linears behind the activations that `scales` names.

        `scales`: by the name of the activation's tensor. `only`: names of the linears to quantize;
        None for all.
        """

    def nearest_weights(self, linears: Iterable[Linear]) -> Rounded:
        """The nearest weights, where the pass cannot round them itself; empty for most formats."""
        return Rounded()


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
        weight, gram = _side_by_side(linears, algebra), read.gram
        steps = algebra.choose_steps(weight, algebra.diagonal(gram) / read.rows, last)
        integers = algebra.round_by_error(weight, gram, steps, last)
        return {
            linear.name: RoundedWeight(np.ascontiguousarray(integers[:, part]), steps[0, part])
            for linear, part in _parts(linears)
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
            whole = self._round(_side_by_side(alike, self.algebra), bits, read)
            for linear, part in _parts(alike):
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


def _side_by_side(linears: Sequence[Linear], algebra: Algebra) -> Array:
    """The weights [K, N] of linears that read the same as one [K, sum of N]."""
    return algebra.put(np.concatenate([linear.weight for linear in linears], axis=1))


def _parts(linears: Sequence[Linear]) -> Iterator[tuple[Linear, slice]]:
    """Each linear's output channels among those of all."""
    start = 0
    for linear in linears:
        end = start + linear.weight_shape[1]
        yield linear, slice(start, end)
        start = end


def block_bits(linear: Linear, bits: int) -> int:
    """The bits of a weight that is stored in blocks: 8 for the value and output projections."""
    return _WIDE_BITS if linear.role in _WIDE else bits


def number_format(target: Target, algebra: Algebra = NUMPY) -> NumberFormat:
    """The number format that a target's linears are quantized to."""
    if target.float8:
        return Float8Linears(target, algebra)
    if target.block_size is not None:
        return BlockWeights(target, algebra)
    kind = Int8 if target.activation_bits is not None else WeightsAlone
    return kind(target, algebra)
