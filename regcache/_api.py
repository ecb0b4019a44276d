"""What stands behind `regcache.compile`, `parity` and `inspect`: input checked, little said."""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from rich.console import Console

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.cli.choose import CpuKind, compile_for_cpu, compile_for_kind
from regcache.compiler.cli.cpu_ways import Accuracy
from regcache.compiler.curation.add_registers import (
    TAKEN,
    Judge,
    RegistersResult,
    add_registers,
)
from regcache.compiler.curation.quantizer_command import QuantizerCommand
from regcache.compiler.encoder.memory_source import NamedSource
from regcache.compiler.inspection.inspect import inspect_encoder
from regcache.compiler.inspection.record import Inspection
from regcache.compiler.job.effort import FP4_SHARE
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.staging import check_output, unnamed
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.export.suggest import did_you_mean
from regcache.passes.errors import InputError, one_line
from regcache.passes.preprocess import Preprocess
from regcache.passes.quiet import quiet
from regcache.passes.temporary import temporary_folder
from regcache.runtime.device import find_device
from regcache.runtime.list_images import list_images
from regcache.runtime.openvino_options import Hint, InferencePrecision, OpenVinoOptions
from regcache.runtime.run_with import RuntimeName, RunWith

Choice = TypeVar("Choice", bound=StrEnum)

# Fields of CompileOptions that the calls here fill themselves, whatever they are called there.
_OWN = frozenset({"source", "source_file", "images", "output", "preprocess"})


class QuietReporter(Reporter):
    """Tells no progress; what the user has to know is a Python warning."""

    def __init__(self) -> None:
        super().__init__(Console(quiet=True, force_terminal=False))

    def step(self, text: str) -> None:
        """Say nothing."""

    def warn(self, text: str) -> None:
        """Warn as Python does, so that a caller can filter, count or refuse it."""
        warnings.warn(one_line(text), UserWarning, stacklevel=_caller_level())


def _caller_level() -> int:
    """How far up from QuietReporter.warn the line stands that called this package."""
    level, found, frame = 1, 1, sys._getframe(1).f_back
    while frame is not None:
        level += 1
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "regcache":
            found = level
        frame = frame.f_back
    return found + 1


@dataclass(frozen=True)
class GivenSource:
    """What `compile` and `inspect` are told of the source; see there for each."""

    source: object
    example: object
    preprocess: object
    embedding: object


def compile_source(
    given: GivenSource,
    images: object,
    output: object,
    options: Mapping[str, Any],
    verbose: bool,
    *,
    force: bool,
) -> Artifact:
    """`regcache.compile`: see there."""
    folder = None if images is None else path_of(images, "images")
    target = path_of(output, "output")
    named = NamedSource.of(given.source, given.example)
    rest, choosing = _choosing(options)
    chosen = _options(named, given, {"images": str(folder or ""), **rest})
    find_device(chosen.device, algebra=True)
    if choosing is not None and folder is None:
        raise InputError('target "cpu" calibrates and compares on photographs: name a folder')
    if folder is not None:
        list_images(folder)  # said before minutes of exporting
    check_output(target, force=force)
    reporter = reporter_of(verbose)
    with _written(named, chosen, reporter) as ready:
        if choosing is None:
            manifest = compile_encoder(ready, target, reporter, force=force)
        else:
            manifest = choosing.compile(ready, target, reporter, force=force)
    opened = Artifact.open(target)
    # The file leaves out how fast it was found to be.
    told = opened.manifest.model_copy(update={"speed": manifest.speed})
    return replace(opened, manifest=told)


def registers_of_source(
    given: GivenSource,
    images: object,
    output: object,
    judge: str,
    quantizer: object,
    options: Mapping[str, Any],
    verbose: bool,
) -> RegistersResult:
    """`regcache.registers`: see there."""
    folder, target = path_of(images, "images"), path_of(output, "output")
    for name in options:
        if name not in TAKEN:
            raise InputError(f"there is no option {name!r}; there are {', '.join(sorted(TAKEN))}")
    named = NamedSource.of(given.source, given.example)
    chosen = _options(named, given, {"images": str(folder), **options})
    by = choice_of(Judge, judge, "judge")
    command = None if quantizer is None else QuantizerCommand.of(quantizer)
    list_images(folder)  # said before minutes of exporting
    reporter = reporter_of(verbose)
    with _written(named, chosen, reporter) as ready:
        return add_registers(ready, by, target, reporter, command)


@dataclass(frozen=True)
class _Choosing:
    """What was told of `target="cpu"`.

    `kind`: the CPU that a rule chooses for; None: this one, by what is measured.
    """

    accuracy: Accuracy
    kind: CpuKind | None

    def compile(
        self, options: CompileOptions, output: Path, reporter: Reporter, *, force: bool
    ) -> Manifest:
        """Compile what is best for the CPU."""
        given = (options, output, reporter, self.accuracy)
        if self.kind is not None:
            return compile_for_kind(*given, self.kind, force=force)
        return compile_for_cpu(*given, force=force)[1]


def _choosing(options: Mapping[str, Any]) -> tuple[dict[str, Any], _Choosing | None]:
    """The options without those of `target="cpu"`, and these; None for another target."""
    rest = dict(options)
    own = {name: rest.pop(name, None) for name in ("min_cosine", "max_error", "for_cpu")}
    if rest.get("target") != "cpu":
        for name in ("max_error", "for_cpu"):
            if own[name] is not None:
                raise InputError(f'option {name} is for target "cpu"')
        return {**rest, "min_cosine": own["min_cosine"]}, None
    del rest["target"]
    for name in ("precision", "keep_float"):
        if name in rest:
            raise InputError(f'option {name}: target "cpu" chooses the precision and keeps float')
    cosine, error = (_number(own[name], name) for name in ("min_cosine", "max_error"))
    kind = own["for_cpu"]
    chosen = None if kind is None else choice_of(CpuKind, str(kind), "for_cpu")
    return rest, _Choosing(Accuracy.of(cosine, error), chosen)


def inspect_source(
    given: GivenSource,
    images: object,
    *,
    resolution: int | None,
    batch_size: int,
    threads: int | None,
    device: str,
    verbose: bool,
) -> Inspection:
    """`regcache.inspect`: see there."""
    folder = None if images is None else path_of(images, "images")
    named = NamedSource.of(given.source, given.example)
    fields = {"resolution": resolution, "batch_size": batch_size, "threads": threads}
    chosen = _options(named, given, {"images": str(folder or ""), "device": device, **fields})
    find_device(chosen.device)
    reporter = reporter_of(verbose)
    with _written(named, chosen, reporter) as ready:
        return inspect_encoder(
            ready,
            folder,
            reporter,
            batch_size=chosen.batch_size,
            threads=chosen.threads,
            device=chosen.device,
        )


def run_with_of(runtime: str | None, precision: str, hint: str, cache: object) -> RunWith:
    """The runtime that somebody named, and OpenVINO's options. Raises InputError for others."""
    return RunWith(
        None if runtime is None else choice_of(RuntimeName, runtime, "runtime"),
        OpenVinoOptions(
            choice_of(InferencePrecision, precision, "inference_precision"),
            choice_of(Hint, hint, "hint"),
            None if cache is None else path_of(cache, "model_cache"),
        ),
    )


def folder_of(artifact: object) -> Path:
    """The folder of an artifact, opened or not. Raises InputError for another type."""
    return artifact.folder if isinstance(artifact, Artifact) else path_of(artifact, "artifact")


def path_of(value: object, what: str) -> Path:
    """A path that somebody gave. Raises InputError, naming the argument, for another type."""
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{what}: a path is wanted, not a {type(value).__name__}")
    return Path(value)


def reporter_of(verbose: bool) -> Reporter:
    return Reporter() if verbose else QuietReporter()


@contextmanager
def _written(
    named: NamedSource, options: CompileOptions, reporter: Reporter
) -> Iterator[CompileOptions]:
    """The options with an object in memory written to a file, which is gone after the block."""
    with temporary_folder() as folder, unnamed(folder), quiet():
        file = named.write(folder, reporter, threads=options.threads)
        yield options.model_copy(update={"source_file": file})


def _options(named: NamedSource, given: GivenSource, fields: Mapping[str, Any]) -> CompileOptions:
    """Raises InputError, in one line, for an option that there is not or that cannot be so."""
    known = sorted({*CompileOptions.model_fields, FP4_SHARE} - _OWN)
    for name in fields:
        if name not in {*known, "images"}:
            near = did_you_mean(name, known) or f"; there are {', '.join(known)}"
            raise InputError(f"there is no option {name!r}{near}")
    own = {"source": named.name, "output": given.embedding, "preprocess": _recipe(given.preprocess)}
    try:
        return CompileOptions.model_validate({**fields, **own})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"][:1])).replace("output", "embedding")
        where = f"option {name} = {first['input']!r}: " if name else ""
        raise InputError(one_line(f"{where}{first['msg']}")) from error


def _recipe(given: object) -> str | Preprocess | None:
    if given is None or isinstance(given, Preprocess):
        return given
    return str(path_of(given, "preprocess"))


def choice_of(kind: type[Choice], value: str, what: str) -> Choice:
    try:
        return kind(value)
    except ValueError as error:
        known = ", ".join(kind)
        raise InputError(f"{what}: {value!r} is none of {known}") from error


def _number(value: object, what: str) -> float | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return None if value is None else float(value)
    raise InputError(f"{what}: a number is wanted, not {value!r}")


def count_of(value: object, what: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{what}: a whole number from 1 is wanted, not {value!r}")
    return value
