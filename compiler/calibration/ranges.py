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


ErrorMeasure = Callable[[Array], float]
"""||D W||^2 of what rounding adds to an activation, D [S, K]."""


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
    """The affine scale whose rounding and clipping disturbs the layer's output least.

    `rows` [S, K] are sampled activations, `error` what the layer makes of their rounding (see
    output_error), `low` and `high` the smallest and largest value observed. Minimises
    ||(Q(X) - X) W||^2 over shares of [low, high]; the whole range is among the candidates. Clipping
    by a fixed percentile is not: it would cut the class token.
    """

    def affine(low: float, high: float) -> Affine:
        return Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)

    fine = bits == _FINE_BITS
    return affine(
        *_least_disturbing(affine, rows, error, low, high, symmetric=symmetric, fine=fine)
    )


def choose_float8(rows: Array, error: ErrorMeasure, low: float, high: float) -> Float8:
    """The E4M3 scale that disturbs the layer's output least; arguments as for choose_scale."""
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
    """The range whose scale, as `make` gives it, disturbs the layer's output least."""
    round_trip = algebra_of(rows).round_trip
    return search_range(
        lambda bounds: error(round_trip(make(*bounds), rows) - rows),
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
    """The range of least `error` among shares of [low, high]; where not `symmetric`, per end.

    `fine`: a tighter range rounds less and clips more, as it does where steps are much smaller than
    values. Then once an error is larger than the least so far by all that the widest range rounds,
    clipping alone loses more than is to be gained, and the tighter ranges are left out.
    """
    best = low, high
    least = widest = error(best)

    def tighten(ranges: Iterable[Bounds]) -> None:
        nonlocal best, least
        for bounds in ranges:
            found = error(bounds)
            if found < least:
                best, least = bounds, found
            if fine and found > least + widest:
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


def output_error(weights: Sequence[Array]) -> ErrorMeasure:
    """||D W||^2 by the matrices [K, N] that read an activation, through W W^T where smaller."""
    algebra = algebra_of(weights[0])
    weight = algebra.join(weights, axis=1) if len(weights) > 1 else weights[0]
    if weight.shape[1] <= weight.shape[0]:
        return lambda added: algebra.square_sum(added @ weight)
    gram = weight @ weight.T
    return lambda added: algebra.dot(added @ gram, added)
