"""The base quantizer that registers sit on: number formats, and how ranges are chosen."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from regcache.compiler.calibration import SiteStatistics
from regcache.compiler.ranges import choose_scale
from regcache.compiler.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.base import Pass
from regcache.passes.encoder import Site
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.round_weights import RoundWeights


class Calibrator(StrEnum):
    """How the range of an activation is chosen: by its layers' output error, or as observed."""

    OUTPUT_ERROR = "output-error"
    MIN_MAX = "min-max"


@dataclass(frozen=True)
class Quantizer:
    """A target's number formats and a calibrator."""

    target: Target
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR

    @property
    def quantizes_activations(self) -> bool:
        """False for weight-only formats (w4a16)."""
        return self.target.activation_bits is not None

    def scales(
        self, sites: Iterable[Site], statistics: Mapping[str, SiteStatistics]
    ) -> dict[str, Affine]:
        """The activation scale of every site, by the name of its tensor."""
        if not self.quantizes_activations:
            return {}
        return {site.tensor.name: self._scale(site, statistics[site.tensor.name]) for site in sites}

    def step(self, scales: Mapping[str, Affine]) -> Pass:
        """The pass that quantizes the linears behind the activations that `scales` names."""
        if self.quantizes_activations:
            return QuantizeLinears(scales, self.target.weight_dtype, self.target.weight_bits)
        return RoundWeights(self.target.weight_bits)

    def _scale(self, site: Site, seen: SiteStatistics) -> Affine:
        formats = self.target
        symmetric, bits = formats.activation_symmetric, formats.activation_bits
        assert bits is not None
        low, high, dtype = seen.low, seen.high, formats.activation_dtype
        if self.calibrator is Calibrator.MIN_MAX:
            return Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)
        weights = [linear.weight for linear in site.linears]
        rows = seen.sample.rows
        return choose_scale(rows, weights, low, high, dtype, symmetric=symmetric, bits=bits)
