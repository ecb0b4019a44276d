"""Results as tables: in notebooks, and in pandas."""

import sys
from types import SimpleNamespace

import pytest

from regcache.passes.errors import MissingExtraError
from regcache.runtime.shown_table import Row, ShownTable


class Shown(ShownTable):
    def __init__(self, *rows: Row) -> None:
        self._rows = list(rows)

    def rows(self) -> list[Row]:
        return self._rows


def test_one_row_stands_upright() -> None:
    shown = Shown({"cosine_mean": 0.123456789, "passed": True, "note": None})
    assert shown._repr_html_() == (
        "<table><tr><th>cosine mean</th><td>0.123457</td></tr>"
        "<tr><th>passed</th><td>True</td></tr><tr><th>note</th><td></td></tr></table>"
    )


def test_several_rows_have_a_head() -> None:
    shown = Shown({"batch": 1, "ratio": 0.5}, {"batch": 8, "ratio": 0.25})
    assert shown._repr_html_() == (
        "<table><tr><th>batch</th><th>ratio</th></tr>"
        "<tr><td>1</td><td>0.5</td></tr><tr><td>8</td><td>0.25</td></tr></table>"
    )
    assert Shown()._repr_html_() == "<table></table>"


def test_names_are_text_and_not_html() -> None:
    assert "<script>" not in Shown({"<script>": "<script>alert(1)</script>"})._repr_html_()


def test_becomes_a_data_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    pandas = pytest.importorskip("pandas")
    frame = Shown({"batch": 1, "ratio": 0.5}, {"batch": 8, "ratio": 0.25}).to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["batch", "ratio"]
    assert list(frame["ratio"]) == [0.5, 0.25]


def test_says_what_pandas_is_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtraError, match=r'pandas: pip install "regcache\[report\]"'):
        Shown().to_pandas()


def test_rows_are_what_pandas_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where pandas is not installed, too."""
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=tuple))
    assert Shown({"batch": 1}, {"batch": 8}).to_pandas() == ({"batch": 1}, {"batch": 8})
