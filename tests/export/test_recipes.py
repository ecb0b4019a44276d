"""Recipes against the libraries' own preprocessing, on the same image."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import transformers
from numpy.typing import NDArray
from PIL import Image
from support import zoo_models

from regcache.export.library_recipes import open_clip_recipe, timm_recipe
from regcache.export.recipe import at_resolution, for_input, from_image_processor
from regcache.export.source import open_source
from regcache.export.timm_vit import data_recipe
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import preprocess_image, read_image

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
    "beit": transformers.BeitImageProcessorPil,
    "blip": transformers.BlipImageProcessorPil,
    "convnext": lambda: transformers.ConvNextImageProcessorPil(size={"shortest_edge": 224}),
    "convnext at 384": transformers.ConvNextImageProcessorPil,
    "dpt": lambda: transformers.DPTImageProcessorPil(size=380, ensure_multiple_of=14),
}


@pytest.mark.parametrize("name", PROCESSORS)
def test_a_recipe_does_what_the_image_processor_does(name: str) -> None:
    processor = PROCESSORS[name]()
    expected = processor(photo(), return_tensors="np")["pixel_values"][0]
    assert difference(from_image_processor(processor), expected) <= 1e-5


def see_through() -> dict[str, Image.Image]:
    """The picture with an alpha channel, and as a palette of which some colours are transparent."""
    coarse = np.random.default_rng(1).integers(0, 256, (9, 12), dtype=np.uint8)
    rgba = photo()
    rgba.putalpha(Image.fromarray(coarse).resize(rgba.size, Image.Resampling.NEAREST))
    palette = photo().quantize(16)
    palette.info["transparency"] = bytes(range(0, 256, 16))
    return {"alpha": rgba, "palette": palette}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ["alpha", "palette"])
@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "blip"])
def test_transparency_shows_what_the_image_processor_shows(name: str, kind: str) -> None:
    processor, image = PROCESSORS[name](), see_through()[kind]
    expected = processor(image, return_tensors="np")["pixel_values"][0]
    recipe = from_image_processor(processor)
    assert recipe.background == (255, 255, 255)
    assert difference(recipe, expected, image) <= 1e-5
    assert difference(replace(recipe, background=None), expected, image) > 1


@pytest.mark.parametrize("name", ["vit", "deit", "beit", "convnext", "dpt"])
def test_processors_that_take_no_transparency_leave_it_out(name: str) -> None:
    processor, image = PROCESSORS[name](), see_through()["alpha"]
    with pytest.raises(ValueError, match="mean must have 4 elements"):
        processor(image, return_tensors="np")
    expected = processor(image.convert("RGB"), return_tensors="np")["pixel_values"][0]
    recipe = from_image_processor(processor)
    assert recipe.background is None
    assert difference(recipe, expected, image) <= 1e-5
    asked = from_image_processor(type(processor)(do_convert_rgb=True))
    assert asked.background == (255, 255, 255)


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


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ["alpha", "palette"])
def test_transparency_is_dropped_as_timm_drops_it(kind: str, tmp_path: Path) -> None:
    library: Any = timm
    config = library.get_pretrained_cfg("vit_base_patch16_224").to_dict()
    data = library.data.resolve_data_config(pretrained_cfg=config)
    transform = library.data.create_transform(**data, is_training=False)
    (tmp_path / "class").mkdir()
    see_through()[kind].save(tmp_path / "class" / "a.png")
    (expected, _label), *others = library.data.ImageDataset(str(tmp_path), transform=transform)
    assert not others
    recipe = data_recipe(config)
    assert difference(recipe, expected, Image.open(tmp_path / "class" / "a.png")) <= 1e-5
    found = read_image(tmp_path / "class" / "a.png", recipe)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", ["alpha", "palette"])
@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_transparency_is_resized_as_open_clip_resizes_it(
    kind: str, mode: str, tmp_path: Path
) -> None:
    image = see_through()[kind]
    expected = open_clip.image_transform(224, is_train=False, resize_mode=mode)(image)
    recipe = open_clip_recipe({"resize_mode": mode}, 224)
    assert difference(recipe, expected, image) <= 1e-5
    assert difference(replace(recipe, rgb_last=False), expected, image) > 1
    image.save(tmp_path / "a.png")
    np.testing.assert_allclose(read_image(tmp_path / "a.png", recipe), expected, atol=1e-5)


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
    source: Any = zoo_models.FAMILIES["dinov2-s14"](tmp_path)
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
        background=(255, 255, 255),
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
        ({"do_pad": True}, "padding is not supported"),
    ],
)
def test_what_a_recipe_cannot_express_is_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        from_image_processor(transformers.CLIPImageProcessorPil(**options))


def test_crop_modes_of_timm_that_pad_are_refused() -> None:
    with pytest.raises(InputError, match="crop mode 'border' is not supported"):
        data_recipe({"crop_mode": "border"})


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: timm_recipe({"input_size": [1, 224, 224]}), "1 channels"),
        (lambda: timm_recipe({"input_size": [3, 224, 112]}), "256 x 128, which is not square"),
        (lambda: timm_recipe({"interpolation": "hamming"}), "'hamming' is not one of"),
        (lambda: open_clip_recipe({"resize_mode": "longest"}, 224), "longest is not supported"),
        (lambda: open_clip_recipe({}, (224, 112)), "which is not square"),
    ],
)
def test_what_timm_and_open_clip_do_otherwise_is_refused(
    make: Callable[[], Preprocess], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        make()


def test_a_graph_that_takes_bytes_normalises_by_itself() -> None:
    recipe = Preprocess(8, 8, "squash", (8, 8), "bicubic", (0.1, 0.2, 0.3), (1, 2, 3))
    taken = for_input(recipe, "nhwc", "uint8")
    assert (taken.shape, taken.dtype) == ((8, 8, 3), "uint8")
    pixels = preprocess_image(photo(8, 8), taken)
    np.testing.assert_array_equal(pixels, np.asarray(photo(8, 8)))
    assert for_input(recipe, "nhwc", "float32") == replace(recipe, layout="nhwc")
    assert for_input(recipe, "nchw", "float32") == recipe
