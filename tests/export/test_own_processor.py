"""Every source's recipe beside the processor that its own library makes, on images of all modes."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from PIL import Image
from support import zoo_models

from regcache.export.reference import Source
from regcache.export.source import open_source
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import preprocess_image
from regcache.runtime.list_images import list_images
from regcache.runtime.pixel_parity import compare_pixels

SOURCES = {
    "timm": "timm:vit_small_patch16_224",
    "timm siglip": "timm:vit_base_patch16_siglip_224",
    "open_clip": "openclip:ViT-B-16/laion2b_s34b_b88k",
    "open_clip siglip": "openclip:ViT-B-16-SigLIP/webli",
    "sample": "sample:dinov2-small",
}
CHECKPOINTS: dict[str, tuple[type[Any], Any]] = {
    "clip": (transformers.CLIPVisionConfig, transformers.CLIPImageProcessorPil),
    "siglip": (transformers.SiglipVisionConfig, transformers.SiglipImageProcessorPil),
    "dinov2": (transformers.Dinov2Config, transformers.BitImageProcessorPil),
    "dinov3": (transformers.DINOv3ViTConfig, transformers.DINOv3ViTImageProcessor),
    "vit": (transformers.ViTConfig, transformers.ViTImageProcessorPil),
    "deit": (transformers.DeiTConfig, transformers.DeiTImageProcessorPil),
}


def opened(name: str, folder: Path) -> Source:
    """A source without its weights, which no processor needs."""
    if name in SOURCES:
        return open_source(SOURCES[name])
    config, processor = CHECKPOINTS[name]
    config().save_pretrained(folder)
    processor().save_pretrained(folder)
    return open_source(f"hf:{folder}")


def recipe_of(source: Any, resolution: int | None) -> Preprocess:
    """What `export` would return, had it the weights."""
    if source.name.startswith("hf:"):
        found = source._recipe(source._config(), resolution)
    elif source.name.startswith("openclip:"):
        found = source._recipe(*source.configs(), resolution)
    elif source.name.startswith("sample:"):
        from regcache.export import sample
        from regcache.export.recipe import at_resolution

        found = at_resolution(sample._RECIPE, resolution)
    else:
        found = source._recipe(resolution)
    assert isinstance(found, Preprocess)
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of 8 bits in every mode, with and without transparency, upright and lying."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (30, 40, 3), dtype=np.uint8))
    picture = coarse.resize((402, 301), Image.Resampling.BICUBIC)
    picture.save(folder / "rgb.png")
    picture.rotate(90, expand=True).save(folder / "upright.jpg")
    picture.convert("L").save(folder / "grey.png")
    picture.convert("CMYK").save(folder / "print.jpg")
    picture.quantize(16).save(folder / "palette.png", transparency=3)
    alpha = Image.fromarray(random.integers(0, 256, (9, 12), dtype=np.uint8)).resize(picture.size)
    see_through = picture.copy()
    see_through.putalpha(alpha)
    see_through.save(folder / "rgba.png")
    see_through.convert("LA").save(folder / "la.png")
    return folder


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("resolution", [None, 210])
@pytest.mark.parametrize("name", [*SOURCES, *CHECKPOINTS])
def test_a_recipe_gives_the_pixels_of_the_source(
    name: str, resolution: int | None, images: Path, tmp_path: Path
) -> None:
    source = opened(name, tmp_path)
    recipe, processor = recipe_of(source, resolution), source.processor(resolution=resolution)
    assert processor is not None
    found = compare_pixels(list_images(images), recipe, processor)
    assert found is not None
    assert (found.n_images, found.n_different) == (7, 0), found
    assert found.max_difference < (1 if name == "dinov3" else 0.01), found


@pytest.mark.parametrize("name", ["timm", "open_clip", "clip", "vit"])
def test_deep_grey_is_scaled_where_the_source_clips_it(
    name: str, images: Path, tmp_path: Path
) -> None:
    """Pillow makes it white, and so do the libraries; scaled to 8 bits, both see the same."""
    source = opened(name, tmp_path)
    recipe, processor = recipe_of(source, None), source.processor()
    assert processor is not None
    with Image.open(images / "grey.png") as grey:
        shallow = grey.copy()
    deep = Image.fromarray(np.maximum(np.asarray(shallow), 1).astype(np.uint16) * 257)
    assert np.ptp(processor(deep), axis=(1, 2)) == pytest.approx([0, 0, 0], abs=1e-6)
    np.testing.assert_allclose(preprocess_image(deep, recipe), processor(shallow), atol=0.02)


def test_a_checkpoint_without_a_processor_has_none(tmp_path: Path) -> None:
    source = zoo_models.FAMILIES["dinov2-s14"](tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    assert source.processor() is None
