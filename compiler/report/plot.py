"""Figures as plain geometry: scales, ticks and marks in the units of an SVG's view box."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

WIDE, PANEL = 640, 320
"""Widths of a figure of its own, and of one that stands beside others."""
# Room for the title of the y axis above, and for x's labels and title below.
_TOP, _BOTTOM, _RIGHT = 36, 66, 14
_ROW, _BAR = 56, 16

Series = Literal["a", "b", "c", "d", "e", "f", "quiet"]
"""A colour of the style sheet; `quiet` is for what others are held against."""
SERIES: tuple[Series, ...] = ("a", "b", "c", "d", "e", "f")


@dataclass(frozen=True)
class Tick:
    """A label at a place of an axis; `minor` ones make room on a narrow screen."""

    at: float
    label: str
    minor: bool = False


@dataclass(frozen=True)
class Rect:
    """A bar, and what it says where a pointer rests on it."""

    x: float
    y: float
    width: float
    height: float
    series: Series
    says: str = ""
    hollow: bool = False


@dataclass(frozen=True)
class Line:
    """A line through points "x,y x,y"."""

    points: str
    series: Series
    dashed: bool = False


@dataclass(frozen=True)
class Dot:
    """A dot; `hollow` ones are what the filled are compared with, `large` ones are the result."""

    x: float
    y: float
    series: Series
    says: str = ""
    hollow: bool = False
    large: bool = False


@dataclass(frozen=True)
class Label:
    """A text in the drawing; `end` ones are set against their right end."""

    x: float
    y: float
    text: str
    end: bool = False


@dataclass(frozen=True)
class Plot:
    """A drawing of `width` x `height` units.

    `title`, `summary`: what it shows, for whoever hears it read.
    """

    title: str
    summary: str
    width: float
    height: float
    x_ticks: Sequence[Tick] = ()
    y_ticks: Sequence[Tick] = ()
    x_title: str = ""
    y_title: str = ""
    rects: Sequence[Rect] = ()
    lines: Sequence[Line] = ()
    dots: Sequence[Dot] = ()
    labels: Sequence[Label] = ()

    @property
    def left(self) -> float:
        """Where the y axis stands."""
        return _left(self.width)

    @property
    def right(self) -> float:
        """Where the x axis ends."""
        return self.width - _RIGHT

    @property
    def floor(self) -> float:
        """Where the x axis stands."""
        return self.height - _BOTTOM


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high` on a line from `start` to `end`, by their logarithm if `log`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value; those out of range stand at the nearest end."""
        value = min(max(value, self.low), self.high)
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)

    def ticks(self, least: int = 4) -> list[Tick]:
        """Labels at round values, no more of them than needed for the least number."""
        if self.log:
            values = _decades(self.low, self.high)
            return [Tick(self(value), short(value), _is_between(value)) for value in values]
        values = _round_values(self.low, self.high, least)
        labels = _labels(values)
        return [
            Tick(self(value), label, bool(at % 2))
            for at, (value, label) in enumerate(zip(values, labels, strict=True))
        ]


def x_scale(low: float, high: float, width: float = WIDE, *, log: bool = False) -> Scale:
    """A scale from the left to the right of a plot's frame."""
    return Scale(low, high, _left(width), width - _RIGHT, log)


def y_scale(low: float, high: float, height: float, *, log: bool = False) -> Scale:
    """A scale from the bottom to the top of a plot's frame."""
    return Scale(low, high, height - _BOTTOM, _TOP, log)


@dataclass(frozen=True)
class Bands:
    """Places for `count` things in a row, such as blocks, in a plot of a width."""

    count: int
    width: float = WIDE

    @property
    def step(self) -> float:
        """The width of one place."""
        return (self.width - _left(self.width) - _RIGHT) / max(self.count, 1)

    def __call__(self, number: float) -> float:
        """The middle of a place."""
        return round(_left(self.width) + (number + 0.5) * self.step, 2)

    def bar(self, number: int, part: int = 0, parts: int = 1) -> tuple[float, float]:
        """Where a bar begins, and its width; several parts stand side by side."""
        wide = min(self.step * 0.76, 44.0 * parts) / parts
        begin = self(number) + wide * (part - parts / 2)
        return round(begin, 2), round(max(wide - 1, 1), 2)

    def ticks(self, first: int = 0) -> list[Tick]:
        """Numbers below the places, as many as there is room for."""
        every = max(1, math.ceil(26 / self.step))
        return [
            Tick(self(number), str(number + first), bool(number // every % 2))
            for number in range(0, self.count, every)
        ]


def polyline(points: Iterable[tuple[float, float]]) -> str:
    """Points as SVG writes them."""
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def rows_plot(title: str, summary: str, rows: Sequence[tuple[str, float, str, Series]]) -> Plot:
    """Bars that lie, one below the other: (label, length, value in words, series) each."""
    most = max((length for _, length, _, _ in rows), default=0.0) or 1.0
    rects, labels = [], []
    for number, (label, length, value, series) in enumerate(rows):
        top = number * _ROW
        labels += [Label(0, top + 24, label), Label(WIDE, top + 24, value, end=True)]
        wide = max(WIDE * length / most, 2.0)
        rects.append(Rect(0, top + 32, round(wide, 1), _BAR, series, f"{label}: {value}"))
    height = len(rows) * _ROW + 2
    return Plot(title, summary, WIDE, height, rects=rects, labels=labels)


def short(value: float) -> str:
    """A number in few characters: 0.00012 is 1.2e-4, 12000 is 1.2e4."""
    if value == 0:
        return "0"
    text = f"{value:.2e}" if abs(value) < 1e-3 else f"{value:.3g}"
    digits, _, power = text.partition("e")
    return f"{float(digits):g}e{int(power)}" if power else text


def limits(values: Iterable[float], *, log: bool = False) -> tuple[float, float]:
    """The ends of a scale that holds all values, with a little room; from 0 on if not `log`."""
    found = [value for value in values if math.isfinite(value)]
    if log:
        positive = [value for value in found if value > 0]
        low, high = min(positive, default=0.1), max(positive, default=1.0)
        return low / 1.4, high * 1.4
    low, high = min(found, default=0.0), max(found, default=1.0)
    low, high = min(low, 0.0), max(high, 0.0)
    room = (high - low) * 0.06 or 1.0
    return (low - room if low < 0 else 0.0), (high + room if high > 0 else 0.0)


def _left(width: float) -> float:
    """Where the y axis stands: labels of a wide plot grow where the screen is narrow."""
    return 84 if width == WIDE else 48


def _round_values(low: float, high: float, least: int) -> list[float]:
    """The fewest multiples of a round step in a range that are `least` or more."""
    if high <= low:
        return [low]
    power = math.floor(math.log10(high - low))
    steps = [part * 10.0**exponent for exponent in (power, power - 1) for part in (5, 2, 1)]
    for step in steps:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first + 1 >= least:
            break
    return [round(number * step, 12) for number in range(first, last + 1)]


def _labels(values: Sequence[float]) -> list[str]:
    """Values in words that tell them apart: with as many digits as their distance needs."""
    most = max(map(abs, values))
    if len(values) < 2 or not 1e-3 <= most < 1e5:
        return [short(value) for value in values]
    digits = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [f"{value:.{digits}f}" for value in values]


def _decades(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    parts = (1, 2, 5) if last - first <= 3 else (1,)
    every = max(1, math.ceil((last - first) / 6))
    powers = range(first, last + 1, every)
    return [v for p in powers for part in parts if low <= (v := part * 10.0**p) <= high]


def _is_between(value: float) -> bool:
    """Whether a value is no power of ten."""
    return not math.isclose(math.log10(value), round(math.log10(value)), abs_tol=1e-9)
