"""`regcache compile`, stage by stage: source -> float encoder -> registers -> integers -> artifact.

A stage is a function of the context and of the encoder as it stands; it changes neither.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np

from regcache.compiler.artifact.artifact import MODEL, PREPROCESS
from regcache.compiler.artifact.describe import Compiled, describe_artifact
from regcache.compiler.artifact.manifest import FileRecord, Manifest, ParityRecord, SpeedRecord
from regcache.compiler.artifact.speed_check import check_speed
from regcache.compiler.calibration.calibrate import Calibrated, calibrate
from regcache.compiler.calibration.mapped import let_graph_go, return_memory
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.find import find_registers, no_registers, splice
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.pass_record import say_slower
from regcache.compiler.encoder.prepare import prepare
from regcache.compiler.encoder.split import split_for_target
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.options import CompileOptions, RegisterChoice
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.targets import Precision
from regcache.compiler.parity.first_look import FIRST_LOOK_IMAGES, first_look
from regcache.compiler.plan.steps import planned_steps
from regcache.compiler.quantization.equalize import (
    Equalized,
    as_it_is,
    equalize,
    without_shifts,
)
from regcache.compiler.quantization.finish import Quantized, quantize
from regcache.compiler.quantization.int8_share import Placement, keep_float
from regcache.compiler.quantization.rotation import rotate
from regcache.compiler.quantization.unquantized import leave_unquantized
from regcache.compiler.reporter import Reporter
from regcache.compiler.staging import staged_folder
from regcache.passes.errors import InputError
from regcache.passes.model_files import model_files, remove_model
from regcache.passes.onnx_file import save_graph
from regcache.runtime.device import Device, computing_on, find_device
from regcache.runtime.images import ImageFolder, Skipped, list_images
from regcache.runtime.made_pictures import draw_pictures
from regcache.runtime.openvino_options import check_openvino, computes_bf16

REGISTERS = "registers.npz"


def compile_encoder(
    options: CompileOptions, output: Path, reporter: Reporter, device: Device | None = None
) -> Manifest:
    """Compile a source into the artifact folder `output`: docs/architecture.md says what it holds.

    `device`: what computes; None for the one that the options name.
    Peak memory does not grow with the number of images (docs/cost.md says what it is). Raises
    InputError on bad input, and then leaves nothing at `output` that was not there before.
    """
    device = device or find_device(options.device, algebra=True)
    _check_possible(options)
    target = choose_target(options)
    with TemporaryDirectory(prefix="regcache-") as drawn, computing_on(device), ExitStack() as ends:
        paths = (
            list_images(Path(options.images), reporter.warn)
            if options.images
            else draw_pictures(Path(drawn), FIRST_LOOK_IMAGES)
        )
        ends.enter_context(reporter.command(*planned_steps(options, len(paths))))
        staging = ends.enter_context(staged_folder(output))
        prepared = prepare(options, staging, reporter, threads=options.threads)
        encoder = split_for_target(prepared, target)
        images = ImageFolder(
            paths, encoder.recipe, encoder.batch(options.batch_size), reporter.skipped
        )
        journal = output.absolute().parent / f".{output.name}.search.jsonl"
        context = Context(options, target, images, staging, journal, reporter, device)
        follow = _compile if options.precision.quantizes else _compile_float
        manifest = follow(context, encoder, staging)
        manifest.write(staging)
        say_slower(manifest.passes, reporter)
    return manifest


def _check_possible(options: CompileOptions) -> None:
    """Raise InputError without images to calibrate on, or where bf16 cannot be looked at here.

    ONNX Runtime would compute the same file in FP32, which says nothing of bf16: MissingExtraError
    without OpenVINO.
    """
    if options.precision.quantizes and not options.images:
        named = options.precision.value
        raise InputError(f"{named} is calibrated on photographs: name a folder with --images")
    if options.precision is Precision.BF16:
        check_openvino("--precision bf16")
        if not computes_bf16():
            raise InputError("--precision bf16: this CPU computes none; compile where it will run")


def _compile(context: Context, encoder: FloatEncoder, folder: Path) -> Manifest:
    """Every stage behind the float encoder; writes the artifact's files but for the manifest."""
    options, skipped = context.options, list[Skipped]()
    context = replace(context, images=context.images.telling(skipped.append))
    searched, curated = None, no_registers(encoder, "not asked for")
    if options.registers is RegisterChoice.AUTO:
        searched = _even(context, encoder)
        context = replace(context, images=searched.calibrated.images)
        curated = find_registers(context, searched.plain(context))
    placed = splice(encoder, curated)
    if options.rotates:
        placed = rotate(context, placed, options.share)
    sensitivity = curated.record.sensitivity
    if placed.graph is not encoder.graph:
        searched, sensitivity = None, []  # they are of another encoder, and their memory is free
    even = _even(context, placed) if searched is None else searched.also(placed)
    context = replace(context, images=even.calibrated.images)
    placement = keep_float(context, placed, even.equalized, sensitivity, options.share)
    quantized = quantize(context, even.equalized, placement, even.calibrated.streams)
    made = _Made(curated, even.equalized, placement, quantized)
    _save(quantized, curated, (encoder, placed, even.equalized.encoder), folder)
    return _finish(context, encoder, made, skipped, folder)


def _compile_float(context: Context, encoder: FloatEncoder, folder: Path) -> Manifest:
    """The stages where nothing is quantized: no image is run but for the first look."""
    skipped = list[Skipped]()
    context = replace(context, images=context.images.telling(skipped.append))
    curated = no_registers(encoder, "nothing is quantized")
    made = _Made(curated, *leave_unquantized(context, encoder))
    _save(made.quantized, curated, (encoder,), folder)
    return _finish(context, encoder, made, skipped, folder)


@dataclass(frozen=True)
class _Made:
    """What the stages made of an encoder."""

    curated: Curated
    equalized: Equalized
    placement: Placement
    quantized: Quantized


def _finish(
    context: Context, encoder: FloatEncoder, made: _Made, skipped: Sequence[Skipped], folder: Path
) -> Manifest:
    """Measure the model in `folder`, write the files that are missing but for the manifest."""
    look = first_look(context, encoder, folder / MODEL)
    parity = ParityRecord(images=_shown(context), result=look.result, runtime=look.runtime)
    speed = _speed(context, encoder, folder / MODEL, made.quantized.linears)
    (folder / PREPROCESS).write_text(encoder.recipe.to_json(), encoding="utf-8")
    source = FileRecord.of(*model_files(encoder.path))
    if not context.options.keep_float:
        remove_model(encoder.path)
    context.reporter.begin(Stage.SEAL)
    compiled = Compiled(**vars(made), parity=parity, primitives=look.primitives, speed=speed)
    return describe_artifact(context, compiled, source, skipped, folder)


def _shown(context: Context) -> Literal["calibration", "given", "drawn"]:
    if not context.options.images:
        return "drawn"
    return "calibration" if context.options.precision.quantizes else "given"


@dataclass(frozen=True)
class _Even:
    """An encoder, its calibration, and the encoder that equalizing made of it."""

    encoder: FloatEncoder
    calibrated: Calibrated
    equalized: Equalized

    def plain(self, context: Context) -> FloatEncoder:
        """The encoder to search in: equalized, but not shifted."""
        return without_shifts(context, self.encoder, self.equalized)

    def also(self, encoder: FloatEncoder) -> "_Even":
        """The same of `encoder`, whose graph is the same but which more passes have looked at."""
        after = self.equalized.encoder
        passes = (*encoder.passes, *after.passes[len(self.encoder.passes) :])
        equalized = replace(self.equalized, encoder=replace(after, passes=passes))
        return replace(self, encoder=encoder, equalized=equalized)


def _even(context: Context, encoder: FloatEncoder) -> _Even:
    options = context.options
    calibrated = calibrate(context, encoder, with_streams=options.in_half)
    if options.equalize:
        return _Even(encoder, calibrated, equalize(context, encoder, calibrated))
    return _Even(encoder, calibrated, as_it_is(encoder, calibrated.statistics))


def _save(
    quantized: Quantized, curated: Curated, done: Sequence[FloatEncoder], folder: Path
) -> None:
    """Write model and registers; free the memory of the encoders in `done`, no longer needed."""
    save_graph(quantized.graph, folder / MODEL)
    if curated.setting.changes:
        np.savez(folder / REGISTERS, tokens=curated.tokens)
    for encoder in done:
        let_graph_go(encoder.graph)  # what follows runs files
    return_memory()


def _speed(
    context: Context, encoder: FloatEncoder, model: Path, linears: int
) -> SpeedRecord | None:
    """How fast the model is beside the float one; None where ONNX Runtime is not to run it."""
    options = context.options
    untimed = not options.profile.timed or not options.precision.quantizes
    if untimed or options.simulate is not None:
        return None
    first = replace(context.images, paths=context.images.paths[:1], batch_size=1)
    batch = next(iter(first))
    return check_speed(
        encoder.path,
        model,
        batch.images,
        context.reporter,
        linears=linears,
        # 4-bit weights are for memory.
        accept_slower=options.accept_slower or options.precision is Precision.W4A16,
        threads=context.threads,
    )
