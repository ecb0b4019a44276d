"""Folders and files that appear whole or not at all."""

import glob
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from regcache.passes.errors import InputError

MANIFEST = "manifest.json"
_PARTIAL, _OLD = ".partial-", "-old"


@contextmanager
def staged_folder(output: Path, *, marker: str = MANIFEST) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that takes its place when the block ends well.

    A folder that holds the file `marker` (an artifact does), or nothing, is replaced; anything else
    at `output` raises InputError, as does an OSError (a full disk, a read-only folder) inside the
    block. When the block fails the folder is removed; what a killed process left behind is removed
    by the next run.
    """
    _check_replaceable(output, marker)
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        recover(output)
        prefix = f".{output.name}{_PARTIAL}{os.getpid()}-"
        staging = Path(tempfile.mkdtemp(prefix=prefix, dir=output.parent))
        staging.chmod(0o777 & ~_umask())
    except OSError as error:
        raise InputError(f"{output}: {error.strerror or error}") from error
    try:
        with unnamed(staging):
            yield staging
        _swap(staging, output)
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def unnamed(folder: Path) -> Iterator[None]:
    """Leave a temporary folder's path out of the InputErrors raised in the block."""
    try:
        yield
    except InputError as error:
        reason = str(error)
        if str(folder) not in reason:
            raise
        raise InputError(reason.replace(f"{folder}{os.sep}", "")) from error


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder beside `output`, renamed to it when the block ends well.

    Files written beside it with names that start with its name (external data) move along.
    """
    if output.is_dir():
        raise InputError(f"{output}: is a folder")
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        recover(output)
        prefix = f".{output.name}{_PARTIAL}{os.getpid()}-"
        with tempfile.TemporaryDirectory(prefix=prefix, dir=output.parent) as folder:
            yield Path(folder) / output.name
            # The file itself last: when it is there, all that it needs is.
            for path in sorted(Path(folder).iterdir(), key=lambda path: path.name == output.name):
                path.replace(output.parent / path.name)
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; "-" is standard output."""
    if path == Path("-"):
        sys.stdout.write(text)
        return
    with staged_file(path) as staged:
        staged.write_text(text, encoding="utf-8")


def _check_replaceable(output: Path, marker: str) -> None:
    if output.is_dir():
        if any(output.iterdir()) and not (output / marker).is_file():
            missing = "regcache artifact" if marker == MANIFEST else marker
            raise InputError(f"{output}: is a folder that holds no {missing}; not replaced")
    elif output.exists():
        raise InputError(f"{output}: is a file, where a folder has to go")


def _swap(staging: Path, output: Path) -> None:
    """Put `staging` in the place of `output`; an old artifact goes last."""
    if not output.exists():
        staging.replace(output)
        return
    old = staging.with_name(f"{staging.name}{_OLD}")
    output.replace(old)
    try:
        staging.replace(output)
    except OSError:
        old.replace(output)
        raise
    shutil.rmtree(old, ignore_errors=True)


def recover(output: Path) -> None:
    """Remove what runs that were killed left behind for the same output.

    One killed in the instant between moving the old artifact aside and the new one into its place
    left no artifact: the old one is put back.
    """
    for path in sorted(output.parent.glob(f".{glob.escape(output.name)}{_PARTIAL}*")):
        owner = path.name.partition(_PARTIAL)[2].partition("-")[0]
        if not owner.isdigit() or _alive(int(owner)):
            continue
        if path.name.endswith(_OLD) and not output.exists():
            path.replace(output)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":  # signal 0 would end the process there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
