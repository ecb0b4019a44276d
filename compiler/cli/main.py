"""The command line. Exit codes: 0 passed, 1 a measured value misses its limit, 2 bad input."""

import gc
import sys
import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from regcache.compiler.cli.bench import bench_command
from regcache.compiler.cli.build import build_command
from regcache.compiler.cli.bundle import bundle_command
from regcache.compiler.cli.compile import compile_command
from regcache.compiler.cli.doctor import doctor_command
from regcache.compiler.cli.ending import ended_cleanly
from regcache.compiler.cli.examples import epilog_of
from regcache.compiler.cli.options import (
    INPUT,
    BatchOption,
    DeviceOption,
    JsonOption,
    OutOption,
    OutputOption,
    PreprocessOption,
    ResolutionOption,
    SourceArgument,
    ThreadsOption,
)
from regcache.compiler.cli.parity import parity_command
from regcache.compiler.cli.registers import registers_command
from regcache.compiler.cli.report import report_command
from regcache.compiler.cli.reproduce import reproduce_command
from regcache.compiler.cli.tables import print_lines, print_tables
from regcache.compiler.cli.talk import CommandReporter, talking
from regcache.compiler.cli.usage import Commands
from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.inspection.inspect import inspect_encoder
from regcache.compiler.inspection.tables import inspection_tables
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.stages import Stage
from regcache.compiler.job.staging import staged_file, write_text
from regcache.compiler.reporter import Step
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import FallsShortError, RegcacheError, one_line
from regcache.passes.model_files import check_name
from regcache.passes.quiet import silence_graphs
from regcache.runtime.session import silence_runtime

app = typer.Typer(
    name="regcache",
    cls=Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
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


@app.command(epilog=epilog_of("export"))
@talking
def export(source: SourceArgument, out: OutOption, resolution: ResolutionOption = None) -> None:
    """Write a source as ONNX, its preprocessing recipe beside it."""
    check_name(out)
    reporter = CommandReporter()
    with reporter.command(Step(Stage.EXPORT)), staged_file(out) as staged:
        reporter.begin(Stage.EXPORT, source)
        recipe = export_source(source, staged, resolution, reporter)
        if recipe is not None:
            sidecar(staged).write_text(recipe.to_json(), encoding="utf-8")
    print_lines([f"wrote {out}"])


@app.command(epilog=epilog_of("inspect"))
@talking
def inspect(
    source: SourceArgument,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Images to measure activations on.",
            rich_help_panel=INPUT,
        ),
    ] = None,
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
        options, images, CommandReporter(), batch_size=batch_size, threads=threads, device=device
    )
    if json is not None:
        write_text(json, inspection.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        print_tables(inspection_tables(inspection))


_COMMANDS: dict[str, Callable[..., None]] = {
    "compile": compile_command,
    "registers": registers_command,
    "build": build_command,
    "bundle": bundle_command,
    "parity": parity_command,
    "report": report_command,
    "reproduce": reproduce_command,
    "bench": bench_command,
    "doctor": doctor_command,
}
for _name, _command in _COMMANDS.items():
    app.command(_name, epilog=epilog_of(_name))(talking(_command))


def main() -> None:
    """Entry point: bad input and a full disk are one line on stderr and exit code 2.

    What was asked for and cannot be reached is one line and exit code 1.
    """
    silence_runtime()
    silence_graphs()
    _freeze_modules()
    # Of palettes and metadata; they would land between the lines that tell progress.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with ended_cleanly():
            app(prog_name="regcache")
    except FallsShortError as error:
        _fail(str(error), 1)
    except RegcacheError as error:
        _fail(str(error))
    except OSError as error:  # a full disk or a folder without permission, outside an artifact
        _fail(
            f"{error.filename}: {error.strerror}"
            if error.filename
            else error.strerror or str(error)
        )
    except MemoryError:
        _fail("out of memory")


@cache
def _freeze_modules() -> None:
    """Keep garbage collections from walking through modules: they live as long as the process."""
    gc.freeze()


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"regcache: error: {one_line(message)}", file=sys.stderr)
    sys.exit(code)
