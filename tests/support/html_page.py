"""What a page of HTML holds, read without a browser."""

from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = frozenset({"meta", "img", "br", "link", "hr", "input"})
_MARKS = frozenset({"rect", "polyline", "circle"})


@dataclass
class Figure:
    """An SVG: its attributes, and how many marks of each kind it has."""

    attributes: dict[str, str]
    marks: list[str] = field(default_factory=list)


class HtmlPage(HTMLParser):
    """Elements of a page; `tables` by their captions, with the head's row first.

    Raises AssertionError where tags are not closed in their order.
    """

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.words = text, ""
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.figures: list[Figure] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.elements.append((tag, found))
        if tag == "svg":
            self.figures.append(Figure(found))
        elif tag == "caption":
            self._rows = self.tables.setdefault("", [])
        elif tag == "tr":
            self._rows.append([])
        elif tag in ("td", "th"):
            self._rows[-1].append("")
        elif tag in _MARKS:
            self.figures[-1].marks.append(tag)
        if tag not in _VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.words += data + " "
        if self._open and self._open[-1] == "caption":
            self.tables[data] = self.tables.pop("")
        elif {"td", "th"} & set(self._open):
            self._rows[-1][-1] += data

    def all_of(self, tag: str) -> list[dict[str, str]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self) -> None:
        """What holds of every report: all is labelled, drawn, linked, and of the page itself."""
        names = [found["id"] for _, found in self.elements if "id" in found]
        assert len(names) == len(set(names)), "two elements of one id"
        for _, found in self.elements:
            assert set(found.get("aria-labelledby", "").split()) <= set(names), found
        for link in self.all_of("a"):
            assert link["href"].startswith("#"), link
            assert link["href"][1:] in names, link
        assert not self.all_of("script")
        assert not self.all_of("link")
        for image in self.all_of("img"):
            assert image["src"].startswith("data:image/jpeg;base64,")
            assert image["alt"]
        assert "http" not in self.text.replace('http-equiv="Content-Security-Policy"', "")
        for figure in self.figures:
            assert figure.marks, figure
            assert figure.attributes["role"] == "img"
            assert figure.attributes["tabindex"] == "0"
        for _, found in self.elements:
            assert "nan" not in {found.get(name) for name in ("x", "y", "cx", "cy", "width", "d")}
