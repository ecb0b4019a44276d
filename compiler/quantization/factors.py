"""Choose by what each activation's channels are divided, by the error that is left."""

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.folds import Folded, Halved, Observed, Suggested
from regcache.compiler.calibration.number_formats import BlockWeights, Scale
from regcache.compiler.calibration.placing import algebra_of
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.quantization.sampled_weight import SampledWeight
from regcache.passes.encoder import Site

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

    def factors(self, seen: Observed, peaks: Floats) -> Floats:
        """Factors [K] of geometric mean 1. `peaks` [K]: the weight's largest, by input channel."""
        sizes = np.maximum(np.abs(seen.lows), np.abs(seen.highs)).astype(np.float64)
        if self.mean:
            sizes = algebra_of(seen.rows).magnitudes(seen.rows)
        tiny = float(np.finfo(np.float32).tiny)
        powers = np.maximum(sizes, max(sizes.max() * _LEAST_RANGE, tiny)) ** self.exponent
        if self.smooth:
            floor = max(float(peaks.max()) * _LEAST_RANGE, tiny)
            powers /= np.maximum(peaks.astype(np.float64), floor) ** (1 - self.exponent)
        return np.asarray(powers / np.exp(np.log(powers).mean()), np.float32)

    def suggest(self, seen: Halved, peaks: Floats) -> Suggested:
        """The factors that all images suggest, and those of each fold."""
        return Suggested.by(lambda half: self.factors(half, peaks), seen)


@dataclass(frozen=True)
class Equalization:
    """A rule for one activation, its factors [K], and the error that it leaves.

    `error_left`: as a share of what it was without.
    """

    rule: Rule
    factors: Suggested
    error: float
    error_left: float


@dataclass(frozen=True)
class Standing:
    """What was chosen for an activation so far.

    `seen`: what calibration saw of it, its channels shifted as far as they were; `weight`: of what
    reads it; `factors`: what its channels are divided by; `error`: folds_error with all that.
    """

    site: Site
    seen: Folded
    weight: SampledWeight
    factors: Suggested
    error: float

    @classmethod
    def untouched(cls, site: Site, seen: Folded, quantizer: Quantizer) -> Self:
        """The activation as it is."""
        seen = seen.on(quantizer.algebra)
        weight = SampledWeight.of([linear.weight for linear in site.linears], quantizer.algebra)
        ones = Suggested.everywhere(1, seen)
        return cls(site, seen, weight, ones, folds_error(ones, weight, seen, quantizer))


def choose_equalization(now: Standing, quantizer: Quantizer, *, free: bool) -> Equalization | None:
    """How equalizing an activation's channels helps most; None where it does not.

    `free`: whether factors cost no node. The rules of SmoothQuant and plain powers of the range
    compete, or those of AWQ where only weights are rounded: then without any node more. Each takes
    its factors from one half of the images, and its layer's output error, with activation and
    weights rounded, is measured on the other, both ways: a channel's largest value is seldom seen,
    and what fits the images at hand too well clips others.
    """
    rules = rules_for(quantizer, free=free)
    if not rules:
        return None
    tried = {rule: rule.suggest(now.seen, now.weight.peaks) for rule in rules}
    errors = {
        rule: folds_error(factors, now.weight, now.seen, quantizer)
        for rule, factors in tried.items()
    }
    best = min(rules, key=lambda rule: errors[rule])
    gain = LEAST_GAIN if free else LEAST_GAIN_OF_A_NODE
    if not errors[best] < now.error * (1 - gain):
        return None
    return Equalization(best, tried[best], errors[best], errors[best] / now.error)


def rules_for(quantizer: Quantizer, *, free: bool) -> list[Rule]:
    """The rules that compete; `free`: factors cost no node."""
    if not quantizer.quantizes_activations:
        if not isinstance(quantizer.format, BlockWeights) or not free:
            return []  # simulated: the literature's plain rounding
        return [Rule(exponent, mean=True) for exponent in _MEAN_EXPONENTS]
    rules = [Rule(exponent) for exponent in _RANGE_EXPONENTS]
    if free:
        rules += [Rule(exponent, smooth=True) for exponent in _SMOOTH_EXPONENTS]
    return rules


def folds_error(
    factors: Suggested, weight: SampledWeight, seen: Folded, quantizer: Quantizer
) -> float:
    """`rounding_error` on each half, with the factors that the other suggests, in sum."""
    return sum(
        rounding_error(by, weight, fold.other, quantizer)
        for fold, by in zip(seen.folds, factors.folds, strict=True)
    )


def rounding_error(
    factors: Floats,
    weight: SampledWeight,
    seen: Observed,
    quantizer: Quantizer,
    scale: Scale | None = None,
) -> float:
    """||Q(X / f) Q(f W) - X W||^2 on the rows X of `seen`, but for the mean: biases make that good.

    With the given scale, or the best one: a single number, so the rows that choose it can judge it.
    """
    algebra = quantizer.algebra
    by = algebra.put(factors)
    rows = seen.rows / by
    if quantizer.quantizes_activations:
        scale = scale or equalized_scale(factors, weight, seen.divided(factors), quantizer)
        rows = algebra.round_trip(scale, rows)
    scaled = weight.columns * by[:, None]
    return algebra.spread(rows @ quantizer.format.nearest(scaled) - seen.rows @ weight.columns)


def equalized_scale(
    factors: Floats, weight: SampledWeight, even: Observed, quantizer: Quantizer
) -> Scale:
    """The best scale of an activation that was divided by `factors` [K]; `even`: as it is then."""
    # What is added to X / f comes out of f W as f times that would come out of W.
    by = quantizer.algebra.put(factors)
    return quantizer.scale_by(lambda: lambda added: weight.error(added * by), even)
