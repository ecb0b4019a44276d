"""Prototypes and accuracies equal their formulas; class names are read or refused in one line."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.passes.errors import InputError
from regcache.runtime.zero_shot import (
    TEMPLATES,
    class_prototypes,
    read_class_names,
    read_templates,
    zero_shot_top1,
    zero_shot_topk,
)

Floats = NDArray[np.float32]
FOLDERS = ["n01443537", "n01440764"]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain_unit(vector: list[float]) -> list[float]:
    length = math.hypot(*vector)
    return [value / length for value in vector]


def plain_mean(vectors: list[list[float]]) -> list[float]:
    return [math.fsum(values) / len(vectors) for values in zip(*vectors, strict=True)]


@examples(40)
@given(
    classes=st.integers(1, 5),
    templates=st.integers(1, 4),
    width=st.integers(2, 6),
    seed=st.integers(0, 99),
)
def test_prototypes_equal_their_formula(
    classes: int, templates: int, width: int, seed: int
) -> None:
    names = [f"class {number}" for number in range(classes)]
    prompts = [f"{number} {{}} or {{}}" for number in range(templates)]
    rows = {
        f"{number} {name} or {name}": normal(width, seed=seed + 100 * number + 1000 * index)
        for index, name in enumerate(names)
        for number in range(templates)
    }
    calls = []

    def embed(texts: list[str]) -> Floats:
        calls.append(texts)
        return np.stack([rows[text] for text in texts])

    found = class_prototypes(embed, names, prompts)
    assert len(calls) == 1
    assert found.shape == (classes, width)
    for index, name in enumerate(names):
        units = [
            plain_unit([float(value) for value in rows[f"{number} {name} or {name}"]])
            for number in range(templates)
        ]
        assert found[index] == pytest.approx(plain_unit(plain_mean(units)), abs=1e-12)


def test_prompts_that_are_not_finite_are_left_out() -> None:
    rows = normal(4, 3)
    rows[1, 0], rows[2], rows[3] = np.nan, np.inf, np.nan
    found = class_prototypes(lambda _: rows, ["cat", "dog"], ["a {}", "the {}"])
    assert found[0] == pytest.approx(plain_unit([float(value) for value in rows[0]]))
    assert (found[1] == 0).all()


def test_prototypes_need_names_and_as_many_embeddings() -> None:
    with pytest.raises(InputError, match="needs class names and prompts"):
        class_prototypes(lambda texts: normal(len(texts), 3), [])
    with pytest.raises(InputError, match="needs class names and prompts"):
        class_prototypes(lambda texts: normal(len(texts), 3), ["cat"], [])
    with pytest.raises(ValueError, match="5 embeddings of 7 prompts"):
        class_prototypes(lambda _: normal(5, 3), ["cat"])


def test_every_template_has_one_place_for_the_name() -> None:
    assert len(set(TEMPLATES)) == len(TEMPLATES) > 3
    assert all(template.count("{}") == 1 for template in TEMPLATES)


@examples(60)
@given(
    n=st.integers(1, 12),
    classes=st.integers(1, 8),
    width=st.integers(2, 6),
    seed=st.integers(0, 999),
)
def test_accuracy_equals_its_definition(*, n: int, classes: int, width: int, seed: int) -> None:
    prototypes = normal(classes, width, seed=seed)
    labels = [int(label) for label in np.random.default_rng(seed).integers(0, classes, n)]
    images = prototypes[labels] + normal(n, width, seed=seed + 1)

    def cosine(image: Floats, prototype: Floats) -> float:
        a, b = image.astype(np.float64), prototype.astype(np.float64)
        return float(np.dot(a, b) / math.sqrt(np.dot(a, a) * np.dot(b, b)))

    orders = [
        sorted(range(classes), key=lambda number: -cosine(image, prototypes[number]))
        for image in images
    ]
    for k in (1, 5):
        right = [label in order[:k] for label, order in zip(labels, orders, strict=True)]
        assert zero_shot_topk(images, prototypes, labels, k) == pytest.approx(sum(right) / n)
    assert zero_shot_top1(images, prototypes, labels) == zero_shot_topk(
        images, prototypes, np.array(labels), 1
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 0])
@pytest.mark.parametrize("k", [1, 3, 99])
def test_broken_embeddings_are_never_right(bad: float, k: int) -> None:
    prototypes = np.eye(3, dtype=np.float32)
    images = prototypes.copy()
    images[0] = bad
    assert zero_shot_topk(images, prototypes, [0, 1, 2], k) == pytest.approx(2 / 3)
    assert zero_shot_topk(images[:1], prototypes, [0], k) == 0
    broken = prototypes.copy()
    broken[0] = bad
    assert zero_shot_topk(prototypes, broken, [0, 1, 2], k) == pytest.approx(2 / 3)
    assert zero_shot_topk(images, np.full((3, 3), bad), [0, 0, 0], k) == 0


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(InputError, match="no images to classify"):
        zero_shot_top1(normal(0, 3), normal(2, 3), [])
    with pytest.raises(InputError, match="1 or more classes, not 0"):
        zero_shot_topk(normal(1, 3), normal(2, 3), [0], 0)
    with pytest.raises(InputError, match="of 3 and of 4 numbers are not of the same space"):
        zero_shot_top1(normal(1, 3), normal(2, 4), [0])
    with pytest.raises(ValueError, match="2 labels for 1 images"):
        zero_shot_top1(normal(1, 3), normal(2, 3), [0, 1])


@pytest.mark.parametrize(
    "content",
    [
        "n01440764 tench\nn01443537 gold fish\n",
        "n01443537\tgold fish\r\n\r\nn01440764\ttench\r\n",
        "n01440764 tench, Tinca tinca\nn01443537 gold fish, Carassius auratus",
        "n01440764\ttench,Tinca tinca\nn01443537 gold fish\nn99999999 never used",
        '{"n01443537": "gold fish", "n01440764": "tench", "n99999999": "never used"}',
        ' {"n01443537": "gold fish, Carassius", "n01440764": "tench"}',
        "tench\n\ngold fish",
        '["tench", " gold fish "]',
    ],
)
def test_names_are_read_in_every_form(content: str, tmp_path: Path) -> None:
    file = tmp_path / "names"
    for mark in ("", "\ufeff"):
        file.write_text(mark + content, encoding="utf-8")
        found = read_class_names(file, FOLDERS)
        assert list(found.items()) == [("n01443537", "gold fish"), ("n01440764", "tench")]


def test_other_folders_keep_their_names_whole(tmp_path: Path) -> None:
    file = tmp_path / "names.txt"
    names = {"my cats": "cat, grey", "b": "n01440764 is no folder here"}
    file.write_text("".join(f"{folder}\t{name}\n" for folder, name in names.items()))
    assert read_class_names(file, list(names)) == names
    file.write_text(json.dumps(names))
    assert read_class_names(file, list(names)) == names
    file.write_text("crane\ncrane\n")  # two classes of ImageNet are called so
    assert read_class_names(file, ["a", "b"]) == {"a": "crane", "b": "crane"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("tench\ngold fish\nshark", "3 names for 2 class folders; name the folders too"),
        ("", "0 names for 2 class folders"),
        ('["tench"]', "1 names for 2 class folders"),
        ("n01440764 tench", "no name for 1 class folders, first n01443537"),
        ("{}", "no name for 2 class folders, first n01440764"),
        ("n01440764 tench\ngold fish", "line 2: expected a class folder and its name"),
        ("n01440764 tench\nn01443537", "line 2: expected a class folder and its name"),
        ("n01440764 tench\nn01440764 shark", "line 2: n01440764 is named twice"),
        ('["tench", 3]', "a class name is empty or no text"),
        ('{"n01440764": ["n01440764", "tench"]}', "a class name is empty or no text"),
        ('{"n01440764": " "}', "a class name is empty or no text"),
        ('{"n01440764": "tench"', "not JSON"),
    ],
)
def test_a_bad_names_file_is_one_clear_line(content: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "names.json"
    file.write_text(content)
    with pytest.raises(InputError, match=reason) as error:
        read_class_names(file, FOLDERS)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_templates_are_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a {}.\n\n  the {} \n", encoding="utf-8")
    assert read_templates(file) == ["a {}.", "the {}"]
    file.write_text("a {}.\n\nthe {name}\n")
    with pytest.raises(InputError, match=r"templates\.txt: line 3: no \{\} where the class name"):
        read_templates(file)
    file.write_text("\n")
    with pytest.raises(InputError, match="no prompts in it"):
        read_templates(file)
    with pytest.raises(InputError, match="No such file"):
        read_templates(tmp_path / "missing")
