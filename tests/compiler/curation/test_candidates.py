"""Candidates from crafted hidden states: which tokens, in which order, how many."""

import statistics
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.compiler.curation.candidates import Candidate, find_candidates, usual_outliers

Floats = NDArray[np.float32]
WIDTH, PREFIX = 32, 2


def bench_of(fit: list[Floats], prefix: int | None = PREFIX) -> Any:
    """What find_candidates reads of a workbench."""
    return SimpleNamespace(
        fit=fit,
        view=SimpleNamespace(prefix_tokens=prefix),
        study=SimpleNamespace(seed=0),
        in_own_channels=lambda tokens, _: tokens,
    )


def noise(seed: int, images: int = 6, tokens: int = 20, width: int = WIDTH) -> Floats:
    return np.random.default_rng(seed).standard_normal((images, tokens, width)).astype(np.float32)


def axis(index: int, size: float) -> Floats:
    vector = np.zeros(WIDTH, np.float32)
    vector[index] = size
    return vector


def after_one(hidden: Floats, prefix: int | None = PREFIX) -> list[Candidate]:
    """The candidates of one block."""
    return find_candidates(bench_of([hidden, hidden], prefix), 0)[0]


def cosine(one: Floats, other: Floats) -> float:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def places(found: list[Candidate]) -> list[tuple[int | None, int | None]]:
    return [(item.image, item.token) for item in found]


def test_patches_only() -> None:
    hidden = noise(0)
    hidden[:, 0] += axis(1, 1000)
    hidden[:, 1] += axis(2, 500)
    hidden[4, 7] += axis(3, 60)
    (first, *rest) = after_one(hidden)
    assert (first.image, first.token) == (4, 7)
    np.testing.assert_array_equal(first.vector, hidden[4, 7])
    assert first.norm == np.abs(hidden[4, 7]).max()
    assert all(item.token is None or item.token >= PREFIX for item in rest)
    # Where patches cannot be told from the others, nobody is left out.
    assert after_one(hidden, prefix=None)[0].token == 0
    assert after_one(hidden, prefix=0)[0].norm == np.abs(hidden[:, 0]).max()


def test_largest_first_and_three_of_them() -> None:
    hidden = noise(1)
    for index, (image, token, size) in enumerate([(3, 5, 30), (0, 9, -50), (5, 2, 40), (2, 2, 20)]):
        hidden[image, token] += axis(index, size)
    found = after_one(hidden)
    assert places(found) == [(0, 9), (5, 2), (3, 5)]
    assert [item.members for item in found] == [1, 1, 1]
    assert [round(item.norm, -1) for item in found] == [50, 40, 30]


def test_alike_ones_are_one_and_their_mean_another() -> None:
    hidden = noise(2)
    alike = [(0, 4, 70), (1, 8, 80), (3, 3, 60), (5, 19, 75)]
    for image, token, size in alike:
        hidden[image, token] += axis(6, size)
    hidden[2, 11] += axis(6, -65)  # the opposite direction is not alike
    largest, mean, opposite = after_one(hidden)
    assert places([largest, mean, opposite]) == [(1, 8), (None, None), (2, 11)]
    assert (largest.members, mean.members, opposite.members) == (4, 4, 1)
    wanted = np.mean([hidden[image, token].astype(np.float64) for image, token, _ in alike], axis=0)
    np.testing.assert_allclose(mean.vector, wanted, rtol=1e-5, atol=1e-5)
    assert mean.norm == pytest.approx(np.abs(wanted).max(), rel=1e-5)
    assert mean.vector.dtype == largest.vector.dtype == np.float32


@pytest.mark.parametrize(("angle", "members"), [(0.91, 2), (0.89, 1)])
def test_alike_is_a_cosine_above_nine_tenths(angle: float, members: int) -> None:
    hidden = noise(3) * np.float32(1e-3)
    hidden[0, 5] = axis(0, 50)
    hidden[1, 6] = axis(0, 40 * angle) + axis(1, 40 * (1 - angle**2) ** 0.5)
    assert cosine(hidden[0, 5], hidden[1, 6]) == pytest.approx(angle, abs=1e-6)
    found = after_one(hidden)
    assert found[0].members == members
    assert places(found[1:2]) == [(None, None) if members == 2 else (1, 6)]


@pytest.mark.parametrize(
    ("sensitive", "blocks"), [(0, [0]), (1, [1, 0]), (3, [3, 2, 1, 0]), (5, [5, 4, 3, 2])]
)
def test_the_sensitive_block_and_three_before(sensitive: int, blocks: list[int]) -> None:
    fit = [noise(seed) for seed in range(7)]
    for index, hidden in enumerate(fit):
        hidden[index % 6, 10] = axis(index, 100 + index)
    found, universality = find_candidates(bench_of(fit), sensitive)
    assert list(dict.fromkeys(item.block for item in found)) == blocks
    kept = Counter(item.block for item in found)
    assert kept == {block: 3 if block == sensitive else 2 for block in blocks}
    assert universality.block == sensitive
    for block in blocks:  # the hidden state after block b is the input of block b + 1
        first = next(item for item in found if item.block == block)
        assert first.norm == 100 + block + 1
        np.testing.assert_array_equal(first.vector, axis(block + 1, 100 + block + 1))


def test_universality_tells_a_common_vector_from_random_ones() -> None:
    common = noise(4)
    for image in range(6):
        common[image, 3 + image] += axis(9, 60)
    _, seen = find_candidates(bench_of([common, common]), 0)
    assert seen.outliers == 6
    vectors = [common[image, 3 + image] for image in range(6)]
    pairs = [cosine(a, b) for i, a in enumerate(vectors) for b in vectors[:i]]
    assert seen.largest == pytest.approx(np.mean(pairs), abs=1e-6)
    assert seen.largest > 0.95
    assert abs(seen.ordinary) < 0.2

    different = noise(4)
    for image in range(6):
        different[image, 3 + image] += axis(image, 60)
    _, seen = find_candidates(bench_of([different, different]), 0)
    assert seen.outliers == 6
    assert abs(seen.largest) < 0.2
    assert abs(seen.ordinary) < 0.2


def test_outliers_are_three_deviations_above_the_mean() -> None:
    sizes = np.exp(np.random.default_rng(8).standard_normal((6, 20, 1))).astype(np.float32)
    hidden = noise(8) * sizes
    norms = [float(max(abs(token))) for image in hidden for token in image[PREFIX:]]
    mean, deviation = statistics.fmean(norms), statistics.pstdev(norms)
    wanted = sum(norm > mean + 3 * deviation for norm in norms)
    assert 0 < wanted < sum(norm > mean + 2 * deviation for norm in norms)
    assert find_candidates(bench_of([hidden, hidden]), 0)[1].outliers == wanted


def test_universality_leaves_out_pairs_within_an_image() -> None:
    hidden = noise(5)
    for image, sign in ((0, 1), (1, -1)):
        hidden[image, 4:8] += axis(2, 60 * sign)
    _, seen = find_candidates(bench_of([hidden, hidden]), 0)
    assert seen.outliers == 8
    assert seen.largest < -0.9
    _, alone = find_candidates(bench_of([hidden[:1], hidden[:1]]), 0)
    assert (alone.largest, alone.ordinary) == (0, 0)


def test_ordinary_tokens_that_are_all_alike_are_universal_too() -> None:
    hidden = noise(6) + axis(0, 20)
    _, seen = find_candidates(bench_of([hidden, hidden]), 0)
    assert seen.ordinary > 0.85


def grouped(hidden: Floats, prefix: int) -> list[tuple[list[tuple[int, int]], Floats]]:
    """Candidates by the words of the docstring, in loops: their tokens, and the vector."""
    images, count, _ = hidden.shape
    left = [(image, token) for image in range(images) for token in range(prefix, count)]
    left.sort(key=lambda place: -np.abs(hidden[place]).max())
    left = left[:100]
    found: list[tuple[list[tuple[int, int]], Floats]] = []
    while left:
        first = left[0]
        group = [p for p in left if p == first or cosine(hidden[p], hidden[first]) > 0.9]
        found.append((group, hidden[first]))
        if len(group) > 1:
            found.append((group, np.mean([hidden[p] for p in group], axis=0)))
        left = [p for p in left if p not in group]
    return found[:3]


@examples(40)
@given(
    seed=st.integers(0, 9999),
    images=st.integers(1, 8),
    tokens=st.integers(1, 30),
    prefix=st.integers(0, 3),
    width=st.integers(2, 6),  # few dimensions, so that tokens are alike by chance
)
def test_random_hidden_states(seed: int, images: int, tokens: int, prefix: int, width: int) -> None:
    hidden = noise(seed, images, tokens + prefix, width)
    found = after_one(hidden, prefix)
    wanted = grouped(hidden, prefix)
    assert len(found) == len(wanted) <= 3
    for one, (group, vector) in zip(found, wanted, strict=True):
        assert one.members == len(group)
        np.testing.assert_allclose(one.vector, vector, rtol=1e-5, atol=1e-6)
        if one.image is not None and one.token is not None:
            np.testing.assert_array_equal(hidden[one.image, one.token], vector)
        else:
            assert len(group) > 1


def test_usual_outliers_are_counted_where_there_are_most() -> None:
    calm, wild = noise(0), noise(1)
    calm[0, 5] += axis(1, 1000)
    for image, count in enumerate((3, 1, 2, 0, 3, 1)):
        wild[image, PREFIX : PREFIX + count] += axis(1, 1000)
    wild[:, 0] += axis(1, 1000)  # the class token is no patch
    assert usual_outliers(bench_of([calm, calm, calm]), 1) == 1
    assert usual_outliers(bench_of([calm, calm, wild]), 1) == 2  # 10 in 6 images
    assert usual_outliers(bench_of([noise(2), noise(3)]), 0) == 0
