"""Where tests lie: in the folders of what they test, and none imports another."""

import ast
from collections.abc import Iterator
from pathlib import Path

TESTS = Path(__file__).parent
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module
            yield from (f"{module}.{name.name}" for name in node.names)


def test_no_file_imports_a_test_file() -> None:
    tests = {path.stem for path in FILES if path.stem.startswith("test_")}
    assert len(tests) > 100
    found = [
        f"{file} imports {module}"
        for file in FILES
        for module in imported_modules(TESTS / file)
        if module.startswith(".") or tests & set(module.split("."))
    ]
    assert not found


def test_test_files_lie_in_the_folders_of_what_they_test() -> None:
    for file in FILES:
        if file.name != "conftest.py":
            assert file.name.startswith("test_") == (file.parts[0] != "support"), file
            assert file.parts[0] == "support" or (TESTS.parent / file.parent).is_dir(), file


def test_no_folder_is_a_package() -> None:
    """A package `passes` in here would hide the one that is tested."""
    assert not [file for file in FILES if file.name == "__init__.py"]
