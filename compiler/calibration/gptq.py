"""Round weights so that their errors cancel at the layer's output (GPTQ, arXiv 2210.17323)."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# Rows whose corrections are collected before the rest of the weight is touched.
_LAZY = 32
# Shares of a channel's largest weight that its integers may end at.
CLIPS = np.linspace(1.0, 0.76, 9)
# Output channels whose normal equations are solved at a time, and what keeps these regular.
_COLUMNS, RIDGE = 256, 1e-6
# A triangle up to this size is inverted as any other matrix.
_SMALL = 64
_TINY = float(np.finfo(np.float32).tiny)


def round_by_error(
    weight: Floats,
    gram: Doubles,
    steps: Floats,
    last: int,
    block_size: int | None = None,
    *,
    first: int | None = None,
    damping: float = 0.01,
) -> NDArray[np.int8]:
    """Integers from `first` (by default -`last`) to `last` that times `steps` disturb X W least.

    `weight` [K, N]; `gram` [K, K] is X^T X of the inputs X as the layer will read them; `steps`
    float32 [blocks, N], one row for each `block_size` consecutive input channels (all by default).
    Input channels are rounded in the order of their second moment, and each error is made good by
    the channels to come. `damping`: the share of the mean second moment that is added to all, for
    few rows make a Gram matrix singular.
    """
    lowest = -last if first is None else first

    def nearest(values: Floats) -> Floats:
        return np.asarray(np.clip(np.rint(values), lowest, last))

    size = block_size or len(weight)
    return round_to(weight, gram, steps, nearest, size, damping=damping, dtype=np.int8)


def round_to(
    weight: Floats,
    gram: Doubles,
    steps: Floats,
    nearest: Callable[[Floats], Floats],
    block_size: int,
    *,
    damping: float,
    dtype: type[np.generic] = np.float32,
) -> NDArray[Any]:
    """Numbers of any format that times `steps` disturb X W least; see round_by_error.

    `nearest` gives those of the format that are nearest to values; `dtype` holds them. A step of
    zero stands for zeros.
    """
    rows = len(weight)
    diagonal = np.diag(gram).copy()
    order = np.argsort(-diagonal, kind="stable")
    upper = _upper_of_inverse(gram, order, damping)
    left = weight[order].astype(np.float32)
    block = order // block_size
    found = np.empty(weight.shape, dtype)
    divisors = np.where(steps != 0, steps, np.float32(1))
    for start in range(0, rows, _LAZY):
        end = min(start + _LAZY, rows)
        errors = np.empty((end - start, weight.shape[1]), np.float32)
        for row in range(start, end):
            step = steps[block[row]]
            numbers = nearest(left[row] / divisors[block[row]])
            found[order[row]] = numbers
            error = (left[row] - numbers * step) / upper[row, row]
            left[row + 1 : end] -= np.outer(upper[row, row + 1 : end], error)
            errors[row - start] = error
        left[end:] -= upper[start:end, end:].T @ errors
    return found


def choose_steps(
    weight: Floats,
    moments: Doubles,
    last: int,
    block_size: int | None = None,
    *,
    first: int | None = None,
) -> Floats:
    """Steps [blocks, N] of a weight [K, N] that round and clip it with the least error.

    One row for each `block_size` consecutive input channels (all by default; the last block may be
    shorter). Errors count by `moments` [K], the mean square of each input channel. The step that
    clips nothing is among the candidates; a block that holds zeros alone gets a step of 1. Where
    the integers go further down, to `first`, than up, the step's sign takes the largest there.
    """
    rows, columns = weight.shape
    size = block_size or rows
    count = -(-rows // size)
    padded = np.zeros((count * size, columns), np.float32)
    padded[:rows] = weight
    blocks = padded.reshape(count, size, columns)
    counts = np.zeros(count * size, np.float32)
    counts[:rows] = moments / max(float(moments.mean()), _TINY)
    counts = counts.reshape(count, size, 1)
    lowest = -last if first is None else first
    peaks = np.abs(blocks).max(axis=1)
    largest = np.where(peaks > 0, peaks / np.float32(-lowest), np.float32(1)).astype(np.float32)
    largest = np.maximum(largest, np.float32(_TINY))
    if -lowest > last:
        largest = np.where((peaks > 0) & (blocks.max(axis=1) >= peaks), -largest, largest)
    best, least = largest.copy(), np.full(largest.shape, np.inf, np.float32)
    for clip in CLIPS:
        steps = (largest * np.float32(clip))[:, None]
        rounded = np.clip(np.rint(blocks / steps), lowest, last) * steps
        error = (np.square(rounded - blocks) * counts).sum(axis=1)
        better = error < least
        best, least = np.where(better, steps[:, 0], best), np.where(better, error, least)
    return best


def refit_steps(
    weight: Floats,
    gram: Doubles,
    integers: NDArray[np.int8],
    steps: Floats,
    block_size: int,
    damping: float,
) -> Floats:
    """The steps [blocks, N] with which given integers [K, N] disturb X W least.

    The normal equations of each output channel, one unknown for each block of input channels. A
    block that is rounded to zeros keeps its step; so do all of a channel where one would change
    its sign, for the others were solved along with it.
    """
    damped, starts = _damped(gram, damping), np.arange(0, len(weight), block_size)
    refit = steps.copy()
    for column in range(0, weight.shape[1], _COLUMNS):
        part = slice(column, column + _COLUMNS)
        rounded = integers[:, part].astype(np.float64)
        wanted = np.add.reduceat(rounded * (damped @ weight[:, part]), starts, axis=0)
        matrix = np.empty((rounded.shape[1], len(starts), len(starts)))
        for block, start in enumerate(starts):
            rows = slice(start, start + block_size)
            products = rounded * (damped[:, rows] @ rounded[rows])
            matrix[:, :, block] = np.add.reduceat(products, starts, axis=0).T
        diagonal = np.einsum("nbb->nb", matrix)
        diagonal += np.where(diagonal > 0, diagonal * RIDGE, 1.0)
        refitted = np.linalg.solve(matrix, wanted.T[..., None])[..., 0].T
        kept = steps[:, part]
        signs = np.sign(refitted) * np.sign(kept)
        refit[:, part] = np.where((signs > 0) & (signs >= 0).all(axis=0), refitted, kept)
    return refit


def _damped(gram: Doubles, damping: float) -> Doubles:
    """A copy of a Gram matrix with a share of the mean second moment added to all."""
    damped = gram.copy()
    diagonal = np.einsum("kk->k", damped)
    diagonal += max(float(diagonal.mean()) * damping, _TINY)
    return damped


def _upper_of_inverse(gram: Doubles, order: NDArray[np.intp], damping: float) -> Floats:
    """U, upper triangular, with U^T U the inverse of the damped `gram`, in the given order."""
    # With the rows in reverse, the inverse's factor is the inverse of a Cholesky factor.
    backwards = order[::-1]
    lower = np.linalg.cholesky(_damped(gram[np.ix_(backwards, backwards)], damping))
    _invert_lower(lower)
    return np.asarray(lower[::-1, ::-1], np.float32)


def _invert_lower(lower: NDArray[np.floating]) -> None:
    """Invert a lower triangular matrix in its place, by halves."""
    size = len(lower)
    if size <= _SMALL:
        lower[:] = np.linalg.inv(lower)
        return
    half = size // 2
    first, last = lower[:half, :half], lower[half:, half:]
    _invert_lower(first)
    _invert_lower(last)
    lower[half:, :half] = -(last @ lower[half:, :half] @ first)
