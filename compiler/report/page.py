"""What a page is made of: sections of sentences, facts, tables, figures and pictures."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from regcache.compiler.report.plot import Plot, Series


@dataclass(frozen=True)
class Verdict:
    """Whether a limit is kept to, as a cell."""

    passed: bool


Cell = str | Verdict


@dataclass(frozen=True)
class Sentence:
    """A paragraph."""

    kind: ClassVar = "sentence"
    text: str


@dataclass(frozen=True)
class Facts:
    """Names and what they are."""

    kind: ClassVar = "facts"
    rows: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Table:
    """A table. `texts`: how many of its first columns are words; the others are numbers.

    `folded`: whether it is hidden until somebody asks for it.
    """

    kind: ClassVar = "table"
    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    texts: int = 1
    folded: bool = False


@dataclass(frozen=True)
class Figure:
    """Plots that belong together, the words below them, and the table of their numbers.

    `legend`: the series that they show, with what each stands for; the third says if it is hollow.
    """

    kind: ClassVar = "figure"
    title: str
    about: str
    plots: Sequence[Plot]
    table: Table
    legend: Sequence[tuple[Series, str, bool]] = ()


@dataclass(frozen=True)
class Thumbnail:
    """A small picture. `source`: a data URI; `note`: what stands below it."""

    source: str
    name: str
    note: str
    differs: bool = False


@dataclass(frozen=True)
class Neighbours:
    """An image, and what is nearest to it in two embeddings, by what these are called."""

    image: Thumbnail
    nearest: Sequence[tuple[str, Sequence[Thumbnail]]]


@dataclass(frozen=True)
class Gallery:
    """Images with their neighbours."""

    kind: ClassVar = "gallery"
    rows: Sequence[Neighbours]


Part = Sentence | Facts | Table | Figure | Gallery


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading; `name` is what links point to."""

    name: str
    title: str
    parts: Sequence[Part]


@dataclass(frozen=True)
class Tile:
    """A figure that sums something up, in large type."""

    value: str
    label: str


@dataclass(frozen=True)
class Page:
    """The whole page. `passed`: of parity; `verdict`: that in words."""

    title: str
    lead: str
    passed: bool
    verdict: str
    tiles: Sequence[Tile]
    sections: Sequence[Section]
    made_by: str
