"""Whether a recipe gives an encoder the pixels that the source's own library would."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.passes.errors import printable
from regcache.passes.preprocess import Preprocess
from regcache.runtime.finite_record import FiniteRecord
from regcache.runtime.images import check_pixels, evenly, read_image
from regcache.runtime.open_image import open_image
from regcache.runtime.stored_images import AnyImage, open_image_file

COMPARED = 8
_LOOKED_AT = 256
# DINOv3's processor resizes floats and never rounds them to bytes, which is up to a grey level.
ROUNDING = 1.0
_DEEP = ("I", "F")

Processor = Callable[[Image.Image], NDArray[np.float32]]
"""An image of any mode, as Pillow opens it -> float32 [3, H, W]."""


class PixelParity(FiniteRecord):
    """The recipe's pixels beside those of the source's own processor, in grey levels of 255."""

    n_images: int
    """Images that both could read."""
    n_different: int
    """Those among them that differ by more than rounding, which is one grey level."""
    max_difference: float
    """The largest difference of a pixel; 255 where the sizes differ."""
    worst_image: str
    """Name of the image with it."""
    worst_mode: str
    """Pillow's mode of that image, such as RGB, RGBA, or I;16 for grey of 16 bits."""

    def warning(self, source: str) -> str | None:
        """One line that says how many images differ, and by how much; None where none does."""
        if not self.n_different:
            return None
        line = (
            f"the pixels are not those of {source}'s own processor: "
            f"{self.n_different} of {self.n_images} images differ, "
            f"by up to {self.max_difference:.3g} of 255 grey levels in {self.worst_image}"
        )
        if self.worst_mode.startswith(_DEEP):
            line += f" ({self.worst_mode}: more than 8 bits; that clips them, the recipe scales)"
        return line


def compare_pixels(
    paths: Sequence[AnyImage], recipe: Preprocess, processor: Processor
) -> PixelParity | None:
    """Hold the recipe against a processor on a few images, of every mode that is among them.

    Images that either cannot read are left out; None where none is left.
    """
    found: list[tuple[float, str, str]] = []
    for path in _of_every_mode(paths, COMPARED):
        try:
            with open_image_file(path) as file, open_image(file, str(path)) as image:
                check_pixels(path, image.size, recipe)
                image.load()
                mode, theirs = image.mode, processor(image)
            ours = read_image(path, recipe)
        except Exception:  # Pillow's readers, and processors, let any type escape
            continue
        found.append((_grey_levels(ours, theirs, recipe), printable(path.name), mode))
    if not found:
        return None
    worst = max(found, key=lambda item: item[0])
    return PixelParity(
        n_images=len(found),
        n_different=sum(item[0] > ROUNDING for item in found),
        max_difference=worst[0],
        worst_image=worst[1],
        worst_mode=worst[2],
    )


def _grey_levels(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], recipe: Preprocess
) -> float:
    """The largest difference of two images [3, H, W], as the recipe normalises, in grey levels."""
    if ours.shape != theirs.shape or not np.isfinite(theirs).all():
        return 255.0
    scale = np.array(recipe.std, np.float64) / recipe.rescale
    difference = np.abs(ours.astype(np.float64) - theirs).max(axis=(1, 2)) * scale
    # what float32 loses in normalising and back is no difference
    return round(min(float(difference.max()), 255.0), 3)


def _of_every_mode(paths: Sequence[AnyImage], count: int) -> list[AnyImage]:
    """At most `count` images from all over, in turn of each mode, with transparency and without."""
    kinds: dict[tuple[str, bool], list[AnyImage]] = defaultdict(list)
    for path in evenly(paths, _LOOKED_AT):
        try:
            with open_image_file(path) as file, open_image(file, str(path)) as image:
                kinds[image.mode, "transparency" in image.info].append(path)
        except Exception:  # whatever Pillow's readers let escape
            continue
    rows = zip_longest(*(evenly(found, count) for found in kinds.values()))
    return [path for path in chain.from_iterable(rows) if path is not None][:count]
