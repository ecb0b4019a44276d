"""The base quantizer that registers sit on: number formats, and how ranges are chosen."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from regcache.compiler.calibration import Activation
from regcache.compiler.ranges import Floats, choose_scale
from regcache.compiler.targets import Target
from regcache.passes.affine import Affine
from regcache.passes.base import Pass
from regcache.passes.encoder import Site
from regcache.passes.quantize_linears import QuantizeLinears, RoundedWeight
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
        self, sites: Iterable[Site], statistics: Mapping[str, Activation]
    ) -> dict[str, Affine]:
        """The activation scale of every site, by the name of its tensor."""
        if not self.quantizes_activations:
            return {}
        return {
            site.tensor.name: self.scale(
                [linear.weight for linear in site.linears], statistics[site.tensor.name]
            )
            for site in sites
        }

    def scale(self, weights: Sequence[Floats], seen: Activation) -> Affine:
        """The scale of one activation that the matrices `weights` [K, N] read."""
        formats = self.target
        symmetric, bits = formats.activation_symmetric, formats.activation_bits
        assert bits is not None
        low, high, dtype = seen.low, seen.high, formats.activation_dtype
        if self.calibrator is Calibrator.MIN_MAX:
            return Affine.from_range(low, high, dtype, symmetric=symmetric, bits=bits)
        return choose_scale(seen.rows, weights, low, high, dtype, symmetric=symmetric, bits=bits)

    def step(
        self,
        scales: Mapping[str, Affine],
        weights: Mapping[str, RoundedWeight] | None = None,
        only: frozenset[str] | None = None,
    ) -> Pass:
        """The pass that quantizes the linears behind the activations that `scales` names.

        `weights`: integers of linears, by name, in place of the nearest ones. `only`: the names of
        the linears to quantize, all by default.
        """
        if not self.quantizes_activations:
            return RoundWeights(self.target.weight_bits)
        formats = self.target
        return QuantizeLinears(
            scales, formats.weight_dtype, formats.weight_bits, only, weights or {}
        )
