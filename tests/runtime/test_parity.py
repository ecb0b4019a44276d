"""Every metric equals its formula, and nothing broken ever passes."""

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.examples import examples

from regcache.passes.errors import InputError
from regcache.runtime.parity import ParityMeter
from regcache.runtime.parity_result import ParityResult
from regcache.runtime.similarity import knn_top1
from regcache.runtime.thresholds import Thresholds

Floats = NDArray[np.float32]


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def compare(
    truth: list[NDArray[Any]], found: list[NDArray[Any]], batch: int = 4, **options: Any
) -> ParityResult:
    kinds = {key: options.pop(key) for key in ("tokens", "class_scores") if key in options}
    meter = ParityMeter(options.pop("prefix_tokens", 1), **kinds)
    names = [f"{number}.jpg" for number in range(len(truth[0]))]
    for start in range(0, len(names), batch):
        part = slice(start, start + batch)
        meter.update([x[part] for x in truth], [x[part] for x in found], names[part])
    return meter.result(**options)


def plain_cosine(a: Floats, b: Floats) -> float:
    x, y = [float(v) for v in a.ravel()], [float(v) for v in b.ravel()]
    dot = math.fsum(p * q for p, q in zip(x, y, strict=True))
    return dot / (math.hypot(*x) * math.hypot(*y))


@examples(60)
@given(
    n=st.integers(1, 12),
    width=st.integers(2, 9),
    tokens=st.integers(2, 5),
    prefix=st.integers(0, 1),
    noise=st.floats(0.001, 3),
    seed=st.integers(0, 99),
)
def test_metrics_equal_their_formulas(
    *, n: int, width: int, tokens: int, prefix: int, noise: float, seed: int
) -> None:
    pooled, hidden = normal(n, width, seed=seed), normal(n, tokens, width, seed=seed + 1)
    other = pooled + np.float32(noise) * normal(n, width, seed=seed + 2)
    other_hidden = hidden + np.float32(noise) * normal(n, tokens, width, seed=seed + 3)
    found = compare([pooled, hidden], [other, other_hidden], prefix_tokens=prefix)

    cosines = [plain_cosine(a, b) for a, b in zip(pooled, other, strict=True)]
    error = pooled.astype(np.float64) - other
    sqnr = 10 * math.log10(np.sum(pooled.astype(np.float64) ** 2) / np.sum(error**2))
    patches = [
        plain_cosine(hidden[i, t], other_hidden[i, t])
        for i in range(n)
        for t in range(prefix, tokens)
    ]
    assert found.cosine_mean == pytest.approx(sum(cosines) / n, abs=1e-12)
    assert found.cosine_min == pytest.approx(min(cosines), abs=1e-12)
    assert found.worst_image == f"{cosines.index(min(cosines))}.jpg"
    assert found.sqnr_db == pytest.approx(sqnr, abs=1e-9)
    assert found.nn_agreement == pytest.approx(plain_agreement(pooled, other))
    assert found.patch_cosine_mean == pytest.approx(sum(patches) / len(patches), abs=1e-12)
    assert found.n_images == n
    assert found.passed == (found.cosine_mean >= 0.995)
    assert (found.failure() is None) == found.passed


def plain_agreement(reference: Floats, candidate: Floats) -> float:
    n = len(reference)
    if n < 3:
        return 1.0

    def nearest(rows: Floats, i: int) -> int:
        return max((j for j in range(n) if j != i), key=lambda j: plain_cosine(rows[i], rows[j]))

    return sum(nearest(reference, i) == nearest(candidate, i) for i in range(n)) / n


def test_top1_agreement_is_the_share_of_equal_classes() -> None:
    truth = np.eye(4, dtype=np.float32)[[0, 1, 2, 3, 0, 1, 2, 3]]
    found = truth.copy()
    found[2] = [0, 0, 1, 1.5]
    found[5] = [3, 2.9, 0, 0]
    found[7] *= 0.1
    assert compare([truth], [found]).top1_agreement is None
    assert "top1_agreement" not in compare([truth], [found]).model_dump()
    result = compare([truth], [found], class_scores=True)
    assert result.top1_agreement == 6 / 8
    assert json.loads(result.model_dump_json())["top1_agreement"] == 6 / 8
    limits = {"cosine_mean": 0.0, "top1_agreement": 0.8}
    failed = compare([truth], [found], class_scores=True, thresholds=Thresholds.of(limits))
    assert failed.failure() == "top1_agreement 0.75 is below 0.8"
    found[0, 0] = np.nan
    assert compare([truth], [found], class_scores=True).top1_agreement == 5 / 8
    with pytest.raises(InputError, match="threshold top1_agreement: not measured"):
        compare([truth], [truth], thresholds=Thresholds.of(limits))


def test_outputs_without_a_direction_are_not_compared_one_by_one() -> None:
    """Integers and single numbers would all have a cosine of 1."""
    scores, label = normal(5, 4), np.arange(5)
    found = compare([scores, label], [scores, label[::-1]])
    assert [output.name for output in found.outputs] == ["pooled"]
    depth = normal(5, 6, 7)
    found = compare([scores, depth], [scores, depth], tokens=False)
    assert found.patch_cosine_mean is None
    assert [output.name for output in found.outputs] == ["pooled", "last_hidden_state"]
    assert compare([scores, depth], [scores, depth]).patch_cosine_mean == 1


def test_agreement_over_more_images_than_one_block() -> None:
    pooled = normal(1100, 8)
    other = pooled + np.float32(0.3) * normal(1100, 8, seed=1)
    units = [
        x / np.linalg.norm(x.astype(np.float64), axis=1, keepdims=True) for x in (pooled, other)
    ]
    nearest = []
    for unit in units:
        similar = unit @ unit.T
        np.fill_diagonal(similar, -2)
        nearest.append(similar.argmax(axis=1))
    found = compare([pooled], [other], batch=300)
    assert found.nn_agreement == pytest.approx(np.mean(nearest[0] == nearest[1]))
    assert 0.1 < found.nn_agreement < 0.99


def test_any_of_several_copies_counts_as_the_nearest() -> None:
    pooled = normal(6, 5)
    pooled[3] = pooled[1] = pooled[0]
    other = pooled.copy()
    other[1] += 1e-3 * pooled[4]  # the copies are now at slightly different distances
    assert compare([pooled], [other]).nn_agreement == 1
    scaled = normal(1, 37).astype(np.float64) * np.arange(1, 90)[:, None]  # equal up to rounding
    assert compare([scaled], [normal(89, 37)]).nn_agreement == 1


@given(n=st.integers(1, 5), width=st.integers(1, 300), scale=st.sampled_from([1e-30, 1, 1e30]))
def test_equal_outputs_pass_the_strictest_threshold(n: int, width: int, scale: float) -> None:
    pooled = (normal(n, width) * scale).astype(np.float32)
    found = compare(
        [pooled], [pooled.copy()], thresholds=Thresholds(cosine_mean=1.0), reference="float-onnx"
    )
    assert found.passed
    assert (found.cosine_mean, found.cosine_min, found.nn_agreement) == (1, 1, 1)
    assert (found.sqnr_db, found.reference) == (200, "float-onnx")
    assert found.patch_cosine_mean is None


def test_more_than_two_dimensions_are_flattened_per_image() -> None:
    pooled, other = normal(5, 2, 3, 4), normal(5, 2, 3, 4, seed=1)
    flat = compare([pooled.reshape(5, 24)], [other.reshape(5, 24)])
    assert compare([pooled], [other]) == flat


def test_half_precision_outputs_are_compared_in_float64() -> None:
    pooled = normal(4, 64).astype(np.float16) * np.float16(200)
    assert compare([pooled], [pooled.copy()]).sqnr_db == 200


def test_the_outputs_may_be_reused_after_an_update() -> None:
    pooled, other = normal(4, 3), normal(4, 3, seed=1)
    meter = ParityMeter()
    meter.update([pooled], [other], "abcd")
    expected = meter.result()
    pooled[:], other[:] = 0, 0
    assert meter.result() == expected


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("output", [0, 1])
@pytest.mark.parametrize("side", ["reference", "candidate", "both"])
def test_one_number_that_is_not_finite_fails_it_all(bad: float, output: int, side: str) -> None:
    outputs = [normal(400, 8), normal(400, 3, 8)]
    broken = [output.copy() for output in outputs]
    broken[output][(7, *[0] * (broken[output].ndim - 1))] = bad
    reference = broken if side != "candidate" else outputs
    candidate = broken if side != "reference" else outputs
    found = compare(reference, candidate, thresholds=Thresholds(cosine_mean=-1.0))
    assert not found.passed
    assert found.n_nonfinite == 1
    assert found.failure() == "1 of 400 images give NaN or infinity"
    if output == 0:
        assert (found.cosine_min, found.worst_image, found.sqnr_db) == (-1, "7.jpg", -200)
        assert found.nn_agreement < 1
    json.loads(found.model_dump_json(), parse_constant=pytest.fail)


def test_dead_outputs_do_not_pass() -> None:
    dead = np.zeros((4, 8), np.float32)
    for reference, candidate in ((normal(4, 8), dead), (dead, normal(4, 8)), (dead, dead)):
        found = compare([reference], [candidate])
        assert (found.cosine_mean, found.passed) == (0, False)
    assert compare([np.full((3, 4), np.nan)], [np.full((3, 4), np.nan)]).nn_agreement == 0


def test_json_holds_the_promised_keys() -> None:
    always = ["cosine_mean", "cosine_min", "sqnr_db", "nn_agreement", "patch_cosine_mean"]
    always += ["n_images", "passed"]
    plain = compare([normal(4, 8)], [normal(4, 8)])
    fields = json.loads(plain.model_dump_json())
    assert list(fields)[: len(always)] == always
    assert fields["patch_cosine_mean"] is None
    assert not any(key.startswith("knn") for key in fields)
    knn = compare([normal(4, 8)], [normal(4, 8)], knn_top1_float=0.5, knn_top1_quantized=0.0)
    fields = json.loads(knn.model_dump_json())
    assert (fields["knn_top1_float"], fields["knn_top1_quantized"]) == (0.5, 0.0)
    for found in (plain, knn):
        assert ParityResult.model_validate_json(found.model_dump_json()) == found


def test_what_cannot_be_compared_is_refused() -> None:
    meter = ParityMeter(prefix_tokens=3)
    with pytest.raises(InputError, match="no images"):
        meter.result()
    with pytest.raises(InputError, match=r"embedding is \[2, 5\] where the original's is \[2, 4\]"):
        meter.update([normal(2, 4)], [normal(2, 5)], "ab")
    with pytest.raises(InputError, match="token output"):
        meter.update([normal(2, 4), normal(2, 5, 4)], [normal(2, 4), normal(2, 4, 4)], "ab")
    with pytest.raises(InputError, match="no patch after 3"):
        meter.update([normal(2, 4), normal(2, 3, 4)], [normal(2, 4), normal(2, 3, 4)], "ab")
    with pytest.raises(ValueError, match="names"):
        meter.update([normal(2, 4)], [normal(2, 4)], "abc")
    with pytest.raises(InputError, match="no images"):  # a refused batch leaves nothing behind
        meter.result()


def plain_knn(
    gallery: Floats, labels: list[str], query: Floats, truth: list[str], *, same: bool, k: int
) -> float:
    right = 0
    for i, row in enumerate(query):
        others = [j for j in range(len(gallery)) if not (same and j == i)]
        nearest = sorted(((plain_cosine(row, gallery[j]), labels[j]) for j in others), reverse=True)
        votes: dict[str, float] = {}
        for cosine, label in nearest[:k]:
            votes[label] = votes.get(label, 0) + math.exp(cosine / 0.07)
        right += max(votes, key=lambda label: votes[label]) == truth[i]
    return right / len(query)


@examples(60)
@given(
    g=st.integers(2, 14), q=st.integers(1, 14), k=st.integers(1, 20), same=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_knn_equals_its_formula(g: int, q: int, k: int, same: bool, seed: int) -> None:
    random = np.random.default_rng(seed)
    gallery, query = normal(g, 4, seed=seed), normal(q, 4, seed=seed + 1)
    labels, truth = ([str(x) for x in random.choice(["cat", "dog", "eel"], n)] for n in (g, q))
    if same:
        query, truth = gallery, labels
    expected = plain_knn(gallery, labels, query, truth, same=same, k=k)
    assert knn_top1(gallery, labels, query, truth, same=same, k=k) == pytest.approx(expected)


def test_knn_over_more_queries_than_one_block() -> None:
    labels = [number % 7 for number in range(1200)]
    gallery = np.eye(7, dtype=np.float32)[labels]
    assert knn_top1(gallery, labels, gallery, labels, same=True) == 1
    assert knn_top1(gallery, labels, gallery, [0] * 1200, same=False) == pytest.approx(172 / 1200)
    unique = list(range(700))
    assert knn_top1(normal(700, 8), unique, normal(700, 8), unique, same=True) == 0


def test_knn_never_counts_what_is_not_finite() -> None:
    gallery = np.eye(4, dtype=np.float32)
    labels = ["a", "b", "c", "d"]
    broken = gallery.copy()
    broken[2, 1] = np.nan
    assert knn_top1(gallery, labels, broken, labels, same=False, k=1) == 0.75
    assert knn_top1(broken, labels, gallery, labels, same=False, k=1) == 0.75
    votes = np.array([[0.1, 1], *[[np.nan, 0]] * 9], np.float32)  # nine broken against one far
    assert knn_top1(votes, ["b", *"a" * 9], np.eye(1, 2), ["b"], same=False) == 1
    assert (
        knn_top1(np.full_like(gallery, np.nan), labels, gallery * np.nan, labels, same=False) == 0
    )


def test_knn_refuses_too_few_images() -> None:
    one = normal(1, 4)
    with pytest.raises(InputError, match="too few"):
        knn_top1(one, ["a"], one, ["a"], same=True)
    with pytest.raises(InputError, match="too few"):
        knn_top1(one, ["a"], one[:0], [], same=False)
    with pytest.raises(ValueError, match="one label"):
        knn_top1(one, ["a", "b"], one, ["a"], same=False)
    with pytest.raises(ValueError, match="not the gallery"):
        knn_top1(normal(2, 4), ["a", "b"], one, ["a"], same=True)
