"""`regcache compile` on the command line."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regcache.compiler.cli.artifact_lines import print_artifact
from regcache.compiler.cli.cpu import (
    MaxErrorOption,
    MinCosineOption,
    OtherCpuOption,
    TargetChoice,
    compile_by_choice,
    target_of,
)
from regcache.compiler.cli.cpu_ways import Accuracy
from regcache.compiler.cli.dry_run import foretell
from regcache.compiler.cli.options import (
    INPUT,
    OUTPUT,
    QUALITY,
    REGISTERS,
    REPORT,
    SPEED,
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
    SchedulerOption,
    SearchBudgetOption,
    SignOption,
    SourceArgument,
    ThreadsOption,
    parse_duration,
)
from regcache.compiler.cli.report import CompileReportOption, report_compiled
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.options import (
    AttentionChoice,
    Calibrator,
    CompileOptions,
    Effort,
    RegisterChoice,
    Rounding,
)
from regcache.compiler.job.staging import write_text
from regcache.compiler.job.targets import Precision, Simulation
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.report.write import check_report


def compile_command(
    source: SourceArgument,
    out: OutOption,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Images to calibrate on: a folder, a list (.txt), a 'pattern'; bf16 and fp16 need "
            "none.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    max_images: Annotated[
        int,
        typer.Option(
            min=1, help="Of more images, so many are drawn by --seed.", rich_help_panel=INPUT
        ),
    ] = 512,
    target: Annotated[
        TargetChoice,
        typer.Option(
            help="What will run it; cpu: this machine decides.",
            rich_help_panel=OUTPUT,
        ),
    ] = TargetChoice.ORT_CPU,
    min_cosine: MinCosineOption = None,
    max_error: MaxErrorOption = None,
    other_cpu: OtherCpuOption = None,
    resolution: ResolutionOption = None,
    output: OutputOption = None,
    preprocess: PreprocessOption = None,
    no_float: Annotated[
        bool,
        typer.Option(
            "--no-float",
            help="Keep no float.onnx.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    seed: Annotated[
        int,
        typer.Option(
            help="Seed of all that is drawn at random.",
            rich_help_panel=QUALITY,
        ),
    ] = 0,
    calibrator: Annotated[
        Calibrator,
        typer.Option(
            help="How the range of an activation is chosen.",
            rich_help_panel=QUALITY,
        ),
    ] = Calibrator.OUTPUT_ERROR,
    precision: Annotated[
        Precision,
        typer.Option(
            help="What the linears compute in.",
            rich_help_panel=QUALITY,
        ),
    ] = Precision.INT8,
    simulate: Annotated[
        Simulation | None,
        typer.Option(
            help="Other bit-widths, as fake quantization.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    equalize: Annotated[
        bool,
        typer.Option(
            "--equalize/--no-equalize",
            help="Whether channels are equalized.",
            rich_help_panel=QUALITY,
        ),
    ] = True,
    rotate: Annotated[
        bool | None,
        typer.Option(
            "--rotate/--no-rotate",
            help="Whether activations are rotated where --int8-share leaves room for it; by "
            "default they are, but for --effort fast.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    rounding: Annotated[
        Rounding,
        typer.Option(
            help="How weights become integers.",
            rich_help_panel=QUALITY,
        ),
    ] = Rounding.GPTQ,
    int8_share: Int8ShareOption = None,
    half: Annotated[
        bool | None,
        typer.Option(
            "--half/--no-half",
            help="The rest in FP16; by default for TensorRT.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    attention: Annotated[
        AttentionChoice | None,
        typer.Option(
            help="Attention's own products: int8 both (TensorRT), scores q k^T alone (OpenVINO, "
            "its default), float neither.",
            rich_help_panel=QUALITY,
        ),
    ] = None,
    prefer: PreferOption = None,
    gpu: GpuOption = None,
    accept_slower: Annotated[
        bool,
        typer.Option(
            "--accept-slower",
            help="Ship it though it is slower than float here.",
            rich_help_panel=SPEED,
        ),
    ] = False,
    registers: Annotated[
        RegisterChoice | None,
        typer.Option(
            help="Whether to search for registers; auto by default, fast: off.",
            rich_help_panel=REGISTERS,
        ),
    ] = None,
    effort: Annotated[
        Effort,
        typer.Option(
            help="How much is tried; other options go before it (docs/cost.md).",
            rich_help_panel=SPEED,
        ),
    ] = Effort.BALANCED,
    search_budget: SearchBudgetOption = None,
    scheduler: SchedulerOption = "threads",
    force: ReplaceOption = False,
    sign: SignOption = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what it would take, and write nothing.", rich_help_panel=REPORT
        ),
    ] = False,
    report: CompileReportOption = None,
    json: JsonOption = None,
) -> None:
    """Compile a source into an int8 artifact, calibrated on --images."""
    options = CompileOptions(
        source=source,
        images="" if images is None else str(images),
        max_images=max_images,
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
    if report is not None:
        check_report(report, out, "--report")
    if dry_run:
        foretell(options, out, json)
        return
    if target is TargetChoice.CPU:
        accuracy = Accuracy.of(min_cosine, max_error)
        manifest = compile_by_choice(options, out, json, accuracy, other_cpu, force=force, key=sign)
    else:
        manifest = compile_encoder(options, out, CommandReporter(), force=force, key=sign)
        if json is not None:
            write_text(json, manifest.model_dump_json(indent=2) + "\n")
        if json != Path("-"):
            print_artifact(manifest, out)
    if report is not None:
        report_compiled(manifest, out, report, threads, quiet=json == Path("-"))


def _given(**options: Any) -> dict[str, Any]:
    """The options that somebody gave; the effort decides on the others."""
    return {name: value for name, value in options.items() if value is not None}
