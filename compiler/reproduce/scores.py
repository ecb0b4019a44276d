"""The tasks of `regcache reproduce` measured: every encoder's score on each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reporter import Reporter
from regcache.compiler.reproduce.tasks import Classification, Loaded, Retrieval
from regcache.runtime.linear_probe import linear_probe_top1
from regcache.runtime.retrieval import retrieval_recall
from regcache.runtime.similarity import knn_top1
from regcache.runtime.zero_shot import zero_shot_top1

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Embedded:
    """The images that could be read, and each encoder's embeddings of them, [N, D] each.

    Those lie in files, and are in memory as far as they are looked at.
    """

    paths: list[Path]
    embeddings: list[Floats]


class EmbedImages(Protocol):
    """One pass over images for all encoders.

    `evaluated`: whether they count in the mean cosine to float.
    """

    def __call__(self, paths: list[Path], label: str, *, evaluated: bool = True) -> Embedded: ...


def measure(
    loaded: Loaded, embed: EmbedImages, reporter: Reporter, seed: int
) -> list[dict[str, float]]:
    """The metrics of every encoder, shares of 1, by their names in the table."""
    measured = []
    if loaded.classification is not None:
        measured.append(_classify(loaded.classification, embed, reporter, seed))
    if loaded.retrieval is not None:
        measured.append(_retrieve(loaded.retrieval, embed, reporter))
    return [
        dict(item for part in row for item in part.items()) for row in zip(*measured, strict=True)
    ]


def _classify(
    task: Classification, embed: EmbedImages, reporter: Reporter, seed: int
) -> list[dict[str, float]]:
    found = embed(list(task.labels), "evaluating")
    labels = [task.labels[path] for path in found.paths]
    known = Embedded([], [np.zeros((0, 0), np.float32)] * len(found.embeddings))
    if task.train:
        known = embed(list(task.train), "training set", evaluated=False)
    owners = [task.train[path] for path in known.paths]
    number_of = {name: number for number, name in enumerate(task.classes)}
    numbers = [number_of[label] for label in labels]

    def score(images: Floats, gallery: Floats) -> dict[str, float]:
        row: dict[str, float] = {}
        if task.prototypes is not None:
            row["zero-shot top-1"] = zero_shot_top1(images, task.prototypes, numbers)
        if owners:
            row["kNN top-1"] = knn_top1(gallery, owners, images, labels, same=False)
            row["linear probe top-1"] = linear_probe_top1(
                gallery, owners, images, labels, seed=seed
            )
        elif task.prototypes is None:
            row["kNN top-1"] = knn_top1(images, labels, images, labels, same=True)
        return row

    pairs = zip(found.embeddings, known.embeddings, strict=True)
    counted = reporter.progress(pairs, len(found.embeddings), "scoring")
    return [score(images, gallery) for images, gallery in counted]


def _retrieve(task: Retrieval, embed: EmbedImages, reporter: Reporter) -> list[dict[str, float]]:
    found = embed(task.images, "retrieving")
    read = set(found.paths)
    kept = np.array([path in read for path in task.images])
    described = kept[task.owners]
    texts, owners = task.texts[described], (np.cumsum(kept) - 1)[task.owners[described]]
    rows = []
    for images in reporter.progress(found.embeddings, len(found.embeddings), "scoring"):
        recalls = retrieval_recall(images, texts, owners)
        rows.append(
            {
                f"{way.replace('_', ' ')} R@{rank}": share
                for way, by_rank in recalls.items()
                for rank, share in by_rank.items()
            }
        )
    return rows
