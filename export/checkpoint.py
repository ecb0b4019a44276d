"""Weights in a file: safetensors, or a PyTorch file of which nothing but tensors is unpickled."""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regcache.export.extras import loading_errors, quiet, reason
from regcache.export.suggest import did_you_mean
from regcache.passes.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar")
# Where trainers keep the weights, averaged ones first, as timm itself looks for them.
_NESTED = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict")
_ZIP, _PICKLE = b"PK\x03\x04", b"\x80"
_LARGEST_HEADER = 100_000_000


def check_file(path: Path, name: str) -> None:
    """Raises InputError, beginning with `name`, where there is no file to read weights from."""
    if path.is_dir():
        raise InputError(f"{name}: {path} is a folder, not a file of weights")
    if not path.is_file():
        files = sorted(file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES)
        raise InputError(f"{name}: {path}: no such file{did_you_mean(path.name, files)}")


def read_weights(path: Path, name: str, prefix: str = "") -> "dict[str, Tensor]":
    """The tensors of a file whose names begin with `prefix`, by the names that the file gives them.

    Those of a PyTorch file may lie under one of the usual keys, or under a single other one;
    "module." and "_orig_mod.", which wrappers put in front of names, are left out.
    Raises InputError, beginning with `name`, for a file that is missing, unreadable, holds
    something that would have to be unpickled, no tensors, or several models.
    """
    check_file(path, name)
    try:
        if _is_safetensors(path):
            return _read_safetensors(path, prefix)
        found = _read_torch(path)
    except loading_errors() as error:
        raise InputError(f"{name}: {path.name}: {reason(error)}") from error
    except InputError as error:
        raise InputError(f"{name}: {path.name}: {error}") from error
    return {key: tensor for key, tensor in found.items() if key.startswith(prefix)}


def misfit(error: Exception) -> str:
    """What PyTorch's load_state_dict complains of, on one line: how many names, and the first."""
    text = str(error)
    missing, others = (
        re.findall(r'"([^"]+)"', found.group(1))
        if (found := re.search(rf"{kind} key\(s\) in state_dict: (.*)", text))
        else []
        for kind in ("Missing", "Unexpected")
    )
    shapes = re.findall(
        r"size mismatch for (\S+): .*?torch\.Size\((\[.*?\])\).*?torch\.Size\((\[.*?\])\)", text
    )
    said = []
    if missing:
        said.append(f"lacks {_first(missing)}")
    if others:
        said.append(f"has no place for {_first(others)}")
    if shapes:
        name, theirs, ours = shapes[0]
        more = f" and {len(shapes) - 1} more differ" if len(shapes) > 1 else ""
        said.append(f"{name} is {theirs}, not {ours}{more}")
    return "; ".join(said) or reason(error)


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} weights, first {names[0]}"


def _is_safetensors(path: Path) -> bool:
    if path.suffix == ".safetensors":
        return True
    with path.open("rb") as file:  # the length of the header, then its JSON
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < _LARGEST_HEADER


def _read_safetensors(path: Path, prefix: str) -> "dict[str, Tensor]":
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = {key: plain for key in file.keys() if (plain := _plain(key)).startswith(prefix)}  # noqa: SIM118
        if not names and not file.keys():
            raise InputError("it holds no weights")
        return {plain: file.get_tensor(key) for key, plain in names.items()}


def _read_torch(path: Path) -> "dict[str, Tensor]":
    import torch

    with path.open("rb") as file:
        start = file.read(4)
    if start != _ZIP and start[:1] != _PICKLE:
        raise InputError("it is no file of weights, neither PyTorch's nor safetensors")
    # timm's trainer keeps its arguments beside the weights, in a plain container of values
    with quiet(), torch.serialization.safe_globals([argparse.Namespace]):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=start == _ZIP)
    return {_plain(key): tensor for key, tensor in _tensors(content)}


def _tensors(content: Any) -> "Iterator[tuple[str, Tensor]]":
    """The names and tensors of a state dict, wherever it lies in what was read."""
    import torch

    while isinstance(content, Mapping):
        found = [(k, v) for k, v in content.items() if isinstance(v, torch.Tensor)]
        inner = {str(key): item for key, item in content.items() if isinstance(item, Mapping)}
        usual = [inner[key] for key in _NESTED if inner.get(key)]
        if usual:
            content = usual[0]
        elif found:
            return ((str(key), tensor) for key, tensor in found)
        elif len(inner) > 1:
            names = ", ".join(sorted(inner))
            raise InputError(f"it holds several models or none ({names}); save the weights of one")
        else:
            content = next(iter(inner.values()), None)
    raise InputError("it holds no weights")


def _plain(key: str) -> str:
    """A tensor's name without the prefixes of DataParallel and torch.compile, in either order."""
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):
        key = key.removeprefix(prefix)
    return key
