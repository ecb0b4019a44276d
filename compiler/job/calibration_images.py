"""Which images a compilation looks at."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from regcache.compiler.job.breadth import LEAST_IMAGES
from regcache.passes.errors import InputError
from regcache.runtime.images import evenly
from regcache.runtime.list_images import list_images
from regcache.runtime.stored_images import AnyImage

# So many calibrate nothing where a bound is held on them: a fifth, and within these limits.
_FIFTH, _LEAST_HELD, _MOST_HELD = 5, 8, 64


def hold_out(images: Sequence[AnyImage]) -> tuple[list[AnyImage], list[AnyImage]]:
    """The images to calibrate on, and those from all over that are held out of it, to measure on.

    Raises InputError where there are too few for both.
    """
    least = LEAST_IMAGES + _LEAST_HELD
    if len(images) < least:
        raise InputError(
            f"--min-cosine holds images out of calibration: give {least} or more, not {len(images)}"
        )
    held = evenly(images, min(max(len(images) // _FIFTH, _LEAST_HELD), _MOST_HELD))
    out = set(held)
    return [image for image in images if image not in out], held


def calibration_images(
    images: str,
    most: int,
    seed: int,
    warn: Callable[[str], None] | None = None,
    *,
    calibrates: bool = True,
) -> list[AnyImage]:
    """The images that `images` means, at most so many of them.

    Of more, so many are drawn by `seed`; they keep their order. `warn` is told where there are too
    few to calibrate well, if they are to calibrate, and as `list_images` tells it. Raises
    InputError as that does.
    """
    paths = list_images(Path(images), warn)
    if calibrates and len(paths) < LEAST_IMAGES and warn is not None:
        count = "1 image" if len(paths) == 1 else f"{len(paths)} images"
        warn(f"{count} to calibrate on are few: give {LEAST_IMAGES} or more")
    if len(paths) <= most:
        return paths
    drawn = np.random.default_rng(seed).choice(len(paths), most, replace=False)
    return [paths[index] for index in sorted(drawn)]
