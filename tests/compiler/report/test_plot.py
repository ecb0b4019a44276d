"""Scales, ticks and bars of a report's figures."""

import math
from itertools import pairwise

import pytest

from regcache.compiler.report.plot import (
    PANEL,
    WIDE,
    Bands,
    Scale,
    limits,
    rows_plot,
    short,
    x_scale,
    y_scale,
)


def test_values_stand_where_they_belong() -> None:
    scale = Scale(0.0, 10.0, 100.0, 0.0)
    assert [scale(value) for value in (0, 5, 10)] == [100, 50, 0]
    assert [scale(value) for value in (-5, 20)] == [100, 0]
    log = Scale(1.0, 100.0, 0.0, 10.0, log=True)
    assert [log(value) for value in (1, 10, 100)] == [0, 5, 10]
    assert Scale(3.0, 3.0, 0.0, 10.0)(3.0) == 5


@pytest.mark.parametrize(
    ("low", "high", "labels"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0.9982, 1.0, ["0.9985", "0.9990", "0.9995", "1.0000"]),
        (0.0, 4.2e-4, ["0", "1e-4", "2e-4", "3e-4", "4e-4"]),
        (-4.4, 4.6, ["-4", "-2", "0", "2", "4"]),
        (0.0, 70.0, ["0", "20", "40", "60"]),
        (0.0, 0.0, ["0"]),
    ],
)
def test_ticks_are_round_and_tell_values_apart(low: float, high: float, labels: list[str]) -> None:
    ticks = Scale(low, high, 0.0, 100.0).ticks()
    assert [tick.label for tick in ticks] == labels
    assert len(set(labels)) == len(labels)


def test_logarithmic_ticks_are_powers_and_what_lies_between() -> None:
    ticks = Scale(0.3, 40.0, 0.0, 100.0, log=True).ticks()
    assert [tick.label for tick in ticks] == ["0.5", "1", "2", "5", "10", "20"]
    assert [tick.label for tick in ticks if not tick.minor] == ["1", "10"]
    wide = Scale(1e-9, 1e6, 0.0, 100.0, log=True).ticks()
    assert 3 < len(wide) <= 7


@pytest.mark.parametrize("count", [1, 12, 24, 40, 400])
@pytest.mark.parametrize("width", [PANEL, WIDE])
def test_bands_have_room_for_their_labels(count: int, width: int) -> None:
    bands = Bands(count, width)
    ticks = bands.ticks()
    gaps = [b.at - a.at for a, b in pairwise(ticks)]
    assert all(gap > 20 for gap in gaps)
    assert ticks[0].label == "0"
    left, wide = bands.bar(count - 1)
    assert x_scale(0, 1, width)(0) <= left < left + wide <= width
    first, _ = bands.bar(0, 0, 2)
    second, _ = bands.bar(0, 1, 2)
    assert first < bands(0) <= second


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.2e-4, "1.2e-4"), (0.0123, "0.0123"), (1.25e7, "1.25e7"), (-3.0, "-3"),
     (123456.0, "1.23e5"), (9.999e-4, "1e-3")],
)  # fmt: skip
def test_numbers_are_short(value: float, text: str) -> None:
    assert short(value) == text


def test_limits_hold_all_values() -> None:
    assert limits([1.0, 3.0]) == pytest.approx((0.0, 3.18))
    assert limits([-2.0, 2.0]) == pytest.approx((-2.24, 2.24))
    low, high = limits([1e-3, 0.0, 10.0, math.inf], log=True)
    assert 0 < low < 1e-3
    assert 10 < high < 100
    assert limits([]) == pytest.approx((0.0, 1.06))


def test_rows_are_as_long_as_their_values() -> None:
    plot = rows_plot("title", "summary", [("a", 4.0, "4", "a"), ("b", 1.0, "1", "quiet")])
    assert [rect.width for rect in plot.rects] == [WIDE, WIDE / 4]
    assert {label.text for label in plot.labels} == {"a", "b", "4", "1"}
    assert plot.height > plot.rects[-1].y
    assert y_scale(0.0, 1.0, 300)(1.0) < y_scale(0.0, 1.0, 300)(0.0)
