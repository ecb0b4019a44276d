"""Choose the range of each activation by the error it makes at the output of its layers."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from regcache.passes.affine import Affine, IntegerType

Floats = NDArray[np.float32]

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
    measure = _error_measure(rows, weights)

    def error(bounds: tuple[float, float]) -> float:
        scale = Affine.from_range(*bounds, dtype, symmetric=symmetric, bits=bits)
        return measure(scale.round_trip(rows))

    best = min(((low * share, high * share) for share in _JOINT), key=error)
    if not symmetric:
        best = min([best, *((best[0] * share, best[1]) for share in _SINGLE)], key=error)
        best = min([best, *((best[0], best[1] * share) for share in _SINGLE)], key=error)
    return Affine.from_range(*best, dtype, symmetric=symmetric, bits=bits)


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
