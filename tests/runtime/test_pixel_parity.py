"""A recipe beside a library's own processor: which images are compared, and what is said."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.tiny_source import RECIPE, photos

from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import preprocess_image
from regcache.runtime.list_images import list_images
from regcache.runtime.pixel_parity import COMPARED, PixelParity, Processor, compare_pixels

ON_WHITE = replace(RECIPE, background=(255, 255, 255))


def library(recipe: Preprocess) -> Processor:
    """A library that does what a recipe says."""
    return lambda image: preprocess_image(image, recipe)


def compared(folder: Path, processor: Processor, recipe: Preprocess = RECIPE) -> PixelParity:
    found = compare_pixels(list_images(folder), recipe, processor)
    assert found is not None
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Photographs, the last of them half transparent, and one of 16 bits."""
    folder = photos(tmp_path / "images", 30, seed=3)
    with Image.open(folder / "29.png") as image:
        image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(folder / "see_through.png")
    ramp = np.linspace(0, 65535, 1200, dtype=np.uint16).reshape(30, 40)
    Image.fromarray(ramp).save(folder / "deep.png")
    return folder


def test_the_same_pixels_are_no_difference(folder: Path) -> None:
    found = compared(folder, library(RECIPE))
    assert (found.n_images, found.n_different, found.max_difference) == (COMPARED, 0, 0.0)
    assert found.warning("hf:a") is None


def test_one_image_of_each_mode_is_among_those_compared(folder: Path) -> None:
    modes: list[str] = []

    def processor(image: Image.Image) -> NDArray[np.float32]:
        modes.append(image.mode)
        return preprocess_image(image, RECIPE)

    assert compared(folder, processor).n_images == COMPARED
    assert sorted(set(modes)) == ["I;16", "RGB", "RGBA"]


def test_transparency_that_the_recipe_drops_is_told(folder: Path) -> None:
    found = compared(folder, library(ON_WHITE))
    assert (found.n_different, found.worst_image) == (1, "see_through.png")
    assert found.max_difference > 50
    said = found.warning("hf:some/model")
    assert said is not None
    assert said.startswith("the pixels are not those of hf:some/model's own processor: 1 of 8")
    assert said.endswith(f"{found.max_difference:.3g} of 255 grey levels in see_through.png")
    assert compared(folder, library(ON_WHITE), ON_WHITE).n_different == 0


def test_grey_that_a_processor_clips_is_told_as_such(folder: Path) -> None:
    found = compared(folder, lambda image: preprocess_image(image.convert("RGB"), RECIPE))
    assert (found.n_different, found.worst_mode) == (1, "I;16")
    assert "more than 8 bits" in str(found.warning("hf:a"))


@pytest.mark.parametrize(
    ("shift", "different"), [(1 / 255 / 0.25, 0), (1.1 / 255 / 0.25, COMPARED)]
)
def test_one_grey_level_is_rounding(folder: Path, shift: float, different: int) -> None:
    found = compared(folder, lambda image: preprocess_image(image, RECIPE) + np.float32(shift))
    assert found.n_different == different


def test_another_size_is_all_the_difference_there_can_be(folder: Path) -> None:
    found = compared(folder, lambda image: preprocess_image(image, RECIPE)[:, 1:])
    assert found.max_difference == 255
    assert found.n_different == COMPARED


def test_what_cannot_be_compared_is_left_out(folder: Path, tmp_path: Path) -> None:
    def refuse(image: Image.Image) -> Any:
        raise ValueError("mean must have 4 elements")

    assert compare_pixels(list_images(folder), RECIPE, refuse) is None
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert compare_pixels([broken], RECIPE, library(RECIPE)) is None
