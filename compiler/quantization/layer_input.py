"""Second moments of what a site's linears read once the activation is rounded."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import Algebra, Array
from regcache.compiler.calibration.number_format import EVENLY, Emphasis, Scale
from regcache.compiler.calibration.stored_rows import StoredRows

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Moments of `rows` rows of a site's rounded input X [rows, K].

    `gram`: X^T X, float64 [K, K], where an algebra computes. `lost`: X^T (F - X), where F is X in
    float. `total`, `float_total` [K]: sums of the rows, rounded and not. `gram` and `lost` count
    rows as an Emphasis says.
    """

    rows: int
    gram: Array
    total: Doubles
    float_total: Doubles
    lost: Array


@dataclass(frozen=True)
class LayerInput:
    """The input [..., K] of a site's linears, by rows that calibration stored.

    `shifts`, `factors` [K]: what was taken off its channels since, and what they were divided by
    then; None for nothing. `scale`: rounds it; None leaves it in float. `emphasis`: how rows count.
    """

    stored: StoredRows
    scale: Scale | None = None
    shifts: Floats | None = None
    factors: Floats | None = None
    emphasis: Emphasis = EVENLY

    def moments(
        self, algebra: Algebra, *, with_gram: bool = True, with_lost: bool = False
    ) -> Moments:
        """The moments of all rows. A matrix that is not asked for is empty, [0, 0]."""
        channels = self.stored.channels
        total, float_total = np.zeros(channels), np.zeros(channels)
        gram = algebra.zeros(channels if with_gram else 0)
        lost = algebra.zeros(channels if with_lost else 0)
        for rows in self.stored.chunks(whole_images=self.emphasis != EVENLY):
            plain = rows if self.shifts is None else rows - self.shifts
            plain = plain if self.factors is None else plain / self.factors
            rounded = plain if self.scale is None else self.scale.round_trip(plain)
            counted = algebra.put(self.emphasis.of(rounded, self.stored.kept))
            if with_gram:
                gram += algebra.gram(counted)
            if with_lost:
                less = self.emphasis.of(plain - rounded, self.stored.kept)
                lost += algebra.cross(counted, algebra.put(less))
            total += rounded.sum(axis=0, dtype=np.float64)
            float_total += plain.sum(axis=0, dtype=np.float64)
        return Moments(self.stored.count, gram, total, float_total, lost)
