"""Progress and warnings of a command: bars on a terminal, plain lines elsewhere."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TypeVar

from rich.console import Console
from rich.progress import Progress, ProgressColumn, Task
from rich.progress_bar import ProgressBar
from rich.table import Column
from rich.text import Text

from regcache.passes.errors import one_line
from regcache.runtime.images import Batch, Skipped

T = TypeVar("T")
B = TypeVar("B", bound=Batch)

# Seconds between two lines that say how far a command is, where there are no bars.
INTERVAL = 8.0
# Characters of a bar, so that the longest step and its times stand beside it on a terminal.
_BAR = 12


@dataclass(frozen=True)
class Step:
    """A part of a command, and what it takes beside the others.

    `name`: what is being done, in words. `seconds`: whatever the model; `images`: as many as run
    through the float model in that time. `sure`: False where it may turn out not to be needed.
    """

    name: str
    images: float = 0.0
    seconds: float = 0.0
    sure: bool = True


class Course:
    """How far a command is in its steps, and how long it will take in all by those that are done.

    `number`: of the step that is being done, from 1; 0 before the first. `clock`: in seconds.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float]) -> None:
        self.steps, self.number = steps, 0
        self.counted: tuple[str, float, int] | None = None
        """What is counted just now, how many are done, and of how many."""
        self._clock = clock
        self._start = self._began = clock()
        self._done: list[tuple[Step, float]] = []

    @property
    def step(self) -> Step | None:
        """The step that is being done."""
        return self.steps[self.number - 1] if self.number else None

    def begin(self, name: str) -> bool:
        """Go on to the next step of that name; False where none is to come."""
        for number in range(self.number + 1, len(self.steps) + 1):
            if self.steps[number - 1].name == name:
                now = self._clock()
                if self.step is not None:
                    self._done.append((self.step, now - self._began))
                self.number, self._began = number, now
                return True
        return False

    @property
    def elapsed(self) -> float:
        """Seconds since the command began."""
        return self._clock() - self._start

    @property
    def expected(self) -> float | None:
        """Seconds that the command takes in all; None while nothing tells how fast it goes."""
        step, since = self.step, self._clock() - self._began
        if step is None:
            return None
        share = self._share(step)
        pace = self._pace() if share == 0 else self._pace((step, since / share))
        if pace is None:
            return None
        usual = step.seconds + step.images * pace
        if share:  # the more is counted, the less is guessed
            usual = since + (1 - share) * (since + (1 - share) * usual)
        rest = [one for one in self.steps[self.number :] if one.sure]
        left = sum(one.seconds + one.images * pace for one in rest)
        return self.elapsed - since + max(usual, since) + left

    def _share(self, step: Step) -> float:
        """How much of a step is done, 0 to 1, as far as what is counted is the step itself."""
        if self.counted is None or self.counted[0] != step.name:
            return 0.0
        return min(self.counted[1] / self.counted[2], 1.0)

    def _pace(self, *current: tuple[Step, float]) -> float | None:
        """Seconds for an image through the float model, by what the steps took."""
        timed = [(step, taken) for step, taken in (*self._done, *current) if step.images]
        if not timed:
            return None
        spent = sum(max(taken - step.seconds, 0.0) for step, taken in timed)
        return spent / sum(step.images for step, _ in timed)

    def place(self) -> str:
        """The step, as "step 2 of 9: NAME", or its name alone where the command has one step."""
        if self.step is None:
            return ""
        name = self.step.name
        return f"step {self.number} of {len(self.steps)}: {name}" if len(self.steps) > 1 else name

    def count(self) -> str:
        """What is counted, as "LABEL 3 of 16"; empty where nothing is."""
        if self.counted is None:
            return ""
        label, done, total = self.counted
        own = self.step is not None and self.step.name == label
        return f"{done:g} of {total}" if own else f"{label} {done:g} of {total}"

    def times(self) -> str:
        """The time, as "0:30 so far", or "0:30 of about 2:00" once a step says how fast it goes."""
        expected = self.expected
        so_far = duration(self.elapsed)
        return f"{so_far} so far" if expected is None else f"{so_far} of about {duration(expected)}"

    def __str__(self) -> str:
        return ", ".join(filter(None, (self.place(), self.count(), self.times())))


def duration(seconds: float) -> str:
    """Seconds as minutes:seconds, with hours in front where there are some."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Reporter:
    """Progress and warnings on standard error, so that standard output holds results only.

    `interval`: seconds after which a line says how far the command is, where there are no bars.
    """

    def __init__(
        self,
        console: Console | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        interval: float = INTERVAL,
    ) -> None:
        self.console = console or Console(stderr=True, soft_wrap=True, highlight=False)
        self._clock, self._interval = clock, interval
        self._lock = threading.RLock()
        self._course: Course | None = None
        self._told = 0.0

    def step(self, text: str) -> None:
        """Say what is being done now."""
        self._print(Text(one_line(text)))

    def warn(self, text: str) -> None:
        """Say what the user has to know, in one line."""
        self._print(Text.assemble(("warning: ", "yellow"), one_line(text)))

    def detail(self, text: str) -> None:
        """Say what only somebody who looks closely wants to know; nobody does here."""

    def skipped(self, skipped: Skipped) -> None:
        """Say that an image was left out."""
        self.warn(f"skipped {skipped.path}: {skipped.reason}")

    @contextmanager
    def command(self, *steps: Step) -> Iterator[None]:
        """Within the block, show how far a command is: a bar, or a line every `interval` seconds.

        Nothing is shown after the block. A command inside another is a part of its step.
        """
        if self._course is not None:
            yield
            return
        self._course, self._told = Course(steps, self._clock), self._clock()
        try:
            with self._show(self._course):
                yield
        finally:
            self._course = None

    def begin(self, name: str, detail: str = "") -> None:
        """Begin the command's next step of that name, and say so; `detail` is said behind it."""
        course = self._course
        text = f"{name} {detail}" if detail else name
        if course is None or not course.begin(name):
            self.step(text)
        elif not self.console.is_terminal:
            self.step(f"{course.place()} {detail}" if detail else course.place())

    def images(self, batches: Iterable[B], total: int, label: str) -> Iterator[B]:
        """Pass batches through, counting their images."""
        return self._count(batches, total, f"{label}: {total} images", label, _images_in)

    def progress(self, items: Iterable[T], total: int, label: str) -> Iterator[T]:
        """Pass items through, counting them."""
        return self._count(items, total, f"{label}: {total}", label, lambda _: 1)

    def beat(self) -> None:
        """Say how far the command is, where that was last said `interval` seconds ago."""
        with self._lock:
            now = self._clock()
            if self._course is not None and now - self._told >= self._interval:
                self._told = now
                self.step(str(self._course))

    def _show(self, course: Course) -> AbstractContextManager[object]:
        return self._bar(course) if self.console.is_terminal else self._beats()

    def _print(self, text: Text) -> None:
        with self._lock:
            self.console.print(text)

    def _count(
        self, items: Iterable[T], total: int, line: str, label: str, size: Callable[[T], int]
    ) -> Iterator[T]:
        if not total:
            return
        alone = self._course is None
        with self.command(Step(label, images=1)):
            course = self._course
            assert course is not None
            told = course.step is not None and course.step.name == label
            if alone:
                course.begin(label)
            if not told and not self.console.is_terminal:
                self.step(line)
            before, done = course.counted, 0
            try:
                for item in items:
                    course.counted = label, done, total
                    yield item
                    done += size(item)
            finally:
                course.counted = before

    @contextmanager
    def _beats(self) -> Iterator[None]:
        if self.console.quiet:
            yield
            return
        over = threading.Event()

        def beat() -> None:
            while not over.wait(min(self._interval / 8, 1.0)):
                with self._lock:
                    if not over.is_set():
                        self.beat()

        thread = threading.Thread(target=beat, name="regcache progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            with self._lock:
                over.set()
            thread.join()

    def _bar(self, course: Course) -> AbstractContextManager[object]:
        words = [_Words(tell) for tell in (course.place, course.count, course.times)]
        columns = (words[0], _CountBar(course), *words[1:])
        bar = Progress(*columns, console=self.console, transient=True, disable=self.console.quiet)
        bar.add_task("", total=None)
        return bar


class _Words(ProgressColumn):
    """What a function says at the moment, on one line."""

    def __init__(self, tell: Callable[[], str]) -> None:
        super().__init__(Column(no_wrap=True, overflow="ellipsis"))
        self._tell = tell

    def render(self, task: Task) -> Text:
        return Text(one_line(self._tell()))


class _CountBar(ProgressColumn):
    """A bar of what is counted just now; it pulses where nothing is."""

    def __init__(self, course: Course) -> None:
        super().__init__()
        self._course = course

    def render(self, task: Task) -> ProgressBar:
        _, done, total = self._course.counted or ("", 0, None)
        return ProgressBar(total, done, _BAR, pulse=total is None, animation_time=task.get_time())


def _images_in(batch: Batch) -> int:
    return len(batch.paths)
