"""Pillow images of any mode -> RGB of 8 bits: deep grey is scaled, transparency composited."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.passes.preprocess import Colour

_SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
# Pillow resizes the indices of PA as if they were grey, and takes La to nothing but LA.
_EXPANDED = {"PA": "RGBA", "La": "LA", "RGBa": "RGBA"}
_BITS_PER_SAMPLE = 258
_ROWS = 256


def to_rgb(image: Image.Image, background: Colour | None) -> Image.Image:
    """The image as RGB of 8 bits.

    `background`: the colour that transparent pixels are composited on (an alpha channel, or a
    colour or palette entries that the file calls transparent); None drops the transparency.
    """
    image = to_eight_bits(image)
    if background is not None and _has_alpha(image):
        canvas = Image.new("RGBA", image.size, (*background, 255))
        image = Image.alpha_composite(canvas, image.convert("RGBA"))
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns of what is dropped
    return image if image.mode == "RGB" else image.convert("RGB")


def to_eight_bits(image: Image.Image) -> Image.Image:
    """The image in a mode of 8 bits for each channel, with its transparency.

    Grey of more bits becomes L, which Pillow itself would clip at 255:
    - 16 bits: 65,535 is white (4,095 in a TIFF of 12 bits), so the values are divided by 257;
    - integers of 32 bits: 0 to 255 as they are, 0 to 65,535 as 16 bits, all else from its least
      to its largest value;
    - floats: 0 to 1 times 255, whole numbers as integers, others as they are where none is negative
      and the largest lies between 128 and 255, all else from its least to its largest finite value;
      NaN is black.
    """
    if image.mode in _EXPANDED:
        return image.convert(_EXPANDED[image.mode])
    if image.mode not in (*_SIXTEEN_BITS, "I", "F"):
        return image
    pixels = np.asarray(image)
    black, white = _full_range(image, pixels)
    grey = np.empty(pixels.shape, np.uint8)
    for top in range(0, len(pixels), _ROWS):  # few at a time: in float64 they are eight-fold
        part = pixels[top : top + _ROWS].astype(np.float64)
        levels = np.rint((part - black) * (255 / (white - black)))
        grey[top : top + _ROWS] = np.nan_to_num(np.clip(levels, 0, 255), nan=0)
    return Image.fromarray(grey)


def _has_alpha(image: Image.Image) -> bool:
    bands, transparent = image.getbands(), image.info.get("transparency")
    return bands in (("L", "A"), ("R", "G", "B", "A")) or transparent is not None


def _full_range(image: Image.Image, pixels: NDArray[np.generic]) -> tuple[float, float]:
    """The values that are black and white."""
    if image.mode in _SIXTEEN_BITS:
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE)
        return 0, 4095 if bits == (12,) else 65535
    if image.mode == "I" and image.format == "PPM":  # Pillow has scaled it to 16 bits
        return 0, 65535
    finite = pixels[np.isfinite(pixels)]
    if not finite.size:
        return 0, 1
    low, high = float(finite.min()), float(finite.max())
    if image.mode == "F" and low >= 0 and high <= 1:
        return 0, 1
    whole = image.mode == "I" or bool((finite == np.rint(finite)).all())
    if low >= 0 and high <= 255 and (whole or high >= 128):
        return 0, 255
    if low >= 0 and high <= 65535 and whole:
        return 0, 65535
    return low, high if high > low else low + 1
