"""`regcache parity` on the command line."""

import os
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.cli.configuration import ConfigOption
from regcache.compiler.cli.options import (
    EMBEDDING,
    GATE,
    INPUT,
    REPORT,
    ArtifactArgument,
    BatchOption,
    DeviceOption,
    GateOption,
    HintOption,
    ImagesOption,
    InferencePrecisionOption,
    JsonOption,
    ModelCacheOption,
    PerLayerOption,
    RuntimeOption,
    ThreadsOption,
    ThresholdsOption,
    VerifyOption,
)
from regcache.compiler.cli.tables import print_tables
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.job.staging import write_text
from regcache.compiler.parity.measure import measure_artifact
from regcache.compiler.parity.reference import Against, ReferenceChoice
from regcache.passes.errors import InputError
from regcache.runtime.baseline import DEFAULT_MAX_REGRESSION, Baseline
from regcache.runtime.openvino_options import Hint, InferencePrecision, OpenVinoOptions
from regcache.runtime.parity_output import block_table, parity_table, write_json, write_junit
from regcache.runtime.parity_summary import append_summary
from regcache.runtime.run_with import RunWith
from regcache.runtime.thresholds import Thresholds

_STEP_SUMMARY = "GITHUB_STEP_SUMMARY"


def parity_command(
    artifact: ArtifactArgument,
    images: ImagesOption,
    config: ConfigOption = None,
    gallery: Annotated[
        Path | None,
        typer.Option(
            help="Class folders, for the accuracy of neighbours.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    query: Annotated[
        Path | None,
        typer.Option(help="Class folders to classify by the gallery.", rich_help_panel=INPUT),
    ] = None,
    min_cosine: GateOption = None,
    thresholds: ThresholdsOption = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="What --json wrote before: exit 1 where it got worse.",
            rich_help_panel=GATE,
        ),
    ] = None,
    max_regression: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="SHARE",
            help="--baseline: by which share of it the error may grow.",
            rich_help_panel=GATE,
        ),
    ] = DEFAULT_MAX_REGRESSION,
    reference: Annotated[
        ReferenceChoice,
        typer.Option(
            help="What to compare with; auto: PyTorch if it can be.", rich_help_panel=INPUT
        ),
    ] = ReferenceChoice.AUTO,
    against: Annotated[
        Against,
        typer.Option(
            help="What is compared: the artifact's model, or its float.onnx.", rich_help_panel=INPUT
        ),
    ] = Against.ARTIFACT,
    per_layer: PerLayerOption = False,
    class_scores: Annotated[
        bool | None,
        typer.Option(
            "--class-scores/--no-class-scores",
            help="Whether the embedding is a score for each class; by default as it is named.",
            rich_help_panel=EMBEDDING,
        ),
    ] = None,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    verify: VerifyOption = None,
    runtime: RuntimeOption = None,
    inference_precision: InferencePrecisionOption = InferencePrecision.AUTO,
    hint: HintOption = Hint.LATENCY,
    model_cache: ModelCacheOption = None,
    json: JsonOption = None,
    junit: Annotated[
        Path | None,
        typer.Option(help="Write a JUnit report to this file.", rich_help_panel=REPORT),
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            help=f"Append a Markdown summary to this file; by default to {_STEP_SUMMARY}'s.",
            rich_help_panel=REPORT,
        ),
    ] = None,
) -> None:
    """Measure how close an artifact is to PyTorch; exit 1 where it falls short."""
    if (gallery is None) != (query is None):
        raise InputError("--gallery and --query go together")
    result = measure_artifact(
        artifact,
        images,
        CommandReporter(),
        thresholds=chosen_limits(thresholds, min_cosine),
        choice=reference,
        against=against,
        per_layer=per_layer,
        labelled=None if gallery is None or query is None else (gallery, query),
        class_scores=class_scores,
        batch_size=batch_size,
        threads=threads,
        device=device,
        verify=verify,
        baseline=None if baseline is None else Baseline.read(baseline, max_regression),
        run_with=RunWith(runtime, OpenVinoOptions(inference_precision, hint, model_cache)),
    )
    if json == Path("-"):
        write_text(json, result.model_dump_json(indent=2) + "\n")
    else:
        print_tables([parity_table(result)])
        if result.blocks is not None:
            print_tables([block_table(result.blocks, result.first_jump)])
        if json is not None:
            write_json(result, json)
    if junit is not None:
        write_junit(result, junit)
    if summary is None and os.environ.get(_STEP_SUMMARY):
        summary = Path(os.environ[_STEP_SUMMARY])
    if summary is not None:
        append_summary(result, artifact.name, summary)
    if not result.passed:
        raise typer.Exit(1)


def chosen_limits(file: Path | None, min_cosine: float | None) -> Thresholds:
    """The file's thresholds, or the defaults; --min-cosine takes precedence."""
    limits = Thresholds() if file is None else Thresholds.read(file)
    if min_cosine is None:
        return limits
    return Thresholds.of(limits.model_dump() | {"cosine_mean": min_cosine})
