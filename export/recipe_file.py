"""Recipes from files: ours, and those that transformers, open_clip and timm write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from regcache.export.library_recipes import open_clip_recipe, timm_recipe
from regcache.export.processor_config import processor_recipe
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

_PROCESSOR, _MODEL = "preprocessor_config.json", "config.json"
# In transformers, what a processor_config.json holds of images goes first.
_BESIDE = ("processor_config.json", _PROCESSOR, "open_clip_config.json", _MODEL)
_PROCESSOR_KEYS = {
    *("image_processor_type", "feature_extractor_type", "do_resize", "do_normalize"),
    *("image_mean", "image_std", "do_rescale", "do_center_crop"),
}


def read_recipe(path: Path) -> Preprocess:
    """The recipe in a JSON file, which is told by its keys:

    - a preprocess.json (docs/preprocessing.md);
    - transformers' preprocessor_config.json, or a processor_config.json that holds one;
    - open_clip's open_clip_config.json;
    - timm's config.json, or a pretrained_cfg alone.

    Raises InputError, naming the file, when it is none of them, cannot be read, or says what a
    recipe cannot express.
    """
    try:
        recipe = _recipe_of(_read(path), path)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    if recipe is None:
        raise InputError(
            f"{path}: not a preprocessing recipe: neither a preprocess.json nor a configuration of "
            "transformers' image processors, open_clip or timm"
        )
    return recipe


def recipe_beside(model: Path) -> Preprocess | None:
    """The recipe that a library left beside a model file, or above its folder where that is `onnx`.

    Looked for are processor_config.json, preprocessor_config.json, open_clip_config.json and timm's
    config.json. None where there is none, as beside a config.json that says nothing of images.
    Raises InputError, naming the file, when one cannot be read or expressed.
    """
    folder = model.absolute().parent  # where a link lies, as in the hub's cache, not what it means
    for place in (folder, folder.parent) if folder.name == "onnx" else (folder,):
        for file in (place / name for name in _BESIDE):
            try:
                recipe = _recipe_of(_read(file), file) if _is_candidate(file) else None
            except InputError as error:
                raise InputError(f"{file}: {error} (--preprocess FILE replaces it)") from error
            if recipe is not None:
                return recipe
    return None


def _is_candidate(file: Path) -> bool:
    """Whether a file is there, and is no config.json without anything about images."""
    if not file.is_file():
        return False
    return file.name != _MODEL or _model_config(file.parent) is not None


def _recipe_of(fields: Mapping[str, Any], file: Path) -> Preprocess | None:
    """The recipe in a parsed file; None where it has none of the known keys."""
    try:
        if "resize" in fields or "resize_to" in fields:
            return Preprocess.from_fields(dict(fields))
        if "image_processor" in fields or _PROCESSOR_KEYS & set(fields) or file.name == _PROCESSOR:
            config = _model_config(file.parent) or {}
            return processor_recipe(fields.get("image_processor", fields), config.get("model_type"))
        if "model_cfg" in fields:
            said = fields.get("preprocess_cfg", {})
            vision = fields["model_cfg"].get("vision_cfg", {})
            return open_clip_recipe(said, vision.get("image_size", said.get("size", 224)))
        if "pretrained_cfg" in fields or "input_size" in fields:
            return timm_recipe(fields.get("pretrained_cfg", fields))
    except (AttributeError, OverflowError, TypeError, ValueError) as error:
        # A value of another type than the library writes.
        raise InputError(f"not a preprocessing recipe: {error}") from error
    return None


def _model_config(folder: Path) -> Mapping[str, Any] | None:
    """A model's config.json, None where there is none that can be read."""
    try:
        return _read(folder / _MODEL)
    except InputError:
        return None


def _read(file: Path) -> Mapping[str, Any]:
    try:
        fields = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"not a preprocessing recipe: {error}") from error
    if not isinstance(fields, dict):
        raise InputError("not a preprocessing recipe: it holds no JSON object")
    return fields
