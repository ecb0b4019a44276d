"""`regcache compile --target cpu`: the machine decides between runtimes and precisions."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.artifact.signature import check_signing_key, sign
from regcache.compiler.cli.cpu_ways import Accuracy, Choice, Way, choose, relative_error
from regcache.compiler.cli.measure_ways import deploy, measure_ways, ways_here
from regcache.compiler.job.calibration_images import calibration_images
from regcache.compiler.job.effort import Effort, RegisterChoice
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import staged_folder
from regcache.compiler.job.targets import Precision, TargetName
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.temporary import temporary_folder
from regcache.runtime.images import ImageFolder
from regcache.runtime.openvino_options import check_openvino


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
    accuracy: Accuracy,
    *,
    force: bool = False,
    key: Path | None = None,
) -> tuple[Choice, Manifest]:
    """Compile in int8 for every CPU runtime that is installed, time all ways, keep the best.

    The best is the fastest, over batch 1 and 8, of those that are as close to float as `accuracy`
    asks for; of those within 5 % of it, the closest to float. `force`, `key`: as
    compile_encoder has them. Raises InputError as compiling does, and for a simulation, which
    cannot be timed.
    """
    if options.simulate is not None:
        raise InputError("--target cpu times what ships: --simulate cannot be timed")
    ways = list(ways_here())
    with _folders(output, reporter, force, key) as (staging, folder):
        for way in ways:
            if way.precision.quantizes:
                reporter.step(f"compiling for {way}")
                compile_encoder(_options_for(options, way), folder / str(way), reporter)
        artifacts = {
            way: Artifact.open(folder / str(way)) for way in ways if way.precision.quantizes
        }
        deployed = deploy(ways, artifacts, options.threads)
        recipe = next(iter(artifacts.values())).recipe
        paths = calibration_images(options.images, options.max_images, options.seed)
        images = ImageFolder(paths, recipe, options.batch_size)
        records = measure_ways(deployed, deployed[ways[0]], recipe, images, reporter)
        choice = choose(records, accuracy)
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
    accuracy: Accuracy,
    kind: CpuKind,
    *,
    force: bool = False,
    key: Path | None = None,
) -> Manifest:
    """Compile for OpenVINO on another CPU, by rule: bf16 with AMX, int8 with VNNI, else FP32.

    Where the first look at int8 falls short of `accuracy`, FP32 takes its place, with a warning.
    Raises MissingExtraError without OpenVINO, and InputError as compiling does.
    """
    check_openvino("--target cpu --for")
    way = Way(TargetName.OPENVINO, _RULE[kind])
    with _folders(output, reporter, force, key) as (staging, scratch):
        artifact = scratch / str(way)
        manifest = compile_encoder(_options_for(options, way), artifact, reporter)
        found = manifest.parity.result
        missed = accuracy.missed(found.cosine_mean, relative_error(found))
        if way.precision.quantizes and missed is not None:
            cosine, error = found.cosine_mean, relative_error(found)
            reporter.warn(
                f"FP32 in place of int8: {missed} (cosine {cosine:.5f}, error {error:.4f})"
            )
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


def _options_for(options: CompileOptions, way: Way) -> CompileOptions:
    """The options for one way; those that say how to quantize fall where nothing is quantized."""
    fields: dict[str, Any] = {**dict(options), "target": way.target, "precision": way.precision}
    if way.precision.quantizes:
        return CompileOptions(**{**fields, "keep_float": True, "accept_slower": True})
    unsaid = dict.fromkeys(("int8_share", "attention", "search_budget", "half"))
    return CompileOptions(
        **{**fields, **unsaid, "effort": Effort.BALANCED, "registers": RegisterChoice.OFF}
    )
