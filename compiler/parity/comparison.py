"""Run an encoder and its float original over the same images and compare."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import labelled_images
from regcache.runtime.parity import OUTPUT_NAMES, ParityMeter, why_no_cosine
from regcache.runtime.similarity import knn_top1
from regcache.runtime.stored_images import AnyImage

GALLERY, QUERY = "gallery", "query"

Encoder = Callable[[NDArray[Any]], Sequence[NDArray[Any]]]
"""images as the recipe makes them -> outputs, the pooled embedding [B, D] first."""


def compare(
    reference: Encoder,
    candidate: Encoder,
    folder: ImageFolder,
    reporter: Reporter,
    output_names: Sequence[str] = OUTPUT_NAMES,
    *,
    prefix_tokens: int = 1,
    tokens: bool = True,
    class_scores: bool = False,
    label: str = "comparing",
) -> ParityMeter:
    """Run every batch through both encoders; returns the meter that compared their outputs.

    `output_names`, `tokens`, `class_scores`: what the outputs are, as for ParityMeter. Raises
    InputError when no image can be read, the outputs differ in shape, or the first output is one
    that cosines cannot compare.
    """
    meter = ParityMeter(prefix_tokens, output_names, tokens=tokens, class_scores=class_scores)
    for batch in reporter.images(folder, len(folder.paths), label):
        names = [path.name for path in batch.paths]
        outputs = candidate(batch.images)
        _check_direction(output_names[0], outputs[0], len(names))
        meter.update(reference(batch.images), outputs, names)
    return meter


def _check_direction(name: str, embedding: NDArray[Any], images: int) -> None:
    if len(embedding) != images:
        raise InputError(f"the embedding {name} has {len(embedding)} rows for {images} images")
    reason = why_no_cosine(embedding)
    if reason is not None:
        raise InputError(
            f"the embedding {name} {list(embedding.shape)} holds {reason}: a cosine says nothing "
            "of it; compile the source again, with another --output"
        )


def compare_knn(
    reference: Encoder,
    candidate: Encoder,
    gallery: Path,
    query: Path,
    recipe: Preprocess,
    reporter: Reporter,
    *,
    batch_size: int,
) -> tuple[float, float]:
    """Top-1 accuracy of nearest-neighbour classification with both encoders: (float, quantized).

    `gallery` and `query` are folders of class folders; where they are the same, every image is
    classified by the others (leave-one-out). Raises InputError when a folder cannot be used or the
    query holds a class that the gallery does not.
    """
    same = gallery.resolve() == query.resolve()
    folders = [gallery] if same else [gallery, query]
    sets = [labelled_images(folder, reporter.warn) for folder in folders]
    missing = {label for _, label in sets[-1]} - {label for _, label in sets[0]}
    if missing:
        raise InputError(f"{query}: class {min(missing)!r} is not in the gallery {gallery}")
    embedded = []
    for items, name in zip(sets, (GALLERY, QUERY), strict=False):
        reporter.begin(name)
        labels: dict[AnyImage, str] = dict(items)
        folder = ImageFolder([path for path, _ in items], recipe, batch_size, reporter.skipped)
        rows: tuple[list[NDArray[Any]], list[NDArray[Any]]] = ([], [])
        classes: list[str] = []
        for batch in reporter.images(folder, len(items), name):
            for encoder, kept in zip((reference, candidate), rows, strict=True):
                pooled = encoder(batch.images)[0]
                kept.append(pooled.reshape(len(pooled), -1).copy())
            classes += [labels[path] for path in batch.paths]
        embedded.append(([np.concatenate(part) for part in rows], classes))
    (known, known_labels), (asked, asked_labels) = embedded[0], embedded[-1]
    in_float, quantized = (
        knn_top1(known[side], known_labels, asked[side], asked_labels, same=same) for side in (0, 1)
    )
    return in_float, quantized
