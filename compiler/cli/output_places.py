"""Where a command is told to write: nothing into an artifact, which holds its own files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.job.staging import MANIFEST, real_path
from regcache.passes.errors import InputError

_FILES = ("json", "junit", "summary", "plot", "log_file")


def check_places(given: Mapping[str, Any]) -> None:
    """Raise InputError where what is written would lie in an artifact, or in what becomes one.

    `given`: a command's options by name. An artifact with a file that is not in its manifest is
    refused by whatever opens it.
    """
    out, opened = given.get("out"), given.get("artifact")
    becomes = [real_path(one) for one in (out, opened) if one is not None]
    for name in _FILES:
        path = given.get(name)
        if path is not None and path != Path("-"):
            _check(path, f"--{name.replace('_', '-')}", becomes)
    if out is not None and opened is None:  # what reads an artifact looks after its own output
        _check(out, "--out", [])


def _check(path: Path, option: str, becomes: list[Path]) -> None:
    for folder in real_path(path).parents:
        if folder in becomes or _is_artifact(folder):
            raise InputError(
                f"{option} {path}: lies in an artifact, whose files are its own; write it beside"
            )


def _is_artifact(folder: Path) -> bool:
    return (folder / MANIFEST).is_file() and (folder / MODEL).is_file()
