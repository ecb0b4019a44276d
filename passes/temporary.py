"""Locks on places, and temporary folders that hold one for as long as their makers live.

A process id would not do: it is another process's in the next container, and on the next day.
"""

import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from regcache.passes.errors import InputError

_LOCK = ".lock"
# Seconds in which a folder that was made gets its lock.
_YOUNG = 60.0
_PREFIX = "regcache-run-"
# Seconds that another process may take to put its files into place.
_PATIENCE = 600.0


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a new folder among the system's temporary ones, removed after the block.

    Those that killed processes of the same user left behind are removed first. Raises OSError.
    """
    parent = Path(tempfile.gettempdir())
    _sweep(parent)
    with held_folder(parent, _PREFIX) as outer:
        inner = outer / "files"
        inner.mkdir()
        yield inner


@contextmanager
def held_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a new folder in `parent`, for this user alone, removed after the block.

    It holds the lock's own file. Raises OSError where it cannot be made.
    """
    outer = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        with FileLock(outer / _LOCK, thread_local=False):
            try:
                yield outer
            finally:
                shutil.rmtree(outer, ignore_errors=True)
    finally:
        shutil.rmtree(outer, ignore_errors=True)  # Windows keeps a file that is open


def abandoned_folders(parent: Path, prefix: str, *, age: float = 0.0) -> Iterator[Path]:
    """The folders that `held_folder` made and whose makers were killed; each is removed after.

    Those of other users are left alone. `age`: seconds that one with nothing in it has not been
    changed for: its maker may not have locked it yet. With none, nobody may be making one just now.
    """
    for name in sorted(os.listdir(parent)):
        outer = parent / name
        if not name.startswith(prefix) or not _may_be_abandoned(outer, age):
            continue
        try:
            with FileLock(outer / _LOCK, blocking=False):
                yield outer
                shutil.rmtree(outer, ignore_errors=True)
        except (Timeout, OSError):  # its maker lives, or it went meanwhile
            continue


def any_held(parent: Path, prefix: str) -> bool:
    """Whether a maker of such a folder lives, in this process or another of this user."""
    for name in os.listdir(parent):
        lock = parent / name / _LOCK
        if name.startswith(prefix) and lock.exists():
            try:
                with FileLock(lock, blocking=False):
                    pass
            except Timeout:
                return True
            except OSError:  # another user's, or gone
                continue
    return False


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock of an output in the block: all who write there wait for one another.

    Raises InputError where somebody holds it for ten minutes, or no file can be made there.
    """
    path = output.with_name(f".{output.name}.lock")
    # Where no file can be made, filelock would try until its time is up.
    try:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0), 0o666))
    except OSError as error:
        raise InputError(f"{output.parent}: {error.strerror or error} ({path.name})") from error
    lock = FileLock(path, timeout=_PATIENCE)
    try:
        lock.acquire()
    except Timeout as error:
        raise InputError(f"{output}: another process keeps {path.name} locked") from error
    try:
        yield
    finally:
        # Who waits for the file that is gone sees that, and locks a new one.
        with suppress(OSError):
            path.unlink()
        lock.release()


def _may_be_abandoned(outer: Path, age: float) -> bool:
    try:
        status = outer.lstat()
        if not stat.S_ISDIR(status.st_mode):
            return False
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            return False
        names = set(os.listdir(outer))
        if names - {_LOCK}:  # written by one who held the lock
            return True
        least = age if names else max(age, _YOUNG)
        return time.time() - status.st_mtime >= least
    except OSError:
        return False


@functools.cache
def _sweep(parent: Path) -> None:
    for _ in abandoned_folders(parent, _PREFIX, age=_YOUNG):
        pass
