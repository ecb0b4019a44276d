"""Embeddings in files that grow batch by batch, and that outlive whoever writes them."""

from collections.abc import Sequence
from typing import BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reproduce.kept import Kept, short
from regcache.passes.model_files import check_free

Floats = NDArray[np.float32]

_SIZE = 4  # bytes of a number


class KeptRows:
    """Embeddings of images in order, float32 [N, D], in a file for each of several encoders.

    `next`: index of the first image that is not done; `skipped`: those done that could not be read,
    and have no rows. A batch counts once the journal has it: what a kill left behind it is cut off.
    Use it as a context manager to write.
    """

    def __init__(self, kept: Kept, name: str, encoders: int) -> None:
        self._journal, self._name = kept.journal, name
        self._paths = [kept.folder / f"{short(name)}-{index}.f32" for index in range(encoders)]
        self.next, self.skipped, self.widths = 0, set[int](), list[int]()
        while self._key in self._journal:
            self._count_in(*self._journal[self._key])
        if not self._are_whole():  # the machine lost them, not the process
            self.next, self.skipped, self.widths = 0, set(), []
        self._files: list[BinaryIO] = []

    def __enter__(self) -> Self:
        for path, width in zip(self._paths, self.widths or [0] * len(self._paths), strict=True):
            file = path.open("ab")
            self._files.append(file)
            file.truncate(self.count * width * _SIZE)
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files:
            file.close()

    @property
    def count(self) -> int:
        """N, how many rows there are."""
        return self.next - len(self.skipped)

    def append(self, images: int, skipped: Sequence[int], embeddings: Sequence[Floats]) -> None:
        """Add so many images, those at `skipped` of them without rows. `embeddings`: [n, D] each.

        There are none where all are skipped.
        """
        widths = [part.shape[1] for part in embeddings] or self.widths
        for file, part in zip(self._files, embeddings, strict=bool(embeddings)):
            file.write(np.ascontiguousarray(part, np.float32).data)
            file.flush()
        done = images, list(skipped), widths
        self._journal.put(self._key, done)
        self._count_in(*done)

    def check_room(self, images: int, widths: Sequence[int]) -> None:
        """Raise InputError where the disk lacks the room for so many images in all."""
        check_free(self._paths[0], (images - self.next) * sum(widths) * _SIZE)

    def mapped(self) -> list[Floats]:
        """The embeddings of each encoder, mapped from its file."""
        return [
            np.memmap(path, np.float32, "r", shape=(self.count, width))
            for path, width in zip(self._paths, self.widths, strict=True)
        ]

    @property
    def _key(self) -> str:
        return f"{self._name} {self.next}"

    def _count_in(self, images: int, skipped: list[int], widths: list[int]) -> None:
        self.skipped.update(self.next + index for index in skipped)
        self.next, self.widths = self.next + images, widths

    def _are_whole(self) -> bool:
        if not self.count:
            return True
        sizes = [self.count * width * _SIZE for width in self.widths]
        return all(
            path.is_file() and path.stat().st_size >= size
            for path, size in zip(self._paths, sizes, strict=True)
        )
