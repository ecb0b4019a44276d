"""Choose the range of each activation by the error it makes at the output of its layers."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import Array
from regcache.compiler.calibration.placing import algebra_of
from regcache.passes.affine import Affine, IntegerType
from regcache.passes.float8 import Float8

Floats = NDArray[np.float32]
Bounds = tuple[float, float]

# Shares of the observed range that are tried, first on both ends at once, then on each alone.
_JOINT = np.linspace(0.95, 0.25, 15)
# Bits from which steps are much smaller than values.
_FINE_BITS = 8
_WIDER, _SINGLE = 1.1, (0.9, 0.8, 0.7, 0.6, 0.5)


# Output channels that stand for all: errors of so many tell candidates apart as those of all do.
COLUMNS = 192


ErrorMeasure = Callable[[Array], float]
"""||D W||^2, where D [S, K] is what rounding adds to the rows of an activation."""


def choose_scale(
    rows: Array,
    error: ErrorMeasure,
    low: float,
    high: float,
    dtype: IntegerType,
    *,
    symmetric: bool,
    bits: int = 8,
) -> Affine:
    """The affine scale whose rounding and clipping changes the layers' outputs least.

    `rows` [S, K]: sampled activations. `error`: the measure of their rounding (see output_error).
    `low`, `high`: the smallest and largest value observed. Minimises ||(Q(X) - X) W||^2 over shares
    of [low, high]; the whole range is among the candidates. Clipping by a fixed percentile is not:
    it would cut the class token.
    """

    def affine(low: float, high: float) -> Affine:
        return Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)

    fine = bits == _FINE_BITS
    return affine(
        *_least_disturbing(affine, rows, error, low, high, symmetric=symmetric, fine=fine)
    )


def choose_float8(rows: Array, error: ErrorMeasure, low: float, high: float) -> Float8:
    """The E4M3 scale that changes the layers' outputs least; arguments as for choose_scale."""
    make = Float8.from_range
    return make(*_least_disturbing(make, rows, error, low, high, symmetric=True, fine=True))


def _least_disturbing(
    make: Callable[[float, float], Affine | Float8],
    rows: Array,
    error: ErrorMeasure,
    low: float,
    high: float,
    *,
    symmetric: bool,
    fine: bool,
) -> Bounds:
    """The range whose scale, made by `make`, changes the layers' outputs least."""
    round_trip = algebra_of(rows).round_trip

    def lost(bounds: Bounds) -> float:
        added = round_trip(make(*bounds), rows)
        added -= rows
        return error(added)

    return search_range(
        lost,
        low,
        high,
        symmetric=symmetric,
        fine=fine,
    )


def search_range(
    error: Callable[[Bounds], float],
    low: float,
    high: float,
    *,
    symmetric: bool,
    fine: bool = False,
) -> Bounds:
    """The range of least `error` among shares of [low, high].

    Both ends are scaled together first, and where not `symmetric` each end alone after that.
    `fine`: steps are much smaller than values, so that a tighter range rounds less and clips more.
    Tighter ranges are then left out behind one whose error exceeds the least so far by more than
    the whole error of the widest range: clipping alone loses more than finer steps can gain.
    """
    best = low, high
    least = widest = error(best)

    def tighten(ranges: Iterable[Bounds]) -> None:
        nonlocal best, least
        for bounds in ranges:
            lost = error(bounds)
            if lost < least:
                best, least = bounds, lost
            if fine and lost > least + widest:
                return

    tighten((low * share, high * share) for share in _JOINT)
    if not symmetric:
        first, last = best
        tighten([(first * _WIDER, last)])
        tighten((first * share, last) for share in _SINGLE)
        first, last = best
        tighten([(first, last * _WIDER)])
        tighten((first, last * share) for share in _SINGLE)
    return best


def some_columns(weights: Sequence[Array], most: int) -> Array:
    """At most so many output channels [K, n] from all over the matrices [K, N]."""
    total = sum(weight.shape[1] for weight in weights)
    chosen = np.arange(min(total, most)) * total // min(total, most)
    parts, start = [], 0
    for weight in weights:
        here = chosen[(start <= chosen) & (chosen < start + weight.shape[1])] - start
        parts.append(weight[:, here])
        start += weight.shape[1]
    return algebra_of(weights[0]).join(parts, axis=1)


def output_error(weights: Sequence[Array]) -> ErrorMeasure:
    """||D W||^2 by the matrices [K, N] that read an activation; through W W^T where smaller."""
    algebra = algebra_of(weights[0])
    weight = algebra.join(weights, axis=1) if len(weights) > 1 else weights[0]
    if weight.shape[1] <= weight.shape[0]:
        return lambda added: algebra.square_sum(added @ weight)
    gram = weight @ weight.T
    return lambda added: algebra.dot(added @ gram, added)
