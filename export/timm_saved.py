"""timm:hf-hub:ID and timm:local-dir:DIR: the config.json and the weights that timm saved there."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from regcache.export.checkpoint import SUFFIXES
from regcache.export.extras import loading_errors, quiet, reason
from regcache.export.timm_name import OPTIONS, TimmName, Value
from regcache.passes.errors import InputError

_WEIGHTS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_LAYERS = ("act_layer", "norm_layer")  # by the names that timm has for them


@dataclass(frozen=True)
class SavedModel:
    """The content of timm's config.json: model name, preprocessing, arguments of the model."""

    architecture: str
    data: dict[str, Any]
    options: dict[str, Value] = field(default_factory=dict)


def read_saved(wanted: TimmName, name: str) -> SavedModel:
    """The config.json of a repository or folder.

    Raises InputError, beginning with `name`, where it is missing or not timm's, and for arguments
    of the model that are no plain values or that `?OPTIONS` do not know either.
    """
    file = _find(wanted, "config.json", name)
    if file is None:
        raise InputError(f"{name}: no config.json there")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{name}: config.json: {reason(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        hint = ""
        if isinstance(config, dict) and "model_type" in config:
            hint = f"; did you mean hf:{wanted.place}?"
        raise InputError(f"{name}: config.json names no architecture of timm{hint}")
    data = config.get("pretrained_cfg", config)  # older files are that part alone
    if not isinstance(data, dict):
        raise InputError(f"{name}: config.json: pretrained_cfg is no object")
    return SavedModel(config["architecture"], data, _options(config.get("model_args") or {}, name))


def find_weights(wanted: TimmName, name: str) -> Path:
    """The file of weights beside the config.json, fetched where it is on the hub.

    Raises InputError, beginning with `name`, where there is none, or several of unknown names.
    """
    for usual in _WEIGHTS:
        file = _find(wanted, usual, name)
        if file is not None:
            return file
    if wanted.origin == "hf-hub":
        raise InputError(f"{name}: it holds neither of {', '.join(_WEIGHTS)}")
    folder = Path(wanted.place).expanduser()
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        raise InputError(f"{name}: which file holds the weights is not clear: {found}")
    return files[0]


def _find(wanted: TimmName, file: str, name: str) -> Path | None:
    if wanted.origin == "local-dir":
        path = Path(wanted.place).expanduser() / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = wanted.place.partition("@")
    try:
        with quiet():
            return Path(hf_hub_download(repository, file, revision=revision or None))
    except LocalEntryNotFoundError as error:  # no network
        raise InputError(f"{name}: {reason(error)}") from error
    except EntryNotFoundError:
        return None
    except loading_errors() as error:
        raise InputError(f"{name}: {reason(error)}") from error


def _options(arguments: object, name: str) -> dict[str, Value]:
    if not isinstance(arguments, Mapping):
        raise InputError(f"{name}: config.json: model_args is no object")
    found: dict[str, Value] = {}
    for key, given in arguments.items():
        value = given[0] if key == "img_size" and _is_square(given) else given
        if value is None or (key == "in_chans" and value == 3):
            continue
        named = key in OPTIONS and isinstance(value, (bool, int, float, str))
        if not named and not (key in _LAYERS and isinstance(value, str)):
            raise InputError(f"{name}: config.json: {key}={given!r} is not supported")
        found[key] = value
    return found


def _is_square(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and value[0] == value[1]
