"""The stage that takes the place of all others where nothing is quantized: bf16 and FP16."""

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.pass_record import pass_records
from regcache.compiler.job.context import Context
from regcache.compiler.job.half import half_steps
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.targets import Precision
from regcache.compiler.quantization.equalize import Equalized
from regcache.compiler.quantization.finish import Quantized
from regcache.compiler.quantization.int8_share import Placement
from regcache.passes.base import run_all


def leave_unquantized(
    context: Context, encoder: FloatEncoder
) -> tuple[Equalized, Placement, Quantized]:
    """The encoder as it is, and what the stages of quantization would have given.

    In FP16 what may overflow computes in FP32; bf16 is a matter of how OpenVINO runs the graph, and
    FP32 is what it is.
    Every site stays float.
    """
    context.reporter.begin(Stage.WRITE)

    half = context.precision is Precision.FP16
    steps = half_steps(context.target.profile) if half else ()
    graph, ran = run_all(steps, encoder.graph)
    sites = tuple(site.name for site in encoder.view.sites)
    quantized = Quantized(graph, {}, 0, pass_records(ran))
    return Equalized(encoder, {}), Placement(sites, 0.0), quantized
