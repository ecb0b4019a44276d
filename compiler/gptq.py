"""Round weights so that their errors cancel at the layer's output (GPTQ, arXiv 2210.17323)."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Rows whose corrections are collected before the rest of the weight is touched.
_LAZY = 128
# Share of the mean second moment that is added to all: few rows make a Gram matrix singular.
_DAMPING = 0.01
# Shares of a channel's largest weight that its integers may end at.
_CLIPS = np.linspace(1.0, 0.76, 9)
_TINY = float(np.finfo(np.float32).tiny)


def round_by_error(
    weight: Floats, gram: NDArray[np.float64], steps: Floats, last: int
) -> NDArray[np.int8]:
    """Integers within +-last whose products with `steps` disturb X W least.

    `weight` [K, N]; `gram` [K, K] is X^T X of the inputs X as the layer will read them; `steps`
    float32 [G, N], one row for each K / G consecutive input channels. Input channels are rounded
    in the order of their second moment, and each error is made good by the channels to come.
    """
    rows = len(weight)
    diagonal = np.diag(gram).copy()
    damping = max(float(diagonal.mean()) * _DAMPING, _TINY)
    order = np.argsort(-diagonal, kind="stable")
    damped = gram[np.ix_(order, order)] + damping * np.eye(rows)
    upper = _upper_of_inverse(damped).astype(np.float32)
    left = weight[order].astype(np.float32)
    group = order // -(-rows // len(steps))
    found = np.empty(weight.shape, np.int8)
    for start in range(0, rows, _LAZY):
        end = min(start + _LAZY, rows)
        errors = np.empty((end - start, weight.shape[1]), np.float32)
        for row in range(start, end):
            step = steps[group[row]]
            integers = np.clip(np.rint(left[row] / step), -last, last)
            found[order[row]] = integers
            error = (left[row] - integers * step) / upper[row, row]
            left[row + 1 : end] -= np.outer(upper[row, row + 1 : end], error)
            errors[row - start] = error
        left[end:] -= upper[start:end, end:].T @ errors
    return found


def choose_steps(
    weight: Floats, moments: NDArray[np.float64], last: int, groups: int = 1
) -> Floats:
    """Steps [groups, N] of a weight [K, N] that round and clip it with the least error.

    Errors count by `moments` [K], the mean square of each input channel. The step that clips
    nothing is among the candidates; a group that holds zeros alone gets a step of 1.
    """
    rows, columns = weight.shape
    size = -(-rows // groups)
    padded = np.zeros((groups * size, columns), np.float32)
    padded[:rows] = weight
    blocks = padded.reshape(groups, size, columns)
    counts = np.zeros(groups * size, np.float32)
    counts[:rows] = moments / max(float(moments.mean()), _TINY)
    counts = counts.reshape(groups, size, 1)
    peaks = np.abs(blocks).max(axis=1)
    largest = np.where(peaks > 0, peaks / np.float32(last), np.float32(1)).astype(np.float32)
    largest = np.maximum(largest, np.float32(_TINY))
    best, least = largest.copy(), np.full(largest.shape, np.inf, np.float32)
    for clip in _CLIPS:
        steps = (largest * np.float32(clip))[:, None]
        rounded = np.clip(np.rint(blocks / steps), -last, last) * steps
        error = (np.square(rounded - blocks) * counts).sum(axis=1)
        better = error < least
        best, least = np.where(better, steps[:, 0], best), np.where(better, error, least)
    return best


def _upper_of_inverse(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """U, upper triangular, with U^T U the inverse of a positive definite matrix."""
    # With the rows in reverse, the inverse's factor is the inverse of a Cholesky factor.
    lower = np.linalg.cholesky(matrix[::-1, ::-1])
    return np.asarray(np.linalg.inv(lower)[::-1, ::-1])
