"""`regcache bench`: an artifact's speed, memory, start and energy beside the float original's."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.bench.bench import BenchPlan, bench_artifact, parse_batches, parse_runners
from regcache.compiler.bench.plot import check_plot, write_plot
from regcache.compiler.bench.table import bench_lines, bench_tables
from regcache.compiler.cli.configuration import ConfigOption
from regcache.compiler.cli.cpu_ways import Accuracy, Choice, choice_table
from regcache.compiler.cli.measure_ways import compare_ways
from regcache.compiler.cli.options import (
    ArtifactArgument,
    HintOption,
    InferencePrecisionOption,
    JsonOption,
    ModelCacheOption,
    ThreadsOption,
    VerifyOption,
    listed,
)
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.staging import write_text
from regcache.passes.errors import InputError
from regcache.runtime.openvino_options import Hint, InferencePrecision, OpenVinoOptions


def bench_command(
    artifact: ArtifactArgument,
    config: ConfigOption = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="The float model; the artifact's own by default."),
    ] = None,
    half_float: Annotated[
        bool, typer.Option("--half-float", help="The float model in FP16, as TensorRT wants it.")
    ] = False,
    runner: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="Of ort-cpu, openvino, ort-cuda, ort-tensorrt, tensorrt, tensorrt-rtx; ort-cpu by "
            "default.",
        ),
    ] = None,
    batch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LIST",
            help="Images per run, 1,8 by default; engines are tuned for the first size.",
        ),
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0.0, max=3600.0, help="Timed for each runner and batch size.")
    ] = 5.0,
    threads: ThreadsOption = None,
    inference_precision: InferencePrecisionOption = InferencePrecision.AUTO,
    hint: HintOption = Hint.LATENCY,
    model_cache: ModelCacheOption = None,
    verify: VerifyOption = None,
    max_ratio: Annotated[
        float | None,
        typer.Option(min=0.0, help="Exit 1 where quantized / float latency is over it."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Compare every way to run it on this CPU, as --target cpu does, on a folder of "
            "images."
        ),
    ] = None,
    min_cosine: Annotated[
        float | None, typer.Option(min=-1.0, max=1.0, help="--images: as compile has it.")
    ] = None,
    max_error: Annotated[
        float | None, typer.Option(min=0.0, help="--images: as compile has it.")
    ] = None,
    json: JsonOption = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the latencies into this .png or .svg file.")
    ] = None,
) -> None:
    """Time an artifact against the float model, in turn, and measure memory, start and energy."""
    if plot is not None:
        check_plot(plot)
    plan = BenchPlan(
        artifact=artifact,
        against=against,
        half_float=half_float,
        runners=parse_runners(listed(runner or ["ort-cpu"])),
        batches=parse_batches(listed(batch or ["1,8"])),
        seconds=seconds,
        threads=threads,
        max_ratio=max_ratio,
        openvino=OpenVinoOptions(inference_precision, hint, model_cache),
        verify=verify,
    )
    choice = _choice(artifact, images, min_cosine, max_error, threads)
    result = bench_artifact(plan, CommandReporter())
    if json != Path("-"):  # before a file is written, which may fail
        print_tables([*([] if choice is None else [choice_table(choice)]), *bench_tables(result)])
        print_lines(bench_lines(result))
    if json is not None:
        ways = {} if choice is None else {"choice": choice.model_dump(mode="json")}
        text = dumps({**result.model_dump(mode="json"), **ways}, indent=2)
        write_text(json, f"{text}\n")
    if plot is not None:
        write_plot(result, plot)
    if not result.passed:
        raise typer.Exit(1)


def _choice(
    artifact: Path,
    images: Path | None,
    min_cosine: float | None,
    max_error: float | None,
    threads: int | None,
) -> Choice | None:
    """The comparison of all ways on this CPU; None where no images are given."""
    if images is None:
        for option, value in (("--min-cosine", min_cosine), ("--max-error", max_error)):
            if value is not None:
                raise InputError(f"{option} says nothing without --images")
        return None
    accuracy = Accuracy.of(min_cosine, max_error)
    return compare_ways(Artifact.open(artifact), images, accuracy, CommandReporter(), threads)
