"""Calibrators that choose a range from the values of an activation alone.

Every calibrator takes `rows` [S, K] float32, sampled values in the activation's own unit, and the
`low` and `high` observed over all values; it returns the scale of the whole tensor. The range holds
0 and, up to the rounding of the zero point, nothing beyond [low, high]. All raise InputError unless
`bits` is 2 to 8.
"""

import math
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.ranges import Bounds, Floats, search_range
from regcache.passes.affine import Affine, IntegerType

# Percent of the values that a percentile range keeps: among those that Wu et al. compare.
_KEPT = 99.99
# Histogram bins on each side of the one around 0, the least that a clip keeps, as in TensorRT
# (fewer may match by accident), and how many apart the clips lie that are tried.
_BINS = 2048
_FEWEST = 128
_STRIDE = 8
# Values ascribed to a bin that the quantized histogram leaves empty, as in MXNet: keeps log finite.
_SMOOTHING = 1e-4


class ScaleByValues(Protocol):
    """A calibrator that looks at an activation alone, not at the layers that read it."""

    def __call__(
        self,
        rows: Floats,
        low: float,
        high: float,
        dtype: IntegerType,
        *,
        symmetric: bool,
        bits: int = 8,
    ) -> Affine:
        """The affine scale of an activation, of sampled `rows` [S, K] and values in [low, high]."""


def min_max_scale(
    rows: Floats, low: float, high: float, dtype: IntegerType, *, symmetric: bool, bits: int = 8
) -> Affine:
    """The scale that covers all that was observed; `rows` are not read."""
    return Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)


def percentile_scale(
    rows: Floats, low: float, high: float, dtype: IntegerType, *, symmetric: bool, bits: int = 8
) -> Affine:
    """The scale that covers 99.99 % of the sampled values (Wu et al. 2020, arXiv 2004.09602).

    Cuts half of the rest off either end; where `symmetric`, the largest magnitudes. The sample
    holds the first and the largest row of an image among 4 to 10 rows, not among all its tokens
    (see RowSample), so that of all values a far smaller share than 0.01 % is cut. One huge channel
    of one token per image is already more than 0.01 % of the sample below about 1,000 channels,
    and stays in range.
    """
    if symmetric:
        last = float(np.percentile(np.abs(rows), _KEPT))
        first = -last
    else:
        tail = (100 - _KEPT) / 2
        first, last = (float(end) for end in np.percentile(rows, (tail, 100 - tail)))
    return Affine.from_range(
        max(first, low), min(last, high), dtype, symmetric=symmetric, bits=bits
    )


def mse_scale(
    rows: Floats, low: float, high: float, dtype: IntegerType, *, symmetric: bool, bits: int = 8
) -> Affine:
    """The scale of least squared error, rounding and clipping, of the sampled values themselves.

    Choukroun et al. 2019 (OMSE, arXiv 1902.06822), over the shares of [low, high] that
    `choose_scale` tries, cut to [low, high].
    """

    def inside(bounds: Bounds) -> Affine:
        first, last = max(bounds[0], low), min(bounds[1], high)
        return Affine.from_range(first, last, dtype, symmetric=symmetric, bits=bits)

    def error(bounds: Bounds) -> float:
        return float(np.square(inside(bounds).round_trip(rows) - rows).sum())

    return inside(search_range(error, low, high, symmetric=symmetric))


def entropy_scale(
    rows: Floats, low: float, high: float, dtype: IntegerType, *, symmetric: bool, bits: int = 8
) -> Affine:
    """The scale whose clip loses least information of the histogram of the sampled values.

    Migacz, "8-bit inference with TensorRT", GTC 2017, as MXNet has it for signed values: among
    clips |x| <= t, t from 128 to 2048 of 2048 bins, the least Kullback-Leibler divergence of
    the quantized from the clipped histogram. A range that is not symmetric is [low, high] cut to
    [-t, t]. Of clips as good as each other the widest is taken.
    """
    limit = max(-low, high)
    whole = Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)
    width = np.float32(limit / _BINS)
    if not width > 0:
        return whole
    places = np.clip(np.rint(rows.ravel() / width), -_BINS, _BINS).astype(np.intp)
    counts = np.bincount(places + _BINS, minlength=2 * _BINS + 1)
    centres = np.arange(-_BINS, _BINS + 1, dtype=np.float32) * width

    best, least = whole, math.inf
    for clip in range(_BINS, _FEWEST - 1, -_STRIDE):
        bound = limit * clip / _BINS
        first, last = max(low, -bound), min(high, bound)
        scale = Affine.from_range(first, last, dtype, symmetric=symmetric, bits=bits)
        lost = _divergence(counts, scale.quantize(centres).astype(np.intp), clip)
        if lost < least:
            best, least = scale, lost
    return best


def _divergence(counts: NDArray[np.intp], integers: NDArray[np.intp], clip: int) -> float:
    """KL(P || Q) in nats of clipping a histogram to the `clip` bins on each side of its middle.

    `counts` [2 * _BINS + 1] are the values in each bin, `integers` what its centre is rounded to.
    P is the histogram with what is clipped moved into its end bins. Q has only what is kept, the
    values of each integer spread evenly over its bins that are not empty in P: without the clipped
    values, a clip costs something. Infinite where nothing is kept.
    """
    window = slice(_BINS - clip, _BINS + clip + 1)
    kept, levels = counts[window], integers[window] - integers.min()
    clipped = kept.copy()
    clipped[0] += counts[: window.start].sum()
    clipped[-1] += counts[window.stop :].sum()
    filled = clipped > 0
    total = kept.sum()
    if not total:
        return math.inf
    values = np.bincount(levels, weights=kept)
    spread = values / np.maximum(np.bincount(levels, weights=filled), 1)
    quantized = np.maximum(spread[levels][filled], _SMOOTHING) / total
    reference = clipped[filled] / counts.sum()
    return float((reference * np.log(reference / quantized)).sum())
