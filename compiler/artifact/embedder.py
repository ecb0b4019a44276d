"""Images in, embeddings out: an artifact and its preprocessing behind one method."""

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.artifact.artifact import MODEL, Artifact, ReplacedError
from regcache.compiler.artifact.image_input import ImageInput, as_iterable, read_input
from regcache.compiler.artifact.manifest import Manifest
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.device import find_device
from regcache.runtime.images import OversizedImageError, UnreadableImageError
from regcache.runtime.map_ahead import map_ahead
from regcache.runtime.run_with import RunWith, Session
from regcache.runtime.session import available_cpus

OnError = Literal["raise", "nan"]
"""What becomes of an image that cannot be read: an error that names it, or a row of NaN."""

# How often an artifact is opened that others keep replacing.
_TRIES = 20
# Threads that decode images while the encoder runs: it takes far longer than they do.
_READERS = 2

Embeddings = NDArray[np.float32]


class Embedder:
    """An artifact opened in the runtime that is to run it; `regcache.load` makes one.

    `artifact`: a folder that `regcache compile` wrote; every file is checked against its hash.
    `threads`: of the runtime; all CPUs this process may use by default.
    `device`: "cpu", or "cuda:N", which computes in float, rounded as written, whatever the target.
    `run_with`: what computes, and how; ONNX Runtime by default.
    `verify`: a public key of OpenSSH's, by whose owner the artifact has to be signed.
    Use it as a context manager, or `close` it, to free the weights early. A pickle holds none: it
    opens the same artifact again where it is loaded, with the same arguments.
    Raises InputError when the folder is no artifact, a byte of it has changed, it is not signed as
    asked, the runtime cannot load its model, or there is no such device; MissingExtraError where
    the runtime is not installed.
    """

    def __init__(
        self,
        artifact: str | os.PathLike[str],
        *,
        threads: int | None = None,
        device: str = "cpu",
        run_with: RunWith | None = None,
        verify: str | os.PathLike[str] | None = None,
    ) -> None:
        self._given = {
            "threads": threads,
            "device": device,
            "run_with": run_with,
            "verify": verify,
        }
        place = find_device(device)
        key = None if verify is None else Path(verify)
        self._session: Session | None
        for left in reversed(range(_TRIES)):
            self._artifact = Artifact.open(Path(artifact), verify=key)
            try:
                self._session = self._artifact.session(
                    threads=threads, device=place, deployed=True, run_with=run_with
                )
                break
            except ReplacedError:
                if not left:
                    raise

    def __repr__(self) -> str:
        options = self.manifest.options
        closed = "" if self._session is not None else ", closed"
        return (
            f"<Embedder of {options.source}: {options.target} {options.precision}, images of "
            f"{self.recipe.height} x {self.recipe.width}{closed}>"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        digest = self.manifest.files[MODEL].sha256
        folder = self._artifact.folder.absolute()
        return _reopen, (folder, digest, self._session is None, self._given)

    @property
    def manifest(self) -> Manifest:
        """How the artifact was made, and how close it is to the original."""
        return self._artifact.manifest

    @property
    def recipe(self) -> Preprocess:
        """How an image becomes the encoder's input."""
        return self._artifact.recipe

    @property
    def output_names(self) -> tuple[str, ...]:
        """The keys of `outputs`, the pooled embedding's first."""
        return tuple(self._open_session().output_names)

    @cached_property
    def dim(self) -> int:
        """The length of an embedding; found by encoding one black image."""
        return int(self._blank()[0].shape[1])

    def embed(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 8,
        on_error: OnError = "raise",
    ) -> Embeddings:
        """The pooled embeddings, float32 [N, dim], in the order of `images`.

        `images`: one, or any iterable of them, which is read one batch at a time; or the name of a
        folder, of a list (`.txt`, a path a line), of a tar archive, of a data set on disk, of a
        `.npy` of tensors, or a pattern, whose images come sorted or listed.
        `batch_size`: images per run, where the graph does not fix it.
        Raises InputError, naming the image, when one cannot be read or has too many pixels and
        `on_error` is "raise".
        """
        pooled = list(self.embed_batches(images, batch_size=batch_size, on_error=on_error))
        return np.concatenate(pooled) if pooled else np.empty((0, self.dim), np.float32)

    def embed_batches(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 8,
        on_error: OnError = "raise",
    ) -> Iterator[Embeddings]:
        """The same batch by batch, float32 [B, dim]: memory holds the images of two batches.

        What follows is read and decoded while the encoder runs.
        """
        for outputs in self._run(images, batch_size, on_error):
            yield outputs[0].astype(np.float32, copy=False)

    async def aembed(
        self,
        images: ImageInput | Iterable[ImageInput] | AsyncIterable[ImageInput],
        *,
        batch_size: int = 8,
        on_error: OnError = "raise",
    ) -> Embeddings:
        """As `embed`, for asyncio: the loop goes on while a thread computes.

        `images` may also come from an asynchronous iterable, which is read here, batch by batch.
        """
        if not isinstance(images, AsyncIterable):
            return await asyncio.to_thread(
                self.embed, images, batch_size=batch_size, on_error=on_error
            )
        pooled = [
            await asyncio.to_thread(self.embed, batch, batch_size=batch_size, on_error=on_error)
            async for batch in _batches(images, batch_size)
        ]
        return np.concatenate(pooled) if pooled else np.empty((0, self.dim), np.float32)

    def outputs(
        self,
        images: ImageInput | Iterable[ImageInput],
        *,
        batch_size: int = 8,
        on_error: OnError = "raise",
    ) -> dict[str, NDArray[Any]]:
        """All outputs of the encoder by name, each [N, ...]; as for `embed` otherwise.

        The last hidden state has N x tokens x width numbers: mind the memory.
        """
        found = list(self._run(images, batch_size, on_error)) or [
            [output[:0] for output in self._blank()]
        ]
        return {
            name: np.concatenate(parts)
            for name, parts in zip(self.output_names, zip(*found, strict=True), strict=True)
        }

    def close(self) -> None:
        """Free the weights; the embedder cannot be used after."""
        self._session = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(
        self, images: ImageInput | Iterable[ImageInput], batch_size: int, on_error: OnError
    ) -> Iterator[list[NDArray[Any]]]:
        if batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {batch_size}")
        if on_error not in ("raise", "nan"):
            raise InputError(f'on_error must be "raise" or "nan", not {on_error!r}')
        session = self._open_session()
        size = session.fixed_batch or batch_size
        pixels = self._pixels(as_iterable(images), size, on_error)
        unread = deque[list[int]]()

        def batches() -> Iterator[NDArray[Any]]:
            while batch := list(islice(pixels, size)):
                unread.append([index for index, image in enumerate(batch) if image is None])
                yield np.stack([self._black() if image is None else image for image in batch])

        for outputs in session.run_each(batches()):
            rows = unread.popleft()
            for output in outputs:  # NaN where an image could not be read, -1 in integers
                output[rows] = np.array(np.nan if output.dtype.kind == "f" else -1).astype(
                    output.dtype
                )
            yield outputs

    def _pixels(
        self, images: Iterable[ImageInput], batch_size: int, on_error: OnError
    ) -> Iterator[NDArray[Any] | None]:
        """The input of each image in turn; None for one that cannot be read, where that may be."""

        def read(numbered: tuple[int, ImageInput]) -> NDArray[Any] | None:
            return self._read(numbered[1], numbered[0], on_error)

        if isinstance(images, list) and len(images) == 1:
            return map(read, enumerate(images))
        readers = min(_READERS, available_cpus())
        return map_ahead(read, enumerate(images), ahead=batch_size, workers=readers)

    def _read(self, image: ImageInput, index: int, on_error: OnError) -> NDArray[Any] | None:
        try:
            return read_input(image, index, self.recipe)
        except (UnreadableImageError, OversizedImageError):
            if on_error == "raise":
                raise
            return None

    def _blank(self) -> list[NDArray[Any]]:
        return self._open_session().run(self._black()[np.newaxis])

    def _black(self) -> NDArray[Any]:
        return np.zeros(self.recipe.shape, self.recipe.dtype)

    def _open_session(self) -> Session:
        if self._session is None:
            raise ValueError("the embedder is closed")
        return self._session


def _reopen(folder: Path, digest: str, closed: bool, given: dict[str, Any]) -> Embedder:
    """The embedder that was pickled. Raises InputError where the artifact is another by now."""
    embedder = Embedder(folder, **given)
    if embedder.manifest.files[MODEL].sha256 != digest:
        raise InputError(f"{folder}: holds another model than when its embedder was pickled")
    if closed:
        embedder.close()
    return embedder


async def _batches(
    images: AsyncIterable[ImageInput], batch_size: int
) -> AsyncIterator[list[ImageInput]]:
    batch: list[ImageInput] = []
    async for image in images:
        batch.append(image)
        if len(batch) >= batch_size:
            yield batch
            batch = []
    if batch:
        yield batch
