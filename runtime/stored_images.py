"""Images that are no files of their own: in archives, in data sets and in arrays of tensors."""

import io
import os
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError

TAR, TENSORS = ".tar", ".npy"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz", ".tar.xz", ".txz", ".tar.zst")
_AXES = 4


@dataclass(frozen=True)
class StoredImage(ABC):
    """An image inside `file`. `name`: what reports call it; its place in the file is told apart."""

    file: Path
    name: str

    def __str__(self) -> str:
        return f"{self.file}:{self.name}"

    @abstractmethod
    def open(self) -> BinaryIO:
        """Its bytes, to read and to seek in. Raises OSError where the file has none there."""


@dataclass(frozen=True)
class TarImage(StoredImage):
    """A file in a tar archive that is not compressed. `offset`, `size`: of its bytes, in bytes.

    Only a window of the archive is read: nothing is ever written to disk, whatever it is called.
    """

    offset: int
    size: int

    def open(self) -> BinaryIO:
        """The member's bytes, read as far as a reader asks for them."""
        return io.BufferedReader(_Window(self.file, self.offset, self.size))


@dataclass(frozen=True)
class TensorImage(StoredImage):
    """A row of a .npy file: an image as it goes into the encoder, not preprocessed any more."""

    row: int

    def tensor(self, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
        """The row, of the encoder's `shape` and `dtype`. Raises InputError for any other."""
        tensors = _tensors(self.file)
        found = tensors.shape[1:]
        if found != shape or tensors.dtype != dtype:
            raise InputError(
                f"{self.file}: holds {tensors.dtype} tensors {list(found)}, where the encoder "
                f"takes {dtype} {list(shape)}"
            )
        return np.array(tensors[self.row])

    def open(self) -> BinaryIO:
        """The row's numbers as bytes."""
        return io.BytesIO(np.ascontiguousarray(_tensors(self.file)[self.row]).tobytes())


AnyImage: TypeAlias = Path | StoredImage
"""An image file, or an image inside of a file."""


def open_image_file(image: AnyImage) -> BinaryIO:
    """The bytes of an image. Raises OSError where it cannot be read."""
    return image.open("rb") if isinstance(image, Path) else image.open()


def list_tensors(file: Path) -> list[AnyImage]:
    """The rows of a .npy file [N, ...] of images. Raises InputError for any other array."""
    tensors = _tensors(file)
    width = len(str(len(tensors) - 1))
    return [TensorImage(file, f"{file.name}[{row:0{width}}]", row) for row in range(len(tensors))]


def list_tar(file: Path, suffixes: tuple[str, ...], tell: Callable[[str], None]) -> list[AnyImage]:
    """The members of a tar archive that are named like images, in its order.

    `tell` is told the name of every other file in it. Hidden files are left out. Raises InputError
    for a file that is no tar archive, a compressed one, and an image that is a link or a device.
    """
    images, last = list[AnyImage](), -1
    try:
        with tarfile.open(file, "r:") as archive:
            for member in archive:
                vars(archive)["members"].clear()  # which else keeps all of a long archive
                if member.offset <= last:
                    raise ValueError("a member that leads back to an earlier one")
                base, last = member.name.rpartition("/")[2], member.offset
                if base.startswith(".") or member.isdir():
                    continue
                if not base.lower().endswith(suffixes):
                    tell(base)
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise InputError(f"{file}: {member.name} is a link, a device or full of holes")
                images.append(TarImage(file, member.name, member.offset_data, member.size))
    except InputError:
        raise
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except Exception as error:  # of broken headers tarfile lets any type escape
        packed = file.name.lower().endswith(_COMPRESSED)
        remedy = (
            "is compressed: unpack it first" if packed else "is no tar archive, or a broken one"
        )
        raise InputError(f"{file}: {remedy}") from error
    return images


def is_archive(name: str) -> bool:
    """Whether a file's name is that of a tar archive, be it one that cannot be read."""
    return name.lower().endswith((TAR, *_COMPRESSED))


def _tensors(file: Path) -> NDArray[Any]:
    """The array in a .npy file, mapped and not read. Raises InputError where it holds no images."""
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{file}: {error.strerror or error}") from error
    except Exception as error:  # of broken headers NumPy lets many types escape
        raise InputError(f"{file}: is no .npy file of numbers, or a broken one") from error
    if not isinstance(array, np.ndarray) or array.ndim != _AXES or not len(array):
        raise InputError(f"{file}: holds no batch of images [N, 3, H, W]")
    return array


class _Window(io.RawIOBase):
    """The bytes of a file from `offset` on, as if there were `size` and nothing else."""

    def __init__(self, file: Path, offset: int, size: int) -> None:
        self._file, self._offset, self._size, self._at = file.open("rb"), offset, size, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next byte is read, from the window's begin."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place, as files do; before the begin is the begin."""
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(start + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer as far as there is something."""
        self._file.seek(self._offset + self._at)
        part = memoryview(buffer)[: max(self._size - self._at, 0)]
        count = self._file.readinto(part) or 0
        self._at += count
        return count

    def close(self) -> None:
        """Close the file, too."""
        self._file.close()
        super().close()
