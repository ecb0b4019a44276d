"""`regcache build` on the command line."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from regcache.compiler.artifact.engine_record import EngineKind
from regcache.compiler.cli.configuration import ConfigOption
from regcache.compiler.cli.options import (
    MOST_IMAGES,
    OUTPUT,
    REPORT,
    SPEED,
    ArtifactArgument,
    JsonOption,
    SignOption,
    VerifyOption,
    listed,
)
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.engines.build import BuildReport, EngineReport, build_engines
from regcache.compiler.engines.toolchain import BuildOptions
from regcache.compiler.job.staging import write_text
from regcache.passes.errors import InputError
from regcache.runtime.engine_cost import PredictedTime

_EngineOption = Annotated[
    EngineKind,
    typer.Option(help="What builds: -rtx needs no GPU, the other one does.", rich_help_panel=SPEED),
]
_CapabilitiesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--compute-capability",
        metavar="LIST",
        help="GPUs that TensorRT-RTX builds for, or all; 8.6,8.9,12.0 by default.",
        rich_help_panel=OUTPUT,
    ),
]
_MaxBatchOption = Annotated[
    int, typer.Option(min=1, max=MOST_IMAGES, help="Largest batch that the engine takes.")
]
_OptBatchOption = Annotated[
    int, typer.Option(min=1, max=MOST_IMAGES, help="Batch that its kernels are tuned for.")
]
_FloatOption = Annotated[
    bool, typer.Option("--float", help="Build float.onnx too, to compare with.")
]
_PredictOption = Annotated[
    bool,
    typer.Option(
        "--predict/--no-predict",
        help="Predict its time beside FP16's, from peak rates; takes two more builds.",
        rich_help_panel=REPORT,
    ),
]
_ForceOption = Annotated[bool, typer.Option("--force", help="Build what is up to date as well.")]


def build_command(
    artifact: ArtifactArgument,
    config: ConfigOption = None,
    engine: _EngineOption = EngineKind.TENSORRT_RTX,
    compute_capability: _CapabilitiesOption = None,
    max_batch: _MaxBatchOption = 8,
    opt_batch: _OptBatchOption = 1,
    with_float: _FloatOption = False,
    predict: _PredictOption = True,
    force: _ForceOption = False,
    sign: SignOption = None,
    verify: VerifyOption = None,
    json: JsonOption = None,
) -> None:
    """Build an artifact's TensorRT engine, kept inside the artifact."""
    if opt_batch > max_batch:
        raise InputError(f"--opt-batch {opt_batch} is larger than --max-batch {max_batch}")
    options = BuildOptions(
        engine=engine,
        compute_capabilities=tuple(listed(compute_capability)) if compute_capability else None,
        max_batch=max_batch,
        opt_batch=opt_batch,
        with_float=with_float,
        force=force,
        predict=predict,
    )
    report = build_engines(artifact, options, CommandReporter(), signing_key=sign, verify=verify)
    if json is not None:
        write_text(json, report.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        _print(report, artifact)


def _print(report: BuildReport, artifact: Path) -> None:
    for engine in report.engines:
        print_lines(_lines(engine, artifact))
        if engine.record.predicted:
            print_tables([_predictions(engine.record.predicted)])


def _lines(engine: EngineReport, artifact: Path) -> list[str]:
    record = engine.record
    least, tuned, largest = record.batch
    sizes = f"batch {least}" if least == largest else f"batch {least} to {largest}, best at {tuned}"
    where = record.gpu or f"compute capability {', '.join(record.compute_capabilities)}"
    state = "up to date" if engine.seconds is None else f"built in {engine.seconds:.1f} s"
    lines = [
        f"{state}: {artifact / record.file}, {engine.size / 1e6:.1f} MB, for {where}, {sizes}",
        f"  matrix products: {_counts(record.products)}; fused attentions: "
        f"{record.fused_attentions}; all kernels: {_counts(record.layers)}",
    ]
    if record.size_ratio is not None:
        lines.append(f"  {record.size_ratio:.2f} x the float engine's size")
    return lines


def _predictions(times: list[PredictedTime]) -> Table:
    """A row for each GPU and batch: how long it is predicted to take, of what, beside FP16's."""
    numbers = ("batch", "ms", "memory", "arithmetic", "launches", "x FP16's")
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    title = "predicted from peak rates, not measured"
    table = Table(Column("GPU", no_wrap=True), *columns, title=title, title_justify="left")
    for time in times:
        parts = (time.total_ms, time.memory_ms, time.arithmetic_ms, time.launches_ms)
        ratio = "-" if time.ratio is None else f"{time.ratio:.2f}"
        table.add_row(time.gpu, str(time.batch), *(f"{part:.3g}" for part in parts), ratio)
    return table


def _counts(by_format: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in by_format.items()) or "unknown"
