"""Embed images with the model beside this file: python run.py EMBEDDINGS.npy IMAGE.npy|.ppm ..."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray


class Encoder:
    """The model and preprocess.json of a folder; needs NumPy and ONNX Runtime only."""

    def __init__(self, folder: Path) -> None:
        self.recipe = json.loads((folder / "preprocess.json").read_text(encoding="utf-8"))
        self.session = ort.InferenceSession(str(next(folder.glob("model.o[nr]*"))))

    def embed(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """RGB pixels, uint8 [H, W, 3] -> float32 [D]."""
        recipe, old, to = self.recipe, pixels.shape[:2], self.recipe["resize_to"]
        short = [int(to[0] * side / min(old)) for side in old]
        new = {"shortest": short, "squash": to, "none": old}[recipe["resize"]]
        for axis in (0, 1) if 0 < old[0] - new[0] > 2 * (old[1] - new[1]) else (1, 0):  # as Pillow
            pixels = resample(pixels, axis, new[axis], recipe["interpolation"])
        high, wide = recipe["height"], recipe["width"]
        even = round if recipe["crop_offset"] == "round" else int
        top, left = (int(m / 2) if m < 0 else even(m / 2) for m in (new[0] - high, new[1] - wide))
        canvas = np.pad(pixels, ((high, high), (wide, wide), (0, 0)))[high + top :, wide + left :]
        mean, std, rescale = (np.float32(recipe[key]) for key in ("mean", "std", "rescale"))
        image = ((canvas[:high, :wide] * rescale - mean) / std).astype(recipe["dtype"])
        image = image if recipe["layout"] == "nhwc" else image.transpose(2, 0, 1)
        run, node, name = self.session.run, self.session.get_inputs()[0], recipe.get("embedding")
        batch = [image] * (node.shape[0] if isinstance(node.shape[0], int) else 1)
        return np.asarray(run(name and [name], {node.name: np.stack(batch)})[0][0], np.float32)


def resample(pixels: NDArray[np.uint8], axis: int, size: int, name: str) -> NDArray[np.uint8]:
    """Resize one axis of uint8 [H, W, 3] as Pillow does, in its fixed point of 22 bits."""
    old, scale = pixels.shape[axis], pixels.shape[axis] / size
    if name == "nearest" or scale == 1:
        return pixels.take(np.cumsum([scale / 2] + [scale] * (size - 1)).astype(int), axis)
    x = np.abs(np.arange(old) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / max(scale, 1)
    bicubic = np.where(x < 1, (1.5 * x - 2.5) * x**2 + 1, (1 - x) * (2 - x) ** 2 / 2) * (x < 2)
    lanczos = np.sinc(x) * np.sinc(x / 3) * (x < 3)
    weights = {"bilinear": np.maximum(1 - x, 0), "bicubic": bicubic, "lanczos": lanczos}[name]
    total = np.tensordot(np.rint(weights / weights.sum(1)[:, None] * 2**22), pixels, (1, axis))
    return np.floor(np.moveaxis(total, 0, axis) / 2**22 + 0.5).clip(0, 255).astype(np.uint8)


def read(path: str) -> NDArray[np.uint8]:
    """An .npy, or a binary .ppm of 8 bits without comments, as uint8 [H, W, 3]."""
    if path.endswith(".npy"):
        return np.asarray(np.load(path).astype(np.uint8, casting="safe"))
    wide, high = (int(word) for word in Path(path).read_bytes().split(maxsplit=3)[1:3])
    return np.fromfile(path, np.uint8)[-3 * high * wide :].reshape(high, wide, 3)


if __name__ == "__main__":
    np.save(sys.argv[1], [*map(Encoder(Path(__file__).parent).embed, map(read, sys.argv[2:]))])
