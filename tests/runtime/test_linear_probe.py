"""The probe against a plain Newton solver, and what it must not be fooled by."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime import linear_probe
from regcache.runtime.linear_probe import linear_probe_top1

Floats = NDArray[np.float32]


def clouds(
    classes: int, each: int, width: int, noise: float, seed: int
) -> tuple[Floats, list[str], Floats, list[str]]:
    """Training and test embeddings around one centre a class, off the origin and of mixed scale."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(classes, width))
    scales = 10.0 ** random.uniform(-2, 2, width)
    labels = np.repeat(np.arange(classes), each)
    sets = []
    for _ in range(2):
        points = centres[labels] + noise * random.normal(size=(len(labels), width))
        sets.append((points * scales + 3 * scales).astype(np.float32))
    names = [f"class {label}" for label in labels]
    return sets[0], names, sets[1], names


def plain_probe(
    train: Floats, labels: list[str], test: Floats, strength: float
) -> tuple[NDArray[np.float64], list[str]]:
    """Softmax regression by Newton's method on the penalised sum of losses, intercept free."""
    names = sorted(set(labels))
    center, spread = train.astype(np.float64).mean(axis=0), train.astype(np.float64).std(axis=0)
    rows, queries = (np.c_[(part - center) / spread, np.ones(len(part))] for part in (train, test))
    truth = np.eye(len(names))[[names.index(label) for label in labels]]
    size, classes = rows.shape[1], len(names)
    penalty = np.kron(np.eye(classes), np.diag([1.0] * (size - 1) + [1e-9]))
    weights = np.zeros(classes * size)
    for _ in range(50):
        chances = softmax(rows @ weights.reshape(classes, size).T)
        gradient = strength * ((chances - truth).T @ rows).ravel() + penalty @ weights
        hessian = penalty.copy()
        for i in range(classes):
            for j in range(classes):
                spread_ij = chances[:, i] * ((i == j) - chances[:, j])
                block = strength * rows.T @ (spread_ij[:, None] * rows)
                hessian[i * size : (i + 1) * size, j * size : (j + 1) * size] += block
        weights -= np.linalg.solve(hessian, gradient)
    return softmax(queries @ weights.reshape(classes, size).T), names


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return shares


@examples(10)
@given(
    classes=st.integers(3, 4),
    width=st.integers(2, 5),
    strength=st.sampled_from([1e-3, 0.1]),
    seed=st.integers(0, 99),
)
def test_it_is_softmax_regression_on_standardised_features(
    *, classes: int, width: int, strength: float, seed: int
) -> None:
    train, labels, test, truth = clouds(classes, 12, width, 1.0, seed)
    chances, names = plain_probe(train, labels, test, strength)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_probe, "_GRID", (strength,))
        found = linear_probe_top1(train, labels, test, truth)
    ordered = np.sort(chances, axis=1)
    near_ties = int((ordered[:, -1] - ordered[:, -2] < 2e-3).sum())
    right = sum(names[row.argmax()] == label for row, label in zip(chances, truth, strict=True))
    assert abs(found * len(test) - right) <= near_ties + 1e-9


def test_two_classes_and_numbered_labels() -> None:
    train, labels, test, truth = clouds(2, 40, 6, 0.8, 0)
    numbers = [int(label.removeprefix("class ")) for label in labels]
    found = linear_probe_top1(train, numbers, test, numbers)
    assert found == linear_probe_top1(train, labels, test, truth)
    assert 0.9 < found <= 1


@pytest.mark.slow
def test_the_penalty_is_chosen_on_held_out_rows_alone() -> None:
    """Few rows of many noisy features: a weak penalty overfits, and the choice has to see it."""
    train, labels, test, truth = clouds(4, 15, 120, 6.0, 3)

    def accuracy(*grid: float) -> float:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(linear_probe, "_GRID", grid)
            return linear_probe_top1(train, labels, test, truth)

    alone = [accuracy(strength) for strength in (1e-5, 1e-3, 1e-1, 10.0)]
    chosen = linear_probe_top1(train, labels, test, truth)
    assert min(alone) < chosen
    assert chosen >= max(alone) - 0.1


def test_a_fifth_of_each_class_is_held_out_by_the_seed() -> None:
    classes = np.array([0] * 10 + [1] * 3 + [2] + [0] * 5)
    held = [linear_probe._hold_out(classes, seed) for seed in range(60)]
    for rows in held:
        assert [int(rows[classes == number].sum()) for number in range(3)] == [3, 1, 0]
    assert (linear_probe._hold_out(classes, 7) == held[7]).all()
    assert (np.any(held, axis=0) == (classes != 2)).all()  # every row has its turn


@pytest.mark.slow
def test_the_same_input_gives_the_same_result() -> None:
    train, labels, test, truth = clouds(5, 10, 20, 2.5, 1)
    first = linear_probe_top1(train, labels, test, truth, seed=4)
    np.random.seed(1)  # what others drew from numpy's common generator does not matter
    assert linear_probe_top1(train, labels, test, truth, seed=4) == first
    assert 0.2 < first < 1


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.slow
def test_embeddings_that_are_not_finite_neither_train_nor_count(bad: float) -> None:
    train, labels, test, truth = clouds(3, 20, 5, 0.05, 0)
    assert linear_probe_top1(train, labels, test, truth) == 1
    train[7, 2] = test[1, 0] = test[59, 4] = bad
    assert linear_probe_top1(train, labels, test, truth) == pytest.approx(58 / 60)
    assert linear_probe_top1(train, labels, np.full_like(test, bad), truth) == 0


@pytest.mark.slow
def test_odd_training_sets() -> None:
    train, labels, test, truth = clouds(3, 20, 5, 0.05, 0)
    train[:, 3] = test[:, 3] = 7  # a feature that never varies
    assert linear_probe_top1(train, labels, test, truth) == 1
    once = [0, 20, 40]  # one row a class leaves nothing to hold out
    assert linear_probe_top1(train[once], [labels[row] for row in once], test, truth) > 0.9
    unseen = ["unseen", *truth[1:]]
    assert linear_probe_top1(train, labels, test, unseen) == pytest.approx(59 / 60)
    assert linear_probe_top1(train.astype(np.float16), labels, test, truth) > 0.9


def test_nothing_is_printed_or_warned() -> None:
    train, labels, test, truth = clouds(3, 10, 60, 3.0, 0)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(linear_probe, "_STEPS", 2)
        linear_probe_top1(train, labels, test, truth)


def test_what_cannot_be_probed_is_refused() -> None:
    train, labels, test, truth = clouds(2, 4, 3, 0.1, 0)
    with pytest.raises(InputError, match="two or more classes"):
        linear_probe_top1(train, ["one"] * len(train), test, truth)
    with pytest.raises(InputError, match="two or more classes"):
        linear_probe_top1(np.full_like(train, np.nan), labels, test, truth)
    with pytest.raises(InputError, match="no images to test"):
        linear_probe_top1(train, labels, test[:0], [])
    with pytest.raises(InputError, match="embeddings of 3 numbers and tested on 2"):
        linear_probe_top1(train, labels, test[:, :2], truth)
    with pytest.raises(ValueError, match="one label for each"):
        linear_probe_top1(train, labels[1:], test, truth)


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, truth = clouds(2, 4, 3, 0.1, 0)
    monkeypatch.setattr(linear_probe, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r'scikit-learn: pip install "regcache\[eval\]"'):
        linear_probe_top1(train, labels, test, truth)


def test_importing_loads_nothing_heavy() -> None:
    script = """
import sys, regcache.runtime.linear_probe, regcache.runtime.zero_shot
assert not {"sklearn", "scipy", "torch"} & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", script], check=True)
