"""SOURCE: what the user names, turned into canonical ONNX, a recipe and a PyTorch reference."""

from collections.abc import Callable
from pathlib import Path

from regcache.export.reference import Source
from regcache.export.suggest import suggest_file, suggest_source
from regcache.passes.errors import InputError

TORCH_MODULE, ONNX_MESSAGE = "torch.nn.Module", "onnx.ModelProto"
"""What the names of sources begin with that were objects in memory; no name opens one again."""

_FORMS = (
    "FILE.onnx, hf:ID_OR_DIR, timm:NAME[/FILE], timm:hf-hub:ID, openclip:ARCH/TAG_OR_FILE "
    "or sample:dinov2-small"
)


def open_source(text: str) -> Source:
    """Find the source that `text` names; weights are read only by its methods.

    Raises InputError for an unknown prefix or a missing file, with what may have been meant;
    MissingExtraError where the libraries that the source needs are not installed.
    """
    refuse_memory(text)
    prefix, colon, rest = text.partition(":")
    if colon and rest and prefix in _OPENERS:
        return _OPENERS[prefix](text, rest)
    if text.endswith(".onnx"):
        return _open_onnx(text)
    raise InputError(f"{text!r} is no source{suggest_source(text)}; expected {_FORMS}")


def is_onnx(text: str) -> bool:
    """Whether a source is ONNX already, so that no PyTorch original of it is known."""
    return text.endswith(".onnx") or text.startswith(ONNX_MESSAGE)


def is_on_hub(text: str) -> bool:
    """Whether a source may have to be fetched from a hub."""
    return text.startswith(("hf:", "timm:", "openclip:"))


def is_in_memory(text: str) -> bool:
    """Whether a source was an object in memory."""
    return text.startswith((TORCH_MODULE, ONNX_MESSAGE))


def refuse_memory(text: str) -> None:
    """Raises InputError for a source that was an object in memory: only its export is kept."""
    if is_in_memory(text):
        raise InputError(f"{text}: was an object in memory; an artifact keeps its export alone")


def _open_onnx(text: str) -> Source:
    from regcache.export.onnx_file import OnnxFileSource

    path = Path(text).expanduser()
    if not path.exists():
        raise InputError(f"{text}: no such file{suggest_file(path)}")
    return OnnxFileSource.open(text)


def _open_huggingface(text: str, rest: str) -> Source:
    from regcache.export.huggingface import HuggingFaceSource

    return HuggingFaceSource.open(text, rest)


def _open_timm(text: str, rest: str) -> Source:
    from regcache.export.timm_vit import TimmSource

    return TimmSource.open(text, rest)


def _open_openclip(text: str, rest: str) -> Source:
    from regcache.export.open_clip_tower import OpenClipSource

    return OpenClipSource.open(text, rest)


def _open_sample(text: str, rest: str) -> Source:
    from regcache.export.sample import SampleSource

    return SampleSource.open(text, rest)


_OPENERS: dict[str, Callable[[str, str], Source]] = {
    "hf": _open_huggingface,
    "timm": _open_timm,
    "openclip": _open_openclip,
    "sample": _open_sample,
}
