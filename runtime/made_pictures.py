"""Pictures drawn at random, for a first look where no photographs were given."""

from pathlib import Path

import numpy as np
from PIL import Image

_SIDE, _COARSE = 256, (8, 8, 3)


def draw_pictures(folder: Path, count: int) -> list[Path]:
    """Write `count` smooth pictures of random colours, always the same, as PNG files."""
    random = np.random.default_rng(0)
    paths = [folder / f"{index:02}.png" for index in range(count)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, _COARSE, dtype=np.uint8))
        coarse.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC).save(path)
    return paths
