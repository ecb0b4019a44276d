"""Which images a compilation looks at."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from regcache.compiler.job.breadth import LEAST_IMAGES
from regcache.compiler.job.options import CompileOptions
from regcache.runtime.list_images import list_images


def calibration_images(
    options: CompileOptions, warn: Callable[[str], None] | None = None
) -> list[Path]:
    """The image files that `options.images` means, at most `options.max_images` of them.

    Of more, so many are drawn by `options.seed`; they keep their order. `warn` is told where there
    are too few to calibrate well, and as `list_images` tells it. Raises InputError as that does.
    """
    paths = list_images(Path(options.images), warn)
    if len(paths) < LEAST_IMAGES and options.precision.quantizes and warn is not None:
        images = "image" if len(paths) == 1 else "images"
        warn(f"{len(paths)} {images} to calibrate on are few: give {LEAST_IMAGES} or more")
    if len(paths) <= options.max_images:
        return paths
    drawn = np.random.default_rng(options.seed).choice(
        len(paths), options.max_images, replace=False
    )
    return [paths[index] for index in sorted(drawn)]
