"""A sample of a weight's columns, enough to choose between ways to round."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array
from regcache.compiler.calibration.ranges import ErrorMeasure, output_error

Floats = NDArray[np.float32]

# Output channels that stand for all: errors of so many tell candidates apart as those of all do.
_COLUMNS = 512


@dataclass(frozen=True)
class SampledWeight:
    """The weights of the linears that read an activation of K channels, sampled.

    `columns` [K, n]: at most 512 output channels from all over the weights; `peaks` [K]: each input
    channel's largest magnitude, over all output channels; `error`: ||D columns||^2 of D [S, K],
    which rounding adds to the activation.
    """

    columns: Array
    peaks: Floats
    error: ErrorMeasure

    @classmethod
    def of(cls, weights: Sequence[Floats], algebra: Algebra = NUMPY) -> "SampledWeight":
        """A sample of the matrices [K, N] that read one activation, where `algebra` computes."""
        total = sum(weight.shape[1] for weight in weights)
        chosen = np.arange(min(total, _COLUMNS)) * total // min(total, _COLUMNS)
        parts, start = [], 0
        for weight in weights:
            here = chosen[(start <= chosen) & (chosen < start + weight.shape[1])] - start
            parts.append(weight[:, here])
            start += weight.shape[1]
        columns = algebra.put(np.concatenate(parts, axis=1))
        peaks = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
        return cls(columns, peaks, output_error([columns]))
