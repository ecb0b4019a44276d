"""The code blocks of a Markdown page, fenced or indented, as CommonMark finds them."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt


@dataclass(frozen=True)
class CodeBlock:
    """A block of code: `language` is what stands behind its fence, empty where it is indented.

    `line`: the first line of its code, from 1.
    """

    page: Path
    line: int
    language: str
    code: str

    @property
    def place(self) -> str:
        """Where it stands, as an editor takes it."""
        return f"{self.page.name}:{self.line}"


def code_blocks(page: Path) -> Iterator[CodeBlock]:
    """Every block of a page, those in lists and quotes, too."""
    for token in MarkdownIt("commonmark").parse(page.read_text(encoding="utf-8")):
        if token.type in ("fence", "code_block"):
            assert token.map is not None
            line = token.map[0] + 1 + (token.type == "fence")
            yield CodeBlock(page, line, token.info.strip(), token.content)
