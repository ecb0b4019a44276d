"""Results that are tables in a notebook and in pandas."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from regcache.passes.errors import MissingExtraError

if TYPE_CHECKING:
    import pandas

Row = Mapping[str, str | float | bool | None]


class ShownTable(ABC):
    """A result that a notebook shows as a table, and that becomes a pandas.DataFrame."""

    @abstractmethod
    def rows(self) -> list[Row]:
        """The table, row by row: the same columns, by name, in each."""

    def to_pandas(self) -> "pandas.DataFrame":
        """The table as a DataFrame. Raises MissingExtraError where pandas is not installed."""
        try:
            import pandas
        except ImportError as error:
            raise MissingExtraError("to_pandas", extra="report", module="pandas") from error
        return pandas.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        """What notebooks show: one row stands upright, a line for each of its columns."""
        rows = self.rows()
        if len(rows) == 1:
            lines = [_head(name) + _cell(value) for name, value in rows[0].items()]
        else:
            lines = ["".join(map(_head, rows[0]))] if rows else []
            lines += ["".join(map(_cell, row.values())) for row in rows]
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _head(name: str) -> str:
    return f"<th>{escape(name.replace('_', ' '))}</th>"


def _cell(value: str | float | bool | None) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else str(value)
    return f"<td>{escape(text)}</td>"
