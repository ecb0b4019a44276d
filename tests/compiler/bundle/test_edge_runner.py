"""The runner that ends up on devices: 60 lines that read images as Pillow and regcache do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from support.examples import examples

from regcache.compiler.bundle import edge_runner
from regcache.compiler.bundle.edge_runner import Encoder, read, resample
from regcache.export.recipe import for_input
from regcache.passes.preprocess import (
    CropOffset,
    Interpolation,
    Layout,
    PixelType,
    Preprocess,
    ResizeMode,
)
from regcache.runtime.images import preprocess_image

FILTERS: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")


class Echo:
    """A session whose output is its input."""

    name, shape = "pixel_values", ("batch", 3, "height", "width")

    def __init__(self, dtype: PixelType) -> None:
        self.dtype = dtype

    def get_inputs(self) -> list["Echo"]:
        return [self]

    def run(self, _: None, feed: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        assert feed[self.name].dtype == self.dtype
        return [feed[self.name]]


def embed_input(pixels: NDArray[np.uint8], recipe: Preprocess) -> NDArray[np.float32]:
    """What the runner feeds to the model."""
    encoder = Encoder.__new__(Encoder)
    encoder.recipe, encoder.session = json.loads(recipe.to_json()), Echo(recipe.dtype)
    return encoder.embed(pixels)


def starts_with_rows(old: tuple[int, int], new: tuple[int, int]) -> bool:
    return 0 < old[0] - new[0] > 2 * (old[1] - new[1])


@examples(60)
@given(
    old=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    size=st.integers(1, 80),
    name=st.sampled_from(FILTERS),
    seed=st.integers(0, 99),
    extreme=st.booleans(),
)
def test_resamples_one_axis_as_pillow_does(
    old: tuple[int, int], size: int, name: Interpolation, seed: int, extreme: bool
) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (*old, 3), dtype=np.uint8)
    pixels = np.where(pixels > 127, 255, 0).astype(np.uint8) if extreme else pixels
    image, how = Image.fromarray(pixels), Image.Resampling[name.upper()]
    np.testing.assert_array_equal(
        resample(pixels, 1, size, name), image.resize((size, old[0]), how)
    )
    np.testing.assert_array_equal(
        resample(pixels, 0, size, name), image.resize((old[1], size), how)
    )


@examples(80)
@given(
    old=st.tuples(st.integers(2, 90), st.integers(2, 90)),
    crop=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    resize=st.sampled_from(["shortest", "squash", "none"]),
    resize_to=st.tuples(st.integers(1, 50), st.integers(1, 50)),
    name=st.sampled_from(FILTERS),
    crop_offset=st.sampled_from(["round", "floor"]),
    layout=st.sampled_from(["nchw", "nhwc"]),
    dtype=st.sampled_from(["float32", "uint8"]),
)
def test_preprocesses_bit_for_bit(
    old: tuple[int, int],
    crop: tuple[int, int],
    resize: ResizeMode,
    resize_to: tuple[int, int],
    name: Interpolation,
    crop_offset: CropOffset,
    layout: Layout,
    dtype: PixelType,
) -> None:
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)
    recipe = Preprocess(*crop, resize, resize_to, name, mean, std, crop_offset=crop_offset)
    recipe = for_input(recipe, layout, dtype)
    pixels = np.random.default_rng(0).integers(0, 256, (*old, 3), dtype=np.uint8)
    found = embed_input(pixels, recipe)
    expected = preprocess_image(Image.fromarray(pixels), recipe)
    short = [int(resize_to[0] * side / min(old)) for side in old]
    new = {"shortest": (short[0], short[1]), "squash": resize_to, "none": old}[resize]
    if starts_with_rows(old, new) and int(PIL.__version__.partition(".")[0]) < 13:
        assert found.shape == expected.shape  # older Pillow starts with the columns
    else:
        np.testing.assert_array_equal(found, expected)


def test_reads_ppm_and_npy(tmp_path: Path) -> None:
    pixels = np.full((5, 7, 3), 32, np.uint8)  # 32 is a space, which ends words of the header
    pixels[2, 3] = (1, 2, 250)
    Image.fromarray(pixels).save(tmp_path / "image.ppm")
    np.save(tmp_path / "image.npy", pixels)
    for name in ("image.ppm", "image.npy"):
        np.testing.assert_array_equal(read(str(tmp_path / name)), pixels)
    np.save(tmp_path / "float.npy", pixels / 255)
    with pytest.raises(TypeError, match="float64"):
        read(str(tmp_path / "float.npy"))


def test_is_sixty_lines_and_needs_two_libraries() -> None:
    lines = Path(edge_runner.__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 60
    imported = {line.split()[1].partition(".")[0] for line in lines if "import " in line[:40]}
    assert imported == {"json", "sys", "pathlib", "numpy", "onnxruntime"}
