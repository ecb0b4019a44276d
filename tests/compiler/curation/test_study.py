"""The images that a search is given."""

from pathlib import Path

import numpy as np
from support.tiny_source import RECIPE, photos

from regcache.compiler.curation.study import ReferenceImages
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images


def test_at_most_so_many_images_are_dealt(tmp_path: Path) -> None:
    paths = list_images(photos(tmp_path / "images", 20, seed=1))
    folder = ImageFolder(paths, RECIPE, 4)
    assert ReferenceImages.of(folder, 16).count == 16
    everything = ReferenceImages.of(folder, 100)
    assert [len(part) for part in (everything.fit, everything.rank, everything.decide)] == [
        5,
        5,
        10,
    ]
    rows = np.concatenate([everything.fit, everything.rank, everything.decide])
    assert len(np.unique(rows.reshape(20, -1), axis=0)) == 20
