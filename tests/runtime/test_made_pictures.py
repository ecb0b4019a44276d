"""Pictures for a first look where no photographs were given."""

from pathlib import Path

import numpy as np
from PIL import Image

from regcache.runtime.made_pictures import draw_pictures


def test_they_differ_and_are_always_the_same(tmp_path: Path) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder in folders:
        folder.mkdir()
    drawn = [[np.asarray(Image.open(path)) for path in draw_pictures(one, 3)] for one in folders]
    for one, other in zip(*drawn, strict=True):
        np.testing.assert_array_equal(one, other)
        assert (one.shape, one.dtype) == ((256, 256, 3), np.uint8)
    first, second, _ = (picture.astype(float) for picture in drawn[0])
    assert np.abs(first - second).mean() > 20
    assert np.abs(np.diff(first, axis=0)).mean() < 10  # smooth
