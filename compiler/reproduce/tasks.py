"""The tasks of `regcache reproduce`: images with labels and captions, checked in advance."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.images import evenly
from regcache.runtime.linear_probe import linear_probe_top1
from regcache.runtime.list_images import labelled_images
from regcache.runtime.retrieval import read_captions, retrieval_recall
from regcache.runtime.similarity import knn_top1
from regcache.runtime.zero_shot import (
    TEMPLATES,
    class_prototypes,
    read_class_names,
    read_templates,
    zero_shot_top1,
)

T = TypeVar("T")
Floats = NDArray[np.float32]
EmbedTexts = Callable[[list[str]], NDArray[np.floating]]
"""Texts -> their embeddings [N, D]."""


@dataclass(frozen=True)
class Tasks:
    """The files and folders that the user names; each may be missing.

    `labelled` holds class folders. With `class_names` its images are classified zero-shot, with
    `train` by nearest neighbours and a linear probe, with neither by their nearest neighbours
    among one another. `captions` names images below its own folder. `limit` and `train_limit`: at
    most that many images of each task and of `train`, as many of every class as can be.
    """

    labelled: Path | None = None
    class_names: Path | None = None
    templates: Path | None = None
    train: Path | None = None
    captions: Path | None = None
    limit: int | None = None
    train_limit: int | None = None


@dataclass(frozen=True)
class Classification:
    """Labelled images, of `available`; `prototypes`: one for each of `classes`, [C, D]."""

    labels: dict[Path, str]
    available: int
    classes: list[str]
    prototypes: NDArray[np.float64] | None = None
    train: dict[Path, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Retrieval:
    """Images, of `available`; text m of `texts` [M, D] describes image number `owners[m]`."""

    images: list[Path]
    available: int
    texts: NDArray[np.floating]
    owners: NDArray[np.int64]


@dataclass(frozen=True)
class Loaded:
    """Tasks whose files are read and whose texts are embedded."""

    classification: Classification | None = None
    retrieval: Retrieval | None = None

    @property
    def available(self) -> int:
        """How many images there are to choose from."""
        tasks = (self.classification, self.retrieval)
        return sum(task.available for task in tasks if task is not None)


@dataclass(frozen=True)
class Embedded:
    """The images that could be read, and each encoder's embeddings of them, [N, D] each."""

    paths: list[Path]
    embeddings: list[Floats]


class EmbedImages(Protocol):
    """One pass over images for all encoders.

    `evaluated`: whether they count in the mean cosine to float.
    """

    def __call__(self, paths: list[Path], label: str, *, evaluated: bool = True) -> Embedded: ...


def load_tasks(tasks: Tasks, embed_texts: EmbedTexts, reporter: Reporter) -> Loaded:
    """Read everything but the images, so that bad input ends the run before it costs hours.

    Raises InputError where no task is given, options do not go together, or a file is of no use.
    """
    if tasks.labelled is None and tasks.captions is None:
        raise InputError("nothing to measure: give --imagenet or --captions")
    for path, option, needed, wanted in (
        (tasks.class_names, "--classnames", tasks.labelled, "--imagenet"),
        (tasks.train, "--train", tasks.labelled, "--imagenet"),
        (tasks.templates, "--templates", tasks.class_names, "--classnames"),
    ):
        if path is not None and needed is None:
            raise InputError(f"{option} {path}: needs {wanted} too")
    chosen = None if tasks.captions is None else _captions(tasks.captions, tasks.limit)
    classification = None
    if tasks.labelled is not None:
        classification = _classification(tasks.labelled, tasks, embed_texts, reporter)
    retrieval = None
    if chosen is not None:
        captions, available = chosen
        texts = [text for group in captions.values() for text in group]
        owners = np.repeat(np.arange(len(captions)), [len(group) for group in captions.values()])
        reporter.step(f"embedding {len(texts)} captions")
        retrieval = Retrieval(list(captions), available, embed_texts(texts), owners)
    return Loaded(classification, retrieval)


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


def balanced(labels: dict[Path, str], limit: int) -> dict[Path, str]:
    """At most `limit` images, as many of every class as can be, from all over each class."""
    groups: dict[str, list[Path]] = {}
    for path, label in labels.items():
        groups.setdefault(label, []).append(path)
    quotas, left = dict.fromkeys(groups, 0), limit
    while left and (unfilled := [name for name in groups if quotas[name] < len(groups[name])]):
        share = max(1, left // len(unfilled))
        for name in evenly(unfilled, left):
            taken = min(share, len(groups[name]) - quotas[name])
            quotas[name] += taken
            left -= taken
    return {path: name for name, paths in groups.items() for path in evenly(paths, quotas[name])}


def _captions(path: Path, limit: int | None) -> tuple[dict[Path, list[str]], int]:
    """The captions of the images chosen, and how many images there are."""
    captions: dict[Path, list[str]] = {}
    for name, texts in read_captions(path):
        captions.setdefault(path.parent / name, []).extend(texts)
    if not any(image.is_file() for image in captions):
        raise InputError(f"{path}: none of its images is there, first {next(iter(captions))}")
    chosen = evenly(list(captions), limit or len(captions))
    return {image: captions[image] for image in chosen}, len(captions)


def _classification(
    folder: Path, tasks: Tasks, embed_texts: EmbedTexts, reporter: Reporter
) -> Classification:
    everything = dict(labelled_images(folder, reporter.warn))
    labels = balanced(everything, tasks.limit or len(everything))
    classes = sorted(set(everything.values()))
    train = {}
    if tasks.train is not None:
        train = _training_images(tasks.train, folder, classes, tasks, reporter)
    prototypes = None
    if tasks.class_names is not None:
        names = list(read_class_names(tasks.class_names, classes).values())
        templates = TEMPLATES if tasks.templates is None else read_templates(tasks.templates)
        reporter.step(f"embedding {len(names)} class names in {len(templates)} prompts each")
        prototypes = class_prototypes(embed_texts, names, templates)
    elif not train:
        alone = list(Counter(labels.values()).values()).count(1)
        if alone:
            reporter.warn(
                f"{alone} of {len(classes)} classes have one image only, which no other image of "
                "its class can classify (give --train or a larger --limit)"
            )
    return Classification(labels, len(everything), classes, prototypes, train)


def _training_images(
    train: Path, folder: Path, classes: list[str], tasks: Tasks, reporter: Reporter
) -> dict[Path, str]:
    if train.resolve() == folder.resolve():
        raise InputError(
            f"--train {train}: is the folder that is evaluated; without --train every image is "
            "classified by the others"
        )
    if find_spec("sklearn") is None:
        raise MissingExtraError("the linear probe", extra="eval", module="scikit-learn")
    everything = dict(labelled_images(train, reporter.warn))
    missing = sorted(set(classes) - set(everything.values()))
    if missing:
        raise InputError(f"{folder}: class {missing[0]!r} is not in the training set {train}")
    limit = tasks.train_limit or len(everything)
    if limit < len(set(everything.values())):
        raise InputError(f"--train-limit {limit}: leaves classes of {train} without an image")
    return balanced(everything, limit)


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
