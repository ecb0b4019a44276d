"""`regcache compile`: source -> float ONNX -> registers -> calibration -> quantized -> artifact."""

from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from regcache.compiler.artifact.artifact import MODEL, PREPROCESS
from regcache.compiler.artifact.manifest import (
    LIBRARIES,
    CalibrationRecord,
    EncoderRecord,
    FileRecord,
    Manifest,
    ParityRecord,
    QuantizationRecord,
    SiteRecord,
    SourceRecord,
    SpeedRecord,
    hash_files,
)
from regcache.compiler.artifact.speed_check import check_speed
from regcache.compiler.calibration.graph_session import return_memory
from regcache.compiler.calibration.mapped import keep_on_disk, let_graph_go
from regcache.compiler.calibration.observe import stream_ranges
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.calibration.statistics import ChannelRange
from regcache.compiler.curation.curate import Curated
from regcache.compiler.curation.record import SensitivityRecord
from regcache.compiler.encoder.outside_blocks import outside_blocks
from regcache.compiler.encoder.prepare import FloatEncoder, prepare
from regcache.compiler.options import CompileOptions, RegisterChoice
from regcache.compiler.parity.comparison import compare
from regcache.compiler.pass_record import PassRecord, say_slower
from regcache.compiler.quantization.equalize import Equalized
from regcache.compiler.quantization.finish import Finisher
from regcache.compiler.quantization.int8_share import Placement
from regcache.compiler.quantization.rotation import rotate
from regcache.compiler.reporter import Reporter
from regcache.compiler.stages import (
    Quantized,
    calibrate,
    choose_quantizer,
    curate_encoder,
    place,
    search_options,
    shape_for_target,
)
from regcache.compiler.staging import staged_folder
from regcache.compiler.targets import Precision, runs_integers
from regcache.passes.model_files import model_files, remove_model
from regcache.passes.onnx_file import save_graph
from regcache.runtime.images import ImageFolder, Skipped, evenly, list_images
from regcache.runtime.parity import ParityResult
from regcache.runtime.session import OrtSession
from regcache.runtime.versions import installed_versions

REGISTERS = "registers.npz"
# Parity in the manifest is a first look, not the gate: `regcache parity` takes all images.
_PARITY_IMAGES = 16


def compile_encoder(options: CompileOptions, output: Path, reporter: Reporter) -> Manifest:
    """Compile a source into the artifact folder `output`; see DESIGN.md for what it holds.

    Peak memory is about 3 x the float model, whatever the number of images. Raises InputError on
    bad input, and then leaves nothing at `output` that was not there before.
    """
    paths = list_images(Path(options.images), reporter.warn)
    with staged_folder(output) as staging:
        encoder = prepare(options, staging, reporter, threads=options.threads)
        quantizer = choose_quantizer(options)
        encoder, passes = shape_for_target(encoder, quantizer.target)
        folder = ImageFolder(paths, encoder.recipe, encoder.batch(options.batch_size))
        skipped: list[Skipped] = []

        def skip(item: Skipped) -> None:
            skipped.append(item)
            reporter.skipped(item)

        folder.on_skip = skip
        search = search_options(options, _journal_beside(output))
        finisher = Finisher(quantizer, folder, options, staging, search, reporter)
        ready = _make_ready(encoder, finisher)
        equalized, curated = ready.calibrated.equalized, ready.curated
        if curated.setting.changes:
            np.savez(staging / REGISTERS, tokens=curated.tokens)
        placement = finisher.place(equalized, ready.sensitivity)
        reporter.step(f"quantizing linears ({quantizer.target.why})")
        quantized = finisher.quantize(equalized, placement, ready.calibrated.streams)
        calibration = CalibrationRecord(
            images=len(folder.paths),
            skipped=[f"{item.path.name}: {item.reason}" for item in skipped],
        )
        save_graph(quantized.graph, staging / MODEL)
        for graph in (encoder.graph, equalized.encoder.graph):
            let_graph_go(graph)  # what follows runs files
        return_memory()
        parity = _first_look(encoder, folder, options, staging, reporter)
        speed = _speed(encoder, folder, _linears(equalized, quantized), options, staging, reporter)
        (staging / PREPROCESS).write_text(encoder.recipe.to_json(), encoding="utf-8")
        source_hash = FileRecord.of(*model_files(encoder.path)).sha256
        if not options.keep_float:
            remove_model(encoder.path)
        manifest = Manifest(
            regcache=version("regcache"),
            versions=installed_versions(LIBRARIES),
            options=options,
            source=SourceRecord(
                name=options.source, sha256=source_hash, recipe=encoder.recipe_from
            ),
            encoder=_describe(encoder),
            calibration=calibration,
            curation=curated.record,
            quantization=_quantization_record(equalized, placement, quantizer, quantized),
            passes=[
                *encoder.passes,
                *outside_blocks(encoder.view),
                *passes,
                *ready.passes,
                *equalized.logs,
                *quantized.logs,
            ],
            parity=ParityRecord(result=parity),
            speed=speed,
            files=hash_files(staging),
        )
        manifest.write(staging)
        say_slower(manifest.passes, reporter)
    return manifest


def _journal_beside(output: Path) -> Path:
    return output.absolute().parent / f".{output.name}.search.jsonl"


@dataclass(frozen=True)
class _Calibrated:
    """An encoder evened out by what calibration saw; its residual stream where FP16 holds it."""

    equalized: Equalized
    streams: dict[str, ChannelRange]


@dataclass(frozen=True)
class _Ready:
    """What is to be quantized, what it was made with, and its sensitivity where it is known."""

    calibrated: _Calibrated
    curated: Curated
    sensitivity: list[SensitivityRecord]
    passes: list[PassRecord]


def _make_ready(encoder: FloatEncoder, finisher: Finisher) -> _Ready:
    """Search for registers, place them, rotate, and calibrate what came of it."""
    options = finisher.options
    searching = options.registers is not RegisterChoice.OFF
    calibrated = _calibrated(encoder, finisher) if searching else None
    curated = curate_encoder(
        encoder if calibrated is None else finisher.unmoved(calibrated.equalized),
        finisher.folder,
        finisher.quantizer,
        options,
        finisher.search,
        finisher.reporter,
    )
    placed, placing = place(encoder, curated)
    placed, rotating = rotate(placed, options)
    keep_on_disk(placed.graph, finisher.scratch)
    let_graph_go(encoder.graph)
    return_memory()
    sensitivity = curated.record.sensitivity
    if calibrated is None or placed is not encoder:
        calibrated = _calibrated(placed, finisher)
        sensitivity = []  # it was measured without registers, or not rotated
    return _Ready(calibrated, curated, sensitivity, [*placing, *rotating])


def _calibrated(encoder: FloatEncoder, finisher: Finisher) -> _Calibrated:
    options = finisher.options
    streams = stream_ranges(encoder.view) if options.in_half else {}
    statistics = calibrate(
        encoder, finisher.folder, options, finisher.scratch, finisher.reporter, streams
    )
    return _Calibrated(finisher.equalize(encoder, statistics), streams)


def _first_look(
    encoder: FloatEncoder,
    folder: ImageFolder,
    options: CompileOptions,
    staging: Path,
    reporter: Reporter,
) -> ParityResult:
    """Parity of model.onnx with the float ONNX on a few calibration images."""
    some = evenly(folder.paths, _PARITY_IMAGES)
    session = partial(OrtSession, threads=options.threads, outputs=encoder.outputs.first)
    integers = runs_integers(options.target)
    with (
        session(encoder.path) as reference,
        session(staging / MODEL, integers=integers) as candidate,
    ):
        meter = compare(
            reference.run,
            candidate.run,
            ImageFolder(some, encoder.recipe, folder.batch_size),
            reporter,
            candidate.output_names,
            prefix_tokens=encoder.outputs.leading,
            tokens=encoder.outputs.tokens is not None,
            class_scores=encoder.outputs.class_scores,
            label="first look at parity",
        )
    return meter.result(reference="float-onnx")


def _speed(
    encoder: FloatEncoder,
    folder: ImageFolder,
    linears: int,
    options: CompileOptions,
    staging: Path,
    reporter: Reporter,
) -> SpeedRecord | None:
    """How fast model.onnx is beside the float one; None where ONNX Runtime will not run it."""
    if not runs_integers(options.target) or options.simulate is not None:
        return None
    batch = next(iter(ImageFolder(folder.paths[:1], encoder.recipe, 1)))
    return check_speed(
        encoder.path,
        staging / MODEL,
        batch.images,
        reporter,
        linears=linears,
        # 4-bit weights are for memory.
        accept_slower=options.accept_slower or options.precision is Precision.W4A16,
        threads=options.threads,
    )


def _linears(equalized: Equalized, quantized: Quantized) -> int:
    """How many linears compute in integers."""
    sites = equalized.encoder.view.sites
    return sum(len(site.linears) for site in sites if site.tensor.name in quantized.scales)


def _describe(encoder: FloatEncoder) -> EncoderRecord:
    view, outputs = encoder.view, encoder.outputs
    return EncoderRecord(
        blocks=len(view.blocks),
        width=view.width,
        heads=view.heads,
        head_dim=view.head_dim,
        tokens=view.tokens,
        prefix_tokens=view.prefix_tokens,
        activation=view.blocks[0].mlp.activation,
        embedding=outputs.embedding,
        embedding_why=outputs.why,
        token_output=outputs.tokens,
        token_prefix=outputs.leading,
        class_scores=outputs.class_scores,
    )


def _quantization_record(
    equalized: Equalized, placement: Placement, quantizer: Quantizer, quantized: Quantized
) -> QuantizationRecord:
    target, sites = quantizer.target, []
    for site in equalized.encoder.view.sites:
        scale = quantized.scales.get(site.tensor.name)
        if scale is None:
            continue
        seen = equalized.statistics[site.tensor.name]
        sites.append(
            SiteRecord(
                site=site.name,
                tensor=site.tensor.name,
                observed=(seen.low, seen.high),
                covered=scale.range,
                scale=scale.scale,
                zero_point=scale.zero_point,
                dtype=scale.dtype,
                equalization=equalized.how.get(site.name),
            )
        )
    return QuantizationRecord(
        activation_dtype=target.dtypes[0],
        activation_symmetric=target.activation_symmetric,
        activation_bits=target.activation_bits,
        weight_dtype=target.dtypes[1],
        weight_bits=target.weight_bits,
        why=target.why,
        int8_share=placement.share if quantizer.quantizes_activations else 0.0,
        left_float=list(placement.left_float),
        pareto=list(placement.pareto),
        sites=sites,
    )
