"""A quick look at an encoder and at this machine: how large it is, and how fast it runs here."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Self

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.prepare import prepare
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.plan.memory import child_peak, resident
from regcache.compiler.plan.steps import TOKENS
from regcache.compiler.reporter import Reporter
from regcache.passes.model_files import model_size
from regcache.runtime.device import CPU, Device
from regcache.runtime.images import ImageFolder
from regcache.runtime.session import OrtSession
from regcache.runtime.stored_images import AnyImage

TIMING = "timing the float model"
# The most runs that are timed, and the seconds after which no other begins.
_RUNS, _SECONDS = 7, 3.0


@dataclass(frozen=True)
class Sizes:
    """How large an encoder is, in bytes but for `linears`: the weights of those, in numbers.

    `activations`: what its linears read of one image; `streams`: the residual stream of one image,
    before and after every block; `pixels`: one image.
    """

    weights: int
    linears: int
    tokens: int
    activations: int
    streams: int
    pixels: int

    @classmethod
    def of(cls, encoder: FloatEncoder) -> Self:
        """The sizes of an encoder whose weights are in its ONNX file."""
        view = encoder.view
        tokens = view.tokens or TOKENS
        channels = sum(site.linears[0].weight_shape[0] for site in view.sites)
        recipe = encoder.recipe
        return cls(
            weights=model_size(encoder.path),
            linears=sum(prod(linear.weight_shape) for linear in view.linears),
            tokens=tokens,
            activations=4 * tokens * channels,
            streams=4 * tokens * view.width * (len(view.blocks) + 1),
            pixels=4 * 3 * recipe.height * recipe.width,
        )


@dataclass(frozen=True)
class Look:
    """What was seen: seconds to export, to decode an image and to run it; memory in bytes.

    `process`: of this process, weights left out; `exporting`: of the largest that it ran.
    """

    sizes: Sizes
    process: int
    exporting: int
    export_seconds: float
    decode_seconds: float
    image_seconds: float


def look(
    options: CompileOptions,
    paths: Sequence[AnyImage],
    folder: Path,
    reporter: Reporter,
    device: Device = CPU,
) -> Look:
    """Export the source into `folder`, then decode one batch and run it a few times in float.

    `device`: what runs it. Raises InputError as compiling does, as far as that goes.
    """
    start = time.perf_counter()
    encoder = prepare(options, folder, reporter, threads=options.threads)
    exported = time.perf_counter()
    sizes = Sizes.of(encoder)
    process = max(resident() - sizes.weights, 0)
    reporter.begin(TIMING)
    size = encoder.batch(options.batch_size)
    before = time.perf_counter()
    batch = next(iter(ImageFolder(paths, encoder.recipe, size, reporter.skipped)))
    decoded = time.perf_counter()
    with OrtSession(encoder.path, threads=options.threads, device=device) as session:
        session.run(batch.images)
        taken = _median_seconds(lambda: session.run(batch.images))
    count = len(batch.images)
    return Look(
        sizes=sizes,
        process=process,
        exporting=child_peak(),
        export_seconds=exported - start,
        decode_seconds=(decoded - before) / count,
        image_seconds=taken / count,
    )


def _median_seconds(run: Callable[[], object]) -> float:
    """Of a few runs, fewer where they take long."""
    taken: list[float] = []
    while len(taken) < _RUNS and sum(taken) < _SECONDS:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return median(taken)
