"""Which images a folder, a list, a pattern or a file means."""

import glob
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from regcache.passes.errors import InputError
from regcache.runtime.dataset_images import is_dataset, list_dataset
from regcache.runtime.image_formats import (
    describe_unread,
    image_suffixes,
    unread_suffix,
)
from regcache.runtime.stored_images import (
    TAR,
    TENSORS,
    AnyImage,
    is_archive,
    list_tar,
    list_tensors,
)

# A list of images is a text file, a path a line.
_LISTS = (".txt", ".lst")


def list_images(images: Path, warn: Callable[[str], None] | None = None) -> list[AnyImage]:
    """The images that `images` means: a folder, an image, a list of them, a pattern, or one file.

    A folder: every file below it that is named like an image that can be read, sorted. Links to
    folders are followed, each folder once; hidden files and folders are left out. One without an
    image, but with tar archives: the images in these, archives sorted. One that Hugging Face's
    `save_to_disk` wrote: the rows of that data set.
    A list, `.txt` or `.lst`: a path a line, in its order; from the list's folder on where it is
    relative. Empty lines and those that begin with # are left out. One may name a tar archive.
    A pattern with `*`, `?` or `[...]`, and `**` for folders in folders: the files that it matches
    and that are named like images, sorted; folders that it matches are looked through. Where it
    ends in `.tar`, the images in the archives that it matches.
    A file: an image; `.tar`, a tar archive such as a webdataset's shard, the files in it that are
    named like images, in its order; `.npy`, an array [N, ...] of tensors as the encoder takes them.

    Broken links and the like, and what a list names and is not there, are listed, so that the
    reader reports them. `warn` is told, in one line, how many files are images of formats that are
    not read. Raises InputError, naming it, when it is missing, means no image, or cannot be read,
    and MissingExtraError for a data set without pyarrow.
    """
    unread: Counter[str] = Counter()
    found: list[AnyImage]
    if images.is_file():
        found = _in_file(images, unread)
    elif images.is_dir() and is_dataset(images):
        found = list_dataset(images, warn)
    elif is_pattern(images):
        found = _matching(images, unread)
    else:
        found = _in_folder(images, unread)
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
    """Whether a path is not that of one image: a folder, a list, a pattern, or a file of many."""
    many = images.suffix.lower() in (*_LISTS, TAR, TENSORS)
    return images.is_dir() or many or is_pattern(images)


def is_pattern(images: Path) -> bool:
    """Whether a path is a pattern, and no file or folder of that name."""
    return glob.has_magic(str(images)) and not images.exists()


def _in_file(file: Path, unread: Counter[str]) -> list[AnyImage]:
    """The images in a file, which may be one itself."""
    suffix = file.suffix.lower()
    if suffix in _LISTS:
        return _listed(file, unread)
    if suffix == TENSORS:
        return list_tensors(file)
    return _in_archives([file], unread) if is_archive(file.name) else [file]


def _in_archives(files: Sequence[Path], unread: Counter[str]) -> list[AnyImage]:
    """The images in tar archives, one archive behind the other."""

    def tell(name: str) -> None:
        if suffix := unread_suffix(name):
            unread[suffix] += 1

    suffixes = image_suffixes()
    found = [image for file in files for image in list_tar(file, suffixes, tell)]
    if not found:
        named = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        raise InputError(f"{named}: no image in it ({' '.join(suffixes)})")
    return found


def _in_folder(folder: Path, unread: Counter[str]) -> list[AnyImage]:
    """The images below a folder, or those in the tar archives in it where there are none."""
    try:
        return list(_images_below(folder, unread))
    except InputError:
        archives = sorted(path for path in folder.glob(f"*{TAR}") if path.is_file())
        if not archives:
            raise
    return _in_archives(archives, unread)


def _listed(file: Path, unread: Counter[str]) -> list[AnyImage]:
    """The paths in a text file, and the images in archives among them."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"image list {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"image list {file}: is no text in UTF-8") from error
    if any("\0" in line for line in lines):
        raise InputError(f"image list {file}: is no text")
    named = [line.strip() for line in lines]
    paths = [file.parent / line for line in named if line and not line.startswith("#")]
    if not paths:
        raise InputError(f"image list {file}: names no image")
    found = list[AnyImage]()
    for path in paths:
        found += _in_archives([path], unread) if is_archive(path.name) else [path]
    return found


def _matching(pattern: Path, unread: Counter[str]) -> list[AnyImage]:
    """The images that a pattern matches, and those of `list_images` in the folders that it does."""
    suffixes, found = image_suffixes(), set[Path]()
    archives = set[Path]()
    for name in glob.iglob(str(pattern), recursive=True):
        path = Path(name)
        if path.is_dir():
            found.update(_found_below(path, unread))
        elif name.lower().endswith(suffixes):
            found.add(path)
        elif is_archive(name):
            archives.add(path)
        elif suffix := unread_suffix(name):
            unread[suffix] += 1
    if found:
        return [*sorted(found)]
    if archives:
        return _in_archives(sorted(archives), unread)
    raise InputError(f"images {pattern}: matches no image ({' '.join(suffixes)})")


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
