"""GPTQ as the method is written down, in float64, slow."""

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from regcache.compiler.calibration.gptq import choose_steps, round_by_error

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
SEEDS = st.integers(0, 9999)
# Of a step: what float32 may move a number by before it is rounded.
_DOUBT = 0.02


@dataclass(frozen=True)
class Layer:
    """A weight [K, N], what is known of its inputs, and steps [blocks, N]; `first` as of GPTQ."""

    weight: Floats
    gram: Doubles
    steps: Floats
    last: int
    block_size: int | None = None
    first: int | None = None
    damping: float = 0.01

    @classmethod
    def draw(
        cls, seed: int, rows: int, columns: int, samples: int, damping: float = 0.01, **more: int
    ) -> "Layer":
        """Inputs that correlate, with channels of unequal size."""
        random = np.random.default_rng(seed)
        x = correlated(random, samples, rows)
        weight = random.standard_normal((rows, columns)).astype(np.float32)
        last, size, first = more.get("last", 127), more.get("block_size"), more.get("first")
        steps = choose_steps(weight, np.square(x).mean(axis=0), last, size, first=first)
        return cls(weight, x.T @ x, steps, last, size, first, damping)

    @property
    def row_steps(self) -> Floats:
        """The step of every weight [K, N], block by block."""
        size = self.block_size or len(self.weight)
        return np.asarray(np.repeat(self.steps, size, axis=0)[: len(self.weight)], np.float64)

    @property
    def damped(self) -> Doubles:
        """The Gram matrix and a share of its mean diagonal."""
        added = np.diag(self.gram).mean() * self.damping
        return np.asarray(self.gram + np.eye(len(self.gram)) * added)

    @property
    def order(self) -> list[int]:
        """Channels by second moment, the largest first."""
        return sorted(range(len(self.gram)), key=lambda row: -self.gram[row, row])

    @property
    def lowest(self) -> int:
        """The lowest integer."""
        return -self.last if self.first is None else self.first

    def round(self) -> NDArray[np.int8]:
        return round_by_error(
            self.weight, self.gram, self.steps, self.last, self.block_size,
            first=self.first, damping=self.damping,
        )  # fmt: skip

    def nearest(self) -> Doubles:
        rounded = np.rint(self.weight.astype(np.float64) / self.row_steps)
        return np.asarray(np.clip(rounded, self.lowest, self.last))

    def errors(self, integers: NDArray[np.generic], gram: Doubles | None = None) -> Doubles:
        """diag(E^T G E): the squared error of each output channel [N]."""
        lost = integers.astype(np.float64) * self.row_steps - self.weight
        moments = self.gram if gram is None else gram
        return np.asarray(np.einsum("kn,kj,jn->n", lost, moments, lost), np.float64)


def correlated(random: np.random.Generator, samples: int, rows: int) -> Doubles:
    """Inputs [S, K] that lie near a few directions, in channels of unequal size."""
    hidden = random.standard_normal((samples, max(rows // 2, 1)))
    x = hidden @ random.standard_normal((hidden.shape[1], rows))
    x += 0.3 * random.standard_normal((samples, rows)) + random.normal(size=rows)
    return np.asarray(x * np.exp(0.5 * random.normal(size=rows)))


def slow_gptq(layer: Layer) -> tuple[Doubles, Doubles, Doubles]:
    """Integers [K, N]; [N] how near a tie a channel came; [K] curvature left at each channel.

    One row at a time; what is left of the weight takes the best correction for its error, through
    the inverse of what is left of the damped Hessian.
    """
    left, steps = layer.weight.astype(np.float64), layer.row_steps.astype(np.float64)
    integers, curvature = np.zeros(left.shape), np.zeros(len(left))
    margin = np.full(left.shape[1], np.inf)
    remaining = list(layer.order)
    while remaining:
        row = remaining[0]
        inverse = np.linalg.inv(layer.damped[np.ix_(remaining, remaining)])
        real = left[row] / steps[row]
        integers[row] = np.clip(np.rint(real), layer.lowest, layer.last)
        near = np.abs(real - np.floor(real) - 0.5)
        beyond = (real > layer.last + 0.5 + _DOUBT) | (real < layer.lowest - 0.5 - _DOUBT)
        margin = np.minimum(margin, np.where(beyond, np.inf, near))
        curvature[row] = 1 / inverse[0, 0]
        error = (left[row] - integers[row] * steps[row]) / inverse[0, 0]
        for index, other in enumerate(remaining):
            left[other] -= inverse[index, 0] * error
        remaining = remaining[1:]
    return integers, margin, curvature
