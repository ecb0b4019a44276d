"""SOURCE: what the user names, turned into canonical ONNX, a recipe and a PyTorch reference."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.export.suggest import suggest_file, suggest_source
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

Reference = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]
"""float32 images [B, 3, H, W] -> [pooled [B, D], last_hidden_state [B, T, C]], both float32."""

_FORMS = (
    "FILE.onnx, hf:ID_OR_DIR, timm:NAME[/FILE], timm:hf-hub:ID, openclip:ARCH/TAG_OR_FILE "
    "or sample:dinov2-small"
)


class Source(Protocol):
    """A vision encoder somebody trained, wherever it comes from."""

    @property
    def name(self) -> str:
        """The source as the user wrote it."""

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the encoder to `path` as ONNX and return its preprocessing recipe.

        The graph takes float32 "pixel_values" [batch, 3, H, W] with a dynamic batch, and yields
        "pooled" [batch, D] and "last_hidden_state" [batch, T, C]. `resolution` is the side of a
        square input; the default is the recipe's, else the model's own. None where the source
        comes without a recipe. Raises InputError when the source cannot be read or exported.
        """

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """The PyTorch original at that resolution (eval, float32), None for a plain ONNX file.

        Raises InputError when the source cannot be read.
        """


def open_source(text: str) -> Source:
    """Find the source that `text` names; weights are read only by its methods.

    Raises InputError for an unknown prefix or a missing file, with what may have been meant;
    MissingExtraError where the libraries that the source needs are not installed.
    """
    prefix, colon, rest = text.partition(":")
    if colon and rest and prefix in _OPENERS:
        return _OPENERS[prefix](text, rest)
    if text.endswith(".onnx"):
        return _open_onnx(text)
    raise InputError(f"{text!r} is no source{suggest_source(text)}; expected {_FORMS}")


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
