"""transformers' preprocessor_config.json -> a recipe, without transformers.

A key that is missing has the default of the processor's class, null turns it off, as in
transformers 5.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from regcache.export.library_recipes import CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD
from regcache.export.recipe import from_settings
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

Settings = Mapping[str, Any]


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


_BASE: Settings = {
    "do_convert_rgb": False,
    "do_resize": True,
    "size": _square(224),
    "default_to_square": True,  # what a size means that is one number
    "resample": 3,
    "do_center_crop": False,
    "crop_size": None,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": (0.5, 0.5, 0.5),
    "image_std": (0.5, 0.5, 0.5),
    "do_pad": False,
}
_IMAGENET: Settings = {**_BASE, "image_mean": IMAGENET_MEAN, "image_std": IMAGENET_STD}
_BLIP: Settings = {
    **_BASE,
    "do_convert_rgb": True,
    "size": _square(384),
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_CLIP: Settings = {
    **_BLIP,
    "size": {"shortest_edge": 224},
    "default_to_square": False,
    "do_center_crop": True,
    "crop_size": _square(224),
}
PROCESSORS: Mapping[str, Settings] = {
    "Beit": {**_BASE, "crop_size": _square(224)},
    "Bit": _CLIP,
    "Blip": _BLIP,
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "ConvNext": {
        **_BASE,
        "size": {"shortest_edge": 384},
        "default_to_square": False,
        "crop_pct": 224 / 256,
    },
    "DINOv3ViT": {**_IMAGENET, "resample": 2},
    "DPT": {**_BASE, "size": _square(384), "keep_aspect_ratio": False, "ensure_multiple_of": 1},
    "DeiT": {
        **_BASE,
        "size": _square(256),
        "do_center_crop": True,
        "crop_size": _square(224),
    },
    "OwlViT": {**_BLIP, "size": _square(768), "crop_size": _square(768)},
    "Pvt": _IMAGENET,
    "Segformer": {**_IMAGENET, "size": _square(512), "resample": 2},
    "Siglip": {**_BASE, "do_convert_rgb": True, "default_to_square": False},
    "ViT": {**_BASE, "resample": 2},
}
"""What a processor does where its file says nothing, by its class without "ImageProcessor"."""

MODEL_TYPES: Mapping[str, str] = {
    **dict.fromkeys(("beit", "data2vec-vision"), "Beit"),
    **dict.fromkeys(("dinov2", "dinov2_with_registers", "hiera", "pixio"), "Bit"),
    **dict.fromkeys(("aimv2", "aimv2_vision_model", "clip", "clip_vision_model"), "CLIP"),
    **dict.fromkeys(("metaclip_2", "mlcd"), "CLIP"),
    **dict.fromkeys(("siglip", "siglip_vision_model"), "Siglip"),
    **dict.fromkeys(("clipseg", "ijepa", "swin", "swinv2", "vit", "vit_mae", "vit_msn"), "ViT"),
    **dict.fromkeys(("convnext", "convnextv2"), "ConvNext"),
    **dict.fromkeys(("blip", "blip-2", "instructblip"), "Blip"),
    **dict.fromkeys(("depth_anything", "dpt"), "DPT"),
    "chinese_clip": "ChineseCLIP",
    "deit": "DeiT",
    "dinov3_vit": "DINOv3ViT",
    "owlvit": "OwlViT",
    "pvt": "Pvt",
    "segformer": "Segformer",
}
"""The processor of a model whose preprocessor_config.json does not name one."""


def processor_recipe(said: Settings, model_type: str | None = None) -> Preprocess:
    """The recipe of a preprocessor_config.json, of any age: sizes may be numbers.

    `model_type`: of the config.json beside it, which decides where the file names no class; where
    neither does, the file has to set every value itself. Raises InputError for a class that is not
    in PROCESSORS and for what recipes cannot express.
    """
    kind = _kind(said, model_type)
    defaults = _BASE if kind is None else PROCESSORS[kind]
    fields = {**defaults, **{key: said[key] for key in said if key in defaults}}
    if said.get("use_square_size"):
        raise InputError("preprocessing: use_square_size is not supported")
    if fields["do_resize"]:
        fields["size"] = _size("size", fields["size"], square=fields["default_to_square"])
    if fields["do_center_crop"]:
        fields["crop_size"] = _size("crop_size", fields["crop_size"], square=True)
    if fields["do_rescale"]:
        fields["rescale_factor"] = _positive("rescale_factor", fields["rescale_factor"])
    if fields.get("crop_pct") is not None:
        fields["crop_pct"] = _positive("crop_pct", fields["crop_pct"])
    recipe = from_settings(SimpleNamespace(**fields), convnext=kind == "ConvNext")
    return replace(recipe, background=(255, 255, 255) if fields["do_convert_rgb"] else None)


def _kind(said: Settings, model_type: str | None) -> str | None:
    """The class among PROCESSORS; None where the file sets every value itself."""
    name = said.get("image_processor_type") or said.get("feature_extractor_type")
    if name is None:
        known = MODEL_TYPES.get(str(model_type))
        if known is None:
            _check_explicit(said)
        return known
    kind = str(name).removesuffix("Fast").removesuffix("Pil")
    kind = kind.removesuffix("FeatureExtractor").removesuffix("ImageProcessor")
    if kind not in PROCESSORS:
        raise InputError(
            f"preprocessing: {name} is not supported; supported are {', '.join(PROCESSORS)}"
        )
    return kind


def _check_explicit(said: Settings) -> None:
    """Raises InputError where the file needs a default in which classes differ."""
    needed = ["do_resize", "do_normalize"]
    needed += ["size", "resample"] if said.get("do_resize") else []
    needed += ["image_mean", "image_std"] if said.get("do_normalize") else []
    missing = [key for key in needed if key not in said]
    if missing:
        raise InputError(
            f"preprocessing: names no image_processor_type and has no {', '.join(missing)}"
        )


def _size(key: str, value: Any, *, square: bool) -> SimpleNamespace:
    """A size in any of the forms that transformers reads: n, [height, width] or by name."""
    if isinstance(value, int):
        value = _square(value) if square else {"shortest_edge": value}
    if isinstance(value, (list, tuple)) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    known = isinstance(value, Mapping) and set(value) in ({"height", "width"}, {"shortest_edge"})
    if not known or not all(isinstance(side, int) and side > 0 for side in value.values()):
        raise InputError(f"preprocessing: {key} {value} is not supported")
    empty = {"height": None, "width": None, "shortest_edge": None, "longest_edge": None}
    return SimpleNamespace(**{**empty, **value})


def _positive(key: str, value: Any) -> float:
    if not isinstance(value, (int, float)) or not math.isfinite(value) or value <= 0:
        raise InputError(f"preprocessing: {key} must be a positive number, not {value!r}")
    return float(value)
