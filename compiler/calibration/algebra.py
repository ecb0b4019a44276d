"""Where dense arrays live and what computes with them: NumPy on the CPU, or PyTorch on a device.

Arrays are put where they belong once, and what is made of them stays there: `@`, `+`, `-`, `*`,
`/`, `.T` and slices are the same for both. The rest asks the array's algebra.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration import gptq
from regcache.passes.affine import Affine
from regcache.passes.block_floats import BlockFloat
from regcache.passes.float8 import Float8, round_weight
from regcache.passes.pack_weights import BlockWeight
from regcache.passes.quantize_linears import quantize_weight

Array: TypeAlias = Any
"""A NumPy array, or a tensor of PyTorch; float32 where nothing else is said."""
Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_TINY = float(np.finfo(np.float32).tiny)


class Algebra:
    """NumPy's, on the CPU; TorchAlgebra says the same in PyTorch's words."""

    def put(self, values: Array) -> Array:
        """The array where this algebra computes; itself where it is there already."""
        return values

    def get(self, values: Array) -> NDArray[Any]:
        """The array in NumPy."""
        return np.asarray(values)

    def zeros(self, side: int) -> Array:
        """A float64 matrix [side, side] of zeros."""
        return np.zeros((side, side))

    def join(self, parts: Sequence[Array], axis: int = 0) -> Array:
        """Arrays one behind the other."""
        return np.concatenate(parts, axis=axis)

    def round_trip(self, scale: Affine | Float8 | BlockFloat, values: Array) -> Array:
        """Values as they come back from the integers, or floats, of a scale."""
        return scale.round_trip(values)

    def nearest(self, weight: Array, bits: int) -> Array:
        """A weight [K, N] rounded to the nearest integers of so many bits, back in float."""
        return quantize_weight(weight, bits).dequantized()

    def nearest_float8(self, weight: Array) -> Array:
        """The same of the nearest E4M3 numbers."""
        return round_weight(weight).dequantized()

    def nearest_blocks(self, weight: Array, bits: int, block_size: int) -> Array:
        """The same with one step for each block of input channels."""
        return nearest_blocks(weight, bits, block_size).dequantized()

    def square_sum(self, values: Array) -> float:
        """The sum of squares."""
        return float(np.square(values).sum())

    def dot(self, one: Array, other: Array) -> float:
        """The sum of products of two arrays of the same shape."""
        return float(np.vdot(one, other))

    def spread(self, values: Array) -> float:
        """The sum of squares of [S, N] but for each column's mean, added in float64."""
        return float(np.square(values - values.mean(axis=0), dtype=np.float64).sum())

    def magnitudes(self, rows: Array) -> Doubles:
        """The mean magnitude of each column [K] of [S, K], added in float64."""
        return np.asarray(np.abs(rows).mean(axis=0, dtype=np.float64))

    def gram(self, rows: Array) -> Array:
        """x^T x of float32 rows [S, K], in float64."""
        return (rows.T @ rows).astype(np.float64)

    def cross(self, rows: Array, others: Array) -> Array:
        """x^T y of float32 rows [S, K] each, in float64."""
        return (rows.T @ others).astype(np.float64)

    def diagonal(self, gram: Array) -> Doubles:
        """The diagonal [K] of a matrix, in NumPy."""
        return np.diag(gram)

    # `weight` and `gram` lie where this algebra computes, all else and the answers in NumPy.
    choose_steps = staticmethod(gptq.choose_steps)
    round_by_error = staticmethod(gptq.round_by_error)
    refit_steps = staticmethod(gptq.refit_steps)


NUMPY = Algebra()


def nearest_blocks(weight: Floats, bits: int, block_size: int) -> BlockWeight:
    """The integers nearest to a weight [K, N], with steps [blocks, N] that clip nothing."""
    last = 2 ** (bits - 1) - 1
    starts = range(0, len(weight), block_size)
    peaks = np.maximum.reduceat(np.abs(weight), starts, axis=0) / np.float32(last)
    steps = np.where(peaks > _TINY, peaks, np.float32(1)).astype(np.float32)
    repeated = np.repeat(steps, block_size, axis=0)[: len(weight)]
    integers = np.clip(np.rint(weight / repeated), -last, last).astype(np.int8)
    return BlockWeight(integers, steps, block_size, bits)
