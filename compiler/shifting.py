"""Choose where channels are moved for symmetric integers to fit, by the error that is left."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration import Halved, Halves, Observed
from regcache.compiler.equalization import (
    LEAST_GAIN,
    LEAST_GAIN_OF_A_NODE,
    Equalization,
    rounding_error,
)
from regcache.compiler.quantizer import Quantizer
from regcache.passes.affine import Affine
from regcache.passes.encoder import EncoderView, Site

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Shift:
    """What is taken off an activation's channels [K], and what it is called in a log.

    `scale`: the scale that it was chosen for, where zero is to stay exact.
    """

    name: str
    values: Floats
    scale: Affine | None = None


def choose_shifts(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> dict[str, Shift]:
    """Where moving each channel's middle to zero helps, by the activation's name.

    Only where integers are symmetric, and not behind an activation function: there a channel's
    largest values are too rare for its middle to be known (DINOv2-S loses a hundredth of cosine on
    unseen images). As for equalization, what one half of the images suggests is measured on the
    other.
    """
    found = {}
    for site in _sites(view, statistics, quantizer):
        if site.name.endswith(".fc2"):
            continue
        seen = statistics[site.tensor.name]
        middles = _middles(seen.observed[0])
        plain = _error(site, seen, np.zeros_like(middles), quantizer)
        if _error(site, seen, middles, quantizer) < plain * (1 - LEAST_GAIN):
            found[site.tensor.name] = Shift("each channel's middle", _middles(seen.whole))
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
        name = site.tensor.name
        weight = site.weight
        before = shifts.get(name, Shift("", np.zeros(len(weight), np.float32)))
        factors = (
            equalizations[name].factors if name in equalizations else np.ones_like(before.values)
        )
        seen = shifted(statistics[name], before.values)
        fit, other = seen.observed
        plain = rounding_error(factors, weight, fit, other, quantizer)
        moved, scale = _zero_point(fit, factors, weight, quantizer)
        error = rounding_error(factors, weight, fit, other.shifted(moved), quantizer, scale)
        gain = LEAST_GAIN_OF_A_NODE if site.name.endswith(".fc2") else LEAST_GAIN
        if error < plain * (1 - gain):
            label = f"{before.name} and a zero point" if before.name else "a zero point"
            moved, scale = _zero_point(seen.whole, factors, weight, quantizer)
            if moved.any():  # else there is nothing to take off
                found[name] = Shift(label, before.values + moved, scale)
    return found


def _zero_point(
    seen: Observed, factors: Floats, weight: Floats, quantizer: Quantizer
) -> tuple[Floats, Affine]:
    """The shift [K] that stands for the best zero point, and the scale that belongs to it."""
    target = replace(quantizer.target, activation_symmetric=False, activation_dtype="uint8")
    scaled = np.asarray(weight * factors[:, None], np.float32)
    found = replace(quantizer, target=target).scale([scaled], seen.divided(factors))
    assert isinstance(found, Affine)
    steps = 2 ** (found.bits - 1) - found.zero_point
    moved = np.asarray(steps * found.scale * factors, np.float32)
    return moved, Affine(found.scale, 0, "int8", found.bits)


def shifted(seen: Halved, values: Floats) -> Halves:
    """What was seen of an activation with `values` [K] taken off its channels."""
    return Halves(tuple(half.shifted(values) for half in seen.observed))


def _sites(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> Iterator[Site]:
    """The sites whose integers are symmetric and whose images are enough for two halves."""
    target = quantizer.target
    if quantizer.quantizes_activations and target.activation_symmetric and not target.float8:
        for site in view.sites:
            if len(statistics[site.tensor.name].observed) == 2:
                yield site


def _error(site: Site, seen: Halved, shift: Floats, quantizer: Quantizer) -> float:
    """What rounding does on one half with the range of the other, both shifted."""
    fit, other = shifted(seen, shift).observed
    return rounding_error(np.ones_like(shift), site.weight, fit, other, quantizer)


def _middles(seen: Observed) -> Floats:
    return np.asarray((seen.lows + seen.highs) / 2, np.float32)
