"""The journal: results of a search on disk, with which a killed search goes on."""

import json
import os
from pathlib import Path
from typing import IO, Any, Self

from regcache.compiler.job.staging import real_path
from regcache.passes.errors import InputError


class Journal:
    """A file of JSON lines beside the artifact: first the study's key, then a result a line.

    Lines behind the first that is cut off are dropped. Nothing is read of a file of another study.
    """

    def __init__(self, path: Path, study_key: str) -> None:
        self.path = path
        self._results, length = _read(path, study_key)
        self._file: IO[str] = path.open("a", encoding="utf-8")
        self._file.truncate(length)  # what is good is never written anew: a kill cannot lose it
        if not length:
            self._append({"study": study_key})

    def __contains__(self, key: str) -> bool:
        return key in self._results

    def __getitem__(self, key: str) -> Any:
        return self._results[key]

    def __len__(self) -> int:
        return len(self._results)

    def get(self, key: str, default: Any) -> Any:
        """The result that was noted under a key; `default` where none was."""
        return self._results.get(key, default)

    def put(self, key: str, value: Any) -> None:
        """Note a result: anything that JSON can hold. Floats come back bit for bit."""
        self._results[key] = value
        self._append({"key": key, "value": value})

    def _append(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def remove(self) -> None:
        """Delete the file: the search is done."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _read(path: Path, study_key: str) -> tuple[dict[str, Any], int]:
    """The results of this study in a file, and how many bytes of the file hold whole lines."""
    results: dict[str, Any] = {}
    length = 0
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError:
        return results, length
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            item = json.loads(line)
            if length:
                results[item["key"]] = item["value"]
            elif item["study"] != study_key:
                break
        except (ValueError, KeyError, TypeError):  # the line that a kill cut off
            break
        length += len(line)
    return results, length


def journal_file(output: Path) -> Path:
    """Where a search notes its results: beside the output, wherever a link leads to.

    Raises InputError where something else than a file of ours has its name.
    """
    output = real_path(output)
    journal = output.with_name(f".{output.name}.search.jsonl")
    if os.path.lexists(journal) and (journal.is_symlink() or not journal.is_file()):
        raise InputError(f"{journal}: is no regular file, where a search notes its results")
    return journal
