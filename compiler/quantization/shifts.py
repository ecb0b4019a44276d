"""Choose where channels are shifted for symmetric integers to fit, by the error that is left."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Observed, Suggested
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.quantization.factors import (
    LEAST_GAIN,
    LEAST_GAIN_OF_A_NODE,
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
    """What is taken off an activation's channels [K], and what it is called in a log.

    `error`: what it leaves (see folds_error); `scale`: the scale that it was chosen for, where zero
    is to stay exact.
    """

    name: str
    values: Suggested
    error: float
    scale: Affine | None = None


def choose_shift(now: Standing, quantizer: Quantizer) -> Shift | None:
    """Each channel's middle, where taking it off helps.

    Only where integers are symmetric, and not behind an activation function: there a channel's
    largest values are too rare for its middle to be known (DINOv2-S loses a hundredth of cosine on
    unseen images). As for equalization, what one half of the images suggests is measured on the
    other, both ways.
    """
    hidden = now.site.role is Role.FC2 and not rotated_channels(now.site.linears[0])
    if hidden or not quantizer.format.symmetric:
        return None
    middles = Suggested.by(_middles, now.seen)
    error = folds_error(now.factors, now.weight, now.seen.shifted(middles), quantizer)
    if not error < now.error * (1 - LEAST_GAIN):
        return None
    return Shift("each channel's middle", middles, error)


def refine_shift(now: Standing, before: Shift | None, quantizer: Quantizer) -> Shift | None:
    """The shift and, where it helps more, what makes symmetric integers of asymmetric ones.

    The best asymmetric scale of the equalized activation has a zero point; a shift by that many
    steps does the same. Its scale goes with it: of another, zero would be no whole step.
    """
    if not quantizer.format.symmetric:
        return before
    seen, factors, weight, error = now.seen, now.factors, now.weight, 0.0
    for fold, by in zip(seen.folds, factors.folds, strict=True):
        steps, scale = _zero_point(fold.other.divided(by), by, weight, quantizer)
        shifted = fold.other.shifted(_offset(steps, scale, by))
        error += rounding_error(by, weight, shifted, quantizer, scale)
    gain = LEAST_GAIN_OF_A_NODE if now.site.role is Role.FC2 else LEAST_GAIN
    if not error < now.error * (1 - gain):
        return before
    steps, scale = _zero_point(seen.divided(factors).held_out, factors.whole, weight, quantizer)
    if not steps:  # there is nothing to take off
        return before
    label = "a zero point" if before is None else f"{before.name} and a zero point"
    values = Suggested.everywhere(0, seen) if before is None else before.values
    return Shift(label, _further(values, steps, scale, factors), error, scale)


def _zero_point(
    even: Observed, factors: Floats, weight: SampledWeight, quantizer: Quantizer
) -> tuple[int, Affine]:
    """The best zero point of what is seen equalized, in steps from the middle, and its scale."""
    target = replace(quantizer.target, activation_symmetric=False, activation_dtype="uint8")
    found = equalized_scale(factors, weight, even, replace(quantizer, target=target))
    assert isinstance(found, Affine)
    return 2 ** (found.bits - 1) - found.zero_point, Affine(found.scale, 0, "int8", found.bits)


def _offset(steps: int, scale: Affine, factors: Floats) -> Floats:
    """What to take off the channels [K], before they are equalized, for a zero point."""
    return np.asarray(steps * scale.scale * factors, np.float32)


def _further(values: Suggested, steps: int, scale: Affine, factors: Suggested) -> Suggested:
    """Shifts, and what to take off besides for a zero point."""
    return Suggested(
        values.whole + _offset(steps, scale, factors.whole),
        tuple(
            one + _offset(steps, scale, by)
            for one, by in zip(values.folds, factors.folds, strict=True)
        ),
    )


def _middles(seen: Observed) -> Floats:
    return np.asarray((seen.lows + seen.highs) / 2, np.float32)
