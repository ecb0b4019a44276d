"""Run the shell commands of a document, each as far as it can be run here."""

import ast
import hashlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from packaging.requirements import Requirement
from support.command_line import run_regcache
from support.docs_world import (
    CANNOT_HERE,
    EXTRA,
    MADE,
    UNLESS,
    with_stand_ins,
)
from typer.main import get_command

ROOT = Path(__file__).parents[2]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_PUNCTUATION = "();<>|&"


def run_shell(code: str, world: Path) -> None:
    """Run every command of a block in the folder `world`; raises AssertionError where one fails."""
    for line in logical_lines(code):
        programs = [words[0] for words in commands_of(line)]
        assert programs, f"no command in {line!r}"
        unknown = [name for name in programs if name not in _HANDLERS and name not in _FOR_REAL]
        assert not unknown, f"nothing here can run {unknown[0]!r}"
        if set(programs) <= _FOR_REAL:
            _run_for_real(line, programs, world)
            continue
        for words in commands_of(line):
            _HANDLERS[words[0]](words[1:], world)


def logical_lines(code: str) -> Iterator[str]:
    """The commands of a block: lines joined where a backslash or an open quote ends them."""
    pending = ""
    for line in code.splitlines():
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1]
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # an open quote
            pending += "\n"
            continue
        if words:
            yield pending
        pending = ""
    assert not pending.strip(), f"the block ends within {pending!r}"


def commands_of(line: str) -> list[list[str]]:
    """The commands of a line, without what leads from one to the next or into a file."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.commenters, lexer.whitespace_split = "#", True
    commands: list[list[str]] = [[]]
    words = iter(lexer)
    for word in words:
        if set(word) <= set("<>") and word:
            following = next(words)
            if set(following) <= set(_PUNCTUATION):  # <( ... ) is a command of its own
                commands.append([])
        elif set(word) <= set(_PUNCTUATION):
            commands.append([])
        else:
            commands[-1].append(word)
    return [words for words in commands if words]


def _run_for_real(line: str, programs: Sequence[str], world: Path) -> None:
    for name in programs:
        if shutil.which(name) is None:
            pytest.skip(f"NOT CHECKED: {name} is not installed")
    command = ["bash", "-euo", "pipefail", "-c", line]
    # ssh-keygen asks for a passphrase, twice.
    done = subprocess.run(
        command, cwd=world, input="\n\n", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{line}: {done.stderr}"


def run_words(words: Sequence[str], world: Path) -> None:
    """In this process, on the tiny encoder; the right refusal will do where it cannot run."""
    name, *rest = [with_stand_ins(word) for word in words]
    shown = shlex.join(rest)
    rest += EXTRA.get(name, [])  # of an option that is given twice the last counts
    made = None
    if name == "compile":
        for options, besides in UNLESS.items():
            rest += [] if re.search(options, shown) else besides
        made = _made(rest, world)
    if made is not None and made[1].is_dir():  # but for the name of its folder it ran before
        shutil.rmtree(made[0], ignore_errors=True)
        shutil.copytree(made[1], made[0])
        return
    outcome = run_regcache(name, *rest)
    said = f"regcache {shlex.join([name, *rest])}: {outcome.err or outcome.out}"
    reasons = [why for asked, why in CANNOT_HERE.items() if re.search(asked, shown)]
    if reasons and outcome.code == 2:
        assert any(re.search(why, outcome.err) for why in reasons), said
        return
    if made is not None and outcome.code == 0:
        shutil.copytree(*made)
    falls_short = outcome.code == 1 and "--max-ratio" in rest  # a tiny encoder may
    assert outcome.code == 0 or falls_short, said


def _made(words: Sequence[str], world: Path) -> tuple[Path, Path] | None:
    """Where a command of `compile` writes, and where a copy of what it wrote is kept.

    None where settings say where, or nothing is written.
    """
    if "-o" not in words or "--dry-run" in words:
        return None
    output = words[words.index("-o") + 1]
    rest = "\0".join(word for word in words if word != output)
    return world / output, world / MADE / hashlib.sha256(rest.encode()).hexdigest()


def _check_pip(words: Sequence[str], _world: Path) -> None:
    """Requirements parse, and extras of ours exist; nothing is fetched."""
    assert words[0] in ("install", "uninstall"), words
    extras = SETTINGS["project"]["optional-dependencies"]
    values = {"--extra-index-url": "https://download.pytorch.org/whl/cpu"}
    rest, named = iter(words[1:]), 0
    for word in rest:
        if word in values:
            assert next(rest) == values[word]
        elif word.startswith("-"):
            assert word in ("-y", "-e", "--editable"), word
        elif word.startswith("."):
            assert set(re.findall(r"[\w-]+", word)) <= set(extras), word
            named += 1
        else:
            requirement = Requirement(word)
            named += 1
            if requirement.name == "regcache":
                assert requirement.extras <= set(extras), word
                assert requirement.url in (None, f"git+{SETTINGS['project']['urls']['Source']}")
    assert named


def _check_make(words: Sequence[str], _world: Path) -> None:
    done = subprocess.run(
        ["make", "--no-print-directory", "-n", *words, f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def _check_git(words: Sequence[str], _world: Path) -> None:
    source = SETTINGS["project"]["urls"]["Source"]
    assert list(words) == ["clone", source], words


def _run_python(words: Sequence[str], world: Path) -> None:
    """A script of the repository: its own parser takes the options. One of a bundle is run."""
    script = Path(words[0])
    if (world / script).is_file():
        done = subprocess.run(
            [sys.executable, *words], cwd=world, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return
    assert (ROOT / script).is_file(), f"no such script: {script}"
    arguments = [with_stand_ins(word) for word in words[1:]]
    if script.parts[0] == "docs":  # these take --check alone
        assert set(arguments) <= {"--check"}
        return
    command = _command_of(script)
    try:
        if command is not None:
            command.make_context(str(script), arguments)
    except Exception as error:  # of the command line's library, which typer has a copy of
        raise AssertionError(f"{script}: {error}") from error


@cache
def _command_of(script: Path) -> Any:
    """The command line of a script: what it hands to `typer.run`, or its `app`; None without."""
    module, source = _load(ROOT / script), (ROOT / script).read_text(encoding="utf-8")
    if hasattr(module, "app"):
        return get_command(module.app)
    names = [
        node.args[0].id
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "typer.run"
        if isinstance(node.args[0], ast.Name)
    ]
    if not names:
        return None
    app = typer.Typer()
    app.command()(getattr(module, names[0]))
    return get_command(app)


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"shown_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


def _check_docker(words: Sequence[str], world: Path) -> None:
    """What is mounted is there, and what the server is told to read lies in it."""
    assert words[0] == "run", words
    mounts = [words[at + 1].split(":") for at, word in enumerate(words) if word == "-v"]
    for here, there, *_ in mounts:
        folder = world / here.removeprefix("$PWD/")
        assert folder.is_dir(), here
        for word in words:
            if word.startswith(f"{there}/"):
                assert (folder / word.removeprefix(f"{there}/")).is_file(), word


def _check_triton(words: Sequence[str], world: Path) -> None:
    assert words[0] == "--model-repository"
    assert list((world / words[1]).glob("*/config.pbtxt"))


def _check_curl(words: Sequence[str], world: Path) -> None:
    """A file that is there goes to a path that the example serves."""
    (sent,) = (word.removeprefix("@") for word in words if word.startswith("@"))
    assert (world / sent).is_file()
    path = words[-1].partition("://")[2].partition("/")[2]
    assert f'"/{path}"' in (ROOT / "examples" / "batch_server.py").read_text(encoding="utf-8")


_FOR_REAL = frozenset({"jq", "diff", "ssh-keygen"})
_HANDLERS: dict[str, Callable[[Sequence[str], Path], None]] = {
    "regcache": run_words,
    "pip": _check_pip,
    "make": _check_make,
    "git": _check_git,
    "python": _run_python,
    "docker": _check_docker,
    "tritonserver": _check_triton,
    "curl": _check_curl,
}
