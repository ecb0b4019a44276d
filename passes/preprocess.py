"""The preprocessing recipe: how an image file becomes the encoder's input tensor."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

from regcache.passes.errors import InputError

ResizeMode = Literal["shortest", "squash", "none"]
Interpolation = Literal["nearest", "bilinear", "bicubic", "lanczos"]
CropOffset = Literal["round", "floor"]
Layout = Literal["nchw", "nhwc"]
PixelType = Literal["float32", "uint8"]
Colour = tuple[int, int, int]
_CHOICES = {
    "resize": ("shortest", "squash", "none"),
    "interpolation": ("nearest", "bilinear", "bicubic", "lanczos"),
    "crop_offset": ("round", "floor"),
    "layout": ("nchw", "nhwc"),
    "dtype": ("float32", "uint8"),
}
_PLAIN = ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0), 1.0)


@dataclass(frozen=True)
class Preprocess:
    """RGB image -> resize -> center crop -> scale by `rescale` -> (x - mean) / std.

    docs/preprocessing.md describes the file, field by field. The resampling is Pillow's
    (antialiased), as in torchvision on PIL images.
    """

    height: int
    """Height of the encoder's input in pixels, reached by the center crop."""
    width: int
    """Its width."""
    resize: ResizeMode
    """How: "shortest" scales the shorter edge to `resize_to[0]` and keeps the aspect ratio,
    "squash" scales to exactly `resize_to`, "none" leaves the size alone.
    """
    resize_to: tuple[int, int]
    """Height and width in pixels to resize to."""
    interpolation: Interpolation
    """Pillow's filter of the resize."""
    mean: tuple[float, float, float]
    """Mean of R, G and B, in units of the rescaled pixel."""
    std: tuple[float, float, float]
    """Standard deviation of R, G and B, in units of the rescaled pixel."""
    rescale: float = 1 / 255
    """What a pixel of 0 to 255 is multiplied by."""
    crop_offset: CropOffset = "round"
    """How the center crop treats an odd margin: torchvision (and so timm and open_clip) rounds half
    of it to even, transformers rounds it down.
    """
    layout: Layout = "nchw"
    """Axes of the input: "nchw" is [3, height, width], "nhwc" [height, width, 3]."""
    dtype: PixelType = "float32"
    """Type of the input; "uint8" for pixels as they are after the crop: `rescale` and `std` then
    have to be 1, `mean` 0.
    """
    background: Colour | None = None
    """Colour behind transparent pixels, as transformers' processors composite them; None drops the
    alpha channel and shows what it hid, as timm and open_clip do.
    """
    rgb_last: bool = False
    """Whether the image becomes RGB after the crop only, as in open_clip: colours are then resized
    by their opacity, and palettes to the nearest pixel.
    """

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"preprocessing: {name} must be one of {', '.join(choices)}")
        sizes = (self.height, self.width, *self.resize_to)
        if len(sizes) != 4 or not all(map(_is_whole, sizes)) or min(sizes) < 1:
            raise InputError("preprocessing: sizes must be positive whole numbers")
        if len(self.mean) != 3 or len(self.std) != 3:
            raise InputError("preprocessing: mean and std need 3 values each")
        numbers = (*self.mean, *self.std, self.rescale)
        if not all(map(math.isfinite, numbers)) or min(self.std) <= 0:
            raise InputError("preprocessing: mean, std and rescale must be finite, std positive")
        if self.dtype == "uint8" and (self.mean, self.std, self.rescale) != _PLAIN:
            raise InputError("preprocessing: with dtype uint8, rescale and std must be 1, mean 0")
        if self.background is not None and not _is_colour(self.background):
            raise InputError("preprocessing: background must be 3 whole numbers from 0 to 255")
        if not isinstance(self.rgb_last, bool):
            raise InputError("preprocessing: rgb_last must be true or false")

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image as the encoder takes it, in its layout."""
        if self.layout == "nchw":
            return 3, self.height, self.width
        return self.height, self.width, 3

    def to_json(self) -> str:
        """The recipe as the text of a preprocess.json."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read a preprocess.json; raises InputError when it is not one."""
        try:
            return cls.from_fields(json.loads(text))
        except (ValueError, RecursionError) as error:
            raise InputError(f"not a preprocessing recipe: {error}") from error

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """The recipe of a preprocess.json that is parsed already; raises InputError likewise.

        Fields with a default may be missing, as they are in files of older versions.
        """
        try:
            triples = {key: tuple(fields[key]) for key in ("resize_to", "mean", "std")}
            if fields.get("background") is not None:
                triples["background"] = tuple(fields["background"])
            return cls(**{**fields, **triples})
        except KeyError as error:
            raise InputError(f"not a preprocessing recipe: it has no {error}") from error
        except (AttributeError, OverflowError, TypeError) as error:
            raise InputError(f"not a preprocessing recipe: {error}") from error


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_colour(values: Sequence[object]) -> bool:
    return len(values) == 3 and all(_is_whole(value) and value in range(256) for value in values)
