"""Register candidates: the tokens of largest l-infinity norm around the sensitive block."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from regcache.compiler.curation.workbench import Workbench
from regcache.runtime.similarity import unit_rows

Floats = NDArray[np.float32]

# Tokens of largest norm that are looked at after each block (as many as in arXiv 2510.04547), and
# blocks before the sensitive one whose outputs are looked at too.
_LARGEST = 100
EARLIER = 3
# Tokens closer than this are one candidate; the most candidates after the sensitive block, and
# after one before it.
_SAME = 0.9
_KEPT, _KEPT_EARLIER = 3, 2
# What stands out is so many times the median (arXiv 2410.05265).
_OUTLYING = 64.0


@dataclass(frozen=True)
class Candidate:
    """A token [width] of the residual stream, not rotated, after `block` (-1: the embeddings).

    `norm`: its l-infinity norm. `members`: how many tokens with a cosine above 0.9 it stands for.
    `image`, `token`: its place in the `fit` images; None for the mean of its members.
    """

    vector: Floats
    block: int
    norm: float
    members: int
    image: int | None = None
    token: int | None = None


@dataclass(frozen=True)
class Universality:
    """How alike tokens of different images are after `block`.

    `outliers`: how many tokens stand out. `largest`, `ordinary`: mean cosine between images of
    those that stand out and of ordinary ones.
    """

    block: int
    outliers: int
    largest: float
    ordinary: float


def find_candidates(workbench: Workbench, sensitive: int) -> tuple[list[Candidate], Universality]:
    """Candidates after block `sensitive` and up to EARLIER blocks before, largest first in each.

    Tokens with a cosine above 0.9 are one candidate; where there are several, their mean is a
    candidate too. Only patches are candidates, where they can be told from the tokens in front of
    them.
    """
    candidates: list[Candidate] = []
    for block in range(sensitive, max(sensitive - EARLIER, 0) - 1, -1):
        candidates += _after(workbench, block, _KEPT if block == sensitive else _KEPT_EARLIER)
    return candidates, _universality(workbench, sensitive)


def usual_outliers(workbench: Workbench, sensitive: int) -> int:
    """How many patches of an image stand out, as PrefixQuant counts them (arXiv 2410.05265).

    That many times the norm of the image's median token, on average over images, after the block
    where there are most; rounded up. The blocks are those that candidates come from.
    """
    most, prefix = 0.0, workbench.view.prefix_tokens or 0
    for block in range(max(sensitive - EARLIER, 0), sensitive + 1):
        norms = np.abs(_after_block(workbench, block)[:, prefix:]).max(axis=-1)
        standing_out = norms > _OUTLYING * np.median(norms, axis=1, keepdims=True)
        most = max(most, float(standing_out.sum(axis=1).mean()))
    return math.ceil(most)


def _after_block(workbench: Workbench, block: int) -> Floats:
    """The hidden states [N, T, width] of the `fit` images after a block, not rotated."""
    return workbench.in_own_channels(workbench.fit[block + 1], block + 1)


def _after(workbench: Workbench, block: int, most: int) -> list[Candidate]:
    tokens, places = _largest(workbench, block)
    units = unit_rows(tokens)
    free = np.ones(len(tokens), bool)
    candidates: list[Candidate] = []
    while free.any() and len(candidates) < most:
        first = int(free.argmax())  # they come largest first
        alike = free & (units @ units[first] > _SAME)
        alike[first] = True
        members = int(alike.sum())
        image, token = places[first]
        norm = float(np.abs(tokens[first]).max())
        candidates.append(Candidate(tokens[first], block, norm, members, image, token))
        if members > 1 and len(candidates) < most:
            mean = tokens[alike].mean(axis=0)
            candidates.append(Candidate(mean, block, float(np.abs(mean).max()), members))
        free &= ~alike
    return candidates


def _largest(workbench: Workbench, block: int) -> tuple[Floats, list[tuple[int, int]]]:
    """The tokens [n, width] of largest norm after a block, largest first, and where they stand."""
    hidden, skipped = _after_block(workbench, block), workbench.view.prefix_tokens or 0
    norms = np.abs(hidden[:, skipped:]).max(axis=-1)
    order = np.argsort(-norms, axis=None, kind="stable")[:_LARGEST]
    images, tokens = np.unravel_index(order, norms.shape)
    places = [(int(i), int(t) + skipped) for i, t in zip(images, tokens, strict=True)]
    return hidden[images, tokens + skipped], places


def _universality(workbench: Workbench, block: int) -> Universality:
    """The universality after block `block`.

    Of the tokens whose norm is above mean + 3 sigma (arXiv 2506.08010), the 100 largest count.
    """
    largest, places = _largest(workbench, block)
    hidden, skipped = _after_block(workbench, block), workbench.view.prefix_tokens or 0
    norms = np.abs(hidden[:, skipped:]).max(axis=-1)
    outliers = int((norms > norms.mean() + 3 * norms.std()).sum())
    count = min(max(outliers, 2), len(places))
    random = np.random.default_rng(workbench.study.seed)
    images = random.integers(len(hidden), size=_LARGEST)
    tokens = random.integers(skipped, hidden.shape[1], size=_LARGEST)
    owners = np.array([image for image, _ in places[:count]])
    ordinary = _alike(hidden[images, tokens], images)
    return Universality(block, outliers, _alike(largest[:count], owners), ordinary)


def _alike(tokens: Floats, images: NDArray[Any]) -> float:
    """The mean cosine of pairs of tokens that come from different images."""
    units = unit_rows(tokens)
    across = images[:, None] != images[None]
    return float((units @ units.T)[across].mean()) if across.any() else 0.0
