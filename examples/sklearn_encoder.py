"""An artifact as a step of a scikit-learn pipeline: images in, embeddings out.

    python examples/sklearn_encoder.py ARTIFACT TRAIN_DIR TEST_DIR

trains a linear classifier on folders of class folders, and prints how many images of the others it
names right. Needs scikit-learn: pip install "regcache[eval]".
"""

import sys
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import regcache


class ImageEncoder(TransformerMixin, BaseEstimator):  # type: ignore[misc]
    """Embeddings of images, of every kind that `regcache.load(ARTIFACT).embed` takes.

    `artifact`: its folder. `batch_size`: images per run. `threads`: of the runtime; None: all CPUs.
    Nothing is learnt: `fit` opens the artifact, and clones and pickles open it again.
    """

    def __init__(self, artifact: str, batch_size: int = 8, threads: int | None = None) -> None:
        self.artifact, self.batch_size, self.threads = artifact, batch_size, threads

    def fit(self, images: Any, labels: Any = None) -> Self:
        """Open the artifact. Raises regcache.InputError where it cannot be."""
        self.encoder_ = regcache.load(self.artifact, threads=self.threads)
        return self

    def transform(self, images: Any) -> NDArray[np.float32]:
        """The embeddings, float32 [N, dim]. Raises regcache.InputError as `embed` does."""
        return self.encoder_.embed(images, batch_size=self.batch_size)


def labelled(folder: Path) -> tuple[list[Path], list[str]]:
    """The files of a folder of class folders, and the class of each."""
    files = sorted(path for path in folder.glob("*/*") if path.is_file())
    return files, [path.parent.name for path in files]


def main(artifact: str, train: Path, test: Path) -> float:
    """Print the share of test images that are named right, and return it."""
    classify = make_pipeline(
        ImageEncoder(artifact), StandardScaler(), LogisticRegression(max_iter=1000)
    )
    classify.fit(*labelled(train))
    right = float(classify.score(*labelled(test)))
    print(f"{right:.1%} of the test images are named right")
    return right


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
