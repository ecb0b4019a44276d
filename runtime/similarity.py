"""Cosines between embeddings in float64, with vectors that have no direction told apart."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError

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


def nearest_rows(
    vectors: NDArray[np.floating], rows: Sequence[int], count: int
) -> list[list[tuple[int, float]]]:
    """For each of some rows of [N, D] the `count` nearest others, nearest first: (index, cosine).

    Rows that are not finite are left out; there are fewer where there are no more.
    """
    units, finite = unit_rows(vectors), finite_rows(vectors)
    found = []
    for row in rows:
        cosines = np.where(finite, units @ units[row], -np.inf)
        cosines[row] = -np.inf
        order = np.argsort(-cosines, kind="stable")[:count]
        found.append([(int(at), float(cosines[at])) for at in order if np.isfinite(cosines[at])])
    return found


def knn_top1(
    gallery: NDArray[np.floating],
    gallery_labels: Sequence[str] | Sequence[int],
    query: NDArray[np.floating],
    query_labels: Sequence[str] | Sequence[int],
    *,
    same: bool,
    k: int = 10,
    temperature: float = 0.07,
) -> float:
    """Share of queries [Q, D] that the gallery [G, D] classifies right, as DINO evaluates.

    The `k` nearest gallery embeddings by cosine (fewer in a smaller gallery) vote with weight
    exp(cosine / temperature). `same`: the query is the gallery, and no image votes for itself.
    Embeddings that are not finite never vote and are never right.
    Raises InputError when there is no query, or no gallery image left to vote.
    """
    if len(gallery) != len(gallery_labels) or len(query) != len(query_labels):
        raise ValueError("there must be one label for each embedding")
    if same and len(gallery) != len(query):
        raise ValueError("the query is not the gallery")
    k = min(k, len(gallery) - same)
    if k < 1 or len(query) == 0:
        raise InputError("too few images for nearest-neighbour classification")
    names, classes = np.unique(np.asarray(gallery_labels), return_inverse=True)
    truth, answerable = np.asarray(query_labels), finite_rows(query)
    muted = ~finite_rows(gallery)
    gallery = unit_rows(gallery)
    right = 0
    for start in range(0, len(query), ROWS_AT_A_TIME):
        block = slice(start, start + ROWS_AT_A_TIME)
        cosines = unit_rows(query[block]) @ gallery.T
        rows = np.arange(len(cosines))
        cosines[:, muted] = -np.inf
        if same:
            cosines[rows, start + rows] = -np.inf
        nearest = np.argpartition(-cosines, k - 1, axis=1)[:, :k]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / temperature)
        votes = np.zeros((len(rows), len(names)))
        np.add.at(votes, (rows[:, None], classes[nearest]), weights)
        right += int(((names[votes.argmax(axis=1)] == truth[block]) & answerable[block]).sum())
    return right / len(query)
