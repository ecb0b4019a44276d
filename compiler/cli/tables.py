"""Tables of figures on standard output."""

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

_ENDLESS = 10_000  # characters, where no terminal ends a line


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables without cutting a figure.

    Where cells may wrap, a table is as wide as the terminal. Where they may not, or standard output
    is a file or a pipe, it is as wide as it needs: Rich would cut it at 80 characters.
    """
    for table in tables:
        console = Console()
        whole = not console.is_terminal or any(column.no_wrap for column in table.columns)
        if whole:
            console.width = _ENDLESS
        console.print(table, soft_wrap=whole)
