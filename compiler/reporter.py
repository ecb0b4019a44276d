"""Progress and warnings of a command: bars on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from regcache.passes.errors import one_line
from regcache.runtime.images import Batch, Skipped

T = TypeVar("T")


class Reporter:
    """Progress and warnings on standard error, so that standard output holds results only."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)

    def step(self, text: str) -> None:
        """Say what is being done now."""
        self.console.print(Text(one_line(text)))

    def warn(self, text: str) -> None:
        """Say what the user has to know, in one line."""
        self.console.print(Text.assemble(("warning: ", "yellow"), one_line(text)))

    def skipped(self, skipped: Skipped) -> None:
        """Say that an image was left out."""
        self.warn(f"skipped {skipped.path}: {skipped.reason}")

    def images(self, batches: Iterable[Batch], total: int, label: str) -> Iterator[Batch]:
        """Pass batches through, counting their images."""
        return self._count(batches, total, f"{label}: {total} images", label, _images_in)

    def progress(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass items through, counting them."""
        return self._count(items, total, f"{label}: {total}", label, lambda _: 1)

    def _count(
        self, items: Iterable[T], total: int, line: str, label: str, size: Callable[[T], int]
    ) -> Iterator[T]:
        if not total:
            return
        if not self.console.is_terminal:
            self.step(line)
            yield from items
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True) as bar:
            task = bar.add_task(label, total=total)
            for item in items:
                yield item
                bar.advance(task, size(item))


def _images_in(batch: Batch) -> int:
    return len(batch.paths)
