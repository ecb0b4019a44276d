"""The command line. Exit codes: 0 passed, 1 a measured value misses its limit, 2 bad input."""

import gc
import sys
import warnings
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from regcache.compiler.cli.artifact_lines import print_artifact
from regcache.compiler.cli.bench import bench_command
from regcache.compiler.cli.build import build_command
from regcache.compiler.cli.bundle import bundle_command
from regcache.compiler.cli.cpu import (
    MaxErrorOption,
    MinCosineOption,
    OtherCpuOption,
    TargetChoice,
    compile_by_choice,
    target_of,
)
from regcache.compiler.cli.cpu_ways import Accuracy
from regcache.compiler.cli.ending import ended_cleanly
from regcache.compiler.cli.options import (
    AttentionOption,
    BatchOption,
    DeviceOption,
    GpuOption,
    Int8ShareOption,
    JsonOption,
    OutOption,
    OutputOption,
    PreferOption,
    PreprocessOption,
    ReplaceOption,
    ResolutionOption,
    RotateOption,
    SchedulerOption,
    SearchBudgetOption,
    SignOption,
    SourceArgument,
    ThreadsOption,
    parse_duration,
)
from regcache.compiler.cli.parity import parity_command
from regcache.compiler.cli.reproduce import reproduce_command
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.inspection.inspect import inspect_encoder
from regcache.compiler.inspection.tables import inspection_tables
from regcache.compiler.job.options import (
    Calibrator,
    CompileOptions,
    Effort,
    RegisterChoice,
    Rounding,
)
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.targets import Precision, Simulation
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.plan.forecast import forecast
from regcache.compiler.plan.table import describe_forecast, forecast_table
from regcache.compiler.reporter import Reporter, Step
from regcache.compiler.staging import staged_file, write_text
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import RegcacheError, one_line
from regcache.passes.model_files import check_name
from regcache.passes.quiet import silence_graphs
from regcache.runtime.session import silence_runtime

app = typer.Typer(
    name="regcache",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"regcache {version('regcache')}")
        raise typer.Exit


@app.callback()
def _common(
    _version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it and end."),
    ] = False,
) -> None:
    """Turn a pretrained vision encoder into an int8 artifact, and prove its accuracy."""


@app.command()
def export(source: SourceArgument, out: OutOption, resolution: ResolutionOption = None) -> None:
    """Write a source as ONNX, its preprocessing recipe beside it."""
    check_name(out)
    reporter = Reporter()
    with reporter.command(Step(Stage.EXPORT)), staged_file(out) as staged:
        reporter.begin(Stage.EXPORT, source)
        recipe = export_source(source, staged, resolution, reporter)
        if recipe is not None:
            sidecar(staged).write_text(recipe.to_json(), encoding="utf-8")
    print_lines([f"wrote {out}"])


@app.command()
def inspect(
    source: SourceArgument,
    images: Annotated[Path | None, typer.Option(help="Images to measure activations on.")] = None,
    resolution: ResolutionOption = None,
    output: OutputOption = None,
    preprocess: PreprocessOption = None,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    json: JsonOption = None,
) -> None:
    """Print the blocks found and, with --images, where the outliers stand."""
    options = CompileOptions(
        source=source,
        images=str(images or ""),
        resolution=resolution,
        output=output,
        preprocess=None if preprocess is None else str(preprocess),
    )
    inspection = inspect_encoder(
        options, images, Reporter(), batch_size=batch_size, threads=threads, device=device
    )
    if json is not None:
        write_text(json, inspection.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_tables(inspection_tables(inspection))


@app.command("compile")
def compile_command(
    source: SourceArgument,
    out: OutOption,
    images: Annotated[
        Path | None,
        typer.Option(help="A folder of images to calibrate on; bf16 and fp16 need none."),
    ] = None,
    target: Annotated[
        TargetChoice, typer.Option(help="What will run it; cpu: this machine decides.")
    ] = TargetChoice.ORT_CPU,
    min_cosine: MinCosineOption = None,
    max_error: MaxErrorOption = None,
    other_cpu: OtherCpuOption = None,
    resolution: ResolutionOption = None,
    output: OutputOption = None,
    preprocess: PreprocessOption = None,
    no_float: Annotated[bool, typer.Option("--no-float", help="Keep no float.onnx.")] = False,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    seed: Annotated[int, typer.Option(help="Seed of all that is drawn at random.")] = 0,
    calibrator: Annotated[
        Calibrator, typer.Option(help="How the range of an activation is chosen.")
    ] = Calibrator.OUTPUT_ERROR,
    precision: Annotated[
        Precision, typer.Option(help="What the linears compute in.")
    ] = Precision.INT8,
    simulate: Annotated[
        Simulation | None, typer.Option(help="Other bit-widths, as fake quantization.")
    ] = None,
    equalize: Annotated[
        bool, typer.Option("--equalize/--no-equalize", help="Whether channels are equalized.")
    ] = True,
    rotate: RotateOption = None,
    rounding: Annotated[
        Rounding, typer.Option(help="How weights become integers.")
    ] = Rounding.GPTQ,
    int8_share: Int8ShareOption = None,
    half: Annotated[
        bool | None,
        typer.Option("--half/--no-half", help="The rest in FP16; by default for TensorRT."),
    ] = None,
    attention: AttentionOption = None,
    prefer: PreferOption = None,
    gpu: GpuOption = None,
    accept_slower: Annotated[
        bool, typer.Option("--accept-slower", help="Ship it though it is slower than float here.")
    ] = False,
    registers: Annotated[
        RegisterChoice | None,
        typer.Option(help="Whether to search for registers; auto by default, fast: off."),
    ] = None,
    effort: Annotated[
        Effort, typer.Option(help="How much is tried; other options go before it (docs/cost.md).")
    ] = Effort.BALANCED,
    search_budget: SearchBudgetOption = None,
    scheduler: SchedulerOption = "threads",
    force: ReplaceOption = False,
    sign: SignOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what it would take, and write nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Compile a source into an int8 artifact, calibrated on --images."""
    options = CompileOptions(
        source=source,
        images="" if images is None else str(images),
        target=target_of(
            target, precision, min_cosine=min_cosine, max_error=max_error, for_=other_cpu
        ),
        resolution=resolution,
        output=output,
        preprocess=None if preprocess is None else str(preprocess),
        batch_size=batch_size,
        threads=threads,
        device=device,
        seed=seed,
        keep_float=not no_float,
        calibrator=calibrator,
        precision=precision,
        simulate=simulate,
        equalize=equalize,
        rounding=rounding,
        int8_share=int8_share,
        accept_slower=accept_slower,
        half=half,
        attention=attention,
        prefer=prefer,
        gpu=gpu,
        search_budget=None if search_budget is None else parse_duration(search_budget),
        scheduler=scheduler,
        effort=effort,
        **_given(registers=registers, rotate=rotate),
    )
    if dry_run:
        _foretell(options, out, json)
    elif target is TargetChoice.CPU:
        accuracy = Accuracy.of(min_cosine, max_error)
        compile_by_choice(options, out, json, accuracy, other_cpu, force=force, key=sign)
    else:
        manifest = compile_encoder(options, out, Reporter(), force=force, key=sign)
        if json is not None:
            write_text(json, manifest.model_dump_json(indent=2) + "\n")
        if json != Path("-"):
            print_artifact(manifest, out)


def _foretell(options: CompileOptions, out: Path, json: Path | None) -> None:
    found = forecast(options, out, Reporter())
    if json is not None:
        write_text(json, found.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_tables([forecast_table(found)])
        print_lines([describe_forecast(found)])


def _given(**options: Any) -> dict[str, Any]:
    """The options that somebody gave; the effort decides on the others."""
    return {name: value for name, value in options.items() if value is not None}


app.command("build")(build_command)
app.command("bundle")(bundle_command)
app.command("parity")(parity_command)
app.command("reproduce")(reproduce_command)
app.command("bench")(bench_command)


def main() -> None:
    """Entry point: bad input and a full disk are one line on stderr and exit code 2."""
    silence_runtime()
    silence_graphs()
    _freeze_modules()
    # Of palettes and metadata; they would land between the lines that tell progress.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with ended_cleanly():
            app()
    except RegcacheError as error:
        _fail(str(error))
    except OSError as error:  # a full disk or a folder without permission, outside an artifact
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except MemoryError:
        _fail("out of memory")


@cache
def _freeze_modules() -> None:
    """Keep garbage collections from walking through modules: they live as long as the process."""
    gc.freeze()


def _fail(message: str) -> NoReturn:
    print(f"regcache: error: {one_line(message)}", file=sys.stderr)
    sys.exit(2)
