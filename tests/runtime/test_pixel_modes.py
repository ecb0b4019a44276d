"""Deep grey keeps its levels, transparency shows its background; files and objects alike."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from regcache.passes.preprocess import Colour, Preprocess
from regcache.runtime.images import preprocess_image, read_image
from regcache.runtime.pixel_modes import to_eight_bits, to_rgb

RECIPE = Preprocess(16, 16, "shortest", (18, 18), "bicubic", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
WHITE, BLUE = (255, 255, 255), (10, 60, 250)
GREY = np.random.default_rng(0).integers(0, 256, (19, 23), dtype=np.uint8)
GREY[0, :2] = 0, 255


def deep(mode: str) -> Image.Image:
    """GREY in 16 bits, white being 65,535, in one of Pillow's byte orders."""
    order = ">u2" if mode == "I;16B" else "<u2"
    return Image.frombytes(mode, (23, 19), (GREY * np.uint16(257)).astype(order).tobytes())


def levels(image: Image.Image) -> NDArray[np.uint8]:
    """The one channel of what is grey."""
    rgb = np.asarray(to_rgb(image, None))
    assert rgb.shape == (*image.size[::-1], 3)
    assert (rgb == rgb[..., :1]).all()
    return np.asarray(rgb[..., 0])


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B"])
def test_sixteen_bits_are_scaled(mode: str) -> None:
    np.testing.assert_array_equal(levels(deep(mode)), GREY)


def test_every_value_of_sixteen_bits_is_rounded() -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    wanted = (2 * values.astype(np.int64) + 257) // 514
    np.testing.assert_array_equal(levels(Image.fromarray(values)), wanted)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2", "a.pgm"])
def test_files_of_sixteen_bits_are_as_their_eight_bits(tmp_path: Path, name: str) -> None:
    deep("I;16").save(tmp_path / name)
    expected = preprocess_image(Image.fromarray(GREY), RECIPE)
    np.testing.assert_array_equal(read_image(tmp_path / name, RECIPE), expected)
    with Image.open(tmp_path / name) as opened:
        np.testing.assert_array_equal(preprocess_image(opened, RECIPE), expected)


def test_a_dark_pgm_of_sixteen_bits_stays_dark(tmp_path: Path) -> None:
    values = np.full((4, 4), 255, ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 4 4 65535\n" + values.tobytes())
    with Image.open(tmp_path / "a.pgm") as opened:
        assert (levels(opened) == 1).all()


def test_a_tiff_of_twelve_bits_is_white_at_4095(tmp_path: Path) -> None:
    def entry(tag: int, value: int) -> bytes:
        return struct.pack("<HHII", tag, 3, 1, value)

    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 200, 277: 1, 278: 1, 279: 6}
    head = b"II*\0" + struct.pack("<IH", 8, len(tags))
    head += b"".join(entry(*item) for item in tags.items()) + struct.pack("<I", 0)
    pixels = bytes.fromhex("000 fff 800 010".replace(" ", ""))  # two of them in three bytes
    (tmp_path / "a.tif").write_bytes(head.ljust(200, b"\0") + pixels)
    with Image.open(tmp_path / "a.tif") as opened:
        assert levels(opened).tolist() == [[0, 255, 128, 1]]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0, 7, 255], [0, 7, 255]),
        ([0, 257, 65535], [0, 1, 255]),
        ([0, 256, 257 * 9], [0, 1, 9]),
        ([-1000, 0, 3000], [0, 64, 255]),
        ([0, 1, 2**31 - 1], [0, 0, 255]),
        ([5, 5, 5], [5, 5, 5]),
        ([-5, -5, -5], [0, 0, 0]),
    ],
)
def test_integers_by_their_range(values: list[int], wanted: list[int]) -> None:
    assert levels(Image.fromarray(np.array([values], np.int32))).tolist() == [wanted]
    whole = np.array([values], np.float32)  # the same numbers as floats
    assert levels(Image.fromarray(whole)).tolist() == [wanted]


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([0.25, 0.2, 0.1], [64, 51, 26]),
        ([0.0, 0.4, 200.3], [0, 0, 200]),
        ([0.5, 3.25, 6.0], [0, 128, 255]),
        ([-1.0, 0.5, 1.0], [0, 191, 255]),
        ([-0.5, 0.0, 65535.5], [0, 0, 255]),
        ([np.nan, 0.0, 1.0], [0, 0, 255]),
        ([-np.inf, 0.5, np.inf], [0, 128, 255]),
        ([np.nan, np.nan, np.nan], [0, 0, 0]),
        ([-3e38, 0.0, 3e38], [0, 128, 255]),
    ],
)
def test_floats_by_their_range(values: list[float], wanted: list[int]) -> None:
    assert levels(Image.fromarray(np.array([values], np.float32))).tolist() == [wanted]


def test_a_float_tiff_is_as_its_eight_bits(tmp_path: Path) -> None:
    expected = preprocess_image(Image.fromarray(GREY), RECIPE)
    Image.fromarray(GREY.astype(np.float32) / np.float32(255)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif", RECIPE), expected)


def test_what_has_eight_bits_is_left_alone() -> None:
    for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV"):
        image = Image.new(mode, (4, 3))
        assert to_eight_bits(image) is image
    rgb = Image.new("RGB", (4, 3))
    assert to_rgb(rgb, WHITE) is rgb


def palette(image: Image.Image, transparency: Any) -> Image.Image:
    found = image.convert("RGB").quantize(16)
    found.info["transparency"] = transparency
    return found


def masked(image: Image.Image, alpha: Image.Image) -> Image.Image:
    image.putalpha(alpha)
    return image


def keyed(image: Image.Image, mode: str, colour: Any) -> Image.Image:
    found = image.convert("RGB").convert(mode)
    found.putpixel((2, 2), colour)
    found.info["transparency"] = colour
    return found


TRANSPARENT: dict[str, Callable[[Image.Image], Image.Image]] = {
    "RGBA": lambda rgba: rgba,
    "LA": lambda rgba: rgba.convert("LA"),
    "La": lambda rgba: rgba.convert("LA").convert("La"),
    "RGBa": lambda rgba: rgba.convert("RGBa"),
    "PA": lambda rgba: masked(rgba.convert("RGB").quantize(16), rgba.getchannel("A")),
    "palette with an alpha for each": lambda rgba: palette(rgba, bytes(range(0, 256, 16))),
    "palette with one transparent": lambda rgba: palette(rgba, 3),
    "RGB with a transparent colour": lambda rgba: keyed(rgba, "RGB", (1, 2, 3)),
    "L with a transparent level": lambda rgba: keyed(rgba, "L", 77),
}


@pytest.mark.parametrize("background", [WHITE, BLUE])
@pytest.mark.parametrize("kind", TRANSPARENT)
def test_transparent_pixels_show_the_background(kind: str, background: Colour) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    pixels[:5, :, 3], pixels[5:10, :, 3] = 0, 255
    image = TRANSPARENT[kind](Image.fromarray(pixels))
    known = {"La": "LA", "PA": "RGBA", "RGBa": "RGBA"}.get(image.mode, image.mode)
    rgba = np.asarray(image.convert(known).convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    assert alpha.min() == 0
    wanted = alpha * rgba[..., :3] + (1 - alpha) * background
    np.testing.assert_allclose(np.asarray(to_rgb(image, background)), wanted, atol=0.51)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", [kind for kind in TRANSPARENT if kind != "La"])
def test_without_a_background_alpha_is_dropped(kind: str) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    image = TRANSPARENT[kind](Image.fromarray(pixels))
    np.testing.assert_array_equal(to_rgb(image, None), image.convert("RGB"))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_a_file_shows_the_background_as_the_object_does(tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (20, 30, 4), dtype=np.uint8)
    whole = Preprocess(
        20, 30, "none", (20, 30), "bicubic", (0, 0, 0), (1, 1, 1), 1, background=BLUE
    )
    for name, image in (
        ("rgba.png", Image.fromarray(pixels)),
        ("rgba.webp", Image.fromarray(pixels)),
        ("palette.png", palette(Image.fromarray(pixels), bytes(range(0, 256, 16)))),
        ("palette.gif", palette(Image.fromarray(pixels), 3)),
    ):
        image.save(tmp_path / name, lossless=True)
        found = read_image(tmp_path / name, whole).transpose(1, 2, 0)
        with Image.open(tmp_path / name) as opened:
            np.testing.assert_array_equal(found, to_rgb(opened, BLUE))
            assert np.abs(found - np.asarray(to_rgb(opened, None), np.float32)).max() > 100
