"""`regcache bundle` on the command line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.bundle.edge import bundle_edge, bundle_openvino_edge
from regcache.compiler.bundle.model_server import bundle_model_server
from regcache.compiler.bundle.record import BundleFormat, BundleRecord
from regcache.compiler.bundle.triton import (
    DEFAULT_MAX_BATCH,
    DEFAULT_QUEUE_DELAY,
    TritonOptions,
    bundle_triton,
)
from regcache.compiler.cli.options import (
    MOST_IMAGES,
    MOST_THREADS,
    ArtifactArgument,
    JsonOption,
    OutOption,
    VerifyOption,
)
from regcache.compiler.cli.tables import print_lines
from regcache.compiler.job.staging import write_text
from regcache.passes.errors import InputError

_FormatOption = Annotated[BundleFormat, typer.Option("--format", help="What will run the bundle.")]
_NameOption = Annotated[
    str | None, typer.Option(help="The model's name in a server; by default from its source.")
]
_MaxBatchOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=MOST_IMAGES,
        help=f"Images that Triton runs at once; {DEFAULT_MAX_BATCH} by default.",
    ),
]
_QueueDelayOption = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=2**31 - 1,
        help=f"Microseconds an image waits for others; {DEFAULT_QUEUE_DELAY} by default.",
    ),
]
_EngineOption = Annotated[
    bool, typer.Option("--engine", help="Let Triton run the artifact's TensorRT engines.")
]
_ThreadsOption = Annotated[
    int | None,
    typer.Option(min=1, max=MOST_THREADS, help="Threads of the backend on a CPU; all by default."),
]
_OrtFormatOption = Annotated[
    bool, typer.Option("--ort-format", help="model.ort, for minimal builds of ONNX Runtime.")
]


def bundle_command(
    artifact: ArtifactArgument,
    out: OutOption,
    kind: _FormatOption,
    name: _NameOption = None,
    max_batch: _MaxBatchOption = None,
    queue_delay: _QueueDelayOption = None,
    engine: _EngineOption = False,
    threads: _ThreadsOption = None,
    ort_format: _OrtFormatOption = False,
    verify: VerifyOption = None,
    json: JsonOption = None,
) -> None:
    """Write what a server or a device needs to run an artifact."""
    server: dict[str, object] = {"--name": name, "--threads": threads}
    triton = {"--max-batch": max_batch, "--queue-delay": queue_delay, "--engine": engine}
    edge = {"--ort-format": ort_format}
    if kind is BundleFormat.TRITON:
        _refuse(kind, edge)
        options = TritonOptions(
            name=name,
            max_batch=max_batch,
            queue_delay=DEFAULT_QUEUE_DELAY if queue_delay is None else queue_delay,
            engine=engine,
            threads=threads,
        )
        record = bundle_triton(Artifact.open(artifact, verify=verify), out, options)
    elif kind is BundleFormat.OPENVINO_SERVER:
        _refuse(kind, {**triton, **edge})
        opened = Artifact.open(artifact, verify=verify)
        record = bundle_model_server(opened, out, name=name, threads=threads)
    elif kind is BundleFormat.OPENVINO_EDGE:
        _refuse(kind, {**server, **triton, **edge})
        record = bundle_openvino_edge(Artifact.open(artifact, verify=verify), out)
    else:
        _refuse(kind, {**server, **triton})
        opened = Artifact.open(artifact, verify=verify)
        record = bundle_edge(opened, out, ort_format=ort_format)
    if json is not None:
        write_text(json, record.model_dump_json(indent=2) + "\n")
    if json != Path("-"):
        _print_record(record, out)


def _refuse(kind: BundleFormat, given: Mapping[str, object]) -> None:
    """Raise InputError for an option that has no meaning for this kind of bundle."""
    for option, value in given.items():
        if value is not None and value is not False:
            raise InputError(f"{option} says nothing with --format {kind.value}")


def _print_record(record: BundleRecord, output: Path) -> None:
    print_lines(
        f"wrote {output / name}: {file.size:,} bytes" for name, file in record.files.items()
    )
