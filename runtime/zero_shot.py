"""Zero-shot classification: class names, prompts, and the accuracy of the nearest prompt."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.runtime.retrieval import (
    nearest_ranks,
    numbered_lines,
    read_json,
    read_text,
    share_within,
)
from regcache.runtime.similarity import unit_rows

TEMPLATES = (
    "a photo of a {}.",
    "a photo of the {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a close-up photo of a {}.",
    "a blurry photo of a {}.",
    "a picture of a {}.",
)
"""The prompts used unless others are given."""

_SLOT = "{}"
_SYNSET = re.compile(r"n\d{8}")


def read_class_names(path: Path, folders: Sequence[str]) -> dict[str, str]:
    """The name of each class folder, in the order of `folders`.

    The file is UTF-8 text in one of these forms:

    - lines of a folder, a tab and its name; where the folder is an ImageNet synset (n01440764) a
      space will do
    - a JSON object {folder: name}
    - one name a line, or a JSON list of names: as many as folders, in their sorted order

    Classes without a folder are left out. The name of a synset ends at its first comma, where
    WordNet lists synonyms. Blank lines are skipped.
    Raises InputError, naming the file, when it cannot be read, a folder has no name or is on two
    lines, or the numbers differ.
    """
    text = read_text(path)
    entries = _from_json(path, text) if text.lstrip()[:1] in ("[", "{") else _from_lines(path, text)
    if isinstance(entries, list):
        if len(entries) != len(set(folders)):
            raise InputError(
                f"{path}: {len(entries)} names for {len(set(folders))} class folders; "
                "name the folders too (n01440764 tench)"
            )
        entries = dict(zip(sorted(set(folders)), entries, strict=True))
    nameless = sorted(set(folders) - entries.keys())
    if nameless:
        raise InputError(f"{path}: no name for {len(nameless)} class folders, first {nameless[0]}")
    return {folder: _short(folder, entries[folder]) for folder in folders}


def read_templates(path: Path) -> list[str]:
    """The prompts of a file, one a line, each with {} where the class name goes.

    Raises InputError, naming the file and line, for a line without {} or a file without lines.
    """
    templates = []
    for number, line in numbered_lines(read_text(path)):
        if _SLOT not in line:
            raise InputError(f"{path}: line {number}: no {{}} where the class name goes")
        templates.append(line)
    if not templates:
        raise InputError(f"{path}: no prompts in it")
    return templates


def class_prototypes(
    embed: Callable[[list[str]], NDArray[np.floating]],
    names: Sequence[str],
    templates: Sequence[str] = TEMPLATES,
) -> NDArray[np.float64]:
    """One unit embedding for each class name, float64 [C, D].

    `embed` ([P] prompts -> [P, D]) is called once, with every name in every template. Its rows are
    normalised, averaged over the templates and normalised again; rows that are not finite are left
    out, and a class that has no others gets zeros, which are never nearest.
    Raises InputError without names or templates.
    """
    if not names or not templates:
        raise InputError("zero-shot classification needs class names and prompts")
    prompts = [template.replace(_SLOT, name) for name in names for template in templates]
    embedded = embed(prompts)
    if len(embedded) != len(prompts):
        raise ValueError(f"{len(embedded)} embeddings of {len(prompts)} prompts")
    units = unit_rows(embedded).reshape(len(names), len(templates), -1)
    return unit_rows(units.mean(axis=1))


def zero_shot_topk(
    images: NDArray[np.floating],
    prototypes: NDArray[np.floating],
    labels: Sequence[int] | NDArray[np.integer],
    k: int,
) -> float:
    """Share of images [N, D] whose class is among the `k` nearest prototypes [C, D] by cosine.

    `labels` [N]: rows of `prototypes`. Of equally near prototypes the first counts as nearer.
    Embeddings that are zero or not finite are never right.
    Raises InputError when there are no images, k is below 1, or D differs.
    """
    truth = np.asarray(labels, dtype=np.int64)
    if len(truth) != len(images):
        raise ValueError(f"{len(truth)} labels for {len(images)} images")
    if len(images) == 0:
        raise InputError("no images to classify")
    if k < 1:
        raise InputError(f"accuracy is measured among 1 or more classes, not {k}")
    ranks = nearest_ranks(images, truth, prototypes, np.arange(len(prototypes)))
    return share_within(ranks, k, len(prototypes))


def zero_shot_top1(
    images: NDArray[np.floating],
    prototypes: NDArray[np.floating],
    labels: Sequence[int] | NDArray[np.integer],
) -> float:
    """Share of images [N, D] whose class has the nearest prototype [C, D]; see zero_shot_topk."""
    return zero_shot_topk(images, prototypes, labels, 1)


def _from_json(path: Path, text: str) -> list[str] | dict[str, str]:
    value = read_json(path, text)
    names = list(value.values()) if isinstance(value, dict) else value
    if not all(isinstance(name, str) and name.strip() for name in names):
        raise InputError(f"{path}: a class name is empty or no text")
    names = [name.strip() for name in names]
    return dict(zip(value, names, strict=True)) if isinstance(value, dict) else names


def _from_lines(path: Path, text: str) -> list[str] | dict[str, str]:
    lines = list(numbered_lines(text))
    if not any(_split(line)[0] for _, line in lines):
        return [line for _, line in lines]
    names: dict[str, str] = {}
    for number, line in lines:
        folder, name = _split(line)
        if not (folder and name):
            raise InputError(f"{path}: line {number}: expected a class folder and its name")
        if folder in names:
            raise InputError(f"{path}: line {number}: {folder} is named twice")
        names[folder] = name
    return names


def _split(line: str) -> tuple[str, str]:
    """A line's class folder ("" where it names none) and class name."""
    first, tab, rest = line.partition("\t")
    if not tab:
        first, _, rest = line.partition(" ")
        if not _SYNSET.fullmatch(first):
            return "", line
    return first.strip(), rest.strip()


def _short(folder: str, name: str) -> str:
    return name.partition(",")[0].strip() or name if _SYNSET.fullmatch(folder) else name
