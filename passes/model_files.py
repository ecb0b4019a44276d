"""The files of an ONNX model as we write it: itself, and its weights where they pass 2 GB."""

import os
import shutil
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from regcache.passes.errors import InputError
from regcache.passes.external_weights import is_external, stored_tensors


def data_file(path: Path) -> Path:
    """Where the weights of a model lie that one file cannot hold: `m.onnx` -> `m.onnx.data`."""
    return path.with_name(f"{path.name}.data")


def model_files(path: Path) -> list[Path]:
    """The model's file and, where it keeps weights in its data file, that one.

    A file that only bears the name, another model's data, is none of them.
    """
    data = data_file(path)
    return [path, data] if data.is_file() and data.name in _locations(path) else [path]


def model_size(path: Path) -> int:
    """Bytes of all files of a model."""
    return sum(file.stat().st_size for file in model_files(path))


def check_name(path: Path) -> None:
    """Raise InputError where a path is not of UTF-8: neither onnx nor ONNX Runtime opens it."""
    if not os.fspath(path).isascii():
        try:
            os.fspath(path).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{path}: its name is not UTF-8, as ONNX Runtime needs") from error


def check_free(path: Path, size: int) -> None:
    """Raise InputError where a model of `size` bytes cannot be written to `path`.

    Its name is not UTF-8, or the disk lacks the room: that is asked before the first byte, as a
    full disk stops whoever else writes there.
    """
    check_name(path)
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(
            f"{path}: needs {size / 1e6:,.1f} MB, and {free / 1e6:,.1f} MB are free there"
        )


def remove_model(path: Path) -> None:
    """Delete a model's files; one that is not there is no error."""
    for file in reversed(model_files(path)):
        file.unlink(missing_ok=True)


def _locations(path: Path) -> set[str]:
    """Where a model says that its weights lie; nowhere, if it cannot be read."""
    try:
        model = onnx.load(path, load_external_data=False)
    except (OSError, DecodeError, ValueError):
        return set()
    entries = (item for t in stored_tensors(model) if is_external(t) for item in t.external_data)
    return {entry.value for entry in entries if entry.key == "location"}
