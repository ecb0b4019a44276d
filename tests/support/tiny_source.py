"""A tiny encoder's recipe, and random photographs for it."""

from pathlib import Path

import numpy as np
from PIL import Image
from support.tiny_vit import Spec

from regcache.passes.preprocess import Preprocess

SPEC = Spec(width=32, heads=4, hidden=64, depth=2, grid=4)
RECIPE = Preprocess(16, 16, "shortest", (18, 18), "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def photos(folder: Path, count: int, seed: int) -> Path:
    """Smooth random pictures, so that neighbours are not all alike."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        coarse = random.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((40, 30), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02}.png")
    return folder
