"""What a user reads while a command works: by a clock that is moved by hand, without waiting."""

import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from rich.console import Console

from regcache.compiler.reporter import Course, Reporter, Step, duration

STEPS = (Step("export", seconds=10), Step("read", images=50), Step("round", images=100))


@dataclass
class Clock:
    """Seconds that pass when they are told to."""

    now: float = 1000.0

    def __call__(self) -> float:
        return self.now

    def pass_(self, seconds: float) -> None:
        """Let time go by."""
        self.now += seconds


class Told:
    """A reporter whose time is moved by hand, and what it has written; no thread beats in it."""

    def __init__(self, *, terminal: bool = False, interval: float = 8.0) -> None:
        self.clock, self.file = Clock(), io.StringIO()
        console = Console(
            file=self.file, soft_wrap=True, highlight=False, width=200, force_terminal=terminal
        )
        self.reporter = Reporter(console, clock=self.clock, interval=interval)

    @property
    def lines(self) -> list[str]:
        return self.file.getvalue().splitlines()

    def after(self, seconds: float) -> list[str]:
        """The lines that a heartbeat writes so much later."""
        before = len(self.lines)
        self.clock.pass_(seconds)
        self.reporter.beat()
        return self.lines[before:]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (9.6, "0:10"), (75, "1:15"), (3599.7, "1:00:00"), (36_061, "10:01:01")],
)
def test_a_duration_is_read_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_steps_are_numbered_and_nothing_else_is_said_of_them() -> None:
    told = Told()
    with told.reporter.command(*STEPS):
        told.reporter.begin("export", "a model")
        told.reporter.begin("round", "by 4 images")  # one that is not needed is passed over
        told.reporter.begin("something else")
    assert told.lines == ["step 1 of 3: export a model", "step 3 of 3: round by 4 images",
                          "something else"]  # fmt: skip


def test_a_step_that_comes_twice_is_begun_twice() -> None:
    told = Told()
    again = [Step("read"), Step("search"), Step("read")]
    with told.reporter.command(*again):
        for name in ("read", "read", "read"):
            told.reporter.begin(name)
    assert told.lines == ["step 1 of 3: read", "step 3 of 3: read", "read"]


def test_a_silent_command_says_how_far_it_is() -> None:
    told = Told()
    with told.reporter.command(*STEPS):
        told.reporter.begin("export")
        assert told.after(7.9) == []
        assert told.after(0.1) == ["step 1 of 3: export, 0:08 so far"]
        assert told.after(0) == []
        told.reporter.begin("read")
        assert told.after(8) == ["step 2 of 3: read, 0:16 so far"]
        told.clock.pass_(2)
        told.reporter.begin("round")
        # 50 images took 10 s, so that 100 more will take 20.
        assert told.after(6) == ["step 3 of 3: round, 0:24 of about 0:38"]
        assert told.after(20) == ["step 3 of 3: round, 0:44 of about 0:44"]
    assert told.after(100) == []


def test_other_lines_do_not_keep_it_from_saying_so() -> None:
    told = Told()
    with told.reporter.command(*STEPS):
        told.reporter.begin("read")
        told.clock.pass_(7)
        told.reporter.warn("an image is blank")
        assert len(told.after(1)) == 1


def test_what_is_counted_is_told_and_foretells() -> None:
    told = Told()
    with told.reporter.command(*STEPS):
        told.reporter.begin("read", "4 images")
        images = told.reporter.progress(range(4), 4, "read")
        next(images)
        assert told.after(10) == ["step 2 of 3: read, 0 of 4, 0:10 so far"]
        next(images)
        # A quarter in 10 s: 40 s for these 50 images, and 80 for the 100 behind.
        assert told.after(8)[0].startswith("step 2 of 3: read, 1 of 4, 0:18 of about 3:")
        assert [*images] == [2, 3]
        assert told.lines[0] == "step 2 of 3: read 4 images"
        assert not [line for line in told.lines if line.startswith("read: ")]


def test_parts_of_a_step_are_counted_by_their_own_name() -> None:
    told = Told()
    with told.reporter.command(*STEPS):
        told.reporter.begin("round")
        parts = told.reporter.progress(range(3), 3, "trying")
        next(parts)
        next(parts)
        assert told.lines[-1] == "trying: 3"
        assert told.after(8) == ["step 3 of 3: round, trying 1 of 3, 0:08 so far"]


def test_counting_outside_a_command_is_told_too() -> None:
    told = Told()
    counted = told.reporter.progress(range(2), 2, "scoring")
    next(counted)
    next(counted)
    assert told.after(8) == ["scoring, 1 of 2, 0:08 of about 0:16"]
    assert [*counted] == []
    assert told.lines[0] == "scoring: 2"
    assert told.after(8) == []


def test_steps_that_may_not_come_are_not_expected() -> None:
    clock = Clock()
    course = Course([Step("a", images=1), Step("b", images=8, sure=False)], clock)
    course.begin("a")
    course.counted = "a", 1, 2
    clock.pass_(5)
    assert course.expected == pytest.approx(10)
    course.begin("b")
    assert course.expected == pytest.approx(45)


def test_what_takes_longer_than_expected_is_never_expected_to_be_over() -> None:
    clock = Clock()
    course = Course(STEPS, clock)
    assert course.expected is None
    course.begin("read")
    assert course.expected is None
    clock.pass_(50)
    course.begin("round")
    expected = course.expected
    assert expected == pytest.approx(150)
    clock.pass_(500)
    assert course.expected == pytest.approx(550)


def test_a_command_inside_another_is_a_part_of_its_step() -> None:
    told = Told()
    with told.reporter.command(*STEPS):
        told.reporter.begin("read")
        with told.reporter.command(Step("inner"), Step("more")):
            told.reporter.begin("inner")
        assert told.after(8) == ["step 2 of 3: read, 0:08 so far"]


def test_what_is_passed_through_is_unchanged() -> None:
    told = Told()

    def items() -> Iterator[int]:
        yield from (3, 1, 2)

    with told.reporter.command(*STEPS):
        assert [*told.reporter.progress(items(), 3, "read")] == [3, 1, 2]
        assert [*told.reporter.progress(iter(()), 0, "read")] == []


def test_a_thread_beats_and_ends_with_the_command() -> None:
    """With the real clock, in hundredths of a second."""
    file, seen = io.StringIO(), threading.Event()

    class Seen(Reporter):
        def beat(self) -> None:
            super().beat()
            if "so far" in file.getvalue():
                seen.set()

    reporter = Seen(Console(file=file, soft_wrap=True), interval=0.01)
    threads = threading.active_count()
    with reporter.command(*STEPS):
        reporter.begin("read")
        assert seen.wait(60)
    assert threading.active_count() == threads
    text = file.getvalue()
    assert text.endswith("so far\n")
    assert {line.split(",")[0] for line in text.splitlines()} == {"step 2 of 3: read"}


def test_the_thread_ends_where_the_command_fails() -> None:
    reporter = Reporter(Console(file=io.StringIO()), interval=0.01)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="no"), reporter.command(*STEPS):
        raise ValueError("no")
    assert threading.active_count() == threads


def test_a_quiet_console_starts_no_thread() -> None:
    reporter = Reporter(Console(quiet=True))
    threads = threading.active_count()
    with reporter.command(*STEPS):
        reporter.begin("read")
        assert threading.active_count() == threads


def test_a_terminal_gets_a_bar_for_every_step() -> None:
    told = Told(terminal=True)
    with told.reporter.command(*STEPS):
        told.reporter.begin("export", "a model")
        told.clock.pass_(4)
        told.reporter.begin("read")
        for item in told.reporter.progress(range(4), 4, "read"):
            told.clock.pass_(3)
            assert item < 4
        told.reporter.begin("round")
        told.reporter.warn("an image is blank")
    text = told.file.getvalue()
    assert "step 3 of 3: round" in text  # drawn when a line is printed
    assert "━" in text
    assert "0:16 of about" in text
    assert "an image is blank\n" in text
    assert "step 0" not in text
    assert "step 1 of 3: export a model\n" not in text
