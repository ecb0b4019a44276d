"""Benchmark an artifact against its float original on one runner or several."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.bench.engines import engine_for, why_unsupported
from regcache.compiler.bench.predicted import with_predictions
from regcache.compiler.encoder.prepare import FLOAT, export_source
from regcache.compiler.engines.signed_model import has_zero_points, write_signed
from regcache.compiler.job.half import write_half
from regcache.compiler.job.targets import PROFILES
from regcache.compiler.reporter import Reporter
from regcache.export.suggest import did_you_mean
from regcache.passes.errors import InputError
from regcache.passes.temporary import temporary_folder
from regcache.runtime.bench import time_runners
from regcache.runtime.bench_cold import cold_start
from regcache.runtime.bench_result import BenchResult, EnergySource, RunnerResult
from regcache.runtime.energy import EnergyMeter, Unreadable, cpu_meter, gpu_meter
from regcache.runtime.machine import describe_machine
from regcache.runtime.open_runner import check_runner, open_runner
from regcache.runtime.openvino_options import InferencePrecision, OpenVinoOptions
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.session import available_cpus

_TARGETS = {RunnerName(profile.runner): name for name, profile in PROFILES.items()}


@dataclass(frozen=True)
class BenchPlan:
    """What is measured.

    `against`: the source of the float model; None for the artifact's own. `half_float`: convert the
    float model to FP16 first. `batches`: batch sizes; engines are tuned for the first. `seconds`:
    how long each runner measures each batch size. `threads`: of a runner on the CPU, all CPUs by
    default. `max_ratio`: the largest ratio of quantized to float latency that passes. `openvino`:
    how that runner runs both. `verify`: the public key of whoever has to have signed the artifact.
    """

    artifact: Path
    against: str | None = None
    half_float: bool = False
    runners: tuple[RunnerName, ...] = (RunnerName.ORT_CPU,)
    batches: tuple[int, ...] = (1, 8)
    seconds: float = 5.0
    threads: int | None = None
    max_ratio: float | None = None
    openvino: OpenVinoOptions = field(default_factory=OpenVinoOptions)
    verify: Path | None = None


def bench_artifact(plan: BenchPlan, reporter: Reporter) -> BenchResult:
    """Measure both models on every runner, one runner after the other.

    Raises InputError or MissingExtraError, before anything is measured, where a runner's library
    or device is missing, the library does not run on the device, or there is nothing to compare
    with; InputError where a model does not run, or the artifact is not signed as asked.
    """
    for name in plan.runners:
        check_runner(name)
        reason = why_unsupported(name)
        if reason is not None:
            raise InputError(reason)
    artifact = Artifact.open(plan.artifact, verify=plan.verify)
    target = artifact.manifest.options.target
    with temporary_folder() as folder, _float_model(plan, artifact, reporter) as original:
        results = []
        for name in plan.runners:
            if _TARGETS.get(name, target) is not target:
                reporter.warn(f"{plan.artifact} was compiled for {target}, and is run by {name}")
            original_loading, quantized_loading = (
                replace(
                    loading_of(
                        *(artifact, name, plan.batches, plan.threads, folder, reporter),
                        model=model,
                    ),
                    openvino=_openvino(plan, artifact, of_artifact=model == artifact.model),
                )
                for model in (original, artifact.model)
            )
            measured = _bench_runner(plan, original_loading, quantized_loading, reporter)
            models = original, artifact.model
            results.append(with_predictions(measured, models, artifact, reporter))
    limit = plan.max_ratio
    return BenchResult(
        artifact=str(plan.artifact),
        target=target.value,
        against=plan.against or artifact.manifest.options.source,
        seconds=plan.seconds,
        machine=describe_machine(),
        runners=tuple(results),
        max_ratio=limit,
        passed=limit is None or not any(result.over(limit) for result in results),
    )


@contextmanager
def _float_model(plan: BenchPlan, artifact: Artifact, reporter: Reporter) -> Iterator[Path]:
    """The ONNX file to compare with, exported and converted where that is asked for."""
    with temporary_folder() as folder:
        path = folder / FLOAT
        if plan.against is None:
            path = artifact.float_model
        elif plan.against.endswith((".onnx", ".xml")):
            path = Path(plan.against)
        else:
            reporter.step(f"exporting {plan.against}")
            export_source(plan.against, path, None, reporter)
        if plan.half_float:
            original, path = path, folder / "half.onnx"
            write_half(original, artifact.manifest.options.profile, path)
        yield path


def loading_of(
    artifact: Artifact,
    runner: RunnerName,
    batches: tuple[int, ...],
    threads: int | None,
    folder: Path,
    reporter: Reporter,
    *,
    model: Path | None = None,
) -> Loading:
    """How a runner loads the artifact's model, or another ONNX file that takes the same images.

    The artifact's embedding is the first output. For a runner of engines, an engine is built into
    `folder` unless the artifact holds it. For the TensorRT provider of ONNX Runtime, a copy of the
    model whose zero points are 0 is written there.
    """
    recipe = artifact.recipe
    threads = threads or available_cpus()
    loading = Loading(
        runner,
        model or artifact.model,
        threads,
        batches,
        recipe.shape,
        recipe.dtype,
        artifact.first_outputs if model is None else (),
    )
    if runner.takes_engines:
        return replace(loading, model=engine_for(artifact, loading, folder, reporter))
    if runner is RunnerName.ORT_TENSORRT and has_zero_points(loading.model, artifact):
        return replace(loading, model=write_signed(loading.model, folder, reporter))
    return loading


def _openvino(plan: BenchPlan, artifact: Artifact, *, of_artifact: bool) -> OpenVinoOptions:
    """How OpenVINO runs a model: a bf16 artifact in bf16, and what it is compared with in FP32."""
    given = plan.openvino
    if of_artifact:
        return given.for_model(artifact.inference_precision)
    in_bf16 = artifact.inference_precision is InferencePrecision.BF16
    return given.for_model(InferencePrecision.F32) if in_bf16 else given


def _bench_runner(
    plan: BenchPlan, original: Loading, quantized: Loading, reporter: Reporter
) -> RunnerResult:
    name = original.runner
    reporter.step(f"{name}: cold starts")
    starts = cold_start(original), cold_start(quantized)
    meter = gpu_meter() if name.on_gpu else cpu_meter()
    with open_runner(original) as float_runner, open_runner(quantized) as quantized_runner:
        sizes = ", ".join(map(str, plan.batches))
        reporter.step(f"{name}: timing batches of {sizes}, at least {plan.seconds:g} s each")
        batches = time_runners(
            float_runner, quantized_runner, original, seconds=plan.seconds, meter=meter
        )
        placement = quantized_runner.placement
    return RunnerResult(
        runner=name,
        threads=None if name.on_gpu else original.threads,
        placement=placement,
        batches=tuple(batches),
        float_start=starts[0],
        quantized_start=starts[1],
        energy=_energy(meter),
    )


def _energy(meter: EnergyMeter | Unreadable) -> EnergySource:
    if isinstance(meter, Unreadable):
        return EnergySource(unreadable=meter.reason)
    return EnergySource(source=meter.source)


_MOST_DIGITS = 6  # of a batch size: more images than that fit into no memory


def parse_batches(items: Sequence[str]) -> tuple[int, ...]:
    """Batch sizes from text, repeated ones left out. Raises InputError for anything else."""
    for item in items:
        if not item.isdecimal() or len(item) > _MOST_DIGITS or int(item) < 1:
            raise InputError(f"--batch {item!r}: must be a batch size, or some as 1,8")
    return tuple(dict.fromkeys(map(int, items)))


def parse_runners(items: Sequence[str]) -> tuple[RunnerName, ...]:
    """Runners by their names, repeated ones left out. Raises InputError for an unknown name."""
    for item in items:
        if item not in list(RunnerName):
            near = did_you_mean(item, [*RunnerName]) or f"; there are {', '.join(RunnerName)}"
            raise InputError(f"--runner {item!r}: there is no such runner{near}")
    return tuple(dict.fromkeys(map(RunnerName, items)))
