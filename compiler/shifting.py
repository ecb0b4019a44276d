"""Choose where channels are moved for symmetric integers to fit, by the error that is left."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.equalization import (
    LEAST_GAIN,
    LEAST_GAIN_OF_A_NODE,
    Equalization,
    folds_error,
    rounding_error,
)
from regcache.compiler.folds import Folded, Halved, Observed, Suggested
from regcache.compiler.quantizer import Quantizer
from regcache.passes.affine import Affine
from regcache.passes.encoder import EncoderView, Site
from regcache.passes.rotate_hidden import rotated_channels

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shift:
    """What is taken off an activation's channels [K], and what it is called in a log.

    `scale`: the scale that it was chosen for, where zero is to stay exact.
    """

    name: str
    values: Suggested
    scale: Affine | None = None


def choose_shifts(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> dict[str, Shift]:
    """Where moving each channel's middle to zero helps, by the activation's name.

    Only where integers are symmetric, and not behind an activation function: there a channel's
    largest values are too rare for its middle to be known (DINOv2-S loses a hundredth of cosine on
    unseen images). As for equalization, what one half of the images suggests is measured on the
    other, both ways.
    """
    found = {}
    for site in _sites(view, statistics, quantizer):
        if site.name.endswith(".fc2") and not rotated_channels(site.linears[0]):
            continue
        seen, weight = Folded.of(statistics[site.tensor.name]), site.weight
        middles, ones = Suggested.by(_middles, seen), Suggested.everywhere(1, seen)
        plain = folds_error(ones, weight, seen, quantizer)
        moved = folds_error(ones, weight, seen.shifted(middles), quantizer)
        if moved < plain * (1 - LEAST_GAIN):
            found[site.tensor.name] = Shift("each channel's middle", middles)
    return found


def refine_shifts(
    view: EncoderView,
    statistics: Mapping[str, Halved],
    shifts: Mapping[str, Shift],
    equalizations: Mapping[str, Equalization],
    quantizer: Quantizer,
) -> dict[str, Shift]:
    """The shifts and, where it helps more, what makes symmetric integers of asymmetric ones.

    The best asymmetric scale of the equalized activation has a zero point; a shift by that many
    steps does the same. Its scale goes with it: of another, zero would be no whole step.
    """
    found = dict(shifts)
    for site in _sites(view, statistics, quantizer):
        name, weight = site.tensor.name, site.weight
        seen, before = Folded.of(statistics[name]), shifts.get(name)
        if before is not None:
            seen = seen.shifted(before.values)
        even = equalizations.get(name)
        factors = Suggested.everywhere(1, seen) if even is None else even.factors
        plain, error = folds_error(factors, weight, seen, quantizer), 0.0
        for fold, by in zip(seen.folds, factors.folds, strict=True):
            steps, scale = _zero_point(fold.other.divided(by), by, weight, quantizer)
            moved = fold.other.shifted(_moved(steps, scale, by))
            error += rounding_error(by, weight, moved, quantizer, scale)
        gain = LEAST_GAIN_OF_A_NODE if site.name.endswith(".fc2") else LEAST_GAIN
        if error < plain * (1 - gain):
            label = "a zero point" if before is None else f"{before.name} and a zero point"
            held_out = seen.divided(factors).held_out
            steps, scale = _zero_point(held_out, factors.whole, weight, quantizer)
            if steps:  # else there is nothing to take off
                values = Suggested.everywhere(0, seen) if before is None else before.values
                found[name] = Shift(label, _further(values, steps, scale, factors), scale)
    return found


def _zero_point(
    even: Observed, factors: Floats, weight: Floats, quantizer: Quantizer
) -> tuple[int, Affine]:
    """The best zero point of what is seen evened out, in steps from the middle, and its scale."""
    target = replace(quantizer.target, activation_symmetric=False, activation_dtype="uint8")
    scaled = np.asarray(weight * factors[:, None], np.float32)
    found = replace(quantizer, target=target).scale([scaled], even)
    assert isinstance(found, Affine)
    return 2 ** (found.bits - 1) - found.zero_point, Affine(found.scale, 0, "int8", found.bits)


def _moved(steps: int, scale: Affine, factors: Floats) -> Floats:
    """What to take off the channels [K], before they are evened out, for a zero point."""
    return np.asarray(steps * scale.scale * factors, np.float32)


def _further(values: Suggested, steps: int, scale: Affine, factors: Suggested) -> Suggested:
    """Shifts, and what to take off besides for a zero point."""
    return Suggested(
        values.whole + _moved(steps, scale, factors.whole),
        tuple(
            one + _moved(steps, scale, by)
            for one, by in zip(values.folds, factors.folds, strict=True)
        ),
    )


def _sites(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> Iterator[Site]:
    """The sites whose integers are symmetric and whose images are enough for two halves."""
    target = quantizer.target
    if quantizer.quantizes_activations and target.activation_symmetric and not target.float8:
        for site in view.sites:
            if statistics[site.tensor.name].folds:
                yield site


def _middles(seen: Observed) -> Floats:
    return np.asarray((seen.lows + seen.highs) / 2, np.float32)
