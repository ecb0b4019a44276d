"""Choose how far each activation's channels are evened out, by the error that is left."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.folds import Halved, Observed, Suggested
from regcache.compiler.quantizer import Quantizer, Scale
from regcache.compiler.rounding import nearest_blocks
from regcache.compiler.targets import Target
from regcache.passes.encoder import EncoderView, Site
from regcache.passes.equalize import foldable
from regcache.passes.float8 import round_weight
from regcache.passes.quantize_linears import quantize_weight

Floats = NDArray[np.float32]

# Exponents of a channel's range: 0 leaves it as it is, 1 makes all ranges alike.
_RANGE_EXPONENTS = (0.25, 0.5, 0.75)
# SmoothQuant's exponents: range^a / weight^(1 - a).
_SMOOTH_EXPONENTS = (0.5, 0.6, 0.75, 0.9)
# AWQ's exponents of a channel's mean magnitude, where only weights are rounded (arXiv 2306.00978).
_MEAN_EXPONENTS = (0.25, 0.5, 0.75, 1.0)
# A gain has to be larger than chance, and larger yet where it costs a node.
LEAST_GAIN, LEAST_GAIN_OF_A_NODE = 0.02, 0.10
# A channel that is nearly always zero must not be blown up.
_LEAST_RANGE = 1e-3


@dataclass(frozen=True)
class Rule:
    """A channel's factor: its range, or mean magnitude, to the power `exponent`.

    Where `smooth`, over the weight's range to the rest of 1.
    """

    exponent: float
    smooth: bool = False
    mean: bool = False

    def __str__(self) -> str:
        name = f"{'mean' if self.mean else 'range'}^{self.exponent:g}"
        return f"{name} / weight^{1 - self.exponent:g}" if self.smooth else name

    def factors(self, seen: Observed, weight: Floats) -> Floats:
        """Factors [K] of geometric mean 1. `weight` [K, N] reads the activation."""
        sizes = np.maximum(np.abs(seen.lows), np.abs(seen.highs)).astype(np.float64)
        if self.mean:
            sizes = np.abs(seen.rows).mean(axis=0, dtype=np.float64)
        tiny = float(np.finfo(np.float32).tiny)
        powers = np.maximum(sizes, max(sizes.max() * _LEAST_RANGE, tiny)) ** self.exponent
        if self.smooth:
            peaks = np.abs(weight).max(axis=1).astype(np.float64)
            floor = max(float(peaks.max()) * _LEAST_RANGE, tiny)
            powers /= np.maximum(peaks, floor) ** (1 - self.exponent)
        return np.asarray(powers / np.exp(np.log(powers).mean()), np.float32)

    def suggest(self, seen: Halved, weight: Floats) -> Suggested:
        """The factors that all images suggest, and those of each fold."""
        return Suggested.by(lambda half: self.factors(half, weight), seen)


@dataclass(frozen=True)
class Equalization:
    """A rule for one activation, its factors [K], and the share of the error that it leaves."""

    rule: Rule
    factors: Suggested
    error_left: float


def choose_equalizations(
    view: EncoderView, statistics: Mapping[str, Halved], quantizer: Quantizer
) -> dict[str, Equalization]:
    """Where evening out the channels helps, by the activation's name.

    The rules of SmoothQuant and plain powers of the range compete, or those of AWQ where only
    weights are rounded: then without any node more. Each takes its factors from one half of the
    images, and its layer's output error, with activation and weights rounded, is measured on the
    other, both ways: a channel's largest value is seldom seen, and what fits the images at hand too
    well clips others.
    """
    target = quantizer.target
    if not quantizer.quantizes_activations and target.block_size is None:
        return {}  # simulated: the literature's plain rounding
    found = {}
    for site in view.sites:
        seen = statistics[site.tensor.name]
        if seen.folds:
            chosen = _choose(site, seen, quantizer, free=foldable(view, site))
            if chosen is not None:
                found[site.tensor.name] = chosen
    return found


def _choose(site: Site, seen: Halved, quantizer: Quantizer, *, free: bool) -> Equalization | None:
    rules = _rules(quantizer, free=free)
    if not rules:
        return None
    weight = site.weight
    plain = folds_error(Suggested.everywhere(1, seen), weight, seen, quantizer)
    tried = {rule: rule.suggest(seen, weight) for rule in rules}
    errors = {
        rule: folds_error(factors, weight, seen, quantizer) for rule, factors in tried.items()
    }
    best = min(rules, key=lambda rule: errors[rule])
    gain = LEAST_GAIN if free else LEAST_GAIN_OF_A_NODE
    if not errors[best] < plain * (1 - gain):
        return None
    return Equalization(best, tried[best], errors[best] / plain)


def _rules(quantizer: Quantizer, *, free: bool) -> list[Rule]:
    if not quantizer.quantizes_activations:
        return [Rule(exponent, mean=True) for exponent in _MEAN_EXPONENTS if free]
    rules = [Rule(exponent) for exponent in _RANGE_EXPONENTS]
    if free:
        rules += [Rule(exponent, smooth=True) for exponent in _SMOOTH_EXPONENTS]
    return rules


def folds_error(factors: Suggested, weight: Floats, seen: Halved, quantizer: Quantizer) -> float:
    """`rounding_error` on each half, with the factors that the other suggests, in sum."""
    return sum(
        rounding_error(by, weight, fold.other, quantizer)
        for fold, by in zip(seen.folds, factors.folds, strict=True)
    )


def rounding_error(
    factors: Floats,
    weight: Floats,
    seen: Observed,
    quantizer: Quantizer,
    scale: Scale | None = None,
) -> float:
    """||Q(X / f) Q(f W) - X W||^2 on the rows X of `seen`, but for the mean: biases make that good.

    With the given scale, or the best one: a single number, so the rows that choose it can judge it.
    """
    scaled = np.asarray(weight * factors[:, None], np.float32)
    rows = seen.rows / factors
    if quantizer.quantizes_activations:
        scale = scale or quantizer.scale([scaled], seen.divided(factors))
        rows = scale.round_trip(rows)
    difference = rows @ _rounded(scaled, quantizer.target) - seen.rows @ weight
    return float(np.square(difference - difference.mean(axis=0), dtype=np.float64).sum())


def _rounded(weight: Floats, target: Target) -> Floats:
    if target.float8:
        return round_weight(weight).dequantized()
    if target.block_size is not None:
        return nearest_blocks(weight, target.weight_bits, target.block_size).dequantized()
    return quantize_weight(weight, target.weight_bits).dequantized()
