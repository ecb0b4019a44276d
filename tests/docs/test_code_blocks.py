"""Every code block of README, CONTRIBUTING, SECURITY and docs is run, parsed or held against code.

Python runs, and so does `regcache`, on small files under the names that the documents use
(support/docs_world.py, which has the table of stand-ins); other commands are checked as far as that
takes no network (support/docs_shell.py); settings are read by what reads them. Exempt is `text`
alone: output, and what no program reads.
"""

import contextlib
import io
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import draw_layers
import pytest
from support.docs_patches import without_waiting
from support.docs_settings import read_json, read_toml, read_yaml
from support.docs_shell import ROOT, run_shell
from support.docs_world import build_world, with_stand_ins
from support.markdown_blocks import CodeBlock, code_blocks
from typer.main import get_command

from regcache.compiler.cli.examples import examples_of
from regcache.compiler.cli.main import app
from regcache.passes.errors import InputError

pytestmark = [pytest.mark.slow, pytest.mark.torch, pytest.mark.xdist_group("code_blocks")]

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
EXEMPT = "text"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def world(original: Path, tmp_path: Path) -> Path:
    """The files for one page, which writes others."""
    return Path(shutil.copytree(original, tmp_path / "world", symlinks=True))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_block_of_a_page_runs(
    page: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names: dict[str, Any] = {"__name__": "__main__"}
    failed = []
    with without_waiting():
        for block in code_blocks(page):
            if block.language == EXEMPT:
                continue
            try:
                run_block(block, world, names)
            except Exception as error:
                failed.append(f"{block.place}: {type(error).__name__}: {error}")
    assert not failed, "\n".join(failed)


def test_the_examples_of_every_help_run(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    commands = get_command(app).commands  # type: ignore[attr-defined]
    with without_waiting():
        for example in (line for command in commands for line in examples_of(command)):
            run_shell(example, world)


def test_no_other_block_is_exempt() -> None:
    """None is indented, where nobody can tell what it is; each language is run by something."""
    blocks = [block for page in PAGES for block in code_blocks(page)]
    assert len(blocks) > 50
    for block in blocks:
        assert block.language in (EXEMPT, *RUNNERS), f"{block.place}: {block.language!r}"
    exempt = [block for block in blocks if block.language == EXEMPT]
    assert len(exempt) < len(blocks) / 6
    programs = re.compile(r"^(\$ )?(regcache|pip|python|make|git|import|from) ", re.M)
    for block in exempt:
        assert not programs.search(block.code), f"{block.place}: holds a command"


@pytest.mark.parametrize(
    ("language", "code"),
    [
        ("sh", "regcache parity ARTIFACT"),
        ("sh", "regcache compile SOURCE --images nowhere -o X"),
        ("sh", "regcache parity ARTIFACT --images DIR --min-cosine 1"),
        ("sh", 'pip install "regcache[holiday]"'),
        ("sh", "pip install 'regcache @ git+https://github.com/somebody/regcache'"),
        ("sh", "make holiday"),
        ("sh", "git clone https://github.com/somebody/regcache"),
        ("sh", "python benchmarks/peers.py --holiday"),
        ("sh", "python benchmarks/holiday.py"),
        ("sh", "jq .holiday ARTIFACT/nothing.json"),
        ("sh", "docker run -v $PWD/NOWHERE:/models server"),
        ("sh", "curl --data-binary @a.jpg http://127.0.0.1:8000/holiday"),
        ("sh", "frobnicate ARTIFACT"),
        ("sh", "regcache doctor 'that never ends"),
        ("python", "import regcache\nregcache.holiday"),
        ("python", "import regcache\nregcache.compile('hf:a/b', 'photos', 'X', holiday=1)"),
        ("python", "# passes/base.py\nholiday = 1"),
        ("python", "def test_it() -> None:\n    assert False"),
        ("json", '{"resize_to": [1, 1]}'),
        ("json", '{"holiday": 1}'),
        ("toml", "cosine_mean = 2"),
        ("toml", "holiday = 1"),
        ("yaml", "jobs: {a: {steps: [{run: make holiday}]}}"),
        ("yaml", "holiday: 1"),
        ("mermaid", "flowchart TD\n    a --> b\n"),
    ],
)
def test_what_is_wrong_is_found(
    language: str, code: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    block = CodeBlock(Path("page.md"), 1, language, code)
    with (
        without_waiting(),
        pytest.raises((AssertionError, AttributeError, InputError, ValueError, KeyError)),
    ):
        run_block(block, world, {})


def run_block(block: CodeBlock, world: Path, names: dict[str, Any]) -> None:
    """Run a block, `names` being what the page's programs have defined so far."""
    RUNNERS[block.language](block, world, names)


def _run_python(block: CodeBlock, _world: Path, names: dict[str, Any]) -> None:
    """A program; or, where a path stands above it, lines of that file."""
    quoted = re.match(r"# (\S+/\S+\.py)\n", block.code)
    if quoted is not None:
        _hold_against(ROOT / quoted[1], block.code.splitlines()[1:])
        return
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        known = set(names)
        exec(compile(with_stand_ins(block.code), block.place, "exec"), names)
        for name in names.keys() - known:
            if name.startswith("test_"):
                names[name]()


def _hold_against(file: Path, lines: list[str]) -> None:
    """Every line has to stand in the file, in that order, but for what `...` stands for."""
    there = iter([line.strip() for line in file.read_text(encoding="utf-8").splitlines()])
    for line in lines:
        wanted = line.strip().removesuffix("...").rstrip()
        assert not wanted or any(found.startswith(wanted) for found in there), line


def _read_mermaid(block: CodeBlock, _world: Path, _names: dict[str, Any]) -> None:
    assert block.code.strip() in draw_layers.draw(draw_layers.read_rooms())


RUNNERS: dict[str, Callable[[CodeBlock, Path, dict[str, Any]], None]] = {
    "sh": lambda block, world, _names: run_shell(block.code, world),
    "bash": lambda block, world, _names: run_shell(block.code, world),
    "python": _run_python,
    "json": lambda block, _world, _names: read_json(block.code),
    "toml": lambda block, world, _names: read_toml(block.code, world),
    "yaml": lambda block, world, _names: read_yaml(block.code, world),
    "mermaid": _read_mermaid,
}
