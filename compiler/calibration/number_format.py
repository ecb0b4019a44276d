"""What a number format of linears is: it chooses scales, rounds weights and makes its passes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.ranges import ErrorMeasure
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.base import Pass
from regcache.passes.block_floats import BlockFloat, BlockFloatWeight
from regcache.passes.encoder import Linear
from regcache.passes.float8 import Float8, Float8Weight
from regcache.passes.pack_weights import BlockWeight
from regcache.passes.quantize_linears import RoundedWeight

Floats = NDArray[np.float32]
Scale = Affine | Float8 | BlockFloat
"""How one activation is rounded: `scale`, `zero_point`, `dtype`, `range` and `round_trip`."""
Weight = RoundedWeight | BlockWeight | Float8Weight | BlockFloatWeight


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

    @property
    def by_block_float(self) -> dict[str, BlockFloatWeight]:
        """The weights of floats whose scales are those of blocks of input channels."""
        return {
            name: weight
            for name, weight in self.weights.items()
            if isinstance(weight, BlockFloatWeight)
        }


class Read(Protocol):
    """Second moments of the rounded input of linears."""

    @property
    def rows(self) -> int:
        """Over how many rows."""

    @property
    def gram(self) -> Array:
        """X^T X of the rows X, float64 [K, K], where the format's algebra computes."""

    @property
    def lost(self) -> Array:
        """X^T (F - X), F being the rows in float, likewise; empty unless `by_lost`."""


@dataclass(frozen=True)
class Emphasis:
    """How much rows count where weights are rounded by the rows that they meet.

    `first`: the first row of an image, its class token, in place of 1. `together`: the mean of an
    image's other rows, as a share of what all of them count alone: attention averages tokens, and
    with them what rounding does to each, but not what it does to all alike.
    """

    first: float = 1.0
    together: float = 0.0

    def of(self, rows: Floats, kept: int) -> Floats:
        """Rows [n, K] of images with `kept` rows each, so that x^T x counts them; maybe more."""
        if self == EVENLY:
            return rows
        images = rows.reshape(-1, kept, rows.shape[1])
        first, others = images[:, :1] * np.float32(math.sqrt(self.first)), images[:, 1:]
        share = np.float32(math.sqrt(self.together / max(kept - 1, 1)))
        parts = [first, others, others.sum(axis=1, keepdims=True) * share]
        return np.concatenate(parts, axis=1).reshape(-1, rows.shape[1])


EVENLY = Emphasis()
"""Every row counts as much as any other."""


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

    @property
    def by_lost(self) -> bool:
        """Whether weights also make up for what rounding takes from the input."""
        return False

    @property
    def emphasis(self) -> Emphasis:
        """How rows count in the moments that weights are rounded by, where a class token leads."""
        return EVENLY

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


def joined_weights(linears: Sequence[Linear], algebra: Algebra) -> Array:
    """The weights [K, N] of linears that read the same as one [K, sum of N]."""
    return algebra.put(np.concatenate([linear.weight for linear in linears], axis=1))


def parts_of(linears: Sequence[Linear]) -> Iterator[tuple[Linear, slice]]:
    """Each linear's output channels among those of all."""
    start = 0
    for linear in linears:
        end = start + linear.weight_shape[1]
        yield linear, slice(start, end)
        start = end
