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
from regcache.compiler.calibration.statistics import ChannelRange, Floats
from regcache.compiler.calibration.stored_rows import StoredRows, stored_rows, stores_rows
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.context import Context
from regcache.compiler.job.stages import Stage
from regcache.passes.encoder import by_tensor
from regcache.runtime.images import ImageFolder, Skipped


@dataclass(frozen=True)
class Calibrated:
    """What calibration learned of an encoder.

    `statistics`: of every site's activation, by the site's name. `streams`: ranges of the residual
    stream, by the name of the tensor; empty unless asked for, as FP16 needs them. `images`: the
    calibration images, without those that cannot be read. `rows`: of every site's activation, by
    the site's name; empty unless weights are rounded by them.
    """

    statistics: Mapping[str, HalvedStatistics]
    streams: Mapping[str, ChannelRange]
    images: ImageFolder
    rows: Mapping[str, StoredRows]


@dataclass(frozen=True)
class _Together:
    """Observers of one activation."""

    observers: tuple[Observer, ...]

    def update(self, tokens: Floats) -> None:
        for observer in self.observers:
            observer.update(tokens)


def calibrate(context: Context, encoder: FloatEncoder) -> Calibrated:
    """Run the images through the encoder once. Raises InputError as `observe` does."""
    images, count, skipped = context.images, len(context.images.paths), list[Skipped]()
    sites = encoder.view.sites
    statistics = halved_statistics(encoder.view, count, context.seed)
    streams = stream_ranges(encoder.view) if context.in_half else {}
    stores = stores_rows(context.target, context.rounding)
    rows = stored_rows(sites, context.scratch, count, context.seed) if stores else {}
    context.reporter.begin(Stage.CALIBRATE, f"{count} images")
    batches = context.reporter.images(images.telling(skipped.append), count, Stage.CALIBRATE)
    seen: dict[str, Observer] = {
        name: _Together((one, rows[name])) if name in rows else one
        for name, one in statistics.items()
    }
    observers: dict[str, Observer] = {**by_tensor(sites, seen), **streams}
    pixels = (batch.images for batch in batches)
    observe(encoder.graph, observers, pixels, threads=context.threads, device=context.device)
    return Calibrated(statistics, streams, images.without(skipped), rows)
