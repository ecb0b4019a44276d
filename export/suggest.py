"""Suggestions for a SOURCE that is none: names alike, and files that are there."""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

_ALIKE = 0.7
_MOST_FILES = 1000
# What people write for a prefix that is spelled otherwise here.
_PREFIXES = {
    "hf": "hf",
    "huggingface": "hf",
    "hf-hub": "hf",
    "hf_hub": "hf",
    "transformers": "hf",
    "timm": "timm",
    "openclip": "openclip",
    "open_clip": "openclip",
    "open-clip": "openclip",
    "sample": "sample",
}
_HUB_URL = re.compile(r"(https?://)?(www\.)?(huggingface\.co|hf\.co)/(?P<id>[^/\s]+/[^/\s?#]+)")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_WEIGHTS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt")
_KNOWN_IDS = (
    *(f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov2-with-registers-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov3-vit{size}-pretrain-lvd1689m" for size in ("s16", "b16", "l16")),
    *(f"facebook/deit-{size}-patch16-224" for size in ("tiny", "small", "base")),
    *(f"openai/clip-vit-{kind}" for kind in ("base-patch16", "base-patch32", "large-patch14")),
    "openai/clip-vit-large-patch14-336",
    *(f"google/siglip-base-patch16-{side}" for side in (224, 256, 384, 512)),
    *(f"google/siglip2-base-patch16-{side}" for side in (224, 256, 384, 512)),
    *("google/siglip-so400m-patch14-384", "google/siglip2-so400m-patch14-384"),
    *("google/vit-base-patch16-224", "google/vit-base-patch16-224-in21k"),
)


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """ "; did you mean X?", or nothing where no known word is like this one."""
    spelled = {name.lower(): name for name in known}
    close = get_close_matches(word.lower(), spelled, n=1, cutoff=_ALIKE)
    return f"; did you mean {prefix}{spelled[close[0]]}?" if close else ""


def suggest_source(text: str) -> str:
    """ "; did you mean SOURCE?" for a text that is none, or nothing."""
    meant = _by_prefix(text) or _by_path(Path(text).expanduser(), text) or _by_name(text)
    return f"; did you mean {meant}?" if meant else ""


def suggest_file(path: Path) -> str:
    """ "; did you mean FILE?" for an ONNX file that is missing, or nothing."""
    if not path.parent.is_dir():
        return f"; there is no folder {path.parent}"
    names = [file.name for file in islice(path.parent.iterdir(), _MOST_FILES)]
    onnx = [name for name in names if name.lower().endswith(".onnx")]
    return did_you_mean(path.name, onnx, f"{path.parent}/" if path.parent.name else "")


def suggest_checkpoint(checkpoint: str) -> str:
    """ "; did you mean hf:ID?" for a name that the hub may not know, or nothing."""
    ids = _known_ids()
    close = get_close_matches(checkpoint.lower(), ids, n=1, cutoff=_ALIKE)
    known = ids[close[0]] if close else checkpoint
    return "" if known.lower() == checkpoint.lower() else f"; did you mean hf:{known}?"


def timm_names(modules: Iterable[str]) -> list[str]:
    """The models that those files of timm define, read without importing timm; [] without it."""
    folder = _package("timm")
    if folder is None:
        return []
    found = []
    for module in modules:
        file = folder / "models" / f"{module}.py"
        if file.is_file():
            source = file.read_text(encoding="utf-8")
            found += re.findall(r"^def (\w+)\(pretrained\b", source, re.MULTILINE)
    return found


def openclip_names() -> list[str]:
    """The architectures of open_clip, without importing it; [] where it is not installed."""
    folder = _package("open_clip")
    return [] if folder is None else [file.stem for file in folder.glob("model_configs/*.json")]


def _package(name: str) -> Path | None:
    spec = find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _by_prefix(text: str) -> str | None:
    url = _HUB_URL.match(text)
    if url:
        return f"hf:{url['id']}"
    prefix, colon, rest = text.partition(":")
    if not colon or not rest or "/" in prefix:
        return None
    close = get_close_matches(prefix.lower(), _PREFIXES, n=1, cutoff=_ALIKE)
    return f"{_PREFIXES[close[0]]}:{rest}" if close else None


def _by_path(path: Path, text: str) -> str | None:
    """What a folder or file that is there can be used as."""
    if path.is_dir():
        if (path / "open_clip_config.json").is_file():
            weights = sorted(file.name for file in path.iterdir() if file.suffix in _WEIGHTS)
            return f"openclip:ARCH/{path / weights[0]}" if weights else None
        config = _config(path / "config.json")
        if "model_type" in config:
            return f"hf:{text}"
        if "architecture" in config:
            return f"timm:local-dir:{text}"
        models = sorted(islice(path.glob("*.onnx"), _MOST_FILES))
        return str(models[0]) if models else None
    if path.is_file() and path.suffix in _WEIGHTS:
        return f"timm:NAME/{text} or openclip:ARCH/{text}"
    return None


def _config(file: Path) -> dict[str, object]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _by_name(text: str) -> str | None:
    first, slash, rest = text.partition("/")
    towers = {name.lower(): f"openclip:{name}" for name in openclip_names()}
    models = {name: f"timm:{name}" for name in timm_names(("vision_transformer", "deit"))}
    if slash and first.lower() in towers | models:
        return f"{(towers | models)[first.lower()]}/{rest}"
    if first == "timm" and rest:
        return f"timm:hf-hub:{text}"
    if slash:
        return f"hf:{text}" if _HUB_ID.fullmatch(text) and not text.startswith(".") else None
    plain, dot, tag = text.lower().partition(".")
    if plain in models:
        return f"{models[plain]}{dot}{tag}"
    short = {known.partition("/")[2]: f"hf:{known}" for known in _KNOWN_IDS}
    known = {"sample": "sample:dinov2-small", **short, **models, **towers}
    close = get_close_matches(text.lower(), known, n=1, cutoff=_ALIKE)
    return known[close[0]] if close else None


def _known_ids() -> dict[str, str]:
    """The best known checkpoints, by their names with and without the owner."""
    return {name: known for known in _KNOWN_IDS for name in (known, known.partition("/")[2])}
