"""GPTQ in PyTorch: what gptq.py computes, by the same formulas, where the tensors live."""

from typing import TYPE_CHECKING

import numpy as np

from regcache.compiler.calibration.gptq import CLIPS, RIDGE

if TYPE_CHECKING:
    from torch import Tensor

# Rows whose corrections are collected, and output channels that are solved for, at a time.
_LAZY, _COLUMNS = 128, 256
_TINY = float(np.finfo(np.float32).tiny)


def in_blocks(values: "Tensor", size: int) -> "Tensor":
    """[K, N] as [blocks, size, N], the last block filled up with zeros."""
    count = -(-len(values) // size)
    filled = values.new_zeros((count * size, values.shape[1]))
    filled[: len(values)] = values
    return filled.reshape(count, size, values.shape[1])


def choose_steps(
    weight: "Tensor", counts: "Tensor", limits: tuple[int, int], size: int
) -> "Tensor":
    """See gptq.choose_steps; `counts` [K]: how much errors count; `limits`: of the integers."""
    lowest, last = limits
    blocks, counted = in_blocks(weight, size), in_blocks(counts[:, None], size)
    peaks = blocks.abs().amax(dim=1)
    largest = (peaks / peaks.new_full((), -lowest)).where(peaks > 0, 1.0).clamp(min=_TINY)
    if -lowest > last:
        largest = (-largest).where((peaks > 0) & (blocks.amax(dim=1) >= peaks), largest)
    best, least = largest.clone(), largest.new_full(largest.shape, float("inf"))
    for clip in CLIPS:
        steps = (largest * float(np.float32(clip)))[:, None]
        rounded = (blocks / steps).round().clamp(lowest, last) * steps
        error = ((rounded - blocks).square() * counted).sum(dim=1)
        better = error < least
        best, least = steps[:, 0].where(better, best), error.where(better, least)
    return best


def round_by_error(
    weight: "Tensor",
    gram: "Tensor",
    steps: "Tensor",
    limits: tuple[int, int],
    size: int,
    damping: float,
) -> "Tensor":
    """See gptq.round_by_error; int8 [K, N]."""
    rows = len(weight)
    order = (-gram.diagonal()).argsort(stable=True)
    upper = _upper_of_inverse(gram, order, damping)
    left, own_steps = weight[order], steps[order.div(size, rounding_mode="floor")]
    found = left.new_empty(left.shape)
    for start in range(0, rows, _LAZY):
        end = min(start + _LAZY, rows)
        errors = left.new_empty((end - start, left.shape[1]))
        for row in range(start, end):
            step = own_steps[row]
            found[row] = (left[row] / step).round().clamp(*limits)
            errors[row - start] = (left[row] - found[row] * step) / upper[row, row]
            left[row + 1 : end] -= upper[row, row + 1 : end].outer(errors[row - start])
        left[end:] -= upper[start:end, end:].T @ errors
    integers = found.new_empty(found.shape).char()
    integers[order] = found.char()
    return integers


def refit_steps(
    weight: "Tensor",
    gram: "Tensor",
    integers: "Tensor",
    steps: "Tensor",
    block_size: int,
    damping: float,
) -> "Tensor":
    """See gptq.refit_steps."""
    from torch.linalg import solve

    damped, count = _damped(gram, damping), len(steps)
    found = steps.clone()
    for column in range(0, weight.shape[1], _COLUMNS):
        part = slice(column, column + _COLUMNS)
        rounded = integers[:, part].double()
        wanted = in_blocks(rounded * (damped @ weight[:, part].double()), block_size).sum(dim=1)
        matrix = damped.new_empty((rounded.shape[1], count, count))
        for block in range(count):
            rows = slice(block * block_size, (block + 1) * block_size)
            products = rounded * (damped[:, rows] @ rounded[rows])
            matrix[:, :, block] = in_blocks(products, block_size).sum(dim=1).T
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += (diagonal * RIDGE).where(diagonal > 0, 1.0)
        refitted = solve(matrix, wanted.T[..., None])[..., 0].T
        kept = steps[:, part]
        signs = refitted.sign() * kept.sign()
        good = (signs > 0) & (signs >= 0).all(dim=0)
        found[:, part] = refitted.float().where(good, kept)
    return found


def _damped(gram: "Tensor", damping: float) -> "Tensor":
    damped = gram.clone()
    diagonal = damped.diagonal()
    diagonal += max(float(diagonal.mean()) * damping, _TINY)
    return damped


def _upper_of_inverse(gram: "Tensor", order: "Tensor", damping: float) -> "Tensor":
    """U, upper triangular, with U^T U the inverse of the damped `gram`, in the given order."""
    from torch.linalg import cholesky, solve_triangular

    backwards = order.flip(0)
    lower = cholesky(_damped(gram[backwards][:, backwards], damping))
    unit = lower.new_ones(len(lower)).diag()
    inverse: Tensor = solve_triangular(lower, unit, upper=False)
    return inverse.flip((0, 1)).float()
