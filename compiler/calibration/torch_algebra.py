"""Dense arrays in PyTorch, on the device where they were put: Algebra in its words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration import torch_gptq
from regcache.compiler.calibration.algebra import Algebra, Array, Doubles, Floats
from regcache.passes.affine import Affine
from regcache.passes.block_floats import BlockFloat
from regcache.passes.float8 import LARGEST, SMALLEST_SCALE, Float8

_TINY = float(np.finfo(np.float32).tiny)


class TorchAlgebra(Algebra):
    """PyTorch's on the device of that name: "cuda:0", or "cpu" for tests."""

    def __init__(self, place: str) -> None:
        self._place = place

    def put(self, values: Array) -> Array:
        if not isinstance(values, np.ndarray):
            return values
        from torch import tensor

        return tensor(np.ascontiguousarray(values), device=self._place)

    def get(self, values: Array) -> NDArray[Any]:
        return values if isinstance(values, np.ndarray) else _in_numpy(values)

    def zeros(self, side: int) -> Array:
        return self.put(np.zeros((side, side)))

    def join(self, parts: Sequence[Array], axis: int = 0) -> Array:
        from torch import cat

        return cat(list(parts), dim=axis)

    def round_trip(self, scale: Affine | Float8 | BlockFloat, values: Array) -> Array:
        if isinstance(scale, BlockFloat):
            return self.put(scale.round_trip(_in_numpy(values)))
        step = values.new_full((), scale.scale)
        if isinstance(scale, Float8):
            return _to_float8(values / step) * step
        integers = ((values / step).round() + scale.zero_point).clamp(*scale.limits)
        return (integers - scale.zero_point) * step

    def nearest(self, weight: Array, bits: int) -> Array:
        last = 2 ** (bits - 1) - 1
        peaks = weight.abs().amax(dim=0)
        steps = _over(peaks, last).where(peaks > 0, 1.0).clamp(min=_TINY)
        return (weight / steps).round().clamp(-last, last) * steps

    def nearest_float8(self, weight: Array) -> Array:
        peaks = weight.abs().amax(dim=0)
        steps = _over(peaks, LARGEST).clamp(min=SMALLEST_SCALE)
        return _to_float8(weight / steps) * steps

    def nearest_blocks(self, weight: Array, bits: int, block_size: int) -> Array:
        last = 2 ** (bits - 1) - 1
        blocks = torch_gptq.in_blocks(weight, block_size)
        peaks = _over(blocks.abs().amax(dim=1, keepdim=True), last)
        steps = peaks.where(peaks > _TINY, 1.0)
        rounded = (blocks / steps).round().clamp(-last, last) * steps
        return rounded.reshape(-1, weight.shape[1])[: len(weight)]

    def square_sum(self, values: Array) -> float:
        return float(values.square().sum())

    def dot(self, one: Array, other: Array) -> float:
        return float((one * other).sum())

    def spread(self, values: Array) -> float:
        return float((values - values.mean(dim=0)).double().square().sum())

    def magnitudes(self, rows: Array) -> Doubles:
        return _in_numpy(rows.abs().double().mean(dim=0))

    def gram(self, rows: Array) -> Array:
        return (rows.T @ rows).double()

    def cross(self, rows: Array, others: Array) -> Array:
        return (rows.T @ others).double()

    def diagonal(self, gram: Array) -> Doubles:
        return _in_numpy(gram.diagonal())

    def choose_steps(
        self,
        weight: Array,
        moments: Doubles,
        last: int,
        block_size: int | None = None,
        *,
        first: int | None = None,
    ) -> Floats:
        counts = self.put(np.asarray(moments / max(float(moments.mean()), _TINY), np.float32))
        lowest = -last if first is None else first
        steps = torch_gptq.choose_steps(weight, counts, (lowest, last), block_size or len(weight))
        return _in_numpy(steps)

    def round_by_error(
        self,
        weight: Array,
        gram: Array,
        steps: Floats,
        last: int,
        block_size: int | None = None,
        *,
        first: int | None = None,
        damping: float = 0.01,
    ) -> NDArray[np.int8]:
        lowest, size = -last if first is None else first, block_size or len(weight)
        found = torch_gptq.round_by_error(
            weight, gram, self.put(steps), (lowest, last), size, damping
        )
        return _in_numpy(found)

    def refit_steps(
        self,
        weight: Array,
        gram: Array,
        integers: NDArray[np.int8],
        steps: Floats,
        block_size: int,
        damping: float,
    ) -> Floats:
        found = torch_gptq.refit_steps(
            weight, gram, self.put(integers), self.put(steps), block_size, damping
        )
        return _in_numpy(found)


def _over(values: Array, number: float) -> Array:
    """CUDA would multiply by the inverse of a plain number, which rounds otherwise."""
    return values / values.new_full((), number)


def _in_numpy(values: Array) -> NDArray[Any]:
    found: NDArray[Any] = values.cpu().numpy()
    return found


def _to_float8(values: Array) -> Array:
    """Round half to even, and saturate."""
    import torch

    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).float()
