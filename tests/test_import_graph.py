"""What modules import, inside functions too: none leads back to itself, few see all options."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).parents if (folder / "pyproject.toml").is_file())
FOLDERS = ("compiler", "export", "passes", "runtime")


def module_files() -> dict[str, Path]:
    """The files of the project's modules by name; a package is its __init__.py."""
    files = {}
    for file in (path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(("regcache", *parts)).removesuffix(".__init__")] = file
    public = {f"regcache.{file.stem}": file for file in (ROOT / "regcache").glob("*.py")}
    public["regcache"] = public.pop("regcache.__init__")
    return files | public


def imported(code: str) -> Iterator[str]:
    """Every name of the project that the code imports, anywhere: `from M import N` gives M.N.

    import_module with a plain text counts; an import for type checkers alone does too.
    """
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports are not followed here"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func):
            names = [str(item.value) for item in node.args if isinstance(item, ast.Constant)]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "regcache")


def import_graph(codes: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each module imports; a name inside a module stands for the module."""
    graph: dict[str, set[str]] = {}
    for module, code in codes.items():
        graph[module] = set()
        for name in imported(code):
            owner = name if name in codes else name.rpartition(".")[0]
            assert owner in codes, f"{module} imports {name}, which is no module"
            graph[module].add(owner)
    return graph


def reached(start: str, graph: dict[str, set[str]]) -> set[str]:
    """The modules that a module imports, and those that these import, and so on; itself too."""
    found: set[str] = set()
    waiting = {start}
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= graph[module] - found
    return found


def names_in(code: str) -> set[str]:
    """Every name that the code reads, writes, imports, defines or passes an argument by."""
    fields = ("id", "attr", "arg", "name", "asname")
    found = {getattr(node, field, None) for node in ast.walk(ast.parse(code)) for field in fields}
    return {name for name in found if isinstance(name, str)}


def test_no_module_leads_back_to_itself() -> None:
    graph = import_graph({name: file.read_text() for name, file in module_files().items()})
    assert len(graph) > 200
    assert sum(map(len, graph.values())) > 1000
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_modules_of_a_compilation_see_all_its_options() -> None:
    """Others are given what they need of them. What is merely called so counts too."""
    codes = {name: file.read_text() for name, file in module_files().items()}
    modules = reached("regcache.compiler.pipeline", import_graph(codes))
    modules = {name for name in modules if name.startswith("regcache.compiler.")}
    assert len(modules) > 50
    modules.add("regcache.compiler.cli.main")  # the command itself
    seeing = sorted(m for m in modules if names_in(codes[m]) & {"options", "CompileOptions"})
    assert "regcache.compiler.job.options" in seeing
    assert len(seeing) <= 15, seeing


def test_names_are_found_however_they_are_used() -> None:
    for code in (
        "options", "a.options.b", "def f(*, options): ...", "f(options=1)", "lambda options: 0",
        "class options: ...", "from a import options", "import a as options", "f(**options)",
    ):  # fmt: skip
        assert "options" in names_in(code), code
    assert "options" not in names_in("'options'; options_of; b.other")


def test_a_circle_is_found_wherever_it_hides() -> None:
    codes = {
        "regcache.top": "from regcache.low import Shared",
        "regcache.low": "def open_top():\n    import regcache.top",
    }
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(codes)).prepare()
    codes["regcache.low"] = "import importlib\nimportlib.import_module('regcache.top')"
    with pytest.raises(CycleError):
        TopologicalSorter(import_graph(codes)).prepare()
    codes["regcache.low"] = "import torch.top"
    TopologicalSorter(import_graph(codes)).prepare()
