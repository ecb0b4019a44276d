"""The images of a Hugging Face data set on disk, as `Dataset.save_to_disk` writes it."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from regcache.passes.errors import InputError, MissingExtraError
from regcache.passes.read_small import read_small
from regcache.runtime.stored_images import AnyImage, StoredImage

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_OPENED = 8
"""Files that stay mapped."""


@dataclass(frozen=True)
class DatasetImage(StoredImage):
    """A row of a data set, whose `column` holds the bytes of an image file."""

    column: str
    row: int

    def open(self) -> BinaryIO:
        """The row's bytes. Raises OSError where it holds none."""
        found = _rows(self.file, _stamp(self.file))[self.column][self.row]
        content = found["bytes"].as_py() if found.is_valid else None
        if content is None:
            raise OSError(0, "the row holds no bytes of an image")
        return io.BytesIO(content)


def is_dataset(folder: Path) -> bool:
    """Whether a folder holds a data set, or several splits of one."""
    whole = (folder / _STATE).is_file() and (folder / _INFO).is_file()
    return whole or (folder / _SPLITS).is_file()


def list_dataset(folder: Path, warn: Callable[[str], None] | None) -> list[AnyImage]:
    """The rows of a data set, in its order.

    `warn` is told where more than one column holds images: the first is read. Raises InputError
    where it has splits, no column of images, or cannot be read; MissingExtraError without pyarrow.
    """
    if not (folder / _STATE).is_file():
        splits = ", ".join(map(str, _json(folder / _SPLITS).get("splits", ())))
        raise InputError(f"data set {folder}: has splits, name the folder of one: {splits}")
    features = _json(folder / _INFO).get("features") or {}
    columns = [name for name, kind in features.items() if _is_image(kind)]
    if not columns:
        raise InputError(f"data set {folder}: no column of it holds images: {', '.join(features)}")
    if len(columns) > 1 and warn is not None:
        warn(f"data set {folder}: images are read from {columns[0]}, not {', '.join(columns[1:])}")
    images = list[AnyImage]()
    state = _json(folder / _STATE)
    if state.get("_indices_data_files"):
        raise InputError(f"data set {folder}: holds indices of another version: save it anew")
    for part in state.get("_data_files", ()):
        name = str(part.get("filename"))
        if Path(name).name != name:
            raise InputError(f"data set {folder}: names a file outside of it: {name}")
        images += _listed(folder / name, columns[0])
    if not images:
        raise InputError(f"data set {folder}: has no row")
    return images


def _listed(file: Path, column: str) -> list[AnyImage]:
    """The rows of one file, by the names that they had as files, or by number."""
    rows = _rows(file, _stamp(file))
    if column not in rows.column_names or "bytes" not in _fields(rows.schema.field(column).type):
        raise InputError(f"{file}: its column {column} holds no bytes of images")
    images = list[AnyImage]()
    for row, stored in enumerate(rows[column]):
        path = stored["path"].as_py() if stored.is_valid and "path" in _keys(stored) else None
        name = Path(path).name if path else f"{file.name}[{row}]"
        images.append(DatasetImage(file, name, column, row))
    return images


def _fields(kind: Any) -> list[str]:
    """The names of a struct's fields; of no other type."""
    return [field.name for field in kind] if hasattr(kind, "num_fields") else []


def _keys(stored: Any) -> list[str]:
    return list(stored.keys())


def _is_image(kind: object) -> bool:
    return isinstance(kind, dict) and kind.get("_type") == "Image"


def _stamp(file: Path) -> tuple[int, int]:
    """What changes where a file is written anew. Raises InputError where there is none."""
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size


@lru_cache(_OPENED)
def _rows(file: Path, stamp: tuple[int, int]) -> Any:
    """The table in a file, mapped and not read. `stamp`: of the file as it is."""
    try:
        import pyarrow
    except ImportError as error:
        what = "reading a Hugging Face data set"
        raise MissingExtraError(what, extra="datasets", module="pyarrow") from error
    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{file}: is no Arrow file of a data set, or a broken one") from error


def _json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises InputError, naming it, where it cannot be read."""
    try:
        content = json.loads(read_small(file))
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is no JSON") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: is no JSON object")
    return content
