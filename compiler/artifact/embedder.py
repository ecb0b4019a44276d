"""Images in, embeddings out: an artifact and its preprocessing behind one method."""

import io
import os
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.compiler.artifact.artifact import Artifact, ReplacedError
from regcache.compiler.artifact.manifest import Manifest
from regcache.passes.errors import InputError, first_line
from regcache.passes.preprocess import Preprocess
from regcache.runtime.device import find_device
from regcache.runtime.images import (
    OversizedImageError,
    UnreadableImageError,
    check_pixels,
    preprocess_image,
    read_image,
    read_stream,
)
from regcache.runtime.list_images import list_images, means_several
from regcache.runtime.run_with import RunWith, Session

ImageInput: TypeAlias = (
    str | os.PathLike[str] | bytes | BinaryIO | Image.Image | NDArray[np.uint8 | np.floating]
)
"""A file's name, its bytes, or the file opened to read bytes; a Pillow image of any mode; or RGB
pixels [height, width, 3] or [3, height, width], uint8, or floats from 0 to 1.
"""

OnError = Literal["raise", "nan"]
"""What becomes of an image that cannot be read: an error that names it, or a row of NaN."""

# How often an artifact is opened that others keep replacing.
_TRIES = 20
_ONE_IMAGE = (str, os.PathLike, Image.Image, bytes, bytearray)


class Embedder:
    """An artifact opened in the runtime that is to run it; `regcache.load` makes one.

    `artifact`: a folder that `regcache compile` wrote; every file is checked against its hash.
    `threads`: of the runtime; all CPUs this process may use by default.
    `device`: "cpu", or "cuda:N", which computes in float, rounded as written, whatever the target.
    `run_with`: what computes, and how; ONNX Runtime by default.
    `verify`: a public key of OpenSSH's, by whose owner the artifact has to be signed.
    Use it as a context manager, or `close` it, to free the weights early.
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
    ) -> NDArray[np.float32]:
        """The pooled embeddings, float32 [N, dim], in the order of `images`.

        `images`: one, or any iterable of them, which is read one batch at a time; or the name of a
        folder, of a list (`.txt`, a path a line) or a pattern, whose images come sorted or listed.
        `batch_size`: images per run, where the graph does not fix it.
        Raises InputError, naming the image, when one cannot be read or has too many pixels and
        `on_error` is "raise".
        """
        pooled = [found[0] for found in self._run(images, batch_size, on_error)]
        if not pooled:
            return np.empty((0, self.dim), np.float32)
        return np.concatenate(pooled).astype(np.float32, copy=False)

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
        pixels = (
            self._read(image, index, on_error) for index, image in enumerate(_as_iterable(images))
        )
        unread = deque[list[int]]()

        def batches() -> Iterator[NDArray[Any]]:
            while batch := list(islice(pixels, session.fixed_batch or batch_size)):
                unread.append([index for index, image in enumerate(batch) if image is None])
                yield np.stack([self._black() if image is None else image for image in batch])

        for outputs in session.run_each(batches()):
            rows = unread.popleft()
            for output in outputs:  # NaN where an image could not be read, -1 in integers
                output[rows] = np.array(np.nan if output.dtype.kind == "f" else -1).astype(
                    output.dtype
                )
            yield outputs

    def _read(self, image: ImageInput, index: int, on_error: OnError) -> NDArray[Any] | None:
        try:
            if isinstance(image, (str, os.PathLike)):
                return read_image(Path(image), self.recipe)
            return _preprocess(image, index, self.recipe)
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


def _as_iterable(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    if isinstance(images, (str, os.PathLike)) and means_several(Path(images)):
        return list_images(Path(images))
    one = isinstance(images, _ONE_IMAGE) or hasattr(images, "read")
    if one or (isinstance(images, np.ndarray) and images.ndim == 3):
        return [images]  # type: ignore[list-item]
    return images  # type: ignore[return-value]


def _preprocess(image: object, index: int, recipe: Preprocess) -> NDArray[Any]:
    name = Path(f"image {index}")
    if isinstance(image, (bytes, bytearray)):
        return read_stream(io.BytesIO(image), name, recipe)
    if hasattr(image, "read"):
        return read_stream(_seekable(image, name), name, recipe)
    if isinstance(image, np.ndarray):
        image = Image.fromarray(_pixels(image, name))
    elif not isinstance(image, Image.Image):
        raise InputError(
            f"{name}: a {type(image).__name__} is no path, file, Pillow image or array of pixels"
        )
    try:
        check_pixels(name, image.size, recipe)
        image.load()  # an opened file is decoded here, and may be broken
        return preprocess_image(image, recipe)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers let any type escape on broken bytes
        raise UnreadableImageError(name, first_line(error)) from error


def _seekable(file: Any, name: Path) -> BinaryIO:
    """The bytes of an opened file from where it stands, as Pillow needs to go back in them."""
    content = file.read()
    if not isinstance(content, bytes):
        raise InputError(f"{name}: a file has to be opened to read bytes")
    return io.BytesIO(content)


def _pixels(array: NDArray[Any], name: Path) -> NDArray[np.uint8]:
    """RGB pixels, uint8 [height, width, 3], of an array in either layout."""
    shape = list(array.shape)
    wanted = "pixels must be [height, width, 3] or [3, height, width], uint8 or floats from 0 to 1"
    if array.ndim != 3 or not array.size or 3 not in (shape[0], shape[2]):
        raise InputError(f"{name}: {wanted}, not {array.dtype} {shape}")
    last = array if shape[2] == 3 else array.transpose(1, 2, 0)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(last)
    if array.dtype.kind != "f":
        raise InputError(f"{name}: {wanted}, not {array.dtype} {shape}")
    if not (array.min() >= 0 and array.max() <= 1):  # NaN is neither
        raise InputError(f"{name}: {wanted}, not floats from {array.min():g} to {array.max():g}")
    return np.asarray(np.rint(last * 255), np.uint8)
