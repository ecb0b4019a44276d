"""What a run of `regcache reproduce` keeps until it ends, so that a stopped one goes on."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from regcache.compiler.curation.journal import Journal
from regcache.compiler.job.staging import real_path
from regcache.passes.errors import InputError
from regcache.passes.temporary import temporary_folder

_LOCK, _JOURNAL = ".lock", "done.jsonl"


@contextmanager
def work_folder(output: Path | None) -> Iterator[Path]:
    """Yield the folder beside an output that a run keeps its work in, deleted when the block ends.

    It stays where the block ends with an error or is killed once something is done, and the next
    run of the same output goes on with it. None: a temporary folder, of which nothing stays. Raises
    InputError where another run works in it, and for an OSError in the block (a full disk).
    """
    if output is None:
        with temporary_folder() as folder:
            yield folder
        return
    output = real_path(output)
    folder = output.with_name(f".{output.name}.reproduce")
    try:
        if os.path.lexists(folder) and (folder.is_symlink() or not folder.is_dir()):
            raise InputError(f"{folder}: is no folder, where a run keeps its work")
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / _LOCK, blocking=False, thread_local=False):
            try:
                yield folder
            except BaseException:
                if not _holds_results(folder):
                    shutil.rmtree(folder, ignore_errors=True)
                raise
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout as error:
        raise InputError(f"{output}: another regcache is writing it just now") from error
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from error


def _holds_results(folder: Path) -> bool:
    """Whether something is done that another run could go on with."""
    journals = list(folder.glob(f"*/{_JOURNAL}"))
    return any(len(path.read_bytes().splitlines()) > 1 for path in journals)


@dataclass(frozen=True)
class Kept:
    """What is done of one model: files in `folder`, and results in its `journal`."""

    folder: Path
    journal: Journal

    @classmethod
    @contextmanager
    def of(cls, work: Path, key: str) -> Iterator["Kept"]:
        """What `work` keeps under a key, which is all that decides what is done."""
        folder = work / short(key)
        folder.mkdir(exist_ok=True)
        with Journal(folder / _JOURNAL, key) as journal:
            yield cls(folder, journal)

    def result(self, key: str, make: Callable[[], Any]) -> Any:
        """What was noted under `key`, anything that JSON can hold; made where nothing was."""
        if key not in self.journal:
            self.journal.put(key, make())
        return self.journal[key]

    def rows(self, key: str, make: Callable[[], NDArray[np.floating]]) -> NDArray[np.floating]:
        """As `result`, of an array."""
        path = self.folder / f"{short(key)}.npy"
        if key not in self.journal:
            np.save(path, make())
            self.journal.put(key, True)
        found: NDArray[np.floating] = np.load(path)
        return found


def digest(*values: object) -> str:
    """The SHA-256 of values that JSON can hold, or that have a text of their own."""
    text = json.dumps(values, default=str, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def short(key: str) -> str:
    """A name for a file that has something to do with `key`."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def stamps(files: Iterable[Any]) -> list[tuple[str, int, int]]:
    """The name, size in bytes and time of change of each file; of what is in a file, its name."""
    found = []
    for file in files:
        try:
            status = os.stat(file)
        except (OSError, TypeError, ValueError):  # missing, or a part of a file
            found.append((str(file), 0, 0))
        else:
            found.append((str(file), status.st_size, status.st_mtime_ns))
    return found
