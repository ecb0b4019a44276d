"""`regcache report` on the command line, and the report that `compile --report` writes."""

from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.cli.options import (
    INPUT,
    OUTPUT,
    QUALITY,
    REPORT,
    ArtifactArgument,
    BatchOption,
    DeviceOption,
    GateOption,
    PerLayerOption,
    RuntimeOption,
    ThreadsOption,
    ThresholdsOption,
    VerifyOption,
)
from regcache.compiler.cli.parity import chosen_limits
from regcache.compiler.cli.tables import print_lines
from regcache.compiler.cli.talk import CommandReporter
from regcache.compiler.parity.reference import ReferenceChoice
from regcache.compiler.report.measure import Comparison, measure
from regcache.compiler.report.subject import read_bench, read_subject
from regcache.compiler.report.write import check_report, write_report
from regcache.passes.errors import InputError
from regcache.runtime.run_with import RunWith

CompileReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write a page on what was compiled, and why, to this .html file.",
        rich_help_panel=REPORT,
    ),
]


def report_command(
    artifact: ArtifactArgument,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Where the page goes.", rich_help_panel=OUTPUT)
    ] = Path("report.html"),
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="IMAGES",
            help="Images to measure parity on and to show: a folder, a list (.txt), a 'pattern'.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Times to show, as bench --json wrote them.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    min_cosine: GateOption = None,
    thresholds: ThresholdsOption = None,
    reference: Annotated[
        ReferenceChoice | None,
        typer.Option(
            help="What to compare with; by default PyTorch if it can be.", rich_help_panel=QUALITY
        ),
    ] = None,
    per_layer: PerLayerOption = False,
    batch_size: BatchOption = 4,
    threads: ThreadsOption = None,
    device: DeviceOption = "cpu",
    verify: VerifyOption = None,
    runtime: RuntimeOption = None,
) -> None:
    """Write a page that shows what was compiled, and why; exit 1 where --images fall short."""
    measuring = {
        "--min-cosine": min_cosine is not None,
        "--thresholds": thresholds is not None,
        "--reference": reference is not None,
        "--per-layer": per_layer,
        "--runtime": runtime is not None,
    }
    for option, given in measuring.items():
        if given and images is None:
            raise InputError(f"{option} says how to measure: it needs --images")
    check_report(out, artifact, "report")
    reporter = CommandReporter()
    opened = Artifact.open(artifact, verify=verify)
    measured = None
    benched = None if bench is None else read_bench(bench)
    if images is not None:
        how = Comparison(
            thresholds=chosen_limits(thresholds, min_cosine),
            choice=reference or ReferenceChoice.AUTO,
            per_layer=per_layer,
            batch_size=batch_size,
            threads=threads,
            device=device,
            verify=verify,
            run_with=RunWith(runtime),
        )
        measured = measure(opened, images, how, reporter)
    subject = read_subject(opened, measured=measured, bench=benched, threads=threads)
    write_report(subject, out)
    print_lines([f"wrote {out}: open it in a browser"])
    if measured is not None and not measured.parity.passed:
        reporter.warn(f"falls short: {measured.parity.failure()}")
        raise typer.Exit(1)


def report_compiled(
    manifest: Manifest, artifact: Path, out: Path, threads: int | None, *, quiet: bool
) -> None:
    """Write the report of an artifact that was just compiled, with the times of its speed check."""
    subject = read_subject(Artifact.open(artifact), manifest=manifest, threads=threads)
    write_report(subject, out)
    if not quiet:
        print_lines([f"wrote {out}: open it in a browser"])
