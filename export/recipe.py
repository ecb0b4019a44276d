"""Recipes read from what the libraries say about their own preprocessing."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from regcache.passes.errors import InputError
from regcache.passes.preprocess import Interpolation, Preprocess, ResizeMode

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

    Raises InputError for a processor whose output has no fixed size, or that pads or resamples
    in a way recipes cannot express.
    """
    mode, resize_to = _resize(processor)
    height, width = resize_to
    if getattr(processor, "do_center_crop", False):
        height, width = processor.crop_size.height, processor.crop_size.width
    elif mode != "squash":
        raise InputError("preprocessing: neither a crop nor a resize fixes the image size")
    if mode == "none":
        resize_to = (height, width)
    if getattr(processor, "do_pad", False):
        raise InputError("preprocessing: padding is not supported")
    normalize = processor.do_normalize
    return Preprocess(
        height=height,
        width=width,
        resize=mode,
        resize_to=resize_to,
        interpolation=_pillow_filter(processor.resample) if mode != "none" else "bicubic",
        mean=three(processor.image_mean) if normalize else (0.0, 0.0, 0.0),
        std=three(processor.image_std) if normalize else (1.0, 1.0, 1.0),
        rescale=float(processor.rescale_factor) if processor.do_rescale else 1.0,
        crop_offset="floor",
    )


def _resize(processor: Any) -> tuple[ResizeMode, tuple[int, int]]:
    if not processor.do_resize:
        return "none", (0, 0)
    size = processor.size
    if size.shortest_edge and not size.longest_edge:
        return "shortest", (size.shortest_edge, size.shortest_edge)
    if size.height and size.width:
        return "squash", (size.height, size.width)
    raise InputError(f"preprocessing: resizing to {size} is not supported")


def _pillow_filter(resample: Any) -> Interpolation:
    # torchvision's InterpolationMode carries a name, Pillow's filter a number
    if isinstance(getattr(resample, "value", None), str):
        return interpolation_named(resample.value)
    if int(resample) in _PILLOW_FILTERS:
        return _PILLOW_FILTERS[int(resample)]
    raise InputError(f"preprocessing: Pillow filter {int(resample)} is not supported")
