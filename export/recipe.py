"""Recipes made from the preprocessing objects and settings of other libraries."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from PIL import Image

from regcache.passes.errors import InputError
from regcache.passes.preprocess import (
    Colour,
    Interpolation,
    Layout,
    PixelType,
    Preprocess,
    ResizeMode,
)

# Pillow's numbers, as preprocessor_config.json stores them.
_PILLOW_FILTERS: dict[int, Interpolation] = {
    0: "nearest",
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}
_NAMES: tuple[Interpolation, ...] = ("nearest", "bilinear", "bicubic", "lanczos")


def at_resolution(recipe: Preprocess, resolution: int | None) -> Preprocess:
    """The recipe for a square input of that side; crop and resize scale by the same ratio.

    Raises InputError when a resolution is given for an input that is not square.
    """
    if resolution is None or (recipe.height, recipe.width) == (resolution, resolution):
        return recipe
    if recipe.height != recipe.width:
        raise InputError(
            f"a resolution needs a square input, this one is {recipe.height} x {recipe.width}"
        )
    height, width = (round(side * resolution / recipe.height) for side in recipe.resize_to)
    return replace(recipe, height=resolution, width=resolution, resize_to=(height, width))


def for_input(recipe: Preprocess, layout: Layout, dtype: PixelType) -> Preprocess:
    """The recipe for a graph that takes images in that layout and type.

    A graph that takes uint8 normalises by itself, so the recipe's own scaling is left out.
    """
    if dtype == "uint8":
        plain = replace(recipe, rescale=1.0, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
        return replace(plain, layout=layout, dtype=dtype)
    return replace(recipe, layout=layout, dtype=dtype)


def interpolation_named(name: str) -> Interpolation:
    """Raises InputError for a filter that recipes cannot express."""
    for known in _NAMES:
        if name == known:
            return known
    raise InputError(f"preprocessing: interpolation {name!r} is not one of {', '.join(_NAMES)}")


def three(values: Iterable[float] | float) -> tuple[float, float, float]:
    """One value per RGB channel. Raises InputError when there are not 1 or 3."""
    numbers = [float(v) for v in values] if isinstance(values, Iterable) else [float(values)]
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise InputError(f"preprocessing: expected 3 channels, got {len(numbers)}")
    return numbers[0], numbers[1], numbers[2]


def from_image_processor(processor: Any) -> Preprocess:
    """The recipe of a transformers image processor that resizes, crops and normalises.

    What it does with transparency is tried on a pixel. Raises InputError for a processor whose
    output has no fixed size, or that pads or resamples in a way recipes cannot express.
    """
    recipe = from_settings(processor, convnext=type(processor).__name__.startswith("ConvNext"))
    return replace(recipe, background=_background(processor))


def from_settings(settings: Any, *, convnext: bool) -> Preprocess:
    """The recipe of an image processor's settings: its attributes, or its file.

    `convnext`: whether they are ConvNext's, which resizes to more than the size and crops, by its
    crop_pct, and from 384 pixels on to exactly the size. Raises InputError as
    `from_image_processor` does.
    """
    mode, resize_to = _convnext_resize(settings) if convnext else _resize(settings)
    height, width = resize_to
    if convnext and mode != "none":
        height = width = settings.size.shortest_edge
    elif getattr(settings, "do_center_crop", False):
        height, width = settings.crop_size.height, settings.crop_size.width
    elif mode != "squash":
        raise InputError("preprocessing: neither a crop nor a resize fixes the image size")
    if mode == "none":
        resize_to = (height, width)
    if getattr(settings, "do_pad", False):
        raise InputError("preprocessing: padding is not supported")
    normalize = settings.do_normalize
    return Preprocess(
        height=height,
        width=width,
        resize=mode,
        resize_to=resize_to,
        interpolation=_pillow_filter(settings.resample) if mode != "none" else "bicubic",
        mean=three(settings.image_mean) if normalize else (0.0, 0.0, 0.0),
        std=three(settings.image_std) if normalize else (1.0, 1.0, 1.0),
        rescale=float(settings.rescale_factor) if settings.do_rescale else 1.0,
        crop_offset="floor",
    )


def _resize(settings: Any) -> tuple[ResizeMode, tuple[int, int]]:
    if not settings.do_resize:
        return "none", (0, 0)
    size = settings.size
    if getattr(settings, "keep_aspect_ratio", False):
        raise InputError("preprocessing: keep_aspect_ratio leaves the size to the image")
    if size.shortest_edge and not size.longest_edge:
        return "shortest", (size.shortest_edge, size.shortest_edge)
    if size.height and size.width:
        multiple = getattr(settings, "ensure_multiple_of", None) or 1
        height, width = (round(side / multiple) * multiple for side in (size.height, size.width))
        return "squash", (height, width)
    raise InputError(f"preprocessing: resizing to {size} is not supported")


def _convnext_resize(settings: Any) -> tuple[ResizeMode, tuple[int, int]]:
    if not settings.do_resize:
        return "none", (0, 0)
    side = settings.size.shortest_edge
    if not side or getattr(settings, "do_center_crop", False):
        raise InputError("preprocessing: ConvNext needs a shortest_edge and no do_center_crop")
    if side >= 384:
        return "squash", (side, side)
    larger = int(side / settings.crop_pct)
    return "shortest", (larger, larger)


def _background(processor: Any) -> Colour | None:
    """What a processor shows in the place of a transparent pixel; None where that is its colour.

    Without do_convert_rgb it takes no transparent image at all.
    """
    if not getattr(processor, "do_convert_rgb", False):
        return None
    stored = (10, 20, 30)
    steps = ("resize", "center_crop", "rescale", "normalize", "pad")
    pixel = processor(
        Image.new("RGBA", (8, 8), (*stored, 0)),
        return_tensors="np",
        **{f"do_{step}": False for step in steps},
    )
    red, green, blue = (int(value) for value in pixel["pixel_values"][0][:, 0, 0])
    return None if (red, green, blue) == stored else (red, green, blue)


def _pillow_filter(resample: Any) -> Interpolation:
    if resample is None:
        return "bilinear"  # as both backends of transformers do
    # torchvision's InterpolationMode carries a name, Pillow's filter a number
    if isinstance(getattr(resample, "value", None), str):
        return interpolation_named(resample.value)
    if int(resample) in _PILLOW_FILTERS:
        return _PILLOW_FILTERS[int(resample)]
    raise InputError(f"preprocessing: Pillow filter {int(resample)} is not supported")
