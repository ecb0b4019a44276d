"""Time the ways to run an encoder on this CPU, and compare what they give with float."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.cli.cpu_ways import Accuracy, Choice, Way, WayRecord, choose, relative_error
from regcache.compiler.job.targets import PROFILES, Precision, TargetName
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.model_files import model_files
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.openvino_options import InferencePrecision, computes_bf16, has_openvino
from regcache.runtime.parity import ParityMeter
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.session import available_cpus
from regcache.runtime.time_alone import BATCHES, Deployed, Timed, embed_alone, least, time_alone

_ROUNDS, _SECONDS, _IMAGES = 3, 0.5, 16


def ways_here() -> Iterator[Way]:
    """Every way that this machine can run."""
    yield from (Way(TargetName.ORT_CPU, one) for one in (Precision.FP32, Precision.INT8))
    if has_openvino():
        own = PROFILES[TargetName.OPENVINO].formats
        for precision in own:
            if precision is not Precision.BF16 or computes_bf16():
                yield Way(TargetName.OPENVINO, precision)


def ways_of(artifact: Artifact) -> list[Way]:
    """An artifact's own way, and those of its float original.

    Raises InputError where it is for no runtime on the CPU.
    """
    options = artifact.manifest.options
    own = Way(options.target, options.precision)
    if options.target not in (TargetName.ORT_CPU, TargetName.OPENVINO):
        raise InputError(
            f"{artifact.folder}: is for {own.target.value}; ways are compared on the CPU"
        )
    return [own, *(way for way in ways_here() if not way.precision.quantizes and way != own)]


def deploy(
    ways: Sequence[Way], artifacts: Mapping[Way, Artifact], threads: int | None
) -> dict[Way, Deployed]:
    """The file and runtime of each way: its artifact's model, or else the float original."""
    first = next(iter(artifacts.values()))
    return {
        way: Deployed(
            artifacts[way].model if way in artifacts else first.float_model,
            way.target.profile.runtime,
            threads or available_cpus(),
            way.precision.in_openvino,
            first.first_outputs,
        )
        for way in ways
    }


def measure_ways(
    deployed: Mapping[Way, Deployed],
    float_model: Deployed,
    recipe: Preprocess,
    folder: ImageFolder,
    reporter: Reporter,
) -> list[WayRecord]:
    """Time every way in turn, each in a process of its own, and compare what it gives.

    That is compared with `float_model` on 16 of the images. Raises InputError where a model cannot
    be run or an image be read.
    """
    timed: dict[Way, list[Timed]] = {way: [] for way in deployed}
    for turn in range(_ROUNDS):
        for way, one in deployed.items():
            reporter.step(f"timing {way}, round {turn + 1} of {_ROUNDS}")
            timed[way].append(time_alone(one, recipe, _SECONDS))
    batches = list(folder.some(_IMAGES))
    images = np.concatenate([one.images for one in batches])
    names = [path.name for one in batches for path in one.paths]
    truth = embed_alone(float_model, images)
    found = []
    for way, one in deployed.items():
        meter = ParityMeter()
        meter.update([truth], [embed_alone(one, images)], names)
        result = meter.result(reference="float-onnx")
        found.append(_record(way, one, timed[way], result))
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
        error=relative_error(parity),
        verdict="",
    )


def compare_ways(
    artifact: Artifact,
    images: Path,
    accuracy: Accuracy,
    reporter: Reporter,
    threads: int | None = None,
) -> Choice:
    """An artifact for the CPU beside its float original in every runtime that is installed.

    `images`: a folder of images to compare the embeddings of. Raises InputError for an artifact of
    another target, and one without float.onnx.
    """
    ways = ways_of(artifact)
    deployed = deploy(ways, {ways[0]: artifact}, threads)
    folder = ImageFolder(list_images(images, reporter.warn), artifact.recipe, BATCHES[-1])
    float_model = replace(
        deployed[ways[0]],
        model=artifact.float_model,
        runtime=RuntimeName.ONNXRUNTIME,
        precision=InferencePrecision.F32,
    )
    with artifact.unreplaced():
        records = measure_ways(deployed, float_model, artifact.recipe, folder, reporter)
    return choose(records, accuracy)
