"""Which of a graph's inputs is the image, and in what form it wants the pixels."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from regcache.passes.errors import InputError
from regcache.passes.preprocess import Layout, PixelType
from regcache.passes.walk import consumers, is_constant

Pixels = Literal["bytes", "unit"]

_OPEN: dict[Layout, tuple[str, ...]] = {
    "nchw": ("batch", "channels", "height", "width"),
    "nhwc": ("batch", "height", "width", "channels"),
}
_NAMES = ("pixel_values", "image", "img", "pixels", "input", "x")
_MOVES = frozenset(["Cast", "Identity", "Reshape", "Transpose", "Unsqueeze", "Squeeze"])


@dataclass(frozen=True)
class ImageInput:
    """The image input as the file declares it.

    `shape`: its dimensions in the file's order, numbers or symbols. `pixels`: what the graph takes
    where it scales or normalises them itself: "bytes" from 0 to 255, "unit" from 0 to 1; None where
    it does not.
    """

    name: str
    layout: Layout
    dtype: PixelType
    shape: tuple[int | str, ...]
    pixels: Pixels | None

    @property
    def size(self) -> tuple[int | str, int | str]:
        """Height and width."""
        return self.shape[2:] if self.layout == "nchw" else self.shape[1:3]  # type: ignore[return-value]

    def at(self, batch: int | str, height: int, width: int) -> tuple[int | str, ...]:
        """The input's shape for a batch of images of that size."""
        if self.layout == "nchw":
            return (batch, 3, height, width)
        return (batch, height, width, 3)


def find_image(graph: gs.Graph) -> ImageInput:
    """Find the image input: of four dimensions, three of them channels, float or uint8.

    Of several the one with the likeliest name is taken. Raises InputError, listing the inputs,
    where there is none.
    """
    found = [item for item in graph.inputs if _layout(item) is not None]
    if not found:
        listed = ", ".join(f"{item.name} {_described(item)}" for item in graph.inputs)
        raise InputError(
            f"needs one image input [batch, 3, H, W] or [batch, H, W, 3], has {listed or 'none'}"
        )
    image = min(found, key=lambda item: (_likeliness(item.name), graph.inputs.index(item)))
    layout = _layout(image)
    assert layout is not None
    names = _OPEN[layout]
    shape = tuple(
        dim if isinstance(dim, str) or is_size(dim) else name
        for dim, name in zip(image.shape or names, names, strict=True)
    )
    if _type_name(image) == "uint8":
        return ImageInput(image.name, layout, "uint8", shape, "bytes")
    return ImageInput(image.name, layout, "float32", shape, _pixels(image))


def is_size(dim: object) -> bool:
    """Whether a dimension is a number of entries: some exporters write 0 or -1 for an open one."""
    return isinstance(dim, int) and dim > 0


def _layout(item: gs.Tensor) -> Layout | None:
    if _type_name(item) not in {"", "float32", "uint8"}:
        return None
    if item.shape is None:
        return "nchw"
    if len(item.shape) != 4:
        return None
    first, last = item.shape[1], item.shape[3]
    if first == 3:
        return "nchw"
    if last == 3:
        return "nhwc"
    if is_size(first):
        return None
    moved = [node for node in item.outputs if node.op == "Transpose"]
    to_front = any(list(node.attrs.get("perm", ())) == [0, 3, 1, 2] for node in moved)
    return "nhwc" if to_front else "nchw"


def _likeliness(name: str) -> int:
    lowered = name.lower()
    return next((n for n, word in enumerate(_NAMES) if word in lowered), len(_NAMES))


def _described(item: gs.Tensor) -> str:
    shape = "of unknown shape" if item.shape is None else str(list(item.shape))
    return f"{_type_name(item)} {shape}".strip()


def _type_name(item: gs.Tensor) -> str:
    """The type as numpy names it, or as ONNX does where numpy has none; empty where unknown."""
    if not isinstance(item.dtype, int):
        return "" if item.dtype is None else str(np.dtype(item.dtype).name)
    return str(onnx.TensorProto.DataType.Name(item.dtype)).lower() if item.dtype else ""


def _pixels(image: gs.Tensor) -> Pixels | None:
    """The range of pixels that the first arithmetic on the input implies.

    "bytes" for 0 to 255, "unit" for 0 to 1; None where the input is not scaled or shifted by
    constants.
    """
    tensor = image
    for _ in range(8):
        readers = consumers(tensor)
        if len(readers) != 1:
            return None
        (node,) = readers
        if node.op not in _MOVES:
            break
        tensor = node.outputs[0]
    constants = [item for item in node.inputs if is_constant(item) and item.values.size in (1, 3)]
    if node.op not in {"Add", "Sub", "Mul", "Div"} or len(constants) != 1:
        return None
    size = float(np.abs(constants[0].values).max())
    if node.op == "Div":  # by 255, by 127.5 or by deviations in bytes; else by deviations of units
        return "bytes" if size > 2 else "unit"
    if node.op == "Mul":
        return "bytes" if size < 0.1 else "unit"
    return "bytes" if size > 2 else "unit"
