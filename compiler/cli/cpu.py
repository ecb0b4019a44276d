"""`regcache compile --target cpu` on the command line."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.cli.artifact_lines import print_artifact
from regcache.compiler.cli.choose import CpuKind, compile_for_cpu, compile_for_kind
from regcache.compiler.cli.cpu_ways import MIN_COSINE, Accuracy, choice_table
from regcache.compiler.cli.options import OUTPUT, QUALITY
from regcache.compiler.cli.tables import print_tables
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import write_text
from regcache.compiler.job.targets import Precision, TargetName
from regcache.passes.errors import InputError


class TargetChoice(StrEnum):
    """What `--target` takes: a target, or `cpu`, where the machine decides."""

    ORT_CPU = "ort-cpu"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    OPENVINO = "openvino"
    CPU = "cpu"


TargetOption = Annotated[
    TargetChoice,
    typer.Option(help="What will run it; cpu: this machine decides.", rich_help_panel=OUTPUT),
]
MinCosineOption = Annotated[
    float | None,
    typer.Option(
        min=-1.0,
        max=1.0,
        help="Least mean cosine to float, on images held out: more stays float until it is kept "
        f"to; --target cpu: of all ways, {MIN_COSINE} without --max-error.",
        rich_help_panel=QUALITY,
    ),
]
MaxErrorOption = Annotated[
    float | None,
    typer.Option(
        min=0.0,
        help="--target cpu: largest relative error |error| / |float| of the embeddings.",
        rich_help_panel=QUALITY,
    ),
]
OtherCpuOption = Annotated[
    CpuKind | None,
    typer.Option(
        "--for",
        help="--target cpu: choose by rule for a CPU with these instructions.",
        rich_help_panel=OUTPUT,
    ),
]


def target_of(
    choice: TargetChoice, precision: Precision, **given: float | CpuKind | None
) -> TargetName:
    """The target that is asked for; for `cpu`, the one whose options are read.

    `given`: the options that are for `cpu` alone, by their names with _ for -; None where not told.
    Raises InputError for options that do not go with it.
    """
    if choice is TargetChoice.CPU:
        if precision is not Precision.INT8:
            raise InputError(f"--precision {precision.value}: --target cpu chooses the precision")
        return TargetName.ORT_CPU
    for name, value in given.items():
        if value is not None:
            option = name.strip("_").replace("_", "-")
            raise InputError(f"--{option} is for --target cpu, not {choice.value}")
    return TargetName(choice.value)


def compile_by_choice(
    options: CompileOptions,
    output: Path,
    json: Path | None,
    accuracy: Accuracy,
    kind: CpuKind | None,
    *,
    force: bool = False,
    key: Path | None = None,
) -> Manifest:
    """Compile what is best on this CPU, or by rule on another; print the table of all ways.

    `force`, `key`: as compile_encoder has them. With `json`: the manifest where the rule chose,
    else {"choice", "manifest"}.
    """
    if not options.keep_float:
        raise InputError("--no-float: --target cpu compares with float.onnx and keeps it")
    reporter = CommandReporter()
    if kind is not None:
        manifest = compile_for_kind(options, output, reporter, accuracy, kind, force=force, key=key)
        text = manifest.model_dump_json(indent=2)
    else:
        choice, manifest = compile_for_cpu(
            options, output, reporter, accuracy, force=force, key=key
        )
        text = (
            f'{{"choice": {choice.model_dump_json()},\n"manifest": {manifest.model_dump_json()}}}'
        )
        if json != Path("-"):
            print_tables([choice_table(choice)])
    if json is not None:
        write_text(json, f"{text}\n")
    if json != Path("-"):
        print_artifact(manifest, output)
    return manifest
