"""Statistics of an activation in two halves of the images, for cross-checking.

What is chosen on one half is judged on the other.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import Algebra, Array
from regcache.compiler.calibration.placing import algebra_of

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Observed:
    """Statistics of an activation [..., K] over some images.

    `lows`, `highs` [K]: smallest and largest value of each channel; `rows` [S, K]: a sample of its
    rows, which may live on a device. All float32, and never written to.
    """

    lows: Floats
    highs: Floats
    rows: Array

    @property
    def low(self) -> float:
        """Smallest value of any channel."""
        return float(self.lows.min())

    @property
    def high(self) -> float:
        """Largest value of any channel."""
        return float(self.highs.max())

    def shifted(self, shifts: Floats) -> "Observed":
        """The same activation with `shifts` [K] taken off its channels."""
        rows = self.rows - algebra_of(self.rows).put(shifts)
        return Observed(self.lows - shifts, self.highs - shifts, rows)

    def divided(self, factors: Floats) -> "Observed":
        """The same activation with its channels divided by positive `factors` [K]."""
        rows = self.rows / algebra_of(self.rows).put(factors)
        return Observed(self.lows / factors, self.highs / factors, rows)

    def turned(self, turn: Callable[[Floats], Floats]) -> "Observed":
        """The same activation after `turn`, which mixes channels: its range is that of the rows."""
        rows = turn(np.asarray(self.rows, np.float32))
        return Observed(rows.min(axis=0), rows.max(axis=0), rows)

    def on(self, algebra: Algebra) -> "Observed":
        """The same with its rows where `algebra` computes."""
        return replace(self, rows=algebra.put(self.rows))


@dataclass(frozen=True)
class Fold:
    """One half of the images, `fit`, to choose by, and the other half, to judge the choice."""

    fit: Observed
    other: Observed

    def shifted(self, shifts: Floats) -> "Fold":
        """Both halves with `shifts` [K] taken off the channels."""
        return Fold(self.fit.shifted(shifts), self.other.shifted(shifts))

    def divided(self, factors: Floats) -> "Fold":
        """Both halves with the channels divided by positive `factors` [K]."""
        return Fold(self.fit.divided(factors), self.other.divided(factors))


class Halved(Protocol):
    """Statistics of an activation over all images, and over each half of them apart."""

    @property
    def whole(self) -> Observed:
        """The statistics over all images."""

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Each half as `fit`, with the other half; none where there was a single image."""


@dataclass(frozen=True)
class Suggested:
    """A number for each channel, float32 [K], chosen once by all images and once by each half.

    `whole`: by all images; `folds`: by each fold's `fit`, in the order of the folds.
    """

    whole: Floats
    folds: tuple[Floats, ...]

    @classmethod
    def by(cls, suggest: Callable[[Observed], Floats], statistics: Halved) -> Self:
        """The numbers that `suggest` computes of all images and of each half alone."""
        return cls(suggest(statistics.whole), tuple(suggest(fold.fit) for fold in statistics.folds))

    @classmethod
    def everywhere(cls, value: float, statistics: Halved) -> Self:
        """The same number for every channel."""
        return cls.by(lambda half: np.full_like(half.lows, value), statistics)


@dataclass(frozen=True)
class Folded:
    """Statistics of an activation when calibration is over: of all images, and in folds."""

    whole: Observed
    folds: tuple[Fold, ...]

    @classmethod
    def of(cls, statistics: Halved) -> Self:
        """The statistics observed so far."""
        return cls(statistics.whole, statistics.folds)

    def on(self, algebra: Algebra) -> "Folded":
        """The same with all rows where `algebra` computes; each half goes there once."""
        return self._each(lambda half: half.on(algebra))

    def turned(self, turn: Callable[[Floats], Floats]) -> "Folded":
        """The activation after `turn`, which makes other rows [S, K] of rows; see Observed."""
        return self._each(lambda half: half.turned(turn))

    def _each(self, change: Callable[[Observed], Observed]) -> "Folded":
        """The same with `change` made of all images and of each half, once."""
        halves = {id(half): half for fold in self.folds for half in (fold.fit, fold.other)}
        made = {key: change(half) for key, half in halves.items()}
        folds = (Fold(made[id(fold.fit)], made[id(fold.other)]) for fold in self.folds)
        return Folded(change(self.whole), tuple(folds))

    @property
    def held_out(self) -> Observed:
        """The statistics of each half as shifted and equalized by the other half's numbers, joined.

        An image's values never leave the range that was fitted to them, but those of new images do:
        a scale that is chosen by these statistics covers them better. `whole` without folds.
        """
        return join([fold.other for fold in self.folds]) if self.folds else self.whole

    def shifted(self, shifts: Suggested) -> "Folded":
        """The activation with shifts [K] taken off its channels, in each fold its own shifts."""
        pairs = zip(self.folds, shifts.folds, strict=True)
        return Folded(
            self.whole.shifted(shifts.whole), tuple(fold.shifted(own) for fold, own in pairs)
        )

    def divided(self, factors: Suggested) -> "Folded":
        """The activation with its channels divided by factors [K], each fold by its own."""
        pairs = zip(self.folds, factors.folds, strict=True)
        return Folded(
            self.whole.divided(factors.whole), tuple(fold.divided(own) for fold, own in pairs)
        )


def join(parts: Sequence[Observed]) -> Observed:
    """The statistics of several sets of images together."""
    return Observed(
        np.min([part.lows for part in parts], axis=0),
        np.max([part.highs for part in parts], axis=0),
        algebra_of(parts[0].rows).join([part.rows for part in parts]),
    )
