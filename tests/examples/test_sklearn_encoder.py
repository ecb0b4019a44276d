"""The scikit-learn transformer: in a pipeline, cloned, and pickled."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.base import clone
from sklearn_encoder import ImageEncoder, main
from support.tiny_artifact import tiny_artifact
from support.tiny_source import photos

import regcache


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_artifact(tmp_path_factory.mktemp("sklearn"))


def test_transforms_as_embed_does(artifact: Path, tmp_path: Path) -> None:
    paths = sorted(photos(tmp_path / "photos", 3, seed=1).iterdir())
    encoder = clone(ImageEncoder(str(artifact), threads=1)).fit(paths)
    with regcache.load(artifact, threads=1) as loaded:
        expected = loaded.embed(paths)
    for one in (encoder, pickle.loads(pickle.dumps(encoder))):
        np.testing.assert_array_equal(one.transform(paths), expected)


def test_names_classes(artifact: Path, tmp_path: Path) -> None:
    """Dark and light pictures, which any encoder tells apart."""
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name, low in (("dark", 0), ("light", 200)):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = random.integers(low, low + 50, (20, 20, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    assert main(str(artifact), tmp_path / "train", tmp_path / "test") == 1.0
