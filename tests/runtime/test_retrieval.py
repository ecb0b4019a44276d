"""Recall equals its definition by sorting, and captions files are read or refused in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.passes.errors import InputError
from regcache.runtime import retrieval
from regcache.runtime.retrieval import read_captions, retrieval_recall

Floats = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_order(query: Floats, gallery: Floats) -> list[int]:
    """The gallery from the nearest to the farthest, by python's own stable sort."""

    def cosine(row: Floats) -> float:
        a, b = query.astype(np.float64), row.astype(np.float64)
        return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))

    return sorted(range(len(gallery)), key=lambda number: -cosine(gallery[number]))


def plain_recall(images: Floats, texts: Floats, owners: list[int], k: int) -> tuple[float, float]:
    to_text = [
        any(owners[found] == image for found in plain_order(images[image], texts)[:k])
        for image in range(len(images))
    ]
    to_image = [owners[text] in plain_order(texts[text], images)[:k] for text in range(len(texts))]
    return sum(to_text) / len(to_text), sum(to_image) / len(to_image)


@examples(60)
@given(
    n=st.integers(1, 7),
    more=st.integers(0, 9),
    width=st.integers(2, 6),
    noise=st.floats(0, 3),
    seed=st.integers(0, 999),
)
def test_recall_equals_its_definition(
    *, n: int, more: int, width: int, noise: float, seed: int
) -> None:
    random = np.random.default_rng(seed)
    owners = [int(owner) for owner in random.permutation([*range(n), *random.integers(0, n, more)])]
    images = normal(n, width, seed=seed)
    texts = images[owners] + np.float32(noise) * normal(n + more, width, seed=seed + 1)
    found = retrieval_recall(images, texts, owners, (1, 2, 5, 99))
    for k in (1, 2, 5, 99):
        to_text, to_image = plain_recall(images, texts, owners, k)
        assert found["image_to_text"][k] == pytest.approx(to_text)
        assert found["text_to_image"][k] == pytest.approx(to_image)
    assert found["image_to_text"][99] == found["text_to_image"][99] == 1  # k is capped


def test_more_than_one_block_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = normal(700, 16)
    owners = np.repeat(np.arange(700), 2)
    texts = images[owners] + normal(1400, 16, seed=1)
    whole = retrieval_recall(images, texts, owners)
    assert list(whole["image_to_text"]) == [1, 5, 10]
    assert 0.1 < whole["text_to_image"][1] < whole["text_to_image"][10] < 0.99
    monkeypatch.setattr(retrieval, "_ENTRIES", 4000)
    assert retrieval_recall(images, texts, owners) == whole
    monkeypatch.setattr(retrieval, "_ENTRIES", 1)
    assert retrieval_recall(images[:40], texts[:80], owners[:80], [1]) == {
        "image_to_text": {1: plain_recall(images[:40], texts[:80], list(owners[:80]), 1)[0]},
        "text_to_image": {1: plain_recall(images[:40], texts[:80], list(owners[:80]), 1)[1]},
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0])
def test_broken_embeddings_find_nothing_and_are_not_found(bad: float) -> None:
    images, owners = normal(4, 5), [0, 1, 2, 3]
    texts = images.copy()
    images[1] = texts[2] = bad
    found = retrieval_recall(images, texts, owners, [1, 4])
    assert found == {"image_to_text": {1: 0.5, 4: 0.5}, "text_to_image": {1: 0.5, 4: 0.5}}
    everything = np.full((4, 5), bad, np.float32)
    found = retrieval_recall(everything, everything, owners, [4])
    assert found == {"image_to_text": {4: 0}, "text_to_image": {4: 0}}


def test_of_equally_near_ones_the_first_comes_first() -> None:
    images = np.eye(3, dtype=np.float32)[[0, 0, 1]]
    found = retrieval_recall(images, images, [0, 1, 2], [1, 2])
    assert found["image_to_text"] == found["text_to_image"] == {1: pytest.approx(2 / 3), 2: 1}


def test_scale_does_not_matter() -> None:
    images, texts = normal(9, 4), normal(9, 4, seed=1)
    scales = np.float32(10) ** np.arange(-4, 5, dtype=np.float32)[:, None]
    owners = list(range(9))
    assert retrieval_recall(images, texts, owners) == retrieval_recall(
        images * scales, texts * scales[::-1], owners
    )


def test_what_cannot_be_measured_is_refused() -> None:
    images, texts = normal(2, 3), normal(3, 3)
    with pytest.raises(InputError, match="a text for every image"):
        retrieval_recall(images, texts, [0, 0, 0])
    with pytest.raises(InputError, match="needs images and texts"):
        retrieval_recall(images[:0], texts[:0], [])
    with pytest.raises(InputError, match="1 or more, not at 0"):
        retrieval_recall(images, texts, [0, 1, 1], [0])
    with pytest.raises(InputError, match="of 3 and of 4 numbers are not of the same space"):
        retrieval_recall(images, normal(3, 4), [0, 1, 1])
    with pytest.raises(ValueError, match="2 owners for 3 texts"):
        retrieval_recall(images, texts, [0, 1])
    with pytest.raises(ValueError, match="none of the 2 images"):
        retrieval_recall(images, texts, [0, 1, 2])


CAPTIONS = [("a b.jpg", ["a cat", "ein Kätzchen"]), ("dir/c.png", ["a dog, running"])]


def as_list(captions: list[tuple[str, list[str]]]) -> str:
    return json.dumps([{"image": image, "captions": texts} for image, texts in captions], indent=1)


def as_lines(captions: list[tuple[str, list[str]]]) -> str:
    entries = ({"id": 7, "image": image, "captions": texts} for image, texts in captions)
    return "\n\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)


def as_tabs(captions: list[tuple[str, list[str]]]) -> str:
    lines = [f"{image}\t{text}" for image, texts in captions for text in texts]
    return "\r\n".join(lines) + "\r\n\r\n"


@pytest.mark.parametrize("form", [as_list, as_lines, as_tabs])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n"])
def test_captions_are_read_in_every_form(form: object, mark: bytes, tmp_path: Path) -> None:
    assert callable(form)
    file = tmp_path / "captions"
    file.write_bytes(mark + form(CAPTIONS).encode())
    assert read_captions(file) == CAPTIONS
    file.write_bytes(mark + form([*CAPTIONS, ("a b.jpg", ["again"])]).encode())
    assert read_captions(file) == [("a b.jpg", [*CAPTIONS[0][1], "again"]), CAPTIONS[1]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "no captions in it"),
        ("[]", "no captions in it"),
        ("a.jpg\ta cat\nb.jpg a dog", "line 2: expected an image, a tab and a caption"),
        ("a.jpg\ta cat\nb.jpg\t", "line 2: expected an image, a tab and a caption"),
        ('{"image": "a.jpg", "captions": ["a cat"]}\n{', "line 2: not JSON"),
        ("[1, ", "not JSON"),
        ("[1]", r'entry 1: expected \{"image"'),
        ('[{"image": "a.jpg", "captions": []}]', r'entry 1: expected \{"image"'),
        ('[{"image": 3, "captions": ["a"]}]', r'entry 1: expected \{"image"'),
        ('{"image": "a.jpg", "captions": "a cat"}', r'line 1: expected \{"image"'),
        ('{"image": "a.jpg", "captions": ["a", ""]}', "line 1: a caption is empty or no text"),
        ('{"image": "a.jpg", "captions": [3]}', "line 1: a caption is empty or no text"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
def test_a_bad_captions_file_is_one_clear_line(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text(content)
    with pytest.raises(InputError, match=reason) as error:
        read_captions(file)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_a_captions_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="missing: No such file"):
        read_captions(tmp_path / "missing")
    with pytest.raises(InputError, match="Is a directory"):
        read_captions(tmp_path)
    (tmp_path / "latin").write_bytes(b"a.jpg\tcaf\xe9")
    with pytest.raises(InputError, match="latin: not UTF-8 text"):
        read_captions(tmp_path / "latin")
