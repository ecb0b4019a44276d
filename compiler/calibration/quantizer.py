"""The base quantizer that registers sit on: number formats, and how ranges are chosen."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from regcache.compiler.calibration.calibrators import (
    ScaleByValues,
    entropy_scale,
    min_max_scale,
    mse_scale,
    percentile_scale,
)
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.ranges import (
    ErrorMeasure,
    Floats,
    choose_float8,
    choose_scale,
    output_error,
)
from regcache.compiler.job.context import Context
from regcache.compiler.job.options import FLOAT8_CALIBRATORS, Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.base import Pass
from regcache.passes.encoder import Site
from regcache.passes.external_weights import let_go
from regcache.passes.float8 import Float8
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears, RoundedWeight
from regcache.passes.round_weights import RoundWeights

Scale = Affine | Float8
"""How one activation is rounded: `scale`, `zero_point`, `dtype`, `range` and `round_trip`."""


_BY_VALUES: Mapping[Calibrator, ScaleByValues] = {
    Calibrator.MIN_MAX: min_max_scale,
    Calibrator.PERCENTILE: percentile_scale,
    Calibrator.ENTROPY: entropy_scale,
    Calibrator.MSE: mse_scale,
}


@dataclass(frozen=True)
class Quantizer:
    """A target's number formats and a calibrator."""

    target: Target
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR

    @classmethod
    def of(cls, context: Context) -> Self:
        """The base quantizer that a compilation asks for."""
        return cls(context.target, context.options.calibrator)

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

    def scale(self, weights: Sequence[Floats], seen: ActivationStatistics) -> Scale:
        """The scale of one activation that the matrices `weights` [K, N] read."""
        return self.scale_by(lambda: output_error(weights), seen)

    def scale_by(self, error: Callable[[], ErrorMeasure], seen: ActivationStatistics) -> Scale:
        """The scale of one activation; `error` makes the measure of what a rounding does."""
        if self.target.float8:
            return self._float8(error, seen)
        formats = self.target
        symmetric, bits = formats.activation_symmetric, formats.activation_bits
        assert bits is not None
        rows, low, high, dtype = seen.rows, seen.low, seen.high, formats.activation_dtype
        if self.calibrator in _BY_VALUES:
            by_values = _BY_VALUES[self.calibrator]
            return by_values(rows, low, high, dtype, symmetric=symmetric, bits=bits)
        return choose_scale(rows, error(), low, high, dtype, symmetric=symmetric, bits=bits)

    def _float8(self, error: Callable[[], ErrorMeasure], seen: ActivationStatistics) -> Float8:
        if self.calibrator is Calibrator.MIN_MAX:
            return Float8.from_range(seen.low, seen.high)
        assert self.calibrator in FLOAT8_CALIBRATORS
        return choose_float8(seen.rows, error(), seen.low, seen.high)

    def step(
        self,
        scales: Mapping[str, Scale],
        weights: Mapping[str, RoundedWeight] | None = None,
        only: frozenset[str] | None = None,
    ) -> Pass:
        """The pass that quantizes the linears behind the activations that `scales` names.

        `weights`: integers of linears, by name, in place of the nearest ones (not for fp8). `only`:
        the names of the linears to quantize, all by default.
        """
        if not self.quantizes_activations:
            return RoundWeights(self.target.weight_bits)
        formats = self.target
        if formats.float8:
            floats = {name: one for name, one in scales.items() if isinstance(one, Float8)}
            return QuantizeFloat8(floats, only)
        integers = {name: one for name, one in scales.items() if isinstance(one, Affine)}
        return QuantizeLinears(
            integers, formats.weight_dtype, formats.weight_bits, only, weights or {}
        )
