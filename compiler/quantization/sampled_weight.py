"""A sample of a weight's columns, enough to choose between ways to round."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array
from regcache.compiler.calibration.ranges import COLUMNS, ErrorMeasure, output_error, some_columns

Floats = NDArray[np.float32]

# So many are enough to choose a range by, which is a single number.
_FEWER = 32


@dataclass(frozen=True)
class SampledWeight:
    """The weights of the linears that read an activation of K channels, sampled.

    `columns` [K, n]: at most 192 output channels from all over the weights; `peaks` [K]: each input
    channel's largest magnitude, over all output channels; `few` [K, n]: at most 32 of the columns.
    """

    columns: Array
    peaks: Floats
    few: Array

    @classmethod
    def of(cls, weights: Sequence[Floats], algebra: Algebra = NUMPY) -> "SampledWeight":
        """A sample of the matrices [K, N] that read one activation, where `algebra` computes."""
        columns = algebra.put(some_columns(weights, COLUMNS))
        peaks = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
        return cls(columns, peaks, some_columns([columns], _FEWER))

    def error_behind(self, factors: Array) -> ErrorMeasure:
        """||D f few||^2 of D [S, K], which rounding adds to the activation divided by f [K]."""
        return output_error([self.few * factors[:, None]])
