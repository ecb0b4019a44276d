"""Which image files a folder, a list, a pattern or a file name means."""

import glob
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from regcache.passes.errors import InputError
from regcache.runtime.image_formats import (
    describe_unread,
    image_suffixes,
    unread_suffix,
)

# A list of images is a text file, a path a line.
_LISTS = (".txt", ".lst")


def list_images(images: Path, warn: Callable[[str], None] | None = None) -> list[Path]:
    """The image files that `images` means: a folder, an image, a list of images or a pattern.

    A folder: every file below it that is named like an image that can be read, sorted. Links to
    folders are followed, each folder once; hidden files and folders are left out.
    A list, `.txt` or `.lst`: a path a line, in its order; from the list's folder on where it is
    relative. Empty lines and those that begin with # are left out.
    A pattern with `*`, `?` or `[...]`, and `**` for folders in folders: the files that it matches
    and that are named like images, sorted; folders that it matches are looked through.

    Broken links and the like, and what a list names and is not there, are listed, so that the
    reader reports them. `warn` is told, in one line, how many files are images of formats that are
    not read. Raises InputError, naming it, when it is missing, means no image, or cannot be read.
    """
    if images.is_file():
        return _listed(images) if _is_list(images) else [images]
    unread: Counter[str] = Counter()
    find = _matching if _is_pattern(images) else _images_below
    found = find(images, unread)
    _warn_of(unread, images, warn)
    return found


def labelled_images(
    folder: Path, warn: Callable[[str], None] | None = None
) -> list[tuple[Path, str]]:
    """The images of a folder of class folders, each with the name of its class folder.

    Files beside the class folders are ignored; `warn` is as for `list_images`.
    Raises InputError when there are fewer than two class folders, or one holds no image or cannot
    be read.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        _refuse_folder(error)
    classes = [name for name in names if not name.startswith(".")]
    if len(classes) < 2:
        raise InputError(f"image folder {folder}: needs a folder for each of two or more classes")
    unread: Counter[str] = Counter()
    found = [(path, name) for name in classes for path in _images_below(folder / name, unread)]
    _warn_of(unread, folder, warn)
    return found


def means_several(images: Path) -> bool:
    """Whether a path is not that of one image: a folder, a list or a pattern."""
    return images.is_dir() or _is_list(images) or _is_pattern(images)


def _is_list(images: Path) -> bool:
    return images.suffix.lower() in _LISTS


def _is_pattern(images: Path) -> bool:
    return glob.has_magic(str(images)) and not images.exists()


def _listed(file: Path) -> list[Path]:
    """The paths in a text file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"image list {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"image list {file}: is no text in UTF-8") from error
    named = [line.strip() for line in lines]
    found = [file.parent / line for line in named if line and not line.startswith("#")]
    if not found:
        raise InputError(f"image list {file}: names no image")
    return found


def _matching(pattern: Path, unread: Counter[str]) -> list[Path]:
    """The images that a pattern matches, and those of `list_images` in the folders that it does."""
    suffixes, found = image_suffixes(), set[Path]()
    for name in glob.iglob(str(pattern), recursive=True):
        path = Path(name)
        if path.is_dir():
            found.update(_found_below(path, unread))
        elif name.lower().endswith(suffixes):
            found.add(path)
        elif suffix := unread_suffix(name):
            unread[suffix] += 1
    if not found:
        raise InputError(f"images {pattern}: matches no image ({' '.join(suffixes)})")
    return sorted(found)


def _images_below(folder: Path, unread: Counter[str]) -> list[Path]:
    """The images below a folder, sorted; what is not read is added to `unread`, by suffix."""
    others: Counter[str] = Counter()
    images = _found_below(folder, others)
    if not images:
        reason = f"no image in it ({' '.join(image_suffixes())})"
        if others:
            reason += f"; {describe_unread(others)}"
        raise InputError(f"image folder {folder}: {reason}")
    unread.update(others)
    return sorted(images)


def _found_below(folder: Path, unread: Counter[str]) -> list[Path]:
    """The same in no order, and where there is none."""
    suffixes, images = image_suffixes(), list[Path]()
    seen = {os.path.realpath(folder)}
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        unseen = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                unseen.append(name)
        folders[:] = unseen
        shown = [name for name in names if not name.startswith(".")]
        images += (Path(parent, name) for name in shown if name.lower().endswith(suffixes))
        unread.update(suffix for name in shown if (suffix := unread_suffix(name)))
    return images


def _warn_of(unread: Counter[str], folder: Path, warn: Callable[[str], None] | None) -> None:
    if unread and warn is not None:
        warn(f"image folder {folder}: {describe_unread(unread)}")


def _refuse_folder(error: OSError) -> NoReturn:
    raise InputError(f"image folder {error.filename}: {error.strerror}") from error
