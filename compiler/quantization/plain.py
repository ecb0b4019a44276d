"""The plain base quantizer: scales, and every linear rounded to the nearest."""

from collections.abc import Mapping

import onnx_graphsurgeon as gs

from regcache.compiler.calibration.observe import ActivationStatistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.passes.base import run


def quantize_plainly(
    encoder: FloatEncoder, statistics: Mapping[str, ActivationStatistics], quantizer: Quantizer
) -> gs.Graph:
    """The quantized graph, from statistics of every site by its name."""
    sites = encoder.view.sites
    step = quantizer.step(sites, quantizer.scales(sites, statistics))
    return run(step, encoder.graph).graph
