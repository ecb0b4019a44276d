"""`regcache compile`, stage by stage: source -> float encoder -> registers -> integers -> artifact.

A stage is a function of the context and of the encoder as it stands; it changes neither.
"""

import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from regcache.compiler.artifact.artifact import MODEL, PREPROCESS, REGISTERS
from regcache.compiler.artifact.describe import Compiled, describe_artifact
from regcache.compiler.artifact.manifest import (
    FileRecord,
    Manifest,
    ParityRecord,
    SpeedRecord,
)
from regcache.compiler.artifact.model_card import with_card
from regcache.compiler.artifact.signature import check_signing_key, sign
from regcache.compiler.artifact.speed_check import check_speed
from regcache.compiler.calibration.mapped import go_on_with, let_graph_go, return_memory
from regcache.compiler.calibration.side_by_side import one_blas_thread
from regcache.compiler.calibration.stored_rows import stored_bytes, stores_rows
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.find import find_registers, no_registers, splice
from regcache.compiler.curation.journal import journal_file
from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.encoder.pass_record import tell_passes
from regcache.compiler.encoder.prepare import prepare
from regcache.compiler.encoder.split import split_for_target
from regcache.compiler.job.calibration_images import calibration_images, hold_out
from regcache.compiler.job.context import Context, choose_target
from regcache.compiler.job.effort import Effort, RegisterChoice
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.staging import staged_folder
from regcache.compiler.job.targets import Precision
from regcache.compiler.parity.both_ways import Way, choose_way
from regcache.compiler.parity.first_look import FIRST_LOOK_IMAGES, first_look
from regcache.compiler.parity.keep_bound import keep_bound
from regcache.compiler.plan.model_size import bytes_of
from regcache.compiler.plan.steps import TOKENS, planned_steps
from regcache.compiler.quantization.equalize import (
    Equalized,
    Even,
    calibrate_and_equalize,
    without_shifts,
)
from regcache.compiler.quantization.fastest import gpus_for, predicted_half
from regcache.compiler.quantization.finish import Quantized, get_ready
from regcache.compiler.quantization.int8_share import BoundRecord, Placement
from regcache.compiler.quantization.rotation import rotate
from regcache.compiler.quantization.unquantized import leave_unquantized
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.model_files import check_free, model_files, remove_model
from regcache.passes.onnx_file import save_graph
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import Device, computing_on, find_device
from regcache.runtime.images import ImageFolder, Skipped
from regcache.runtime.made_pictures import draw_pictures
from regcache.runtime.openvino_options import check_openvino, computes_bf16

_UNASKED = "they were not asked for"


def compile_encoder(
    options: CompileOptions,
    output: Path,
    reporter: Reporter,
    device: Device | None = None,
    *,
    force: bool = False,
    key: Path | None = None,
) -> Manifest:
    """Compile a source into the artifact folder `output`: docs/architecture.md says what it holds.

    `device`: what computes; None for the one that the options name. `force`: whether an artifact is
    replaced, too, whose folder holds files of others; they are moved to `OUTPUT.kept`. `key`: a
    private key of OpenSSH's to sign the manifest with.
    Peak memory does not grow with the number of images (docs/cost.md says what it is). Raises
    InputError on bad input, and then leaves nothing at `output` that was not there before.
    """
    device = device or find_device(options.device, algebra=True)
    _check_possible(options)
    journal = journal_file(output)
    if key is not None:
        check_signing_key(key)
    with temporary_folder() as drawn, computing_on(device), one_blas_thread(), ExitStack() as ends:
        paths = (
            calibration_images(
                *(options.images, options.max_images, options.seed, reporter.warn),
                calibrates=options.precision.quantizes,
            )
            if options.images
            else draw_pictures(drawn, FIRST_LOOK_IMAGES)
        )
        paths, held = (paths, []) if options.min_cosine is None else hold_out(paths)
        ends.enter_context(reporter.command(*planned_steps(options, len(paths))))
        staging = ends.enter_context(staged_folder(output, force=force, tell=reporter.warn))
        prepared = prepare(options, staging, reporter, threads=options.threads)
        options, unquantized = _settle(options, prepared)
        target = choose_target(options)
        encoder = split_for_target(prepared, target)
        go_on_with(encoder.graph, prepared.graph, staging)
        _check_room(options, encoder, staging, len(paths))
        images = ImageFolder(
            paths, encoder.recipe, encoder.batch(options.batch_size), reporter.skipped
        )
        context = Context(options, target, images, staging, journal, reporter, device)
        if unquantized is None:
            out = replace(images, paths=held) if held else None
            manifest = _compile(context, encoder, staging, out)
        else:
            manifest = _compile_float(context, encoder, staging, unquantized)
        manifest.write(staging)
        if key is not None:
            sign(staging, key)
        tell_passes(manifest.passes, reporter)
    return manifest


def _settle(options: CompileOptions, encoder: FloatEncoder) -> tuple[CompileOptions, str | None]:
    """The options, in FP16 where 8 bits would save no time; and why nothing is quantized, or None.

    Raises InputError where time decides and cannot be predicted.
    """
    if not options.precision.quantizes:
        return options, "nothing is quantized"
    reason = predicted_half(options, encoder.view)
    if reason is None:
        return options, None
    # What says how to quantize says nothing any more; an artifact with it could not be opened.
    unsaid = dict.fromkeys(("prefer", "gpu", "search_budget", "attention", "half"))
    half = {**unsaid, "ablate": False, "precision": Precision.FP16, "effort": Effort.BALANCED}
    return options.model_copy(update=half), reason


def _check_room(options: CompileOptions, encoder: FloatEncoder, folder: Path, images: int) -> None:
    """Refuse a full disk before the search, not after it: model.onnx is copied to be looked at."""
    size = model = bytes_of(encoder, options.precision, half=options.in_half)
    if options.precision.quantizes and stores_rows(choose_target(options), options.rounding):
        row = 4 * sum(site.linears[0].weight_shape[0] for site in encoder.view.sites)
        size += stored_bytes(row, images, encoder.view.tokens or TOKENS)
    check_free(folder / MODEL, size)
    check_free(Path(tempfile.gettempdir(), MODEL), model)


def _check_possible(options: CompileOptions) -> None:
    """Raise InputError without images to calibrate on, for an unknown GPU, and without bf16 here.

    ONNX Runtime would compute the same file in FP32, which says nothing of bf16: MissingExtraError
    without OpenVINO.
    """
    if options.precision.quantizes and not options.images:
        named = options.precision.value
        raise InputError(f"{named} is calibrated on photographs: name a folder with --images")
    if options.predicts_time:
        gpus_for(options)
    if options.precision is Precision.BF16:
        check_openvino("--precision bf16")
        if not computes_bf16():
            raise InputError("--precision bf16: this CPU computes none; compile where it will run")


def _compile(
    context: Context, encoder: FloatEncoder, folder: Path, held: ImageFolder | None
) -> Manifest:
    """Every stage behind the float encoder; writes the artifact's files but for the manifest.

    `held`: the images that a bound is held on; None without one.
    """
    options, skipped = context.options, list[Skipped]()
    context = replace(context, images=context.images.telling(skipped.append))
    held = None if held is None else held.telling(skipped.append)
    rotated = rotate(context, encoder, options.rotations_leave) if options.rotates else encoder
    even, curated = calibrate_and_equalize(context, rotated), no_registers(encoder, _UNASKED)
    context = replace(context, images=even.calibrated.images)
    if options.registers is RegisterChoice.AUTO:
        curated = find_registers(context, without_shifts(context, rotated, even.equalized))
    made = _quantize(context, encoder, (rotated, even), curated, held, folder)
    _put_down(made, (encoder, rotated), folder)
    return _finish(context, encoder, made, skipped, folder, held)


def _quantize(
    context: Context,
    encoder: FloatEncoder,
    rotated: tuple[FloatEncoder, Even],
    curated: Curated,
    held: ImageFolder | None,
    folder: Path,
) -> "_Made":
    """The stages from splicing on, into `folder`. `rotated`: what is without registers, even."""
    plain = partial(get_ready, context, *rotated, curated.record.sensitivity)
    placed, least = splice(rotated[0], curated), context.options.min_cosine
    if curated.setting.changes:  # what is known is of the encoder without registers
        ready = get_ready(context, placed, calibrate_and_equalize(context, placed), [])
    else:
        ready = plain()
    way = Way(curated, ready)
    if held is None or curated.setting.changes:
        way = way.written(context, folder)
    if curated.setting.changes:
        way = choose_way(context, encoder, way, plain, folder)
    placement, bound = way.ready.placement, None
    if held is not None and least is not None:
        kept = keep_bound(context, encoder, way.ready, held, least)
        way, placement, bound = replace(way, quantized=kept.quantized), kept.placement, kept.record
    let_graph_go(placed.graph)
    return _Made(way.curated, way.ready.equalized, placement, way.quantized, bound)


def _compile_float(context: Context, encoder: FloatEncoder, folder: Path, reason: str) -> Manifest:
    """The stages where nothing is quantized: no image is run but for the first look."""
    skipped = list[Skipped]()
    context = replace(context, images=context.images.telling(skipped.append))
    curated = no_registers(encoder, reason)
    made = _Made(curated, *leave_unquantized(context, encoder))
    save_graph(made.quantized.graph, folder / MODEL)
    _put_down(made, (encoder,), folder)
    return _finish(context, encoder, made, skipped, folder)


@dataclass(frozen=True)
class _Made:
    """What the stages made of an encoder."""

    curated: Curated
    equalized: Equalized
    placement: Placement
    quantized: Quantized
    bound: BoundRecord | None = None


def _finish(
    context: Context,
    encoder: FloatEncoder,
    made: _Made,
    skipped: Sequence[Skipped],
    folder: Path,
    held: ImageFolder | None = None,
) -> Manifest:
    """Measure the model in `folder`, write the files that are missing but for the manifest."""
    look = first_look(context, encoder, folder / MODEL, held or context.images)
    shown = _shown(context) if held is None else "held-out"
    parity = ParityRecord(images=shown, result=look.result, runtime=look.runtime)
    speed = _speed(context, encoder, folder / MODEL, made.quantized.linears)
    (folder / PREPROCESS).write_text(encoder.recipe.to_json(), encoding="utf-8")
    source = FileRecord.of(*model_files(encoder.path))
    if not context.options.keep_float:
        remove_model(encoder.path)
    context.reporter.begin(Stage.SEAL)
    compiled = Compiled(**vars(made), parity=parity, primitives=look.primitives, speed=speed)
    manifest = describe_artifact(context, compiled, source, skipped, folder)
    return with_card(manifest, encoder.recipe, folder)


def _shown(context: Context) -> Literal["calibration", "given", "drawn"]:
    if not context.options.images:
        return "drawn"
    return "calibration" if context.options.precision.quantizes else "given"


def _put_down(made: _Made, done: Sequence[FloatEncoder], folder: Path) -> None:
    """Write the registers; free the memory of the encoders in `done`, no longer needed."""
    if made.curated.setting.changes:
        np.savez(folder / REGISTERS, tokens=made.curated.tokens)
    for encoder in (*done, made.equalized.encoder):
        let_graph_go(encoder.graph)  # what follows runs files
    return_memory(made.quantized.graph)


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
    context.reporter.begin(Stage.SPEED)
    return check_speed(
        encoder.path,
        model,
        batch.images,
        context.reporter.warn,
        linears=linears,
        # 4-bit weights are for memory.
        accept_slower=options.accept_slower or options.precision is Precision.W4A16,
        threads=context.threads,
    )
