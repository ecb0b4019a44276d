"""The rows that calibration stores: which tokens, of which images, and that they come back."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from regcache.compiler.calibration import stored_rows
from regcache.compiler.calibration.stored_rows import StoredRows


@examples(40)
@given(
    seed=st.integers(0, 999),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 9), st.integers(1, 5)),
    wanted=st.integers(1, 12),
    split=st.integers(1, 6),
)
def test_the_first_token_and_others_once(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shape: tuple[int, int, int],
    wanted: int,
    split: int,
) -> None:
    images, tokens, _ = shape
    draw = np.random.default_rng(seed).normal(0, 3, shape).astype(np.float32)
    # In the last channel each token bears its number.
    draw[:, :, -1] = np.arange(images * tokens).reshape(images, tokens)
    store = StoredRows.of(tmp_path_factory.getbasetemp(), images, seed)
    store.of_an_image = wanted
    for start in range(0, images, split):
        store.update(draw[start : start + split])
    kept = np.concatenate(list(store.chunks()))
    of_an_image = min(wanted, tokens)
    assert len(kept) == store.count == images * of_an_image
    for image, rows in enumerate(np.split(kept, images)):
        numbers = rows[:, -1].astype(int) - image * tokens
        assert numbers[0] == 0
        assert len(set(numbers)) == of_an_image
        np.testing.assert_array_equal(rows, draw[image, numbers])


def test_rows_of_many_images_are_of_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more rows than for fewer images, from all over, and chunk by chunk the same."""
    monkeypatch.setattr(stored_rows, "ROWS", 16)
    monkeypatch.setattr(stored_rows, "LEAST_ROWS_OF_AN_IMAGE", 4)
    store = StoredRows.of(tmp_path, 12, seed=0)
    draw = np.broadcast_to(np.arange(12, dtype=np.float32)[:, None, None], (12, 5, 2))
    for start in (0, 5, 7):
        store.update(draw[start : {0: 5, 5: 7, 7: 12}[start]])
    kept = np.concatenate(list(store.chunks()))
    assert kept[::4, 0].tolist() == [0, 3, 6, 9]
    monkeypatch.setattr(stored_rows, "_CHUNK", 3)
    chunks = list(store.chunks())
    assert [len(chunk) for chunk in chunks] == [3, 3, 3, 3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(chunks), kept)
    whole = list(store.chunks(whole_images=True))
    assert [len(chunk) for chunk in whole] == [store.kept] * 4 == [4] * 4
    np.testing.assert_array_equal(np.concatenate(whole), kept)


def test_its_file_has_no_name(tmp_path: Path) -> None:
    store = StoredRows.of(tmp_path, 1, seed=0)
    store.update(np.ones((1, 2, 3), np.float32))
    assert not list(tmp_path.iterdir())
