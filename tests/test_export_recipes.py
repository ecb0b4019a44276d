"""Recipes against the libraries' own preprocessing, on the same image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import transformers
import zoo
from numpy.typing import NDArray
from PIL import Image

from regcache.export.recipe import at_resolution, from_image_processor
from regcache.export.source import open_source
from regcache.export.timm_vit import data_recipe
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import preprocess_image

# One grey level after normalisation is 1 / 255 / 0.22 = 0.018.
ONE_LEVEL = 0.02


def photo(width: int = 402, height: int = 302) -> Image.Image:
    """A smooth random picture."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def difference(recipe: Preprocess, expected: Any, image: Image.Image | None = None) -> float:
    actual = preprocess_image(image or photo(), recipe)
    theirs: NDArray[np.float32] = np.asarray(expected, dtype=np.float32)
    assert actual.shape == theirs.shape
    return float(np.abs(actual - theirs).max())


PROCESSORS: dict[str, Callable[[], Any]] = {
    "clip": transformers.CLIPImageProcessorPil,
    "siglip": transformers.SiglipImageProcessorPil,
    "dinov2": lambda: transformers.BitImageProcessorPil(size={"shortest_edge": 256}),
    "vit": transformers.ViTImageProcessorPil,
    "deit": transformers.DeiTImageProcessorPil,
    "no resize": lambda: transformers.CLIPImageProcessorPil(do_resize=False),
    "no normalize": lambda: transformers.ViTImageProcessorPil(do_normalize=False),
    "no rescale": lambda: transformers.ViTImageProcessorPil(do_rescale=False),
    "lanczos": lambda: transformers.ViTImageProcessorPil(resample=1),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_recipe_does_what_the_image_processor_does(name: str) -> None:
    processor = PROCESSORS[name]()
    expected = processor(photo(), return_tensors="np")["pixel_values"][0]
    assert difference(from_image_processor(processor), expected) <= 1e-5


@pytest.mark.parametrize("width", [224, 225, 226, 227, 228, 231])
def test_center_crops_agree_at_every_margin(width: int) -> None:
    image = photo(width, 227)
    transformers_own = transformers.CLIPImageProcessorPil(do_resize=False)
    expected = transformers_own(image, return_tensors="np")["pixel_values"][0]
    recipe = from_image_processor(transformers_own)
    assert recipe.crop_offset == "floor"
    assert difference(recipe, expected, image) <= 1e-5


def test_dinov3_is_matched_to_one_grey_level() -> None:
    # its processor resizes floats with torchvision; a recipe resizes bytes with Pillow
    processor = transformers.DINOv3ViTImageProcessor()
    expected = processor(photo(), return_tensors="np")["pixel_values"][0]
    assert difference(from_image_processor(processor), expected) <= ONE_LEVEL


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "vit_base_patch16_siglip_224", "vit_small_patch14_dinov2"]
)
def test_a_recipe_does_what_timm_does(name: str) -> None:
    library: Any = timm
    config = library.get_pretrained_cfg(name).to_dict()
    data = library.data.resolve_data_config(pretrained_cfg=config)
    expected = library.data.create_transform(**data, is_training=False)(photo())
    assert difference(data_recipe(config), expected) <= 1e-5


@pytest.mark.parametrize(
    ("tag", "config"),
    [
        ("openclip:ViT-B-16/laion2b_s34b_b88k", {}),
        ("openclip:ViT-B-16-SigLIP/webli", {"mean": 0.5, "std": 0.5, "resize_mode": "squash"}),
    ],
)
def test_a_recipe_does_what_open_clip_does(tag: str, config: dict[str, Any]) -> None:
    source: Any = open_source(tag)
    transform = open_clip.image_transform(224, is_train=False, **config)
    recipe = source._recipe(*source.configs(), None)
    assert difference(recipe, transform(photo())) <= 1e-5


def test_the_recipe_comes_from_the_checkpoint(tmp_path: Path) -> None:
    source: Any = zoo.FAMILIES["dinov2-s14"](tmp_path)
    recipe = source._recipe(source._config(), None)
    assert recipe == Preprocess(
        height=224,
        width=224,
        resize="shortest",
        resize_to=(256, 256),
        interpolation="bicubic",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        rescale=0.00392156862745098,
        crop_offset="floor",
    )
    (tmp_path / "preprocessor_config.json").unlink()
    assert source._recipe(source._config(), None) is None
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="preprocessing: "):
        source._recipe(source._config(), None)


def test_crop_and_resize_scale_by_the_same_ratio() -> None:
    recipe = Preprocess(224, 224, "shortest", (256, 256), "bicubic", (0, 0, 0), (1, 1, 1))
    larger = at_resolution(recipe, 336)
    assert (larger.height, larger.width, larger.resize_to) == (336, 336, (384, 384))
    assert at_resolution(recipe, None) is recipe
    oblong = Preprocess(224, 112, "squash", (224, 112), "bicubic", (0, 0, 0), (1, 1, 1))
    with pytest.raises(InputError, match="needs a square input, this one is 224 x 112"):
        at_resolution(oblong, 336)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"do_center_crop": False}, "neither a crop nor a resize fixes the image size"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "resizing to .* is not supported"),
        ({"resample": 4}, "Pillow filter 4 is not supported"),
    ],
)
def test_what_a_recipe_cannot_express_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        from_image_processor(transformers.CLIPImageProcessorPil(**options))


def test_crop_modes_of_timm_that_pad_are_refused() -> None:
    with pytest.raises(InputError, match="crop mode 'border' is not supported"):
        data_recipe({"crop_mode": "border"})
