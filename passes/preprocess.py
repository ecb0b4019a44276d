"""The preprocessing recipe: how an image file becomes the encoder's input tensor."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from regcache.passes.errors import InputError

ResizeMode = Literal["shortest", "squash", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropOffset = Literal["round", "floor"]
_RESIZE_MODES = ("shortest", "squash", "none")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")


@dataclass(frozen=True)
class Preprocess:
    """RGB image -> resize -> center crop -> scale by `rescale` -> (x - mean) / std.

    `height`, `width`: the encoder's input in pixels, reached by the center crop.
    `resize`: "shortest" scales the shorter edge to `resize_to[0]` and keeps the aspect ratio,
    "squash" scales to exactly `resize_to` (height, width), "none" leaves the size alone.
    `mean`, `std`: per RGB channel, in units of the rescaled pixel.
    `crop_offset`: how the center crop treats an odd margin: torchvision (and so timm and open_clip)
    rounds half of it to even, transformers rounds it down.
    The resampling is Pillow's (antialiased), as in torchvision on PIL images.
    """

    height: int
    width: int
    resize: ResizeMode
    resize_to: tuple[int, int]
    interpolation: Interpolation
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float = 1 / 255
    crop_offset: CropOffset = "round"

    def __post_init__(self) -> None:
        if self.resize not in _RESIZE_MODES:
            raise InputError(f"preprocessing: resize must be one of {_RESIZE_MODES}")
        if self.interpolation not in _INTERPOLATIONS:
            raise InputError(f"preprocessing: interpolation must be one of {_INTERPOLATIONS}")
        if self.crop_offset not in ("round", "floor"):
            raise InputError("preprocessing: crop_offset must be round or floor")
        if min(self.height, self.width, *self.resize_to) < 1:
            raise InputError("preprocessing: sizes must be positive")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise InputError("preprocessing: mean and std need 3 values each")
        numbers = (*self.mean, *self.std, self.rescale)
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise InputError("preprocessing: mean, std and rescale must be finite, std positive")

    def to_json(self) -> str:
        """The recipe as the text of a preprocess.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a preprocess.json; raises InputError when it is not one."""
        try:
            fields: dict[str, Any] = json.loads(text)
            for key in ("resize_to", "mean", "std"):
                fields[key] = tuple(fields[key])
            return cls(**fields)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"not a preprocessing recipe: {error}") from error
