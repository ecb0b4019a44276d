"""Cosines between embeddings in float64, with vectors that have no direction told apart."""

import numpy as np
from numpy.typing import NDArray

# Rows of a similarity matrix computed at a time, which bounds the memory on large image sets.
ROWS_AT_A_TIME = 512
# Similarities closer than this are the same: copies of one image, up to rounding.
_TIE = 1e-12


def finite_rows(vectors: NDArray[np.floating]) -> NDArray[np.bool_]:
    """[N, ...] -> [N]: whether every number of a row is finite."""
    finite: NDArray[np.bool_] = np.isfinite(vectors).reshape(len(vectors), -1).all(axis=1)
    return finite


def row_cosines(
    reference: NDArray[np.float64], candidate: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Cosines along the last axis, [..., D] and [..., D] -> [...], in [-1, 1].

    0 where either vector is zero, and -1, the worst, where either is not finite. Exactly 1 for
    equal vectors.
    """
    with np.errstate(all="ignore"):
        dots = (reference * candidate).sum(axis=-1)
        # One root of the product, not a product of roots: equal vectors then divide to 1.
        lengths = np.sqrt((reference**2).sum(axis=-1) * (candidate**2).sum(axis=-1))
        cosines = np.where(lengths == 0, 0.0, dots / lengths)
    bounded: NDArray[np.float64] = np.where(np.isfinite(lengths), np.clip(cosines, -1, 1), -1.0)
    return bounded


def unit_rows(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """[N, D] -> float64 [N, D] of length 1; rows that are zero or not finite become zero."""
    rows = np.where(finite_rows(vectors)[:, None], vectors, 0).astype(np.float64)
    lengths = np.sqrt((rows**2).sum(axis=1, keepdims=True))
    units: NDArray[np.float64] = np.divide(
        rows, lengths, out=np.zeros_like(rows), where=lengths > 0
    )
    return units


def nearest_agreement(
    reference: NDArray[np.float64], candidate: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """[N, D] and [N, D] -> [N]: whether each row's nearest other row, by cosine, is the same.

    Of several nearest rows any counts. All True below three rows, where there is no choice. False
    where a row is not finite.
    """
    agree = finite_rows(reference) & finite_rows(candidate)
    if len(reference) < 3:
        return agree
    reference, candidate = unit_rows(reference), unit_rows(candidate)
    for start in range(0, len(reference), ROWS_AT_A_TIME):
        block = slice(start, start + ROWS_AT_A_TIME)
        truth, found = reference[block] @ reference.T, candidate[block] @ candidate.T
        rows = np.arange(len(truth))
        truth[rows, start + rows] = found[rows, start + rows] = -np.inf
        agree[block] &= truth[rows, found.argmax(axis=1)] >= truth.max(axis=1) - _TIE
    return agree
