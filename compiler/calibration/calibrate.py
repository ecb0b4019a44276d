"""The stage that runs the images once in float, for statistics of every activation."""

from collections.abc import Mapping
from dataclasses import dataclass

from regcache.compiler.calibration.observe import (
    HalvedStatistics,
    Observer,
    halved_statistics,
    observe,
    stream_ranges,
)
from regcache.compiler.calibration.statistics import ChannelRange
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.passes.model_files import remove_model
from regcache.runtime.images import ImageFolder, Skipped


@dataclass(frozen=True)
class Calibrated:
    """What the images show of an encoder.

    `statistics`: of every site, by its tensor's name; `streams`: ranges of the residual stream, by
    tensor, where FP16 is to hold it. `images`: those that can be read.
    """

    statistics: Mapping[str, HalvedStatistics]
    streams: Mapping[str, ChannelRange]
    images: ImageFolder


def calibrate(context: Context, encoder: FloatEncoder) -> Calibrated:
    """Run the images through the encoder once. Raises InputError as `observe` does."""
    options, images, skipped = context.options, context.images, list[Skipped]()
    statistics = halved_statistics(encoder.view, len(images.paths), options.seed)
    streams = stream_ranges(encoder.view) if options.in_half else {}
    count = len(images.paths)
    context.reporter.begin(Stage.CALIBRATE, f"{count} images")
    batches = context.reporter.images(images.telling(skipped.append), count, Stage.CALIBRATE)
    model = context.scratch / "observed.onnx"
    observers: dict[str, Observer] = {**statistics, **streams}
    pixels = (batch.images for batch in batches)
    observe(encoder.graph, observers, pixels, model, threads=options.threads)
    remove_model(model)
    return Calibrated(statistics, streams, images.without(skipped))
