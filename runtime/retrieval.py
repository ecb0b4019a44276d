"""Image-text retrieval: a captions file, and recall at k in both directions."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.runtime.similarity import ROWS_AT_A_TIME, unit_rows

# Entries of a similarity matrix computed at a time, 32 MB each; many captions mean fewer rows.
_ENTRIES = 2**22


def read_captions(path: Path) -> list[tuple[str, list[str]]]:
    """The images of a captions file, each with its captions, in the file's order.

    The file is UTF-8 text in one of three forms, told apart by its first character:

    - JSON Lines, each {"image": "cat.jpg", "captions": ["a cat", "a pet"]}; other keys are ignored
    - one JSON list of such objects
    - lines of an image, a tab and one caption, images repeated for more captions

    An image named again adds to its captions. Blank lines are skipped. Raises InputError, naming
    the file and the line or entry, for anything else.
    """
    text = read_text(path)
    start = text.lstrip()[:1]
    if start == "[":
        entries = _from_list(path, text)
    elif start == "{":
        entries = _from_json_lines(path, text)
    else:
        entries = _from_tabs(path, text)
    found: dict[str, list[str]] = {}
    for image, captions in entries:
        found.setdefault(image, []).extend(captions)
    if not found:
        raise InputError(f"{path}: no captions in it")
    return list(found.items())


def retrieval_recall(
    images: NDArray[np.floating],
    texts: NDArray[np.floating],
    owners: Sequence[int] | NDArray[np.integer],
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[int, float]]:
    """Recall at each k by cosine, {"image_to_text": {k: share}, "text_to_image": {k: share}}.

    `images` [N, D]; `texts` [M, D], of which text m describes image owners[m]. An image counts when
    one of its texts is among its k nearest texts, a text when its image is among its k nearest
    images; k beyond the number there is means all. Of equally near ones the first counts as nearer.
    Embeddings that are zero or not finite are never found and find nothing.
    Raises InputError when there is none, an image has no text, k is below 1, or D differs.
    """
    owner = np.asarray(owners, dtype=np.int64)
    numbers = np.arange(len(images))
    if len(owner) != len(texts):
        raise ValueError(f"{len(owner)} owners for {len(texts)} texts")
    if len(images) == 0 or len(texts) == 0:
        raise InputError("retrieval needs images and texts")
    if not np.isin(owner, numbers).all():
        raise ValueError(f"an owner is none of the {len(images)} images")
    if not np.isin(numbers, owner).all():
        raise InputError("retrieval needs a text for every image")
    if min(ks) < 1:
        raise InputError(f"recall is measured at 1 or more, not at {min(ks)}")
    to_text = nearest_ranks(images, numbers, texts, owner)
    to_image = nearest_ranks(texts, owner, images, numbers)
    return {
        "image_to_text": {k: share_within(to_text, k, len(texts)) for k in ks},
        "text_to_image": {k: share_within(to_image, k, len(images)) for k in ks},
    }


def nearest_ranks(
    queries: NDArray[np.floating],
    query_groups: NDArray[np.integer],
    gallery: NDArray[np.floating],
    gallery_groups: NDArray[np.integer],
) -> NDArray[np.int64]:
    """[Q]: how many of the gallery come before the nearest one of the query's own group.

    `queries` [Q, D] and `gallery` [G, D] are compared by cosine, of equal cosines the first of the
    gallery comes first. G, which no rank reaches, for a query that is zero or not finite, and for
    one whose group has no usable embedding in the gallery.
    Raises InputError when D differs.
    """
    if queries.shape[1:] != gallery.shape[1:]:
        raise InputError(
            f"embeddings of {queries.shape[1]} and of {gallery.shape[1]} numbers are not "
            "of the same space"
        )
    gallery = unit_rows(gallery)
    muted = ~gallery.any(axis=1)
    step = max(1, min(ROWS_AT_A_TIME, _ENTRIES // max(1, len(gallery))))
    ranks = np.full(len(queries), len(gallery), dtype=np.int64)
    for start in range(0, len(queries), step):
        block = slice(start, start + step)
        units = unit_rows(queries[block])
        cosines = units @ gallery.T
        cosines[:, muted] = -np.inf
        own = np.where(query_groups[block, None] == gallery_groups, cosines, -np.inf)
        nearest = own.argmax(axis=1, keepdims=True)
        best = np.take_along_axis(own, nearest, axis=1)
        before = (cosines > best) | ((cosines == best) & (np.arange(len(gallery)) < nearest))
        usable = units.any(axis=1) & (best[:, 0] > -np.inf)
        ranks[block] = np.where(usable, before.sum(axis=1), len(gallery))
    return ranks


def share_within(ranks: NDArray[np.int64], k: int, size: int) -> float:
    """Share of ranks below `k`, which a gallery of that size caps."""
    return float((ranks < min(k, size)).mean())


def read_text(path: Path) -> str:
    """A UTF-8 file, a byte order mark left out. Raises InputError, naming it and the reason."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text") from error


def read_json(path: Path, text: str, where: str = "") -> Any:
    """The JSON value of the file's `text`. Raises InputError where it is not JSON."""
    try:
        return json.loads(text)
    except ValueError as error:  # a JSONDecodeError, or a number with too many digits
        raise InputError(f"{path}: {where}not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(f"{path}: {where}nested too deeply") from error


def numbered_lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, each with its number from 1; spaces around are dropped."""
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _from_list(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    for number, entry in enumerate(read_json(path, text), start=1):
        yield _entry(path, f"entry {number}", entry)


def _from_json_lines(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    for number, line in numbered_lines(text):
        where = f"line {number}"
        yield _entry(path, where, read_json(path, line, f"{where}: "))


def _from_tabs(path: Path, text: str) -> Iterator[tuple[str, list[str]]]:
    for number, line in numbered_lines(text):
        image, _, caption = line.partition("\t")
        image, caption = image.strip(), caption.strip()
        if not (image and caption):
            raise InputError(f"{path}: line {number}: expected an image, a tab and a caption")
        yield image, [caption]


def _entry(path: Path, where: str, entry: Any) -> tuple[str, list[str]]:
    image, captions = None, None
    if isinstance(entry, dict):
        image, captions = entry.get("image"), entry.get("captions")
    if not _is_text(image) or not isinstance(captions, list) or not captions:
        raise InputError(f'{path}: {where}: expected {{"image": "...", "captions": ["...", ...]}}')
    if not all(_is_text(caption) for caption in captions):
        raise InputError(f"{path}: {where}: a caption is empty or no text")
    return image, captions


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())
