"""Rows of what linears read, kept on disk from calibration on, to round weights by."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.calibration.number_formats import number_format
from regcache.compiler.job.options import Rounding
from regcache.compiler.job.targets import Target
from regcache.passes.encoder import Site

Floats = NDArray[np.float32]

# About as many rows as the Gram matrix of the widest layer needs to be more than noise.
ROWS = 4096
LEAST_ROWS_OF_AN_IMAGE = 8
# Rows that are read at a time.
_CHUNK = 1024


@dataclass
class StoredRows:
    """Some rows of the activation [..., K] at a site, float32, in a file without a name.

    Of every `stride`-th image: the first token, which is the class token where there is one, and
    tokens drawn at random, `of_an_image` together. The file goes with this object.
    """

    file: BinaryIO
    of_an_image: int
    random: np.random.Generator
    stride: int = 1
    images: int = 0
    count: int = 0
    channels: int = 0

    @classmethod
    def of(cls, folder: Path, images: int, seed: int) -> "StoredRows":
        """No rows yet, sized for so many images; the file lies in `folder`."""
        of_an_image, stride = _rows_of_an_image(images)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - it stays open
        return cls(file, of_an_image, np.random.default_rng(seed), stride)

    def update(self, tokens: Floats) -> None:
        """Take in activations [B, T, K]."""
        self.channels = tokens.shape[-1]
        for image in tokens:
            if self.images % self.stride == 0:
                kept = np.ascontiguousarray(image[self._drawn(len(image))], np.float32)
                self.file.write(kept.data)
                self.count += len(kept)
            self.images += 1

    @property
    def kept(self) -> int:
        """Rows of each image, the first token's in front."""
        return self.count // -(-self.images // self.stride)

    def chunks(self, *, whole_images: bool = False) -> Iterator[Floats]:
        """All rows in order, [n, K] at a time; of no image a part alone where `whole_images`."""
        self.file.seek(0)
        size = max(_CHUNK // self.kept, 1) * self.kept if whole_images else _CHUNK
        for start in range(0, self.count, size):
            rows = min(size, self.count - start)
            content = self.file.read(4 * rows * self.channels)
            yield np.frombuffer(content, np.float32).reshape(rows, self.channels)

    def _drawn(self, tokens: int) -> NDArray[np.intp]:
        others = min(self.of_an_image, tokens) - 1
        chosen = self.random.permutation(tokens - 1)[:others] + 1
        return np.concatenate([np.zeros(1, np.intp), chosen])


def stores_rows(target: Target, rounding: Rounding) -> bool:
    """Whether the weights of a target's linears, or their biases, are chosen by stored rows."""
    return rounding is Rounding.GPTQ and number_format(target).by_error


def stored_bytes(row: int, images: int, tokens: int) -> int:
    """Bytes that so many images of `tokens` tokens leave on disk, of activations of `row` bytes."""
    of_an_image, stride = _rows_of_an_image(images)
    return row * min(of_an_image, tokens) * -(-images // stride)


def _rows_of_an_image(images: int) -> tuple[int, int]:
    """How many rows are stored of an image, and how far apart these images are."""
    of_an_image = max(ROWS // max(images, 1), LEAST_ROWS_OF_AN_IMAGE)
    return of_an_image, max(1, images * LEAST_ROWS_OF_AN_IMAGE // ROWS)


def stored_rows(
    sites: Iterable[Site], folder: Path, images: int, seed: int
) -> dict[str, StoredRows]:
    """No rows yet for every site, by its name, sized for so many images."""
    return {site.name: StoredRows.of(folder, images, seed) for site in sites}
