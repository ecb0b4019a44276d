"""The stages of `regcache compile` between the float encoder and the quantized graph."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs

from regcache.compiler.calibration.observe import (
    Activation,
    HalvedStatistics,
    Observer,
    halved_statistics,
    observe,
)
from regcache.compiler.calibration.quantizer import FLOAT8_CALIBRATORS, Quantizer, Scale
from regcache.compiler.curation.curate import Curated, SearchOptions, UnsearchableError, curate
from regcache.compiler.curation.record import CurationRecord
from regcache.compiler.curation.setting import Setting, place_registers
from regcache.compiler.curation.study import LEAST_IMAGES, ReferenceImages, Study
from regcache.compiler.encoder.prepare import FloatEncoder
from regcache.compiler.options import AttentionChoice, CompileOptions, RegisterChoice
from regcache.compiler.pass_record import PassRecord, pass_record
from regcache.compiler.reporter import Reporter
from regcache.compiler.targets import (
    Precision,
    Target,
    TargetName,
    resolve_target,
    runs_integers,
    simulate,
)
from regcache.passes.base import run
from regcache.passes.errors import InputError
from regcache.passes.find_blocks import view_encoder
from regcache.passes.model_files import remove_model
from regcache.passes.split_qkv import SplitQkv
from regcache.runtime.images import ImageFolder
from regcache.runtime.session import u8s8_saturates


@dataclass(frozen=True)
class Quantized:
    """The quantized graph and how it came about."""

    graph: gs.Graph
    scales: dict[str, Scale]
    logs: list[PassRecord]


def shape_for_target(
    encoder: FloatEncoder, target: Target
) -> tuple[FloatEncoder, list[PassRecord]]:
    """Bring the float graph into the form that the target computes as its formats say.

    TensorRT computes most packed qkv in float; blocks of weights are wider for v than for q and k.
    """
    if runs_integers(target.name) and target.block_size is None:
        return encoder, []
    result = run(SplitQkv(for_tensorrt=not runs_integers(target.name)), encoder.graph)
    shaped = replace(encoder, graph=result.graph, view=view_encoder(result.graph))
    return shaped, [pass_record(SplitQkv.name, result.log)]


def choose_quantizer(options: CompileOptions) -> Quantizer:
    """The base quantizer that the options ask for."""
    on_cpu = options.target is TargetName.ORT_CPU
    target = resolve_target(
        options.target,
        u8s8_saturates=on_cpu and u8s8_saturates(),
        precision=options.precision,
    )
    if on_cpu and (options.half or options.attention is AttentionChoice.INT8):
        raise InputError(
            f"--half and --attention int8 are for TensorRT, not {options.target.value}"
        )
    if options.precision is Precision.W4A16 and options.int8_share is not None:
        raise InputError("--int8-share says nothing about w4a16: activations stay float")
    if options.precision is Precision.FP8 and options.calibrator not in FLOAT8_CALIBRATORS:
        raise InputError(f"the {options.calibrator.value} calibrator is for integers, not for fp8")
    if options.simulate is not None:
        if options.precision is not Precision.INT8:
            raise InputError("--simulate and --precision do not go together")
        target = simulate(target, options.simulate)
    return Quantizer(target, options.calibrator)


def search_options(options: CompileOptions, journal: Path) -> SearchOptions:
    """Where a search runs; `journal` is where results are noted until it is done."""
    return SearchOptions(journal, options.scheduler, options.threads, options.search_budget)


def curate_encoder(
    encoder: FloatEncoder,
    folder: ImageFolder,
    quantizer: Quantizer,
    options: CompileOptions,
    search: SearchOptions,
    reporter: Reporter,
) -> Curated:
    """Search for registers, unless there is a reason not to; the record says which."""
    if options.registers is RegisterChoice.OFF:
        return _none(encoder, "no registers: not asked for")
    if not quantizer.quantizes_activations:
        return _none(encoder, "no registers: activations stay float")
    images = ReferenceImages.of(folder)
    if images.count < LEAST_IMAGES:
        return _none(
            encoder,
            f"no registers: a search needs {LEAST_IMAGES} images, there are {images.count}",
        )
    study = Study.of(
        encoder.graph,
        images,
        quantizer,
        batch=folder.batch_size,
        seed=options.seed,
        outputs=encoder.outputs.counted,
    )
    try:
        return curate(study, search, reporter)
    except UnsearchableError as error:
        reporter.warn(f"{options.source}: searched for no registers: {error}")
        return _none(encoder, f"no registers: nothing could be searched: {error}")
    except InputError as error:
        raise InputError(f"{options.source}: {error}") from error


def _none(encoder: FloatEncoder, reason: str) -> Curated:
    tokens = np.zeros((0, encoder.view.width), np.float32)
    return Curated(Setting(), tokens, CurationRecord(reason=reason))


def place(encoder: FloatEncoder, curated: Curated) -> tuple[FloatEncoder, list[PassRecord]]:
    """The encoder with what curation decided on."""
    if not curated.setting.changes:
        return encoder, []
    graph, logs = place_registers(encoder.graph, encoder.view, curated.setting, curated.tokens)
    placed = replace(encoder, graph=graph, view=view_encoder(graph))
    return placed, [pass_record(name, log) for name, log in logs.items()]


def calibrate(
    encoder: FloatEncoder,
    folder: ImageFolder,
    options: CompileOptions,
    scratch: Path,
    reporter: Reporter,
    also: Mapping[str, Observer] | None = None,
) -> dict[str, HalvedStatistics]:
    """Run the images once in float, for statistics of every activation, by its tensor's name.

    `also`: what else to observe, by tensor name. Images that cannot be read are taken off the
    folder's list.
    """
    statistics = halved_statistics(encoder.view, len(folder.paths), options.seed)
    observed = scratch / "observed.onnx"
    batches = reporter.images(folder, len(folder.paths), "calibrating")
    images = (batch.images for batch in batches)
    observers: dict[str, Observer] = {**statistics, **(also or {})}
    observe(encoder.graph, observers, images, observed, threads=options.threads)
    remove_model(observed)
    unreadable = {item.path for item in folder.skipped}
    folder.paths = [path for path in folder.paths if path not in unreadable]
    return statistics


def quantize(
    encoder: FloatEncoder, statistics: Mapping[str, Activation], quantizer: Quantizer
) -> Quantized:
    """Choose the scales and quantize the linears, to nearest: the plain base quantizer."""
    scales = quantizer.scales(encoder.view.sites, statistics)
    step = quantizer.step(scales)
    result = run(step, encoder.graph)
    return Quantized(result.graph, scales, [pass_record(step.name, result.log)])
