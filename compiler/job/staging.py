"""Folders and files that appear whole or not at all, whoever else writes to the same place."""

import errno
import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from regcache.passes.errors import InputError
from regcache.passes.exchange import exchange
from regcache.passes.external_weights import KEPT
from regcache.passes.model_files import check_name
from regcache.passes.temporary import abandoned_folders, any_held, held_folder, locked

MANIFEST = "manifest.json"
CARD = "README.md"
"""What users may edit: nothing reads it, and an edited one is never replaced unasked."""
# In the temporary folder beside an output: what takes its place, and what was there.
_NEW, _OLD = "new", "old"

Tell = Callable[[str], None]


@contextmanager
def staged_folder(
    output: Path, *, marker: str = MANIFEST, force: bool = False, tell: Tell | None = None
) -> Iterator[Path]:
    """Yield a temporary folder beside `output` that takes its place when the block ends well.

    A folder that holds the file `marker` (an artifact does) and no file beside those that the
    marker lists, or nothing, is replaced; a link is followed. A card that somebody has edited is
    theirs, listed or not. `force`: other files do not stand in the way. They, and those that come
    while the block runs, are moved to `OUTPUT.kept`, and `tell` is told. Anything else at `output`
    raises InputError before the block, as does a place that cannot be replaced, or that another
    process is writing to in such a block; an OSError (a full disk) inside the block becomes one.
    When the block fails the folder is removed; what a killed process left behind is removed by the
    next run.
    """
    output = real_path(output)
    beside = _prefix(output)
    check_name(output)
    with _as_input_errors(output), ExitStack() as stack:
        output.parent.mkdir(parents=True, exist_ok=True)
        with locked(output):
            _recover(output)
            if any_held(output.parent, beside):
                raise InputError(f"{output}: another regcache is writing it just now")
            _check_replaceable(output, marker, force)
            outer = stack.enter_context(held_folder(output.parent, beside))
        staging = outer / _NEW
        staging.mkdir()
        with unnamed(staging):
            yield staging
        for kept in staging.glob(f"{KEPT}*"):  # weights that are mapped still
            kept.unlink()
        with locked(output):
            _keep_foreign(output, marker, tell)
            _swap(staging, output)


@contextmanager
def rewritten_folder(output: Path) -> Iterator[Path]:
    """As `staged_folder`, for a change of the artifact there: nobody else makes one meanwhile.

    What the block reads at `output` is what is replaced after it.
    """
    output = real_path(output)
    with _as_input_errors(output), locked(output):
        _recover(output)
        with held_folder(output.parent, _prefix(output)) as outer:
            staging = outer / _NEW
            staging.mkdir()
            with unnamed(staging):
                yield staging
            _swap(staging, output)


@contextmanager
def staged_file(output: Path) -> Iterator[Path]:
    """Yield a path in a temporary folder beside `output`, renamed to it when the block ends well.

    Files written beside it with names that start with its name (external data) move along. A link
    at `output` is followed. Raises InputError where a folder, a device or a pipe is there.
    """
    output = real_path(output)
    if output.is_dir():
        raise InputError(f"{output}: is a folder")
    if output.exists() and not output.is_file():
        raise InputError(f"{output}: is no regular file")
    with _as_input_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        recover(output)
        with held_folder(output.parent, _prefix(output)) as outer:
            folder = outer / _NEW
            folder.mkdir()
            with unnamed(folder):
                yield folder / output.name
            with locked(output):
                # The file itself last: when it is there, all that it needs is.
                for path in sorted(folder.iterdir(), key=lambda path: path.name == output.name):
                    path.replace(output.parent / path.name)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all; "-" is standard output, and a device is written to."""
    if path == Path("-"):
        sys.stdout.write(text)
    elif path.exists() and not path.is_file() and not path.is_dir():
        with _as_input_errors(path):
            path.write_text(text, encoding="utf-8")
    else:
        with staged_file(path) as staged:
            staged.write_text(text, encoding="utf-8")


def recover(output: Path) -> None:
    """Remove what runs that were killed left behind for the same output.

    One killed in the instant between moving the old artifact aside and the new one into its place
    left no artifact: the old one is put back.
    """
    output = real_path(output)
    with _as_input_errors(output), locked(output):
        _recover(output)


def check_output(output: Path, *, marker: str = MANIFEST, force: bool = False) -> None:
    """Raise InputError where `staged_folder` would refuse `output`; nothing is left there."""
    output = real_path(output)
    with _as_input_errors(output):
        if output.parent.is_dir():
            with locked(output):
                _recover(output)
                _check_replaceable(output, marker, force)


def is_written(output: Path) -> bool:
    """Whether another process, or another thread of this one, is about to replace an output."""
    output = real_path(output)
    return output.parent.is_dir() and any_held(output.parent, _prefix(output))


def real_path(output: Path) -> Path:
    """The absolute path of a place to write to, links followed, so that they stay links."""
    return Path(os.path.realpath(output))


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
def _as_input_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or output}: {error.strerror or error}") from error


def _prefix(output: Path) -> str:
    return f".{output.name}.staged-"


def _check_replaceable(output: Path, marker: str, force: bool) -> None:
    """Refuse what is there now, not after hours of work."""
    if not output.is_dir():
        if output.exists():
            raise InputError(f"{output}: is a file, where a folder has to go")
        return
    if any(output.iterdir()):
        if not (output / marker).is_file():
            missing = "regcache artifact" if marker == MANIFEST else marker
            raise InputError(f"{output}: is a folder that holds no {missing}; not replaced")
        if not force:
            _refuse_foreign(output, marker)
    _check_movable(output)


def _check_movable(output: Path) -> None:
    """Raise InputError where a folder cannot be replaced: a mount point, or another user's.

    To remove a folder takes what to rename it takes, and one that holds files stays.
    """
    status = output.stat()
    try:
        output.rmdir()
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            return
        what = "a mount point; name a folder in it" if error.errno == errno.EBUSY else ""
        reason = what or error.strerror or str(error)
        raise InputError(f"{output}: cannot be replaced: {reason}") from error
    output.mkdir()
    output.chmod(stat.S_IMODE(status.st_mode))


def _refuse_foreign(output: Path, marker: str) -> None:
    what, advice = (
        ("artifact", ", or --force moves it aside") if marker == MANIFEST else ("bundle", "")
    )
    if _listed(output / marker) is None:
        raise InputError(f"{output / marker}: lists no files, as regcache does; not replaced")
    foreign = _foreign_files(output, marker)
    if foreign:
        rest = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        edited = foreign[0] == CARD and CARD in (_listed(output / marker) or {})
        why = "edited since it was written" if edited else f"not part of the {what} there"
        raise InputError(f"{output / foreign[0]}{rest}: {why}; not replaced: move it{advice}")


def _listed(marker: Path) -> dict[str, Any] | None:
    """What a marker, a JSON object, lists under `files`; None where it is no such object."""
    try:
        return dict(json.loads(marker.read_bytes())["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _foreign_files(output: Path, marker: str) -> list[str]:
    """The files below a folder that its marker does not list, and links to folders.

    A card that somebody has edited is theirs, too.
    """
    listed = _listed(output / marker) or {}
    found = []
    for parent, folders, names in os.walk(output):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        found += [Path(parent, name).relative_to(output).as_posix() for name in (*names, *links)]
    ours = {marker, f"{marker}.sig", *listed}
    if CARD in listed and _is_edited(output / CARD, listed[CARD]):
        ours.remove(CARD)
    return sorted(name for name in found if name not in ours)


def _is_edited(path: Path, record: Any) -> bool:
    """Whether a file is not what a marker's record says of it."""
    written = record.get("sha256") if isinstance(record, dict) else None
    return path.is_file() and written != hashlib.sha256(path.read_bytes()).hexdigest()


def _keep_foreign(output: Path, marker: str, tell: Tell | None) -> None:
    """Move the files that are not ours out of a folder that is going to be replaced."""
    foreign = _foreign_files(output, marker) if output.is_dir() else []
    if not foreign:
        return
    number, kept = 1, output.with_name(f"{output.name}.kept")
    while os.path.lexists(kept):
        number += 1
        kept = output.with_name(f"{output.name}.kept-{number}")
    for name in foreign:
        target = kept / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (output / name).rename(target)
    if tell is not None:
        tell(f"{len(foreign)} files of {output} that are not regcache's are now in {kept}")


def _swap(staging: Path, output: Path) -> None:
    """Put `staging` in the place of `output`; what was there goes with the temporary folder."""
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file, where a folder has to go")
    if output.exists() and exchange(staging, output):
        return
    old = staging.with_name(_OLD)
    try:
        if output.exists():
            output.replace(old)
        staging.replace(output)
    except BaseException:  # an interrupt, too: the temporary folder goes, and what is in it
        if old.exists() and not output.exists():
            old.replace(output)
        raise


def _recover(output: Path) -> None:
    for outer in abandoned_folders(output.parent, _prefix(output)):
        old = outer / _OLD
        if old.exists() and not output.exists():
            old.replace(output)
