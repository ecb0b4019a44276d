"""Lines and tables on standard output, where nothing in a name is taken for a command."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from regcache.passes.errors import printable

_ENDLESS = 10_000  # characters, where no terminal ends a line


class _PlainConsole(Console):
    """Prints texts as they are: no markup in them, no numbers coloured, no escapes passed on."""

    def render_str(self, text: str, **options: Any) -> Text:
        """See Rich: what becomes of every text, those in a table too."""
        lines = "\n".join(map(printable, text.split("\n")))
        plain = {"emoji": False, "markup": False, "highlight": False}
        return super().render_str(lines, **(options | plain))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines, none of which is broken where a terminal ends."""
    console = _PlainConsole(soft_wrap=True)
    for line in lines:
        console.print(line)


def print_tables(tables: Iterable[Table]) -> None:
    """Print tables without cutting a figure.

    Where cells may wrap, a table is as wide as the terminal. Where they may not, or standard output
    is a file or a pipe, it is as wide as it needs: Rich would cut it at 80 characters.
    """
    for table in tables:
        console = _PlainConsole()
        whole = not console.is_terminal or any(column.no_wrap for column in table.columns)
        if whole:
            console.width = _ENDLESS
        console.print(table, soft_wrap=whole)
