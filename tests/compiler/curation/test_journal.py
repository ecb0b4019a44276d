"""The journal: whatever was noted before a kill is there afterwards, and nothing else is."""

import math
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.examples import examples

from regcache.compiler.curation.journal import Journal

FLOATS = st.floats(allow_nan=True, allow_infinity=True)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("journal") / ".artifact.search.jsonl"


def write(path: Path, results: dict[str, Any], study: str = "study") -> None:
    path.unlink(missing_ok=True)
    with Journal(path, study) as journal:
        for key, value in results.items():
            journal.put(key, value)


def read(path: Path, study: str = "study") -> dict[str, Any]:
    """What another process finds, which then goes on."""
    with Journal(path, study) as journal:
        keys = journal._results
        assert len(journal) == len(keys)
        assert all(key in journal for key in keys)
        return {key: journal[key] for key in keys}


def same(one: Any, other: Any) -> bool:
    """Equal, with floats compared bit for bit (but NaN, which JSON has one of)."""
    if isinstance(one, float) and isinstance(other, float):
        both_nan = math.isnan(one) and math.isnan(other)
        return both_nan or struct.pack("d", one) == struct.pack("d", other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return type(one) is type(other) and bool(one == other)


@examples(50)
@given(results=st.dictionaries(st.text(), VALUES, max_size=4))
def test_everything_comes_back_bit_for_bit(path: Path, results: dict[str, Any]) -> None:
    write(path, results)
    for _ in range(2):
        assert same(read(path), results)


@examples(60)
@given(
    results=st.dictionaries(st.text(max_size=3), VALUES, min_size=1, max_size=4),
    more=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    data=st.data(),
)
def test_a_file_cut_anywhere_keeps_what_was_whole(
    path: Path, results: dict[str, Any], more: dict[str, int], data: st.DataObject
) -> None:
    write(path, results)
    whole = path.read_bytes()
    length = data.draw(st.integers(0, len(whole)), label="length")
    path.write_bytes(whole[:length])
    lines = whole[:length].count(b"\n")
    kept = dict(list(results.items())[: max(lines - 1, 0)])
    with Journal(path, "study") as journal:
        assert len(journal) == len(kept)
        for key, value in more.items():
            journal.put(key, value)
    assert same(read(path), kept | more)


@examples(30)
@given(tail=st.binary(min_size=1))
def test_garbage_behind_is_left_out(path: Path, tail: bytes) -> None:
    write(path, {"a": 0.1})
    with path.open("ab") as file:
        file.write(b"!" + tail + b"\n")
    with Journal(path, "study") as journal:
        journal.put("b", 2)
    assert read(path) == {"a": 0.1, "b": 2}


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b"{}\n", b"3\n", b"\xff\xfe\n", b'{"key": "a", "value": 1}\n']
)
def test_a_file_that_is_no_journal_is_begun_anew(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with Journal(path, "study") as journal:
        assert len(journal) == 0
        journal.put("a", [1.5])
    assert read(path) == {"a": [1.5]}


def test_another_study_begins_anew(path: Path) -> None:
    write(path, {"a": 1}, study="one")
    assert read(path, "other") == {}
    assert read(path, "one") == {}  # the other has taken the file


def test_every_result_is_on_the_disk_at_once(path: Path) -> None:
    """A journal that nobody closes is one that a kill has left behind."""
    path.unlink(missing_ok=True)
    left = Journal(path, "study")
    assert "a" not in left
    for number, key in enumerate("abc"):
        left.put(key, number / 3)
        assert read(path) == {key: index / 3 for index, key in enumerate("abc"[: number + 1])}


def test_opening_writes_nothing_anew(path: Path) -> None:
    """A kill while a search begins again must not lose what the first one found."""
    write(path, {"a": 1, "b": 2})
    before = path.read_bytes()
    held = path.open("rb")
    with held, Journal(path, "study"):
        assert path.read_bytes() == before
        assert held.read() == before  # in the same file, which was never emptied


def test_the_later_result_counts(path: Path) -> None:
    write(path, {"a": 1, "b": 2})
    with Journal(path, "study") as journal:
        journal.put("a", 3)
        assert journal["a"] == 3
        assert len(journal) == 2
    assert read(path) == {"a": 3, "b": 2}


def test_a_finished_search_leaves_no_file(path: Path) -> None:
    with Journal(path, "study") as journal:
        journal.put("a", 1)
        journal.remove()
    assert not path.exists()
    with Journal(path, "study") as journal:
        assert "a" not in journal
        path.unlink()  # somebody else was faster
        journal.remove()
    assert list(path.parent.iterdir()) == []
