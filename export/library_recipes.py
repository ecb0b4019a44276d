"""Recipes from the dictionaries in which timm and open_clip say how a model is evaluated.

Both libraries write them into JSON beside the weights; neither has to be installed to read them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from regcache.export.recipe import interpolation_named, three
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess, ResizeMode

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_TIMM_MODES: dict[str, ResizeMode] = {"center": "shortest", "squash": "squash"}
_OPEN_CLIP_MODES: dict[str, ResizeMode] = {"shortest": "shortest", "squash": "squash"}


def timm_recipe(pretrained_cfg: Mapping[str, Any]) -> Preprocess:
    """The recipe timm evaluates a model with, from its pretrained_cfg; what is missing is timm's.

    Raises InputError for the crop mode "border", another number of channels than 3, filters that
    recipes cannot express and an input that is resized by its shorter edge and not square.
    """
    said = {key: value for key, value in pretrained_cfg.items() if value}
    mode = said.get("crop_mode", "center")
    if mode not in _TIMM_MODES:
        raise InputError(f"preprocessing: crop mode {mode!r} is not supported")
    channels, height, width = said.get("input_size", (3, 224, 224))
    if channels != 3:
        raise InputError(f"preprocessing: {channels} channels are not supported")
    crop_pct = said.get("crop_pct", 0.875)
    resize_to = (math.floor(height / crop_pct), math.floor(width / crop_pct))
    return Preprocess(
        height=height,
        width=width,
        resize=_even(_TIMM_MODES[mode], resize_to),
        resize_to=resize_to,
        interpolation=interpolation_named(said.get("interpolation", "bicubic")),
        mean=three(said.get("mean", IMAGENET_MEAN)),
        std=three(said.get("std", IMAGENET_STD)),
    )


def open_clip_recipe(
    preprocess_cfg: Mapping[str, Any], image_size: int | Sequence[int]
) -> Preprocess:
    """The recipe open_clip evaluates a model with; what is missing is open_clip's own.

    `image_size`: of the vision tower, which goes before the preprocess_cfg's.
    Raises InputError for the resize mode "longest", which pads, filters that recipes cannot
    express and an input that is resized by its shorter edge and not square.
    """
    said = {key: value for key, value in preprocess_cfg.items() if value}
    height, width = (image_size,) * 2 if isinstance(image_size, int) else image_size
    mode = said.get("resize_mode", "shortest")
    if mode not in _OPEN_CLIP_MODES:
        raise InputError(f"preprocessing: resize mode {mode} is not supported")
    interpolation = said.get("interpolation", "bicubic")
    return Preprocess(
        height=height,
        width=width,
        resize=_even(_OPEN_CLIP_MODES[mode], (height, width)),
        resize_to=(height, width),
        # Random is for training: open_clip evaluates such a model with bicubic.
        interpolation=interpolation_named(
            "bicubic" if interpolation == "random" else interpolation
        ),
        mean=three(said.get("mean", CLIP_MEAN)),
        std=three(said.get("std", CLIP_STD)),
        rgb_last=True,
    )


def _even(mode: ResizeMode, resize_to: tuple[int, int]) -> ResizeMode:
    """Refuse an input that is not square where the shorter edge is resized, in either library."""
    if mode == "shortest" and resize_to[0] != resize_to[1]:
        high, wide = resize_to
        raise InputError(
            f"preprocessing: resizing the shorter edge for {high} x {wide}, which is not square, "
            "is not supported"
        )
    return mode
