"""Choose the range of each activation by the error it makes at the output of its layers."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from regcache.passes.affine import Affine, IntegerType
from regcache.passes.float8 import Float8

Floats = NDArray[np.float32]
Bounds = tuple[float, float]

# Shares of the observed range that are tried, first on both ends at once, then on each alone.
_JOINT = np.linspace(1.0, 0.25, 16)
_SINGLE = (1.1, 0.9, 0.8, 0.7, 0.6, 0.5)


def choose_scale(
    rows: Floats,
    weights: Sequence[Floats],
    low: float,
    high: float,
    dtype: IntegerType,
    *,
    symmetric: bool,
    bits: int = 8,
) -> Affine:
    """The affine scale whose rounding and clipping disturbs the layer's output least.

    `rows` [S, K] are sampled activations, `weights` the [K, N] matrices that read them, `low` and
    `high` the smallest and largest value observed. Minimises ||(Q(X) - X) W||^2 over shares of
    [low, high]; the whole range is among the candidates. Clipping by a fixed percentile is not:
    it would cut the class token.
    """

    def affine(low: float, high: float) -> Affine:
        return Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)

    return affine(*_least_disturbing(affine, rows, weights, low, high, symmetric=symmetric))


def choose_float8(rows: Floats, weights: Sequence[Floats], low: float, high: float) -> Float8:
    """The E4M3 scale that disturbs the layer's output least; arguments as for choose_scale."""
    make = Float8.from_range
    return make(*_least_disturbing(make, rows, weights, low, high, symmetric=True))


def _least_disturbing(
    make: Callable[[float, float], Affine | Float8],
    rows: Floats,
    weights: Sequence[Floats],
    low: float,
    high: float,
    *,
    symmetric: bool,
) -> Bounds:
    """The range whose scale, as `make` gives it, disturbs the layer's output least."""
    measure = _error_measure(rows, weights)
    return search_range(
        lambda bounds: measure(make(*bounds).round_trip(rows)), low, high, symmetric=symmetric
    )


def search_range(
    error: Callable[[Bounds], float], low: float, high: float, *, symmetric: bool
) -> Bounds:
    """The range of least `error` among shares of [low, high]; where not `symmetric`, per end."""
    best = min(((low * share, high * share) for share in _JOINT), key=error)
    if not symmetric:
        best = min([best, *((best[0] * share, best[1]) for share in _SINGLE)], key=error)
        best = min([best, *((best[0], best[1] * share) for share in _SINGLE)], key=error)
    return best


def _error_measure(rows: Floats, weights: Sequence[Floats]) -> Callable[[Floats], float]:
    """||(X' - X) W||^2 of a disturbed X', through W W^T where that is smaller than W."""
    weight = np.concatenate(weights, axis=1) if len(weights) > 1 else weights[0]
    if weight.shape[1] <= weight.shape[0]:
        return lambda disturbed: float(np.square((disturbed - rows) @ weight).sum())
    gram = weight @ weight.T

    def measure(disturbed: Floats) -> float:
        difference = disturbed - rows
        return float(np.vdot(difference @ gram, difference))

    return measure
