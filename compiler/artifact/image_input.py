"""What an image may be where somebody hands it over: a file, its bytes, a picture, pixels."""

import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.passes.errors import InputError, first_line
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import (
    UnreadableImageError,
    check_pixels,
    preprocess_image,
    read_image,
    read_stream,
)
from regcache.runtime.list_images import list_images, means_several
from regcache.runtime.stored_images import StoredImage

ImageInput: TypeAlias = (
    str
    | os.PathLike[str]
    | bytes
    | BinaryIO
    | Image.Image
    | NDArray[np.uint8 | np.floating]
    | StoredImage
)
"""A file's name, its bytes, or the file opened to read bytes; a Pillow image of any mode; or RGB
pixels [height, width, 3] or [3, height, width], uint8, or floats from 0 to 1.
"""

_ONE_IMAGE = (str, os.PathLike, Image.Image, bytes, bytearray, StoredImage)


def as_iterable(images: ImageInput | Iterable[ImageInput]) -> Iterable[ImageInput]:
    """The images that are meant: all of a folder or a list, or one alone in a list."""
    if isinstance(images, (str, os.PathLike)) and means_several(Path(images)):
        return list_images(Path(images))
    one = isinstance(images, _ONE_IMAGE) or hasattr(images, "read")
    if one or (isinstance(images, np.ndarray) and images.ndim == 3):
        return [images]  # type: ignore[list-item]
    return images  # type: ignore[return-value]


def read_input(image: object, index: int, recipe: Preprocess) -> NDArray[Any]:
    """An image as the encoder's input, of the recipe's shape and dtype.

    `index`: of the image among those that are handed over, by which errors name one without a name.
    Raises InputError for what is no image, UnreadableImageError and OversizedImageError, which are
    ones, as read_image does.
    """
    if isinstance(image, StoredImage):
        return read_image(image, recipe)
    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image), recipe)
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
