"""The tasks of `regcache reproduce`: images with labels and captions, checked in advance."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.reporter import Reporter
from regcache.export.imagenet_texts import imagenet_texts
from regcache.export.text_tower import has_texts
from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.images import evenly
from regcache.runtime.list_images import labelled_images
from regcache.runtime.retrieval import read_captions
from regcache.runtime.zero_shot import (
    TEMPLATES,
    class_prototypes,
    read_class_names,
    read_templates,
)

IMAGENET = Path("imagenet")
"""In place of a file of class names: the names and prompts of CLIP's own evaluation."""
EmbedTexts = Callable[[list[str]], NDArray[np.floating]]
"""Texts -> their embeddings [N, D]."""


@dataclass(frozen=True)
class Tasks:
    """The files and folders that the user names; each may be missing.

    `labelled` holds class folders. With `class_names` its images are classified zero-shot, with
    `train` by nearest neighbours and a linear probe, with neither by their nearest neighbours
    among one another. `class_names` may be IMAGENET. `captions` names images below its own folder.
    `limit` and `train_limit`: at most that many images of each task and of `train`, as many of
    every class as can be.
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

    @property
    def paths(self) -> list[Path]:
        """All images, those to evaluate first; one of two tasks comes twice."""
        evaluated, train = list[Path](), list[Path]()
        if self.classification is not None:
            evaluated += self.classification.labels
            train += self.classification.train
        if self.retrieval is not None:
            evaluated += self.retrieval.images
        return evaluated + train

    @property
    def classes(self) -> list[str]:
        """The names of the class folders; none without a classification."""
        return self.classification.classes if self.classification is not None else []


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


def tasks_for(source: str, tasks: Tasks, reporter: Reporter) -> Tasks:
    """The tasks of one of several models: zero-shot where it has a text encoder.

    One without is measured by the training images. Raises InputError where there are none, for
    captions, and for a source that cannot be read.
    """
    if (tasks.class_names is None and tasks.captions is None) or has_texts(source):
        return tasks
    if tasks.train is None or tasks.captions is not None:
        raise InputError(
            f"{source}: it has no text encoder: leave it out, or --captions, and give --train"
        )
    reporter.step(f"{source} has no text encoder and is measured by --train")
    return replace(tasks, class_names=None, templates=None)


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
        names, templates = _names_and_prompts(tasks.class_names, tasks.templates, classes)
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


def _names_and_prompts(
    file: Path, prompts: Path | None, classes: list[str]
) -> tuple[list[str], Sequence[str]]:
    """The names of the classes, in their order, and the prompts to put them into."""
    given = None if prompts is None else read_templates(prompts)
    if file != IMAGENET or file.exists():
        return list(read_class_names(file, classes).values()), given or TEMPLATES
    if len(classes) != 1000:
        raise InputError(
            f"--classnames {IMAGENET}: there are {len(classes)} class folders, not ImageNet's 1,000"
        )
    names, templates = imagenet_texts()
    return names, given or templates


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
