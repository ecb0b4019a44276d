"""How close one tensor of an encoder, an output or a block's, stays to its float original."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.similarity import row_cosines

# Rounding to 8 bits alone disturbs a block by less: below it, nothing has jumped.
_ORDINARY_ERROR = 0.02
_JUMP = 3.0
# Stands for a difference that is not finite, which JSON cannot hold.
_WORST = float(np.finfo(np.float64).max)


class TensorParity(FiniteRecord):
    """One tensor, compared over all images.

    Cosines are of vectors: one for each token of [batch, tokens, channels], one for each image
    else.
    """

    name: str
    """Name of the output, or of the block whose output it is."""
    cosine_mean: float
    """Mean cosine to float."""
    cosine_min: float
    """Least cosine to float."""
    relative_error: float
    """Root of (sum of squared errors / sum of squared float values)."""
    max_abs_error: float
    """Largest difference of two numbers."""


class TensorMeter:
    """Compares one tensor batch by batch, keeping sums only."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._cosines, self._vectors, self._least = 0.0, 0, 1.0
        self._error, self._signal, self._largest = 0.0, 0.0, 0.0

    @property
    def seen(self) -> bool:
        """Whether a batch was added."""
        return self._vectors > 0

    def update(self, reference: NDArray[Any], candidate: NDArray[Any]) -> NDArray[np.float64]:
        """Add a batch [B, ...] of both; returns the cosines, [B, T] of [B, T, C] and else [B, 1].

        Raises InputError where their shapes differ.
        """
        if reference.shape != candidate.shape:
            raise InputError(
                f"{self.name!r} is {list(candidate.shape)} where the original's is "
                f"{list(reference.shape)}"
            )
        # One image at a time: a float64 copy of a whole batch of tokens would be large.
        every = []
        for one, other in zip(reference, candidate, strict=True):
            truth, found = (_vectors(item) for item in (one, other))
            cosines = row_cosines(truth, found)
            every.append(cosines)
            self._cosines += float(cosines.sum())
            self._vectors += cosines.size
            self._least = min(self._least, float(cosines.min(initial=1)))
            with np.errstate(all="ignore"):
                difference = found - truth
                self._error += float((difference**2).sum())
                self._signal += float((truth**2).sum())
                largest = float(np.abs(difference).max(initial=0))
            # NaN is never the larger of two and would get lost.
            self._largest = max(self._largest, math.inf if math.isnan(largest) else largest)
        return np.stack(every)

    def result(self) -> TensorParity:
        """The comparison of everything added so far. Raises InputError when there is nothing."""
        if not self.seen:
            raise InputError(f"nothing of {self.name!r} was compared")
        return TensorParity(
            name=self.name,
            cosine_mean=self._cosines / self._vectors,
            cosine_min=self._least,
            relative_error=_ratio(self._error, self._signal),
            max_abs_error=min(self._largest, _WORST),
        )


def first_jump(tensors: Sequence[TensorParity]) -> str | None:
    """The first of consecutive tensors whose relative error is over 3 x that of the one before.

    An error below 2 % counts as 2 %, also before the first. None where no error jumps.
    """
    before = _ORDINARY_ERROR
    for tensor in tensors:
        if tensor.relative_error > _JUMP * before:
            return tensor.name
        before = max(tensor.relative_error, _ORDINARY_ERROR)
    return None


def _vectors(image: NDArray[Any]) -> NDArray[np.float64]:
    """What one image has, [T, C] or anything else, as vectors [N, C]."""
    rows = image if image.ndim == 2 else image.reshape(1, -1)
    return rows.astype(np.float64)


def _ratio(error: float, signal: float) -> float:
    if error == 0:
        return 0.0
    if not math.isfinite(error) or not math.isfinite(signal) or signal == 0:
        return _WORST
    return math.sqrt(error / signal)
