"""The base quantizer, without registers: number formats, and how ranges are chosen."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import onnx_graphsurgeon as gs

from regcache.compiler.calibration.algebra import Algebra, Array
from regcache.compiler.calibration.number_format import NumberFormat, Rounded, Scale
from regcache.compiler.calibration.number_formats import number_format
from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.placing import algebra_on
from regcache.compiler.calibration.ranges import COLUMNS, ErrorMeasure, output_error, some_columns
from regcache.compiler.calibration.side_by_side import side_by_side
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Target
from regcache.passes.base import Pass, run
from regcache.passes.encoder import Site, by_tensor
from regcache.passes.external_weights import let_go
from regcache.runtime.device import CPU, Device


@dataclass(frozen=True)
class Quantizer:
    """A target's number formats, the calibrator that chooses ranges, and the device that tries."""

    target: Target
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR
    device: Device = CPU

    @classmethod
    def of(cls, context: Context) -> Self:
        """The base quantizer that a compilation asks for."""
        return cls(context.target, context.calibrator, context.device)

    @property
    def format(self) -> NumberFormat:
        """The number format of the linears."""
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
        self,
        sites: Sequence[Site],
        statistics: Mapping[str, ActivationStatistics],
        threads: int | None = None,
    ) -> dict[str, Scale]:
        """The scale of every site's activation; `statistics` and scales go by the site's name.

        `threads` of them are chosen at a time, by the errors of some of the output channels.
        """
        if not self.quantizes_activations:
            return {}

        def choose(site: Site) -> Scale:
            weights = [linear.weight for linear in site.linears]
            scale = self.scale([some_columns(weights, COLUMNS)], statistics[site.name])
            for weight in weights:
                let_go(weight)
            return scale

        chosen = side_by_side(choose, sites, threads)
        return {site.name: scale for site, scale in zip(sites, chosen, strict=True)}

    def scale(self, weights: Sequence[Array], statistics: ActivationStatistics) -> Scale:
        """The scale of an activation that the matrices `weights` [K, N] read, by its statistics."""
        put = self.algebra.put
        return self.scale_by(lambda: output_error([put(weight) for weight in weights]), statistics)

    def scale_by(
        self, error: Callable[[], ErrorMeasure], statistics: ActivationStatistics
    ) -> Scale:
        """The scale of an activation, by its statistics; `error`: see NumberFormat.scale."""
        return self.format.scale(self.calibrator, error, statistics)

    def step(self, sites: Iterable[Site], scales: Mapping[str, Scale]) -> Pass:
        """The pass that quantizes the linears of the sites that `scales` names.

        Weights are rounded to the nearest.
        """
        return self.format.steps(by_tensor(sites, scales), Rounded())[0]

    def plainly(
        self, encoder: FloatEncoder, statistics: Mapping[str, ActivationStatistics]
    ) -> gs.Graph:
        """An encoder quantized, weights to the nearest; `statistics`: of every site by name."""
        sites = encoder.view.sites
        return run(self.step(sites, self.scales(sites, statistics)), encoder.graph).graph
