"""`regcache reproduce` on the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from regcache.compiler.cli.options import (
    INPUT,
    AblateOption,
    BatchOption,
    DeviceOption,
    JsonOption,
    OutputOption,
    PreprocessOption,
    ResolutionOption,
    SchedulerOption,
    SearchBudgetOption,
    ThreadsOption,
    listed,
    parse_duration,
)
from regcache.compiler.cli.tables import print_lines
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.breadth import LEAST_IMAGES
from regcache.compiler.job.options import Calibrator, CompileOptions
from regcache.compiler.job.staging import write_text
from regcache.compiler.job.targets import Precision, Simulation, TargetName, resolve_target
from regcache.compiler.reproduce.kept import work_folder
from regcache.compiler.reproduce.reproduce import Plan, reproduce
from regcache.compiler.reproduce.tasks import Tasks
from regcache.passes.errors import InputError

T = TypeVar("T")


_File = Path | None
_ModelsOption = Annotated[
    list[str],
    typer.Option(
        "--models", "--model", metavar="LIST", help="As SOURCE of compile; a table for each."
    ),
]
_ImagenetOption = Annotated[
    _File, typer.Option(help="Folder of class folders whose images are classified.")
]
_NamesOption = Annotated[
    _File,
    typer.Option(help="Names of the classes, for zero-shot; `imagenet`: OpenAI's, and prompts."),
]
_TemplatesOption = Annotated[
    _File, typer.Option(help="Prompts, one a line, with {} for the class name.")
]
_TrainOption = Annotated[_File, typer.Option(help="Class folders for kNN and the linear probe.")]
_CaptionsOption = Annotated[
    _File, typer.Option(help="Captions file, its images below its folder, for retrieval.")
]
_LimitOption = Annotated[
    int | None, typer.Option(min=1, help="At most so many images a task, classes balanced.")
]
_TrainLimitOption = Annotated[
    int | None, typer.Option(min=1, help="At most so many images of --train, classes balanced.")
]
_CalibrationOption = Annotated[
    _File,
    typer.Option(
        help="Calibration images; --train, else --imagenet, by default.", rich_help_panel=INPUT
    ),
]
_CountOption = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="How many of them.",
        rich_help_panel="Calibration",  # its name is long: nothing else may need room
    ),
]
_BitsOption = Annotated[
    str,
    typer.Option(
        help="Of 8, 6 and 4 (weights and activations alike), w4a16, and TensorRT's nvfp4, mxfp8."
    ),
]
_CalibratorsOption = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        show_default=False,
        help="Base quantizers; by default min-max and output-error.",
    ),
]
_TargetOption = Annotated[TargetName, typer.Option(help="Whose number formats are simulated.")]
_SeedOption = Annotated[int, typer.Option(help="Seed of all that is drawn at random.")]
_MarkdownOption = Annotated[_File, typer.Option(help="Write the table to this file.")]
_BLOCK_FLOATS = (Precision.NVFP4, Precision.MXFP8)
_BOTH = ",".join((Calibrator.MIN_MAX, Calibrator.OUTPUT_ERROR))


def reproduce_command(
    models: _ModelsOption,
    imagenet: _ImagenetOption = None,
    classnames: _NamesOption = None,
    templates: _TemplatesOption = None,
    train: _TrainOption = None,
    captions: _CaptionsOption = None,
    limit: _LimitOption = None,
    train_limit: _TrainLimitOption = None,
    images: _CalibrationOption = None,
    calibration_images: _CountOption = 128,
    bits: _BitsOption = "8",
    calibrators: _CalibratorsOption = _BOTH,
    target: _TargetOption = TargetName.TENSORRT,
    resolution: ResolutionOption = None,
    output: OutputOption = None,
    preprocess: PreprocessOption = None,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    seed: _SeedOption = 0,
    search_budget: SearchBudgetOption = None,
    ablate: AblateOption = False,
    scheduler: SchedulerOption = "threads",
    json: JsonOption = None,
    markdown: _MarkdownOption = None,
) -> None:
    """Rerun the tables of the RegCache paper: base quantizer x {off, RegCache}."""
    if calibration_images < LEAST_IMAGES:
        raise InputError(f"--calibration-images {calibration_images}: give {LEAST_IMAGES} or more")
    folder = images or train or imagenet
    if folder is None:
        raise InputError("no images to calibrate on: give --images, --train or --imagenet")
    reporter = CommandReporter()
    if folder == imagenet:
        reporter.warn("calibrating on images that are evaluated too (give --images or --train)")
    sources = list(dict.fromkeys(listed(models)))
    _check_one({"--output": output, "--preprocess": preprocess}, sources)
    tasks = Tasks(imagenet, classnames, templates, train, captions, limit, train_limit)
    formats = _listed(bits, lambda text: _format(text, target))
    base = _listed(calibrators, _calibrator)
    plans = []
    for source in sources:
        options = CompileOptions(
            source=source,
            images=str(folder),
            target=target,
            resolution=resolution,
            output=output,
            preprocess=None if preprocess is None else str(preprocess),
            batch_size=batch_size,
            threads=threads,
            device=device,
            seed=seed,
            search_budget=None if search_budget is None else parse_duration(search_budget),
            scheduler=scheduler,
            ablate=ablate,
        )
        plans.append(Plan(options, formats, base, tasks, calibration_images))
    _run(plans, json, markdown, reporter)


def _run(
    plans: list[Plan], json: Path | None, markdown: Path | None, reporter: CommandReporter
) -> None:
    """Reproduce, print and write the tables. Work is kept beside a file until it is written."""
    output = next((path for path in (json, markdown) if path not in (None, Path("-"))), None)
    with work_folder(output) as work:
        found = reproduce(plans, work, reporter)
        if Path("-") not in (json, markdown):  # before a file is written, which may fail
            print_lines([found.markdown()])
        if json is not None:
            write_text(json, found.model_dump_json(indent=2) + "\n")
        if markdown is not None:
            write_text(markdown, found.markdown())


def _check_one(given: dict[str, object], sources: list[str]) -> None:
    """Refuse options that are of one model where there are several."""
    for option, value in given.items():
        if value is not None and len(sources) > 1:
            raise InputError(f"{option} is of one model: --models names {len(sources)}")


def _listed(text: str, parse: Callable[[str], T]) -> list[T]:
    """The items of a list with commas, parsed, repeated ones left out."""
    return list(dict.fromkeys(parse(item) for item in listed([text])))


def _format(text: str, target: TargetName) -> Simulation | Precision:
    if text in _BLOCK_FLOATS:
        precision = Precision(text)
        resolve_target(target, u8s8_saturates=False, precision=precision)
        return precision
    name = f"w{text}a{text}" if text.isdigit() else text
    if name not in list(Simulation):
        raise InputError(
            f"--bits {text!r}: must be 8, 6, 4, w4a16, nvfp4 or mxfp8, or some with commas between"
        )
    return Simulation(name)


def _calibrator(text: str) -> Calibrator:
    if text not in list(Calibrator):
        names = " or ".join(Calibrator)
        raise InputError(f"--calibrators {text!r}: must be {names}, or some with commas between")
    return Calibrator(text)
