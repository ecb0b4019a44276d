"""`regcache compile --target cpu`: the machine decides between runtimes and precisions."""

import shutil
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.signature import check_signing_key, sign
from regcache.compiler.cli.cpu_ways import Choice, Way, WayRecord, choose
from regcache.compiler.job.options import CompileOptions, Effort, RegisterChoice
from regcache.compiler.job.targets import PROFILES, Precision, TargetName
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.compiler.staging import staged_folder
from regcache.passes.errors import InputError
from regcache.passes.model_files import model_files
from regcache.passes.temporary import temporary_folder
from regcache.runtime.images import ImageFolder, list_images
from regcache.runtime.openvino_options import (
    check_openvino,
    computes_bf16,
    has_openvino,
)
from regcache.runtime.parity import ParityMeter, ParityResult
from regcache.runtime.session import available_cpus
from regcache.runtime.time_alone import Deployed, Timed, embed_alone, least, time_alone

_ROUNDS, _SECONDS, _IMAGES = 3, 0.5, 16


class CpuKind(StrEnum):
    """The instructions of another CPU, which decide where nothing can be timed."""

    AVX2 = "avx2"
    VNNI = "vnni"
    AMX = "amx"


_RULE: Mapping[CpuKind, Precision] = {
    CpuKind.AVX2: Precision.FP32,
    CpuKind.VNNI: Precision.INT8,
    CpuKind.AMX: Precision.BF16,
}


def compile_for_cpu(
    options: CompileOptions,
    output: Path,
    reporter: Reporter,
    min_cosine: float,
    *,
    force: bool = False,
    key: Path | None = None,
) -> tuple[Choice, Manifest]:
    """Compile in int8 for every CPU runtime that is installed, time all ways, keep the best.

    The best is the fastest, over batch 1 and 8, of those whose mean cosine to float is at least
    `min_cosine`; of those within 5 % of it, the closest to float. `force`, `key`: as
    compile_encoder has them. Raises InputError as compiling does, and for a simulation, which
    cannot be timed.
    """
    if options.simulate is not None:
        raise InputError("--target cpu times what ships: --simulate cannot be timed")
    ways = list(_ways())
    with _folders(output, reporter, force, key) as (staging, folder):
        for way in ways:
            if way.precision.quantizes:
                reporter.step(f"compiling for {way}")
                compile_encoder(_options_for(options, way), folder / str(way), reporter)
        records = _measure(ways, folder, options, reporter)
        choice = choose(records, min_cosine)
        chosen = Way(choice.target, choice.precision)
        if not chosen.precision.quantizes:
            compile_encoder(_options_for(options, chosen), folder / str(chosen), reporter)
        artifact = Artifact.open(folder / str(chosen))
        _place(artifact.folder, staging, key)
    return choice, artifact.manifest


def compile_for_kind(
    options: CompileOptions,
    output: Path,
    reporter: Reporter,
    min_cosine: float,
    kind: CpuKind,
    *,
    force: bool = False,
    key: Path | None = None,
) -> Manifest:
    """Compile for OpenVINO on another CPU, by rule: bf16 with AMX, int8 with VNNI, else FP32.

    Where the first look at int8 falls short of `min_cosine`, FP32 takes its place, with a warning.
    Raises MissingExtraError without OpenVINO, and InputError as compiling does.
    """
    check_openvino("--target cpu --for")
    way = Way(TargetName.OPENVINO, _RULE[kind])
    with _folders(output, reporter, force, key) as (staging, scratch):
        artifact = scratch / str(way)
        manifest = compile_encoder(_options_for(options, way), artifact, reporter)
        found = manifest.parity.result.cosine_mean
        if way.precision.quantizes and found < min_cosine:
            reporter.warn(f"FP32 in place of int8: cosine {found:.5f} is below {min_cosine:g}")
            way = Way(way.target, Precision.FP32)
            artifact = scratch / str(way)
            manifest = compile_encoder(_options_for(options, way), artifact, reporter)
        _place(artifact, staging, key)
    return manifest


@contextmanager
def _folders(
    output: Path, reporter: Reporter, force: bool, key: Path | None
) -> Iterator[tuple[Path, Path]]:
    """The folder that becomes the output, and one for what is tried."""
    if key is not None:
        check_signing_key(key)
    staged = staged_folder(output, force=force, tell=reporter.warn)
    with staged as staging, temporary_folder() as scratch:
        yield staging, scratch


def _place(artifact: Path, staging: Path, key: Path | None) -> None:
    """Copy an artifact to where it becomes the output, signed where there is a key."""
    shutil.copytree(artifact, staging, dirs_exist_ok=True)
    if key is not None:
        sign(staging, key)


def _ways() -> Iterator[Way]:
    """Every way that this machine can run."""
    yield from (Way(TargetName.ORT_CPU, one) for one in (Precision.FP32, Precision.INT8))
    if has_openvino():
        own = PROFILES[TargetName.OPENVINO].formats
        for precision in own:
            if precision is not Precision.BF16 or computes_bf16():
                yield Way(TargetName.OPENVINO, precision)


def _options_for(options: CompileOptions, way: Way) -> CompileOptions:
    """The options for one way; those that say how to quantize fall where nothing is quantized."""
    fields: dict[str, Any] = {**dict(options), "target": way.target, "precision": way.precision}
    if way.precision.quantizes:
        return CompileOptions(**{**fields, "keep_float": True, "accept_slower": True})
    unsaid = dict.fromkeys(("int8_share", "attention", "search_budget", "half"))
    return CompileOptions(
        **{**fields, **unsaid, "effort": Effort.BALANCED, "registers": RegisterChoice.OFF}
    )


def _measure(
    ways: Sequence[Way], folder: Path, options: CompileOptions, reporter: Reporter
) -> list[WayRecord]:
    """Time every way in turn, each in a process of its own, and compare what it gives."""
    artifacts = {
        way.target: Artifact.open(folder / str(way)) for way in ways if way.precision.quantizes
    }
    first = next(iter(artifacts.values()))
    threads = options.threads or available_cpus()
    deployed = {
        way: Deployed(
            artifacts[way.target].model if way.precision.quantizes else first.float_model,
            way.target.profile.runtime,
            threads,
            way.precision.in_openvino,
            first.first_outputs,
        )
        for way in ways
    }
    timed: dict[Way, list[Timed]] = {way: [] for way in ways}
    for turn in range(_ROUNDS):
        for way in ways:
            reporter.step(f"timing {way}, round {turn + 1} of {_ROUNDS}")
            timed[way].append(time_alone(deployed[way], first.recipe, _SECONDS))
    folder_of_images = ImageFolder(
        list_images(Path(options.images)), first.recipe, options.batch_size
    )
    batches = list(folder_of_images.some(_IMAGES))
    images = np.concatenate([one.images for one in batches])
    names = [path.name for one in batches for path in one.paths]
    float_model = Deployed(
        first.float_model, TargetName.ORT_CPU.profile.runtime, threads, outputs=first.first_outputs
    )
    truth = embed_alone(float_model, images)
    found = []
    for way in ways:
        meter = ParityMeter()
        meter.update([truth], [embed_alone(deployed[way], images)], names)
        result = meter.result(reference="float-onnx")
        found.append(_record(way, deployed[way], timed[way], result))
    return found


def _record(
    way: Way, deployed: Deployed, timed: Sequence[Timed], parity: ParityResult
) -> WayRecord:
    times = least(timed)
    largest = max(times)
    return WayRecord(
        target=way.target,
        precision=way.precision,
        milliseconds=times,
        images_per_second=1e3 * largest / times[largest],
        load_ms=statistics.median(one.load_ms for one in timed),
        file_mb=sum(path.stat().st_size for path in model_files(deployed.model)) / 1e6,
        peak_mb=timed[-1].peak_mb,
        cosine_mean=parity.cosine_mean,
        cosine_min=parity.cosine_min,
        verdict="",
    )
