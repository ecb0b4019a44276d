"""Choose factors that the channels of an activation are divided by, by the error left."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.algebra import Array
from regcache.compiler.calibration.folds import Folded, Halved, Observed, Suggested
from regcache.compiler.calibration.number_format import Scale
from regcache.compiler.calibration.number_formats import BlockWeights
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
# A gain has to be larger than chance; where it costs a node, the target says how large.
LEAST_GAIN = 0.02
# A channel that is nearly always zero must not be blown up.
_LEAST_RANGE = 1e-3


@dataclass(frozen=True)
class Rule:
    """A channel's factor: its range, or where `mean` its mean magnitude, to the power `exponent`.

    Where `smooth`, that is divided by the weight's range to the power 1 - `exponent`.
    """

    exponent: float
    smooth: bool = False
    mean: bool = False

    def __str__(self) -> str:
        name = f"{'mean' if self.mean else 'range'}^{self.exponent:g}"
        return f"{name} / weight^{1 - self.exponent:g}" if self.smooth else name

    def factors(self, statistics: Observed, peaks: Floats) -> Floats:
        """Factors, float32 [K], of geometric mean 1.

        `peaks` [K]: the largest magnitude of the weight in each input channel.
        """
        sizes = np.maximum(np.abs(statistics.lows), np.abs(statistics.highs)).astype(np.float64)
        if self.mean:
            sizes = algebra_of(statistics.rows).magnitudes(statistics.rows)
        tiny = float(np.finfo(np.float32).tiny)
        powers = np.maximum(sizes, max(sizes.max() * _LEAST_RANGE, tiny)) ** self.exponent
        if self.smooth:
            floor = max(float(peaks.max()) * _LEAST_RANGE, tiny)
            powers /= np.maximum(peaks.astype(np.float64), floor) ** (1 - self.exponent)
        return np.asarray(powers / np.exp(np.log(powers).mean()), np.float32)

    def suggest(self, statistics: Halved, peaks: Floats) -> Suggested:
        """The factors by all images, and by each half of them."""
        return Suggested.by(lambda half: self.factors(half, peaks), statistics)


@dataclass(frozen=True)
class Equalization:
    """The factors [K] for one activation, and the rule that they come from.

    `error`: folds_error with them; `error_left`: as a share of the error without.
    """

    rule: Rule
    factors: Suggested
    error: float
    error_left: float


@dataclass(frozen=True)
class Standing:
    """An activation with what was chosen for it so far.

    `statistics`: its own, shifted where a shift was chosen; `weight`: of the linears that read it;
    `factors`: what its channels are divided by; `error`: folds_error with these.
    """

    site: Site
    statistics: Folded
    weight: SampledWeight
    factors: Suggested
    error: float

    @cached_property
    def outputs(self) -> tuple[Array, ...]:
        """What the linears compute in float, [S, n] for each fold, of its rows to judge by."""
        return tuple(fold.other.rows @ self.weight.columns for fold in self.statistics.folds)

    def error_with(self, factors: Suggested, quantizer: Quantizer, most: float) -> float:
        """folds_error with these factors."""
        return folds_error(factors, self.weight, self.statistics, quantizer, self.outputs, most)

    @classmethod
    def untouched(
        cls,
        site: Site,
        statistics: Folded,
        quantizer: Quantizer,
        weights: Sequence[Floats] | None = None,
    ) -> Self:
        """The activation before anything is chosen: no shift, and factors of 1.

        `weights`: of the linears that read it, where they are not the site's own.
        """
        statistics = statistics.on(quantizer.algebra)
        if weights is None:
            weights = [linear.weight for linear in site.linears]
        weight = SampledWeight.of(weights, quantizer.algebra)
        now = cls(site, statistics, weight, Suggested.everywhere(1, statistics), math.inf)
        return replace(now, error=now.error_with(now.factors, quantizer, math.inf))


def choose_equalization(now: Standing, quantizer: Quantizer, *, free: bool) -> Equalization | None:
    """The factors that help an activation most; None where none help enough.

    `free`: whether factors cost no node. The rules of SmoothQuant and plain powers of the range
    compete; where only weights are rounded, those of AWQ, as long as factors are free. Each takes
    its factors from one half of the images, and its layer's output error, with activation and
    weights rounded, is measured on the other, both ways: a channel's largest value is rare, and
    factors that fit the images at hand too well make others clip.
    """
    rules = rules_for(quantizer, free=free)
    if not rules:
        return None
    best = None
    least = now.error * (1 - (LEAST_GAIN if free else quantizer.target.node_gain))
    for rule in rules:
        factors = rule.suggest(now.statistics, now.weight.peaks)
        error = now.error_with(factors, quantizer, least)
        if error < least:
            best, least = Equalization(rule, factors, error, error / now.error), error
    return best


def rules_for(quantizer: Quantizer, *, free: bool) -> list[Rule]:
    """The rules that compete; `free`: whether factors cost no node."""
    if not quantizer.quantizes_activations:
        if not isinstance(quantizer.format, BlockWeights) or not free:
            return []  # simulated: the literature's plain rounding
        return [Rule(exponent, mean=True) for exponent in _MEAN_EXPONENTS]
    rules = [Rule(exponent) for exponent in _RANGE_EXPONENTS]
    if free:
        rules += [Rule(exponent, smooth=True) for exponent in _SMOOTH_EXPONENTS]
    return rules


def folds_error(
    factors: Suggested,
    weight: SampledWeight,
    statistics: Folded,
    quantizer: Quantizer,
    outputs: Sequence[Array] | None = None,
    most: float = math.inf,
) -> float:
    """The sum of `rounding_error` on each half, with the factors chosen on the other half.

    `outputs`: see Standing. Nothing more is added to a sum that has reached `most`.
    """
    total = 0.0
    for index, (fold, by) in enumerate(zip(statistics.folds, factors.folds, strict=True)):
        exact = None if outputs is None else outputs[index]
        total += rounding_error(by, weight, fold.other, quantizer, exact=exact)
        if total >= most:
            break
    return total


def rounding_error(
    factors: Floats,
    weight: SampledWeight,
    statistics: Observed,
    quantizer: Quantizer,
    scale: Scale | None = None,
    exact: Array | None = None,
) -> float:
    """||Q(X / f) Q(f W) - X W||^2 on sampled rows X, without the part that biases correct.

    That part is the mean over the rows. `scale`: None for the best one, which may be chosen by the
    same rows: it is a single number. `exact`: X W where that is known.
    """
    algebra, even = quantizer.algebra, statistics.divided(factors)
    rows = even.rows
    if quantizer.quantizes_activations:
        scale = scale or equalized_scale(factors, weight, even, quantizer)
        rows = algebra.round_trip(scale, rows)
    nearest = quantizer.format.nearest(weight.columns * algebra.put(factors)[:, None])
    if exact is None:
        exact = statistics.rows @ weight.columns
    return algebra.spread(rows @ nearest - exact)


def equalized_scale(
    factors: Floats, weight: SampledWeight, even: Observed, quantizer: Quantizer
) -> Scale:
    """The best scale of an activation divided by `factors` [K], by its statistics `even`."""
    return quantizer.scale_by(lambda: weight.error_behind(quantizer.algebra.put(factors)), even)
