"""All that needs a GPU, on the GPU of this machine: engines, their parity and every runner's speed.

Compiles DINOv2-S for ONNX Runtime and for TensorRT-RTX (int8, fp8), builds the engines, compares
each runner with PyTorch over the evaluation images, and times it against the float model. What
this GPU cannot run whatever is installed (TensorRT-RTX on Hopper, FP8 before 8.9) is listed as not
run, with the reason, and is no failure.
Exit code 0: all that this GPU can run did and is close to PyTorch; 1: something did not; 2: there
is no GPU.

    python benchmarks/gpu_check.py --calibration DIR --evaluation DIR [--work build/gpu-check]
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.engine_record import EngineKind
from regcache.compiler.bench.bench import BenchPlan, bench_artifact, loading_of
from regcache.compiler.bench.engines import why_unsupported
from regcache.compiler.bench.plot import write_plot
from regcache.compiler.cli.tables import print_tables
from regcache.compiler.engines.build import build_engines
from regcache.compiler.engines.toolchain import BuildOptions
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import write_text
from regcache.compiler.job.targets import Precision, TargetName
from regcache.compiler.parity.comparison import Encoder, compare
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.export.source import open_source
from regcache.passes.errors import RegcacheError
from regcache.runtime import tensorrt_rtx
from regcache.runtime.bench_result import BatchResult, BenchResult
from regcache.runtime.gpu import find_gpu
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.open_runner import check_runner, open_runner
from regcache.runtime.runners import RunnerName
from regcache.runtime.session import silence_runtime

LEAST_COSINE = 0.98
_SECONDS = 2.0


@dataclass(frozen=True)
class Case:
    """An artifact to compile, and what runs it."""

    name: str
    target: TargetName
    precision: Precision
    runners: tuple[RunnerName, ...]


_RTX = (RunnerName.TENSORRT_RTX, RunnerName.TENSORRT, RunnerName.ORT_TENSORRT)
CASES = (
    Case("ort", TargetName.ORT_CPU, Precision.INT8, (RunnerName.ORT_CPU, RunnerName.ORT_CUDA)),
    Case("int8", TargetName.TENSORRT_RTX, Precision.INT8, _RTX),
    Case("fp8", TargetName.TENSORRT_RTX, Precision.FP8, _RTX),
)


@dataclass(frozen=True)
class Outcome:
    """One artifact on one runner: how it went, or why it did not.

    `cosine`: mean over the evaluation images, of the pooled embedding to PyTorch's. `failure`: why
    it did not run; `unsupported`: why it cannot on this GPU.
    """

    case: str
    runner: str
    cosine: float | None = None
    bench: BenchResult | None = None
    failure: str | None = None
    unsupported: str | None = None

    @property
    def passed(self) -> bool:
        """Whether it ran and is close enough."""
        return self.cosine is not None and self.cosine >= LEAST_COSINE

    def describe(self) -> str | None:
        """What went wrong, in a line; None where it passed."""
        where = f"{self.case} on {self.runner}"
        if self.unsupported is not None:
            return f"{where}: not run, and no failure: {self.unsupported}"
        if self.failure is not None:
            return f"{where}: failed: {self.failure}"
        if self.cosine is not None and not self.passed:
            return f"{where}: failed: cosine {self.cosine:.5f} is under {LEAST_COSINE}"
        return None


@dataclass(frozen=True)
class Check:
    """Where the encoder and the images come from, and where artifacts and figures go."""

    source: str
    calibration: Path
    evaluation: Path
    work: Path
    seconds: float = _SECONDS


def run_case(case: Case, check: Check, reporter: Reporter) -> list[Outcome]:
    """Compile, then compare and time on every runner; a failure ends nothing but itself."""
    artifact = check.work / case.name
    try:
        _compile(case, check, artifact, reporter)
    except RegcacheError as error:
        return [Outcome(case.name, runner, failure=str(error)) for runner in case.runners]
    outcomes = []
    for runner in case.runners:
        reporter.step(f"{case.name} on {runner}")
        try:
            outcomes.append(_run(case, runner, check, artifact, reporter))
        except RegcacheError as error:
            outcomes.append(Outcome(case.name, runner, failure=str(error)))
    return outcomes


def _compile(case: Case, check: Check, artifact: Path, reporter: Reporter) -> None:
    options = CompileOptions(
        source=check.source,
        images=str(check.calibration),
        target=case.target,
        precision=case.precision,
        accept_slower=True,
    )
    compile_encoder(options, artifact, reporter)


def _run(
    case: Case, runner: RunnerName, check: Check, artifact: Path, reporter: Reporter
) -> Outcome:
    check_runner(runner)
    reason = _why_not_here(case, runner)
    if reason is not None:
        return Outcome(case.name, runner, unsupported=reason)
    if runner.takes_engines:
        build_engines(artifact, _build_options(runner), reporter)
    cosine = runner_cosine(Artifact.open(artifact), runner, check.evaluation, reporter)
    # TensorRT runs a float model in FP16 just as well: FP32 would be a rival of straw.
    plan = BenchPlan(
        artifact, runners=(runner,), half_float=runner.takes_engines, seconds=check.seconds
    )
    bench = bench_artifact(plan, reporter)
    figures = check.work / f"{case.name}-{runner}.json"
    write_text(figures, bench.model_dump_json(indent=2) + "\n")
    write_plot(bench, figures.with_suffix(".png"))
    return Outcome(case.name, runner, cosine, bench)


def _why_not_here(case: Case, runner: RunnerName) -> str | None:
    """Why this machine's GPU cannot run a case, whatever is installed."""
    reason = why_unsupported(runner)
    if reason is not None or case.precision is not Precision.FP8:
        return reason
    gpu = find_gpu()
    if tensorrt_rtx.capabilities_since(tensorrt_rtx.FLOAT8_SINCE, [gpu.compute_capability]):
        return None
    return f"{gpu.name}: compute capability {gpu.compute_capability} multiplies no FP8"


def _build_options(runner: RunnerName) -> BuildOptions:
    """For this GPU; TensorRT builds for no other."""
    if runner is RunnerName.TENSORRT:
        return BuildOptions(engine=EngineKind.TENSORRT)
    return BuildOptions(compute_capabilities=(find_gpu().compute_capability,))


def runner_cosine(
    artifact: Artifact, runner: RunnerName, images: Path, reporter: Reporter
) -> float:
    """Mean cosine of what a runner makes of the artifact to PyTorch, or to a source's ONNX file."""
    source = artifact.manifest.options.source
    with TemporaryDirectory() as folder, ExitStack() as stack:
        loading = loading_of(artifact, runner, (1, 8), None, Path(folder), reporter)
        candidate = stack.enter_context(open_runner(loading))
        original: Encoder | None = open_source(source).reference(resolution=None)
        reference = original or stack.enter_context(artifact.float_session()).run
        photos = ImageFolder(list_images(images), artifact.recipe, candidate.fixed_batch or 8)
        meter = compare(reference, lambda batch: candidate.run(batch).outputs, photos, reporter)
    return meter.result().cosine_mean


def outcome_table(outcomes: Iterable[Outcome]) -> Table:
    """Every artifact on every runner, a line for each batch size."""
    table = Table(
        "artifact", "runner", "cosine", "batch", "float ms", "ms", "ratio", "to GPU", "back"
    )
    for outcome in outcomes:
        if outcome.bench is None or outcome.cosine is None:
            table.add_row(outcome.case, outcome.runner, "failed" if outcome.failure else "not run")
            continue
        for batch in outcome.bench.runners[0].batches:
            head = (outcome.case, outcome.runner, f"{outcome.cosine:.5f}")
            table.add_row(*head, *_cells(batch))
    return table


def outcome_lines(outcomes: Iterable[Outcome]) -> Iterator[str]:
    """A line for whatever did not pass."""
    for outcome in outcomes:
        line = outcome.describe()
        if line is not None:
            yield line


def exit_code(outcomes: Iterable[Outcome]) -> int:
    """1 where something failed that this GPU can run, else 0."""
    return int(not all(outcome.passed or outcome.unsupported for outcome in outcomes))


def _cells(batch: BatchResult) -> list[str]:
    timing = batch.quantized_model
    copies = (timing.to_device_ms, timing.to_host_ms)
    return [
        str(batch.batch),
        f"{batch.float_model.latency_ms.p50:.2f}",
        f"{timing.latency_ms.p50:.2f}",
        f"{batch.ratio:.3f}",
        *("-" if part is None else f"{part.p50:.2f}" for part in copies),
    ]


def main(
    calibration: Annotated[Path, typer.Option(help="Images to calibrate on.")],
    evaluation: Annotated[Path, typer.Option(help="Other images, to compare on.")],
    source: str = "sample:dinov2-small",
    work: Path = Path("build/gpu-check"),
) -> None:
    """Run everything, and print one table."""
    try:
        gpu = find_gpu()
    except RegcacheError as error:
        print(f"gpu-check: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    silence_runtime()
    check, reporter = Check(source, calibration, evaluation, work), Reporter()
    outcomes = [outcome for case in CASES for outcome in run_case(case, check, reporter)]
    machine = f"{gpu.name}, compute capability {gpu.compute_capability}, driver {gpu.driver}"
    Console().print(machine, highlight=False, soft_wrap=True)
    print_tables([outcome_table(outcomes)])
    for line in outcome_lines(outcomes):
        Console().print(line, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(exit_code(outcomes))


if __name__ == "__main__":
    typer.run(main)
