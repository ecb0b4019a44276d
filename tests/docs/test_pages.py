"""What the pages claim of the code and of one another: messages, figures, the way of a newcomer."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from support.docs_shell import ROOT, commands_of, logical_lines
from support.markdown_blocks import code_blocks

import regcache
from regcache.passes.errors import MissingExtraError

README = ROOT / "README.md"
MEASURED = [ROOT / "docs" / f"{name}.md" for name in ("choosing-a-target", "accuracy", "cost")]
TROUBLES = re.compile(r"^### `(.+)`$", re.M)


def section(page: Path, heading: str) -> str:
    """The text below a heading of a page, up to the next one of the same rank."""
    text = page.read_text(encoding="utf-8")
    rest = text.partition(f"\n## {heading}\n")[2]
    assert rest, heading
    return rest.partition("\n## ")[0]


class TestReadme:
    def test_it_stays_short(self) -> None:
        assert len(README.read_text(encoding="utf-8").splitlines()) <= 160

    def test_an_own_onnx_file_takes_three_commands(self) -> None:
        text = section(README, "An ONNX file that you have")
        blocks = [block for block in code_blocks(README) if block.code in text]
        lines = [line for block in blocks for line in logical_lines(block.code)]
        commands = [words for line in lines for words in commands_of(line)]
        assert [words[:2] for words in commands] == [
            ["pip", "install"],
            ["regcache", "compile"],
            ["regcache", "parity"],
        ]
        assert "[" not in commands[0][2], "the base install is enough"
        assert commands[1][commands[1].index("-o") + 1] == commands[2][2]

    def test_its_figures_are_those_that_were_measured(self) -> None:
        """Every row of its first table, figure by figure, stands in a page that says how."""
        rows = [
            [cell.strip(" *") for cell in line.strip("|").split("|")]
            for line in README.read_text(encoding="utf-8").partition("\n## ")[0].splitlines()
            if re.match(r"\| (\*\*)?(regcache|NNCF|ONNX Runtime|NVIDIA)", line)
        ]
        assert len(rows) == 6
        measured = [
            line
            for page in MEASURED
            for line in page.read_text(encoding="utf-8").splitlines()
            if line.startswith("|")
        ]
        for row in rows:
            figures = [cell for cell in row[1:] if cell != "not timed"]
            assert len(figures) >= 3
            assert any(
                all(figure.rstrip("0") in line for figure in figures) for line in measured
            ), row


def test_the_reference_lists_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^::: regcache\.(\w+)$", text, re.M)
    assert sorted(listed) == sorted(set(regcache.__all__) - {"__version__"})


class TestTroubleshooting:
    PAGE = ROOT / "docs" / "troubleshooting.md"

    def test_it_has_the_ten_commonest(self) -> None:
        assert len(TROUBLES.findall(self.PAGE.read_text(encoding="utf-8"))) >= 10

    @pytest.mark.parametrize("message", TROUBLES.findall(PAGE.read_text(encoding="utf-8")))
    @pytest.mark.slow
    def test_the_code_says_that(self, message: str) -> None:
        """Word for word, but for what stands in capitals."""
        needed = re.fullmatch(r"(.+) needs (\w+): pip install \"regcache\[([\w-]+)\]\"", message)
        if needed is not None:
            what, module, extra = needed.groups()
            assert str(MissingExtraError(what, extra=extra, module=module)) == message
            assert any(pattern.fullmatch(what) for pattern in _said())
        else:  # whose place is told may be another's business than what is wrong with it
            whole = (message, message.partition(": ")[2])
            assert any(pattern.fullmatch(text) for pattern in _said() for text in whole), message

    def test_a_message_that_nobody_says_is_found(self) -> None:
        for message in ("ARTIFACT: is no holiday; not replaced", "the weather is bad", "SOURCE: x"):
            assert not any(pattern.fullmatch(message) for pattern in _said())


@cache
def _said() -> list[re.Pattern[str]]:
    """Every text in the code with some words of its own, whatever is put into its gaps."""
    return [
        re.compile(pattern)
        for folder in ("compiler", "export", "passes", "runtime")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for pattern in _patterns(ast.parse(path.read_text(encoding="utf-8")))
    ]


def _patterns(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        texts = [
            part.value if isinstance(part, ast.Constant) and isinstance(part.value, str) else None
            for part in parts
        ]
        words = re.findall(r"[A-Za-z]{2,}", " ".join(text for text in texts if text))
        if len(words) >= 3:
            yield "".join(".*" if text is None else re.escape(text) for text in texts)
