"""Choose shifts of channels that make activations fit symmetric integers, by the error left."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Observed, Suggested
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.quantization.factors import (
    LEAST_GAIN,
    Standing,
    equalized_scale,
    folds_error,
    rounding_error,
)
from regcache.compiler.quantization.sampled_weight import SampledWeight
from regcache.passes.affine import Affine
from regcache.passes.encoder import Role
from regcache.passes.rotate_hidden import rotated_channels

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shift:
    """The shift of an activation's channels [K], and its `name` in a log.

    `error`: folds_error with it. `scale`: where it shifts by a zero point, the scale whose steps it
    is a multiple of, so that 0 stays exact; else None.
    """

    name: str
    values: Suggested
    error: float
    scale: Affine | None = None


def choose_shift(now: Standing, quantizer: Quantizer) -> Shift | None:
    """A shift by each channel's middle; None where it does not help.

    Only where integers are symmetric, and not behind an activation function: there a channel's
    largest values are too rare for its middle to be known (DINOv2-S loses a hundredth of cosine on
    unseen images). As for equalization, the middles of one half of the images are judged on the
    other, both ways.
    """
    hidden = now.site.role is Role.FC2 and not rotated_channels(now.site.linears[0])
    if hidden or not quantizer.format.symmetric:
        return None
    middles = Suggested.by(_middles, now.statistics)
    shifted, most = now.statistics.shifted(middles), now.error * (1 - LEAST_GAIN)
    error = folds_error(now.factors, now.weight, shifted, quantizer, most=most)
    if not error < most:
        return None
    return Shift("each channel's middle", middles, error)


def refine_shift(now: Standing, before: Shift | None, quantizer: Quantizer) -> Shift | None:
    """The shift `before`, with a zero point in addition where that helps more.

    The best asymmetric scale of the equalized activation has a zero point; a shift by that many
    steps does the same for symmetric integers. The shift belongs to that scale: in steps of
    another, 0 would be no integer.
    """
    if not quantizer.format.symmetric:
        return before
    statistics, factors, weight, error = now.statistics, now.factors, now.weight, 0.0
    node_gain = quantizer.target.node_gain
    most = now.error * (1 - (node_gain if now.site.role is Role.FC2 else LEAST_GAIN))
    for fold, by in zip(statistics.folds, factors.folds, strict=True):
        steps, scale = _zero_point(fold.other.divided(by), by, weight, quantizer)
        shifted = fold.other.shifted(_offset(steps, scale, by))
        error += rounding_error(by, weight, shifted, quantizer, scale)
        if not error < most:
            return before
    steps, scale = _zero_point(
        statistics.divided(factors).held_out, factors.whole, weight, quantizer
    )
    if not steps:  # there is nothing to take off
        return before
    label = "a zero point" if before is None else f"{before.name} and a zero point"
    values = Suggested.everywhere(0, statistics) if before is None else before.values
    return Shift(label, _further(values, steps, scale, factors), error, scale)


def _zero_point(
    even: Observed, factors: Floats, weight: SampledWeight, quantizer: Quantizer
) -> tuple[int, Affine]:
    """The best zero point of an equalized activation, in steps from the middle, and its scale."""
    target = replace(quantizer.target, activation_symmetric=False, activation_dtype="uint8")
    scale = equalized_scale(factors, weight, even, replace(quantizer, target=target))
    assert isinstance(scale, Affine)
    return 2 ** (scale.bits - 1) - scale.zero_point, Affine(scale.scale, 0, "int8", scale.bits)


def _offset(steps: int, scale: Affine, factors: Floats) -> Floats:
    """The shift [K] that stands for a zero point, before channels are equalized."""
    return np.asarray(steps * scale.scale * factors, np.float32)


def _further(values: Suggested, steps: int, scale: Affine, factors: Suggested) -> Suggested:
    """Shifts with a zero point added to all of them."""
    return Suggested(
        values.whole + _offset(steps, scale, factors.whole),
        tuple(
            shifts + _offset(steps, scale, by)
            for shifts, by in zip(values.folds, factors.folds, strict=True)
        ),
    )


def _middles(statistics: Observed) -> Floats:
    return np.asarray((statistics.lows + statistics.highs) / 2, np.float32)
