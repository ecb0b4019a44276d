"""Image files -> the encoder's input batches, exactly as torchvision does on PIL images."""

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, BinaryIO, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from regcache.passes.errors import InputError
from regcache.passes.preprocess import CropOffset, Preprocess
from regcache.runtime.open_image import open_image
from regcache.runtime.pixel_modes import to_eight_bits, to_rgb
from regcache.runtime.stored_images import AnyImage, StoredImage, TensorImage

T = TypeVar("T")

# Twice Image.MAX_IMAGE_PIXELS: where Pillow stops warning and raises DecompressionBombError.
PIXEL_LIMIT = 178_956_970

_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


class UnreadableImageError(InputError):
    """A file that is not an image, or a broken one."""

    def __init__(self, path: AnyImage, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class OversizedImageError(InputError):
    """An image with more pixels than PIXEL_LIMIT, as stored or once resized."""


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    path: AnyImage
    reason: str


@dataclass(frozen=True)
class Batch:
    """`images`: [B, *recipe.shape] of the recipe's dtype, in the order of `paths`.

    That is float32 [B, 3, height, width], unless the encoder takes uint8 or the channels last.
    """

    images: NDArray[Any]
    paths: Sequence[AnyImage]


@dataclass(frozen=True)
class ImageFolder:
    """Images as a stream of batches: every `batch_size` readable images, then the rest.

    Each iteration reads the files anew and holds one batch. A file that cannot be read is left out
    and passed to `on_skip`.
    Iterating raises OversizedImageError at an image over the pixel limit, and InputError at the end
    when no file could be read.
    """

    paths: Sequence[AnyImage]
    recipe: Preprocess
    batch_size: int = 8
    on_skip: Callable[[Skipped], None] | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise InputError(f"the batch size must be at least 1, not {self.batch_size}")
        if not self.paths:
            raise InputError("no images to read")

    def __iter__(self) -> Iterator[Batch]:
        skipped: list[Skipped] = []
        readable = self._read(skipped)
        while chunk := list(islice(readable, self.batch_size)):
            yield Batch(np.stack([image for _, image in chunk]), [path for path, _ in chunk])
        if len(skipped) == len(self.paths):
            first = skipped[0]
            raise InputError(
                f"none of the {len(self.paths)} images can be read; {first.path}: {first.reason}"
            )

    def telling(self, also: Callable[[Skipped], None]) -> "ImageFolder":
        """The same folder, which also tells `also` of each file that it leaves out."""

        def tell(skipped: Skipped) -> None:
            also(skipped)
            if self.on_skip is not None:
                self.on_skip(skipped)

        return replace(self, on_skip=tell)

    def without(self, skipped: Iterable[Skipped]) -> "ImageFolder":
        """The folder without the files that could not be read."""
        unreadable = {item.path for item in skipped}
        return replace(self, paths=[path for path in self.paths if path not in unreadable])

    def some(self, count: int) -> "ImageFolder":
        """At most `count` images from all over the folder; `on_skip` is told of none."""
        return replace(self, paths=evenly(self.paths, count), on_skip=None)

    def _read(self, skipped: list[Skipped]) -> Iterator[tuple[AnyImage, NDArray[Any]]]:
        for path in self.paths:
            try:
                image = read_image(path, self.recipe)
            except UnreadableImageError as error:
                skipped.append(Skipped(path, error.reason))
                if self.on_skip is not None:
                    self.on_skip(skipped[-1])
            else:
                yield path, image


def evenly(items: Sequence[T], count: int) -> list[T]:
    """`count` items from all over the sequence, in its order; all where there are no more."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


def read_image(path: AnyImage, recipe: Preprocess) -> NDArray[Any]:
    """Read an image as the encoder's input, of the recipe's shape and dtype.

    A tensor in a .npy file is that already, and nothing is done to it.
    Of an animation the first frame is read. The EXIF orientation is not applied and colour profiles
    are ignored, because the pipelines the encoders were trained with do neither.
    Raises UnreadableImageError for a file that is missing, broken or no image, OversizedImageError,
    before decoding, for one over the pixel limit, and InputError for tensors of another shape.
    """
    if isinstance(path, StoredImage):
        return _read_stored(path, recipe)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise UnreadableImageError(path, "not a regular file")
        if status.st_size == 0:
            raise UnreadableImageError(path, "empty file")
        with path.open("rb") as file:
            return read_stream(file, path, recipe)
    except OSError as error:
        raise UnreadableImageError(path, _reason(error)) from error


def _read_stored(image: StoredImage, recipe: Preprocess) -> NDArray[Any]:
    if isinstance(image, TensorImage):
        tensor = image.tensor(recipe.shape, recipe.dtype)
        if not np.isfinite(tensor).all():
            raise UnreadableImageError(image, "holds NaN or infinity")
        return tensor
    try:
        with image.open() as file:
            return read_stream(file, image, recipe)
    except OSError as error:
        raise UnreadableImageError(image, _reason(error)) from error


def read_stream(file: BinaryIO, name: AnyImage, recipe: Preprocess) -> NDArray[Any]:
    """The same of an opened file, or bytes in memory; `name` is what errors call it."""
    try:
        return preprocess_image(_decode_stream(file, name, recipe), recipe)
    except InputError:
        raise
    except Exception as error:  # Pillow's readers let any type escape on broken bytes
        raise UnreadableImageError(name, _reason(error)) from error


def preprocess_image(image: Image.Image, recipe: Preprocess) -> NDArray[Any]:
    """An image of any Pillow mode -> an array of the recipe's shape and dtype.

    The image becomes RGB of 8 bits (`to_rgb`), is resized, cropped at the center (a side smaller
    than the crop is padded with black), scaled and normalized.
    """
    image = to_eight_bits(image) if recipe.rgb_last else to_rgb(image, recipe.background)
    image = image.resize(resized_size(image.size, recipe), _RESAMPLING[recipe.interpolation])
    left = _crop_start(image.width, recipe.width, recipe.crop_offset)
    top = _crop_start(image.height, recipe.height, recipe.crop_offset)
    image = image.crop((left, top, left + recipe.width, top + recipe.height))
    pixels: NDArray[Any] = np.array(to_rgb(image, recipe.background), dtype=recipe.dtype)
    if recipe.dtype == "float32":
        mean, std = np.array(recipe.mean, np.float32), np.array(recipe.std, np.float32)
        pixels = (pixels * np.float32(recipe.rescale) - mean) / std
    return pixels if recipe.layout == "nhwc" else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def resized_size(size: tuple[int, int], recipe: Preprocess) -> tuple[int, int]:
    """(width, height) in pixels after the recipe's resize of an image of `size`."""
    width, height = size
    if recipe.resize == "none":
        return size
    if recipe.resize == "squash":
        return recipe.resize_to[1], recipe.resize_to[0]
    short = recipe.resize_to[0]
    if width <= height:
        return short, int(short * height / width)
    return int(short * width / height), short


def _crop_start(size: int, crop: int, offset: CropOffset) -> int:
    """Where the center crop starts; negative when it pads, as torchvision does."""
    if crop > size:
        return -((crop - size) // 2)
    return round((size - crop) / 2) if offset == "round" else (size - crop) // 2


def _decode_stream(file: BinaryIO, name: AnyImage, recipe: Preprocess) -> Image.Image:
    with open_image(file, str(name)) as image:
        check_pixels(name, image.size, recipe)
        image.load()
        if recipe.rgb_last:
            return to_eight_bits(image).copy()
        return to_rgb(image, recipe.background)


def check_pixels(path: AnyImage, size: tuple[int, int], recipe: Preprocess) -> None:
    """Check the (width, height) of an image, in pixels, before it is decoded or resized.

    Raises OversizedImageError for more than PIXEL_LIMIT, UnreadableImageError for none.
    """
    width, height = size
    if width * height == 0:
        raise UnreadableImageError(path, "it has no pixels")
    over = f"is over the limit of {PIXEL_LIMIT:,}"
    if width * height > PIXEL_LIMIT:
        raise OversizedImageError(f"{path}: {width} x {height} pixels {over}")
    wide, high = resized_size(size, recipe)
    if wide * high > PIXEL_LIMIT:  # a strip of a few pixels by thousands
        raise OversizedImageError(
            f"{path}: {width} x {height}, resized to {wide} x {high} pixels, {over}"
        )


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or its header is broken"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__
