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
from regcache.passes.encoder import by_tensor
from regcache.passes.model_files import remove_model
from regcache.runtime.images import ImageFolder, Skipped


@dataclass(frozen=True)
class Calibrated:
    """What calibration learned of an encoder.

    `statistics`: of every site's activation, by the site's name. `streams`: ranges of the residual
    stream, by the name of the tensor; empty unless asked for, as FP16 needs them. `images`: the
    calibration images, without those that cannot be read.
    """

    statistics: Mapping[str, HalvedStatistics]
    streams: Mapping[str, ChannelRange]
    images: ImageFolder


def calibrate(context: Context, encoder: FloatEncoder, *, with_streams: bool = False) -> Calibrated:
    """Run the images through the encoder once. Raises InputError as `observe` does.

    `with_streams`: whether the residual stream is observed too.
    """
    images, count, skipped = context.images, len(context.images.paths), list[Skipped]()
    statistics = halved_statistics(encoder.view, count, context.seed)
    streams = stream_ranges(encoder.view) if with_streams else {}
    context.reporter.begin(Stage.CALIBRATE, f"{count} images")
    batches = context.reporter.images(images.telling(skipped.append), count, Stage.CALIBRATE)
    model = context.scratch / "observed.onnx"
    observers: dict[str, Observer] = {**by_tensor(encoder.view.sites, statistics), **streams}
    pixels = (batch.images for batch in batches)
    observe(encoder.graph, observers, pixels, model, threads=context.threads, device=context.device)
    remove_model(model)
    return Calibrated(statistics, streams, images.without(skipped))
