"""One pass over images for all encoders; embeddings go to files, and a stopped pass goes on."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reporter import Reporter
from regcache.compiler.reproduce.kept import Kept, digest, stamps
from regcache.compiler.reproduce.kept_rows import KeptRows
from regcache.compiler.reproduce.scores import Embedded
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime import images as image_files
from regcache.runtime.device import Device
from regcache.runtime.images import Batch, Skipped, UnreadableImageError
from regcache.runtime.map_ahead import map_ahead
from regcache.runtime.session import OrtSession, available_cpus
from regcache.runtime.similarity import ROWS_AT_A_TIME, row_cosines

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Encoders:
    """ONNX files to run on the same images, the float one first. `outputs`: which come first.

    `batch`: images in a run.
    """

    files: Sequence[Path]
    recipe: Preprocess
    outputs: Sequence[str]
    batch: int
    threads: int | None
    device: Device

    def open(self, file: Path) -> OrtSession:
        """A session of one of them, in float."""
        return OrtSession(
            file,
            threads=self.threads,
            integers=False,
            outputs=self.outputs,
            device=self.device,
        )


class EmbedOnce:
    """Runs each image once through every encoder; keeps pooled outputs, in files.

    What a run that was stopped has embedded is not embedded again. Memory holds the encoders, which
    are loaded when an image is to be run, and a few images. Use it as a context manager.
    """

    def __init__(self, encoders: Encoders, kept: Kept, reporter: Reporter) -> None:
        self._encoders, self._kept, self._reporter = encoders, kept, reporter
        self._evaluated: list[Embedded] = []
        self._open = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()

    @property
    def count(self) -> int:
        """How many images were evaluated."""
        return sum(len(part.paths) for part in self._evaluated)

    @property
    def cosines(self) -> list[float]:
        """The mean cosine to float of each encoder, over the images evaluated."""
        totals = np.zeros(len(self._encoders.files))
        for part in self._evaluated:
            for start in range(0, len(part.paths), ROWS_AT_A_TIME):
                chunk = slice(start, start + ROWS_AT_A_TIME)
                reference, *_ = wide = [rows[chunk].astype(np.float64) for rows in part.embeddings]
                totals += [row_cosines(reference, rows).sum() for rows in wide]
        return [float(total / self.count) for total in totals]

    def __call__(self, paths: list[Path], label: str, *, evaluated: bool = True) -> Embedded:
        """The images' embeddings; those that are not `evaluated` do not count in the cosine."""
        names = [file.name for file in self._encoders.files]
        name = f"{label} {digest(names, self._encoders.batch, stamps(paths))}"
        with KeptRows(self._kept, name, len(names)) as rows:
            if rows.next:
                self._reporter.step(f"{label}: {rows.next} of {len(paths)} images are done")
            self._embed(paths, label, rows)
        if not rows.count:
            raise InputError(f"none of the {len(paths)} images can be read; first {paths[0]}")
        read = [path for index, path in enumerate(paths) if index not in rows.skipped]
        embedded = Embedded(read, rows.mapped())
        if evaluated:
            self._evaluated.append(embedded)
        return embedded

    @cached_property
    def _sessions(self) -> list[OrtSession]:
        opened = map(self._encoders.open, self._encoders.files)
        return [self._open.enter_context(session) for session in opened]

    def _embed(self, paths: list[Path], label: str, rows: KeptRows) -> None:
        """Embed the images that `rows` lacks."""
        left, checked = paths[rows.next :], False
        batches = _read_ahead(left, self._encoders, self._reporter)
        for batch in self._reporter.images(batches, len(left), label):
            pooled = list[Floats]()
            if batch.paths:
                outputs = [session.run(batch.images)[0] for session in self._sessions]
                pooled = [output.reshape(len(batch.paths), -1) for output in outputs]
                if not checked:
                    rows.check_room(len(paths), [part.shape[1] for part in pooled])
                    checked = True
            rows.append(batch.files, batch.skipped, pooled)


@dataclass(frozen=True)
class _Read(Batch):
    """The images of so many `files`, but for the indices `skipped`, which could not be read."""

    files: int
    skipped: list[int]


def _read_ahead(paths: Sequence[Path], encoders: Encoders, reporter: Reporter) -> Iterator[_Read]:
    """The images of as many files as a run takes, each read and decoded while others are run."""

    def read(path: Path) -> NDArray[Any] | UnreadableImageError:
        try:
            return image_files.read_image(path, encoders.recipe)
        except UnreadableImageError as error:
            return error

    size, shape = encoders.batch, encoders.recipe.shape
    with closing(map_ahead(read, paths, ahead=2 * size, workers=available_cpus())) as found:
        for start in range(0, len(paths), size):
            images, read_from, skipped = [], list[Path](), list[int]()
            for index, path in enumerate(paths[start : start + size]):
                image = next(found)
                if isinstance(image, UnreadableImageError):
                    reporter.skipped(Skipped(image.path, image.reason))
                    skipped.append(index)
                else:
                    images.append(image)
                    read_from.append(path)
            stacked = np.stack(images) if images else np.empty((0, *shape), np.float32)
            yield _Read(stacked, read_from, len(images) + len(skipped), skipped)
