"""Crop the photographs that come with scikit-image and scikit-learn into two folders.

The left half of every photo goes to `calibration`, the right half to `evaluation`, so that the two
share no pixel. Usage: python examples/demo_photos.py FOLDER
"""

import sys
from pathlib import Path

import skimage.data
import sklearn.datasets
from PIL import Image

# The RGB photographs that lie inside the wheels themselves; others would be downloaded.
_SKIMAGE = ("astronaut", "chelsea", "coffee", "motorcycle_left", "retina", "rocket", "ihc")
_SKIMAGE_FILES = {"retina": "retina.jpg", "rocket": "rocket.jpg"}
_SKLEARN = ("china.jpg", "flower.jpg")
# Sides of the crops as shares of the half's shorter edge, and how many lie side by side.
_CROPS = ((1.0, 1), (0.75, 2), (0.5, 2))


def photographs() -> dict[str, Image.Image]:
    """Name -> RGB photograph."""
    folder = Path(skimage.data.__file__).parent
    found = {
        name: Image.open(folder / _SKIMAGE_FILES.get(name, f"{name}.png")).convert("RGB")
        for name in _SKIMAGE
    }
    for name in _SKLEARN:
        pixels = sklearn.datasets.load_sample_image(name)
        found[name.removesuffix(".jpg")] = Image.fromarray(pixels)
    return found


def crops(half: Image.Image) -> list[Image.Image]:
    """Square crops of several sizes: one, four and four."""
    cut = []
    for share, count in _CROPS:
        side = int(min(half.size) * share)
        for row in range(count):
            for column in range(count):
                left = (half.width - side) * column // max(1, count - 1)
                top = (half.height - side) * row // max(1, count - 1)
                cut.append(half.crop((left, top, left + side, top + side)))
    return cut


def main(folder: Path) -> None:
    """Write the two folders of PNG files."""
    for name, photo in photographs().items():
        middle = photo.width // 2
        halves = {
            "calibration": photo.crop((0, 0, middle, photo.height)),
            "evaluation": photo.crop((middle, 0, photo.width, photo.height)),
        }
        for purpose, half in halves.items():
            target = folder / purpose
            target.mkdir(parents=True, exist_ok=True)
            for number, crop in enumerate(crops(half)):  # compressed fast: they are read once
                crop.save(target / f"{name}_{number}.png", compress_level=1)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
