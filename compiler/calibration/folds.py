"""Activations as half of the images show them, to try on the other half what that suggests."""

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
    """An activation seen: `lows`, `highs` [K] of its channels, and rows [S, K] that stand for all.

    No array is written to. `rows` may live on a device.
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

    def on(self, algebra: Algebra) -> "Observed":
        """The same with its rows where `algebra` computes."""
        return replace(self, rows=algebra.put(self.rows))


@dataclass(frozen=True)
class Fold:
    """Half of the images, which suggest something, and the other half to try it on."""

    fit: Observed
    other: Observed

    def shifted(self, shifts: Floats) -> "Fold":
        """Both with `shifts` [K] taken off the channels."""
        return Fold(self.fit.shifted(shifts), self.other.shifted(shifts))

    def divided(self, factors: Floats) -> "Fold":
        """Both with the channels divided by positive `factors` [K]."""
        return Fold(self.fit.divided(factors), self.other.divided(factors))


class Halved(Protocol):
    """What every other image showed of an activation: what one half suggests the other tries."""

    @property
    def whole(self) -> Observed:
        """What all images together show."""

    @property
    def folds(self) -> tuple[Fold, ...]:
        """Each half with the other to try it on; none where there was a single image."""


@dataclass(frozen=True)
class Suggested:
    """A number for each channel [K]: as all images suggest it, and as each fold's half does."""

    whole: Floats
    folds: tuple[Floats, ...]

    @classmethod
    def by(cls, suggest: Callable[[Observed], Floats], seen: Halved) -> Self:
        """What `suggest` makes of all images and of each half alone."""
        return cls(suggest(seen.whole), tuple(suggest(fold.fit) for fold in seen.folds))

    @classmethod
    def everywhere(cls, value: float, seen: Halved) -> Self:
        """One number for all channels."""
        return cls.by(lambda half: np.full_like(half.lows, value), seen)


@dataclass(frozen=True)
class Folded:
    """An activation whose images have all been seen, as one whole and in folds."""

    whole: Observed
    folds: tuple[Fold, ...]

    @classmethod
    def of(cls, seen: Halved) -> Self:
        """What was seen so far."""
        return cls(seen.whole, seen.folds)

    def on(self, algebra: Algebra) -> "Folded":
        """The same with all rows where `algebra` computes; each half goes there once."""
        halves = {id(half): half for fold in self.folds for half in (fold.fit, fold.other)}
        there = {key: half.on(algebra) for key, half in halves.items()}
        folds = (Fold(there[id(fold.fit)], there[id(fold.other)]) for fold in self.folds)
        return Folded(self.whole.on(algebra), tuple(folds))

    @property
    def held_out(self) -> Observed:
        """What images look like that had no say in how channels were shifted and equalized.

        Those that had one never leave the range that was fitted to them; others do.
        """
        return join([fold.other for fold in self.folds]) if self.folds else self.whole

    def shifted(self, shifts: Suggested) -> "Folded":
        """The activation with shifts [K] taken off its channels, in each fold its own."""
        pairs = zip(self.folds, shifts.folds, strict=True)
        return Folded(
            self.whole.shifted(shifts.whole), tuple(fold.shifted(one) for fold, one in pairs)
        )

    def divided(self, factors: Suggested) -> "Folded":
        """The activation with its channels divided by factors [K], in each fold its own."""
        pairs = zip(self.folds, factors.folds, strict=True)
        return Folded(
            self.whole.divided(factors.whole), tuple(fold.divided(one) for fold, one in pairs)
        )


def join(parts: Sequence[Observed]) -> Observed:
    """What several sets of images show together."""
    return Observed(
        np.min([part.lows for part in parts], axis=0),
        np.max([part.highs for part in parts], axis=0),
        algebra_of(parts[0].rows).join([part.rows for part in parts]),
    )
