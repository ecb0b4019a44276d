"""The page in a real browser: nothing fails, all is drawn, readable and reached by keyboard."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from _pytest.outcomes import Skipped
from support.browser import find_chromium, open_browser, open_page, serious_findings
from support.reported import bench_result, with_engine, with_registers

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.parity.reference import ReferenceChoice
from regcache.compiler.report.measure import Comparison, measure
from regcache.compiler.report.subject import Subject
from regcache.compiler.report.write import write_report
from regcache.compiler.reporter import Reporter
from regcache.runtime.thresholds import Thresholds

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow

_NARROW = 400
# The boxes of what is drawn, against that of their figure.
_MARKS = """svgs => svgs.map(svg => {
  const frame = svg.getBoundingClientRect();
  const boxes = [...svg.querySelectorAll("rect, circle, polyline")].map(mark => {
    const box = mark.getBoundingClientRect(), style = getComputedStyle(mark);
    const paint = style.fill === "none" ? style.stroke : style.fill;
    return {drawn: box.width + box.height > 0 && paint !== "none",
            inside: box.left >= frame.left - 9 && box.right <= frame.right + 9 &&
                    box.top >= frame.top - 9 && box.bottom <= frame.bottom + 9};
  });
  return {name: svg.querySelector("title").textContent, width: frame.width, height: frame.height,
          marks: boxes.length, drawn: boxes.every(box => box.drawn),
          inside: boxes.every(box => box.inside)};
})"""
# Texts that are shown: their size on the screen, whether they leave it, and those that overlap.
_TEXTS = """svgs => svgs.flatMap(svg => {
  const shown = [...svg.querySelectorAll("text")].filter(
    text => getComputedStyle(text).display !== "none");
  const boxes = shown.map(text => text.getBoundingClientRect());
  const scale = svg.getBoundingClientRect().width / svg.viewBox.baseVal.width;
  const shared = (a, b, from, to) => Math.min(a[to], b[to]) - Math.max(a[from], b[from]);
  return shown.map((text, at) => ({
    text: text.textContent,
    size: parseFloat(getComputedStyle(text).fontSize) * scale,
    left: boxes[at].left, right: boxes[at].right,
    over: shown.filter((_, other) => other !== at &&
      shared(boxes[at], boxes[other], "left", "right") > 1 &&
      shared(boxes[at], boxes[other], "top", "bottom") > 4).map(other => other.textContent)}));
})"""
_FOCUS = """() => {
  const on = document.activeElement;
  if (on === null || on === document.body) return null;
  const all = [...document.querySelectorAll("a, summary, svg, .scroll")];
  return {number: all.indexOf(on), outline: getComputedStyle(on).outlineStyle};
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def address(
    compiled: Path, images: Path, subject: Subject, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """Of a page with every kind of figure on it."""
    how = Comparison(Thresholds(), ReferenceChoice.FLOAT_ONNX, per_layer=True, threads=1)
    measured = measure(Artifact.open(compiled), images, how, Reporter())
    whole = replace(with_engine(with_registers(subject)), measured=measured, bench=bench_result())
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(whole, path)
    return path.as_uri()


@pytest.fixture
def page(browser: "Browser", address: str) -> Iterator["Page"]:
    with open_page(browser) as page:
        page.goto(address)
        yield page


@pytest.fixture
def narrow(browser: "Browser", address: str) -> Iterator["Page"]:
    with open_page(browser, width=_NARROW) as page:
        page.goto(address)
        yield page


def test_every_figure_is_drawn(page: "Page") -> None:
    figures = page.eval_on_selector_all("svg", _MARKS)
    assert len(figures) > 15
    for figure in figures:
        assert figure["width"] > 200, figure
        assert figure["height"] > 40, figure
        assert figure["marks"], figure
        assert figure["drawn"], figure
        assert figure["inside"], figure


def test_a_page_that_fails_or_reaches_out_is_found_out(browser: "Browser") -> None:
    with (
        pytest.raises(AssertionError, match="asks for https"),
        open_page(browser) as page,
    ):
        page.set_content('<img src="https://example.com/x.png" alt="x">')
    with pytest.raises(AssertionError, match="this fails"), open_page(browser) as page:
        page.set_content("<script>throw new Error('this fails')</script>")
    with open_page(browser) as page:
        page.set_content("<p>dark</p>" * 9 + '<p>dark<b style="color: #ccc">pale</b></p>')
        contrast = [finding for finding in serious_findings(page) if "color-contrast" in finding]
        assert len(contrast) == 1


def test_without_a_browser_a_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(UserWarning, match="apt-get install chromium"), pytest.raises(Skipped):
        find_chromium()


def test_all_pictures_are_there(page: "Page") -> None:
    widths = page.eval_on_selector_all("img", "images => images.map(image => image.naturalWidth)")
    assert len(widths) == 6 * 7
    assert min(widths) > 0


@pytest.mark.parametrize("dark", [False, True])
def test_accessibility_has_no_serious_finding(browser: "Browser", address: str, dark: bool) -> None:
    with open_page(browser, dark=dark) as page:
        page.goto(address)
        for section in ("#parity", "#sensitivity"):
            page.click(f"{section} summary")
        assert serious_findings(page) == []


def test_the_paper_is_dark_where_that_is_wanted(browser: "Browser", address: str) -> None:
    colours = []
    for dark in (False, True):
        with open_page(browser, dark=dark) as page:
            page.goto(address)
            colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
            colours.append(sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))))
    light, dark_paper = colours
    assert light > 700
    assert dark_paper < 100


def test_the_keyboard_reaches_everything_and_opens_what_is_folded(page: "Page") -> None:
    reached = set()
    for _ in range(500):
        page.keyboard.press("Tab")
        focus = page.evaluate(_FOCUS)
        if focus is None:
            break
        assert focus["outline"] != "none", focus
        reached.add(focus["number"])
    wanted = page.evaluate(
        """[...document.querySelectorAll("a, summary, svg, .scroll")].map(
             (one, at) => one.closest("details:not([open])") && one.tagName !== "SUMMARY" ? -1 : at
           ).filter(at => at >= 0)"""
    )
    assert reached == set(wanted)
    page.focus("summary")
    page.keyboard.press("Enter")
    assert page.evaluate('document.querySelector("details").open')


def test_a_narrow_screen_scrolls_in_one_direction(narrow: "Page") -> None:
    narrow.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert narrow.evaluate("document.documentElement.scrollWidth") <= _NARROW
    assert all(figure["inside"] for figure in narrow.eval_on_selector_all("svg", _MARKS))


@pytest.mark.parametrize("width", [_NARROW, 1280])
def test_texts_of_figures_can_be_read(browser: "Browser", address: str, width: int) -> None:
    with open_page(browser, width=width) as page:
        page.goto(address)
        for text in page.eval_on_selector_all("svg", _TEXTS):
            assert text["size"] >= 10, text
            assert text["left"] >= 0, text
            assert text["right"] <= width, text
            assert text["over"] == [], text
