"""The section on the worst images: what is nearest to them in float, and as compiled."""

import base64
import io
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.compiler.parity.measure import Embeddings
from regcache.compiler.report.page import Gallery, Neighbours, Section, Sentence, Thumbnail
from regcache.compiler.report.subject import Subject
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import UnreadableImageError, read_image
from regcache.runtime.similarity import nearest_agreement, nearest_rows, row_cosines
from regcache.runtime.stored_images import AnyImage, TensorImage

_WORST, _NEAREST = 6, 3
# Pixels of a side, and JPEG's quality.
_SIDE, _QUALITY = 112, 80


def worst_section(subject: Subject) -> Section:
    """The images of least cosine to the original, each with its neighbours in both embeddings."""
    name, title = "worst", "The worst images"
    if subject.measured is None:
        text = (
            "No images were given for this report, and an artifact keeps none. Write it with "
            "--images FOLDER to see the images that lost most, beside their nearest neighbours in "
            "float and as compiled."
        )
        return Section(name, title, [Sentence(text)])
    found = subject.measured.embeddings
    agree = nearest_agreement(found.original, found.artifact)
    moved = int((~agree).sum())
    text = (
        "What counts in a search is which image is nearest. "
        f"{moved} of {len(agree)} images have another nearest neighbour than in float. Below are "
        "those of least cosine to the original, cropped as the encoder sees them, with what is "
        "nearest to them among the others."
    )
    precision = subject.manifest.options.precision.value
    return Section(name, title, [Sentence(text), Gallery(_rows(found, subject.recipe, precision))])


def _rows(found: Embeddings, recipe: Preprocess, precision: str) -> list[Neighbours]:
    pictures = _Pictures(found, recipe)
    cosines = row_cosines(found.original, found.artifact)
    worst = [int(row) for row in np.argsort(cosines, kind="stable")[:_WORST]]
    truths = nearest_rows(found.original, worst, _NEAREST)
    rows = []
    for row, truth, compiled in zip(
        worst, truths, nearest_rows(found.artifact, worst, _NEAREST), strict=True
    ):
        known = {index for index, _ in truth}
        nearest = [
            ("float", [pictures.show(index, f"{value:.4f}") for index, value in truth]),
            (
                precision,
                [
                    pictures.show(index, f"{value:.4f}", differs=index not in known)
                    for index, value in compiled
                ],
            ),
        ]
        shown = [(name, images) for name, images in nearest if images]
        rows.append(Neighbours(pictures.show(row, f"cosine {cosines[row]:.5f}"), shown))
    return rows


@dataclass(frozen=True)
class _Pictures:
    found: Embeddings
    recipe: Preprocess

    def show(self, index: int, note: str, *, differs: bool = False) -> Thumbnail:
        path = self.found.paths[index]
        return Thumbnail(thumbnail(path, self.recipe), path.name, note, differs)


def thumbnail(path: AnyImage, recipe: Preprocess) -> str:
    """An image as the encoder sees it, small, as a data URI; empty where it is gone by now."""
    plain = replace(
        recipe, dtype="uint8", layout="nhwc", mean=(0.0,) * 3, std=(1.0,) * 3, rescale=1.0
    )
    try:
        stored = isinstance(path, TensorImage)
        image = Image.fromarray(_unmade(path, recipe) if stored else read_image(path, plain))
    except UnreadableImageError:
        return ""
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _unmade(tensor: AnyImage, recipe: Preprocess) -> NDArray[np.uint8]:
    """The pixels [height, width, 3] that a tensor was made of."""
    made = read_image(tensor, recipe)
    last = made if recipe.layout == "nhwc" else made.transpose(1, 2, 0)
    if recipe.dtype == "uint8":
        return np.asarray(last, np.uint8)
    pixels = (last * np.array(recipe.std) + np.array(recipe.mean)) / recipe.rescale
    return np.asarray(np.clip(np.rint(pixels), 0, 255), np.uint8)
