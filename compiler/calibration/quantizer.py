"""The base quantizer that registers sit on: number formats, and how ranges are chosen."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from regcache.compiler.calibration.algebra import Algebra, Array
from regcache.compiler.calibration.number_formats import (
    NumberFormat,
    Rounded,
    Scale,
    number_format,
)
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.placing import algebra_on
from regcache.compiler.calibration.ranges import ErrorMeasure, output_error
from regcache.compiler.job.context import Context
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.base import Pass
from regcache.passes.encoder import Site
from regcache.passes.external_weights import let_go
from regcache.runtime.device import CPU, Device


@dataclass(frozen=True)
class Quantizer:
    """A target's number formats, a calibrator, and the device that tries them."""

    target: Target
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR
    device: Device = CPU

    @classmethod
    def of(cls, context: Context) -> Self:
        """The base quantizer that a compilation asks for."""
        return cls(context.target, context.options.calibrator, context.device)

    @property
    def format(self) -> NumberFormat:
        """What linears are quantized to."""
        return number_format(self.target, self.algebra)

    @property
    def algebra(self) -> Algebra:
        """What computes with dense arrays."""
        return algebra_on(self.device)

    @property
    def quantizes_activations(self) -> bool:
        """False for weight-only formats (w4a16)."""
        return self.target.activation_bits is not None

    def scales(
        self, sites: Iterable[Site], statistics: Mapping[str, ActivationStatistics]
    ) -> dict[str, Scale]:
        """The activation scale of every site, by the name of its tensor."""
        if not self.quantizes_activations:
            return {}
        found = {}
        for site in sites:
            weights = [linear.weight for linear in site.linears]
            found[site.tensor.name] = self.scale(weights, statistics[site.tensor.name])
            for weight in weights:
                let_go(weight)
        return found

    def scale(self, weights: Sequence[Array], seen: ActivationStatistics) -> Scale:
        """The scale of one activation that the matrices `weights` [K, N] read."""
        put = self.algebra.put
        return self.scale_by(lambda: output_error([put(weight) for weight in weights]), seen)

    def scale_by(self, error: Callable[[], ErrorMeasure], seen: ActivationStatistics) -> Scale:
        """The scale of one activation; `error` makes the measure of what a rounding does."""
        return self.format.scale(self.calibrator, error, seen)

    def step(self, scales: Mapping[str, Scale]) -> Pass:
        """The pass that quantizes the linears behind the activations that `scales` names.

        Each weight becomes the nearest that the format has.
        """
        return self.format.steps(scales, Rounded())[0]
