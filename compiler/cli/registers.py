"""`regcache registers` on the command line."""

from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.cli.ablation_tables import ablation_tables
from regcache.compiler.cli.compile_options import MaxImagesOption, SeedOption
from regcache.compiler.cli.options import (
    REGISTERS,
    SPEED,
    AblateOption,
    BatchOption,
    DeviceOption,
    ImagesOption,
    JsonOption,
    OutOption,
    OutputOption,
    PreprocessOption,
    ResolutionOption,
    SchedulerOption,
    SearchBudgetOption,
    SourceArgument,
    ThreadsOption,
    parse_duration,
)
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.curation.add_registers import Judge, add_registers
from regcache.compiler.curation.quantizer_command import QuantizerCommand
from regcache.compiler.job.effort import Effort
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import write_text


def registers_command(
    source: SourceArgument,
    images: ImagesOption,
    out: OutOption,
    judge: Annotated[
        Judge,
        typer.Option(
            "--for",
            help="What the search judges by: simulated formats, min-max; ort and nncf: that "
            "library's quantizer decides.",
            rich_help_panel=REGISTERS,
        ),
    ] = Judge.W8A8,
    quantizer: Annotated[
        str | None,
        typer.Option(
            help="A command that quantizes, and decides: 'python q.py {model} {images} {output}'.",
            rich_help_panel=REGISTERS,
        ),
    ] = None,
    max_images: MaxImagesOption = 512,
    resolution: ResolutionOption = None,
    output: OutputOption = None,
    preprocess: PreprocessOption = None,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    seed: SeedOption = 0,
    effort: Annotated[
        Effort,
        typer.Option(
            help="How much is tried: balanced or thorough (docs/cost.md).", rich_help_panel=SPEED
        ),
    ] = Effort.BALANCED,
    search_budget: SearchBudgetOption = None,
    scheduler: SchedulerOption = "threads",
    ablate: AblateOption = False,
    json: JsonOption = None,
) -> None:
    """Write a float encoder with its registers, for another library's quantizer."""
    asked = CompileOptions(
        source=source,
        images=str(images),
        max_images=max_images,
        resolution=resolution,
        output=output,
        preprocess=None if preprocess is None else str(preprocess),
        batch_size=batch_size,
        threads=threads,
        device=device,
        seed=seed,
        effort=effort,
        search_budget=None if search_budget is None else parse_duration(search_budget),
        scheduler=scheduler,
        ablate=ablate,
    )
    command = None if quantizer is None else QuantizerCommand.of(quantizer)
    found = add_registers(asked, judge, out, CommandReporter(), command)
    if json is not None:
        write_text(json, found.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_lines([found.curation.reason, f"wrote {out}: in float, to be quantized"])
        print_tables(ablation_tables(found.curation))
