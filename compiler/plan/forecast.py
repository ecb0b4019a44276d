"""`regcache compile --dry-run`: what every step will take, by a quick look at this machine."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from regcache.compiler.calibration.stored_rows import stored_bytes, stores_rows
from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.calibration_images import calibration_images
from regcache.compiler.job.context import choose_target
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.record import Record
from regcache.compiler.job.stages import EXPORTING, Stage
from regcache.compiler.job.staging import unnamed
from regcache.compiler.plan.measure import TIMING, Look, Sizes, look
from regcache.compiler.plan.model_size import compiled_bytes
from regcache.compiler.plan.steps import planned_steps
from regcache.compiler.reporter import Reporter, Step
from regcache.passes.errors import InputError
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import find_device
from regcache.runtime.session import LARGE

# Steps that decode every calibration image.
_DECODING = frozenset({Stage.CALIBRATE})
# What a step holds at most: float weights, fewer where the graph lies on disk; and what linears
# read, of so many images and, where it says, of a batch more. Measured on DINOv2-S with
# benchmarks/compile_cost.py, and a little more than that.
_WEIGHTS, _MAPPED_WEIGHTS, _MORE = 3, 2, 1.1
_ACTIVATIONS: Mapping[str, float] = {
    Stage.CALIBRATE: 7, Stage.EQUALIZE: 13, Stage.SEARCH: 17, Stage.ROTATE: 11, Stage.PLACE: 25,
    Stage.RANGES: 9, Stage.ROUND: 19, Stage.WRITE: 14, Stage.BOUND: 19, Stage.PARITY: 13,
    Stage.SPEED: 20,
}  # fmt: skip
_BATCHES = frozenset({Stage.CALIBRATE})


class StepForecast(Record):
    """What one step is expected to take."""

    name: str
    """What is done, in words."""
    sure: bool
    """Whether it is done for certain; false where the search decides."""
    seconds: float
    """How long, in seconds."""
    memory: int
    """The most memory meanwhile, in bytes."""
    disk: int
    """Bytes on disk meanwhile, files that do not last among them."""


class Forecast(Record):
    """What a compilation is expected to take on this machine, as busy as it is just now."""

    source: str
    """The source as it was named."""
    images: int
    """Calibration images in the folder."""
    weights: int
    """Bytes of the float model."""
    image_seconds: float
    """Seconds that the float model took for an image."""
    steps: list[StepForecast]
    """Every step, in order."""
    seconds: float
    """How long the sure steps take, in seconds."""
    memory: int
    """The most memory of any step, in bytes."""
    disk: int
    """The most bytes on disk at any time."""
    artifact: int
    """Bytes of the artifact, which stay."""
    free: int
    """Bytes that are free where the artifact goes."""


def forecast(options: CompileOptions, output: Path, reporter: Reporter) -> Forecast:
    """What compiling to the folder `output` is expected to take; nothing is written there.

    Only the float model tells its size and its speed: the source is exported into a temporary
    folder. Raises InputError as compiling does, as far as that goes.
    """
    device = find_device(options.device, algebra=True)
    if not options.images:
        raise InputError("--dry-run measures with photographs: name a folder with --images")
    paths = calibration_images(options.images, options.max_images, options.seed, reporter.warn)
    with (
        reporter.command(EXPORTING, Step(TIMING, seconds=1)),
        temporary_folder() as scratch,
        unnamed(scratch),
    ):
        seen = look(options, paths, scratch, reporter, device)
    steps = foretell(options, len(paths), seen)
    kept = seen.sizes.weights if options.keep_float else 0
    return Forecast(
        source=options.source,
        images=len(paths),
        weights=seen.sizes.weights,
        image_seconds=seen.image_seconds,
        steps=steps,
        seconds=sum(step.seconds for step in steps if step.sure),
        memory=max(step.memory for step in steps),
        disk=max(step.disk for step in steps),
        artifact=model_bytes(seen.sizes, options) + kept,
        free=shutil.disk_usage(_existing(output)).free,
    )


def foretell(options: CompileOptions, images: int, seen: Look) -> list[StepForecast]:
    """The seconds, memory and disk of every step, for `images` calibration images.

    `seen`: sizes and times that were measured on the encoder itself.
    """
    sizes = seen.sizes
    stores = stores_rows(choose_target(options), options.rounding)
    rows = stored_bytes(sizes.activations // sizes.tokens, images, sizes.tokens) if stores else 0
    disk = _Disk(sizes, model_bytes(sizes, options), rows)
    return [
        StepForecast(
            name=step.name,
            sure=step.sure,
            seconds=_seconds(step, images, seen),
            memory=_memory(step, options, images, seen),
            disk=disk.during(step),
        )
        for step in planned_steps(options, images, tokens=seen.sizes.tokens)
    ]


def model_bytes(sizes: Sizes, options: CompileOptions) -> int:
    """Bytes of model.onnx, with all linears quantized."""
    half = options.in_half
    return compiled_bytes(sizes.weights, sizes.linears, options.precision, half=half)


def _seconds(step: Step, images: int, seen: Look) -> float:
    if step.name == Stage.EXPORT:
        return seen.export_seconds
    decoding = images * seen.decode_seconds if step.name in _DECODING else 0.0
    return step.seconds + step.images * seen.image_seconds + decoding


def _memory(step: Step, options: CompileOptions, images: int, seen: Look) -> int:
    sizes = seen.sizes
    if step.name == Stage.EXPORT:
        return max(seen.exporting, seen.process + sizes.weights)
    held: float = (_MAPPED_WEIGHTS if sizes.weights >= LARGE else _WEIGHTS) * sizes.weights
    batch = options.batch_size if step.name in _BATCHES else 0
    held += (_ACTIVATIONS.get(step.name, 0) + batch) * sizes.activations
    if step.name == Stage.SEARCH:
        reference = min(images, Breadth.of(options.effort).images)
        held += reference * (sizes.pixels + sizes.streams // 2)
    return round(_MORE * (seen.process + held))


@dataclass
class _Disk:
    """Bytes on disk, step by step: the float file, a large graph's weights, what a step writes.

    `rows`: that calibration leaves to round weights by.
    """

    sizes: Sizes
    model: int
    rows: int
    kept: int = 0
    passing: int = 0

    def during(self, step: Step) -> int:
        """Bytes on disk during a step; to be asked of the steps in order: each adds to it."""
        weights = self.sizes.weights
        if step.name == Stage.EXPORT:
            self.kept = 2 * weights if weights >= LARGE else weights
        elif step.name in (Stage.EQUALIZE, Stage.ROTATE) and weights >= LARGE:
            self.kept += weights
        elif step.name == Stage.WRITE:
            self.kept += self.model
            self.passing = 0
        elif step.name == Stage.BOUND:  # what is tried lies beside the best so far
            self.kept += self.model
            rows, self.passing = self.passing, 0
            return self.kept + rows + self.model
        elif step.name == Stage.CALIBRATE:
            self.passing = self.rows
        return self.kept + self.passing


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())
