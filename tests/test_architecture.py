"""What is said of the code is true of it: the diagram, documents, lists and settings."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draw_layers
import pytest

import regcache.passes

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = ("compiler", "export", "passes", "regcache", "runtime")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
# A place in the repository, with or without a file's name behind.
PLACE = re.compile(
    r"(?<![\w/.:-])((?:\.github|benchmarks|compiler|docs|examples|export|passes|runtime|tests)"
    r"/(?:[\w.-]+/)*(?:[\w-]+\.(?:py|md|txt|yml|json))?)(?![\w*/])"
)
NAME = re.compile(r"\bregcache(?!\.(?:toml|yml)\b)(?:\.\w+)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def pages() -> list[Any]:
    return [pytest.param(page, id=page.name) for page in PAGES]


class TestLayers:
    def test_the_diagram_is_drawn_from_the_imports(self) -> None:
        page = draw_layers.PAGE.read_text(encoding="utf-8")
        drawn = draw_layers.replaced(page, draw_layers.draw(draw_layers.read_rooms()))
        assert page == drawn, "run: python docs/draw_layers.py"

    def test_rooms_stand_on_one_another(self) -> None:
        rooms = {"a": {"b", "c"}, "b": {"c"}, "c": set[str]()}
        assert draw_layers.floors_of(rooms) == {"a": 2, "b": 1, "c": 0}
        assert draw_layers.reduced(rooms) == {"a": {"b"}, "b": {"c"}, "c": set()}
        with pytest.raises(ValueError, match="cycle"):
            draw_layers.floors_of(rooms | {"c": {"a"}})

    def test_a_room_is_a_folder_or_file_of_the_compiler(self) -> None:
        assert draw_layers.room_of("regcache.compiler.curation.search") == "compiler/curation"
        assert draw_layers.room_of("regcache.compiler.job.options") == "compiler/job"
        assert draw_layers.room_of("regcache.compiler") is None
        assert draw_layers.room_of("regcache.passes.walk") == "passes"
        assert draw_layers.room_of("regcache.__main__") == "regcache"

    def test_a_page_without_markers_is_refused(self) -> None:
        with pytest.raises(ValueError, match="markers"):
            draw_layers.replaced(draw_layers.BEGIN, "")


class TestDocuments:
    @pytest.mark.parametrize("page", pages())
    def test_every_place_that_is_named_is_there(self, page: Path) -> None:
        missing = [
            place for place in PLACE.findall(page.read_text()) if not (ROOT / place).exists()
        ]
        assert not missing

    @pytest.mark.parametrize("page", pages())
    def test_every_link_leads_somewhere(self, page: Path) -> None:
        for link in LINK.findall(page.read_text()):
            path, _, heading = link.partition("#")
            if "://" not in path:
                target = page.parent / path if path else page
                assert target.is_file(), link
                assert not heading or heading in _headings(target), link

    @pytest.mark.parametrize("page", pages())
    def test_every_name_of_the_package_is_one(self, page: Path) -> None:
        for name in NAME.findall(page.read_text()):
            _resolve(name)

    def test_no_document_is_cited_that_is_not_there(self) -> None:
        cited = re.compile(r"\b(?:docs/[\w-]+|[A-Z][A-Z_]+)\.md\b")
        files = [ROOT / "Makefile", ROOT / "pyproject.toml", *PAGES, *_sources()]
        assert len(files) > 300
        missing = {
            (path.name, name)
            for path in files
            for name in cited.findall(path.read_text(encoding="utf-8"))
            if not (ROOT / name).is_file()
        }
        assert not missing

    def test_the_readme_links_work_on_pypi(self) -> None:
        """PyPI shows the README alone: what a relative link leads to is not there."""
        source = SETTINGS["project"]["urls"]["Source"]
        links = LINK.findall((ROOT / "README.md").read_text())
        assert len(links) > 5
        for link in links:
            assert link.startswith("https://")
            head, main, path = link.partition("/blob/main/")
            if main:
                assert head == source
                assert (ROOT / path.partition("#")[0]).is_file(), link


class TestPasses:
    def test_the_package_lists_all_of_its_passes(self) -> None:
        listed = re.findall(r"^    (\w+)  +\w", inspect.getdoc(regcache.passes) or "", re.M)
        there = {name for _, name in _passes()}
        assert len(there) > 30
        assert sorted(listed) == sorted(there)

    def test_a_pass_stands_in_the_module_named_like_it(self) -> None:
        for module, name in _passes():
            assert module == re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
            assert (
                getattr(importlib.import_module(f"regcache.passes.{module}"), name).name == module
            )

    def test_listing_them_imports_none(self) -> None:
        code = "import sys, regcache.passes; assert 'numpy' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class TestPackaging:
    @pytest.mark.parametrize("name", ["compiler", "export", "runtime"])
    def test_what_is_private_says_so(self, name: str) -> None:
        text = ast.get_docstring(ast.parse((ROOT / name / "__init__.py").read_text())) or ""
        assert "Private: " in text

    def test_every_folder_with_an_init_is_a_package(self) -> None:
        """One that setuptools is not told of is missing from the wheel."""
        folders = {
            path.parent.relative_to(ROOT).as_posix()
            for name in FOLDERS
            for path in (ROOT / name).rglob("__init__.py")
        }
        names = {
            folder if folder == "regcache" else f"regcache.{folder.replace('/', '.')}"
            for folder in folders
        }
        packages = SETTINGS["tool"]["setuptools"]["packages"]
        assert len(packages) == len(set(packages))
        assert set(packages) == names

    def test_every_file_that_is_no_module_is_data_of_a_package(self) -> None:
        """One that setuptools is not told of is missing from the wheel."""
        patterns = SETTINGS["tool"]["setuptools"]["package-data"]
        told = {
            path
            for package, globs in patterns.items()
            for folder in ([ROOT / name for name in FOLDERS] if package == "*" else
                           [ROOT.joinpath(*package.split(".")[1:])])
            for pattern in globs
            for path in folder.glob(pattern)
        }  # fmt: skip
        found = {
            path
            for name in FOLDERS
            for path in (ROOT / name).rglob("*")
            if path.is_file() and path.suffix not in (".py", ".pyc") and not path.is_symlink()
        }
        assert len(found) > 8
        assert found == told

    def test_every_folder_of_modules_has_an_init(self) -> None:
        for name in FOLDERS:
            for path in (ROOT / name).rglob("*.py"):
                assert (path.parent / "__init__.py").is_file(), path.parent

    def test_the_changelog_begins_with_this_version(self) -> None:
        headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
        assert headings[0] == SETTINGS["project"]["version"]

    @pytest.mark.slow
    def test_the_source_archive_holds_what_the_readme_names(self, tmp_path: Path) -> None:
        names = _source_archive(tmp_path)
        documents = [path for path in ROOT.glob("docs/*") if path.is_file()]
        assert len(documents) > 8
        for path in (*documents, *ROOT.glob("examples/*.py"), *_sources("tests", "benchmarks")):
            assert path.relative_to(ROOT).as_posix() in names
        for path in (*_sources(*FOLDERS), ROOT / "CHANGELOG.md", ROOT / "Makefile"):
            assert path.relative_to(ROOT).as_posix() in names
        assert not [name for name in names if "__pycache__" in name]


class TestHabits:
    def test_commits_are_checked_with_what_lint_runs(self) -> None:
        recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.M)
        assert recipe is not None
        linted = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
        hooks = (ROOT / ".pre-commit-config.yaml").read_text()
        assert re.findall(r"^ +entry: (.+)$", hooks, re.M) == linted

    def test_workflows_run_the_pythons_that_are_promised(self) -> None:
        promised = re.findall(r"Python :: (3\.\d+)", "\n".join(SETTINGS["project"]["classifiers"]))
        text = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
        matrix = re.search(r"python: \[(.+)\]", text)
        assert matrix is not None
        assert re.findall(r"3\.\d+", matrix[1]) == promised
        assert SETTINGS["project"]["requires-python"] == f">={promised[0]}"


def _sources(*folders: str) -> Iterator[Path]:
    """All Python files of some of the root folders, by default of all that hold any."""
    for folder in folders or (*FOLDERS, "tests", "benchmarks", "examples", "docs"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def _passes() -> list[tuple[str, str]]:
    """Module and class of every pass: a class with a precondition, a rewrite, a postcondition."""
    methods = {"requires", "rewrite", "ensures"}
    return [
        (path.stem, node.name)
        for path in sorted((ROOT / "passes").glob("*.py"))
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef) and path.stem != "base"
        if methods <= {item.name for item in node.body if isinstance(item, ast.FunctionDef)}
    ]


def _headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def _resolve(name: str) -> object:
    """What a dotted name stands for. Raises ImportError or AttributeError where it is none."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            found = getattr(found, part)
        return found
    raise ImportError(name)


def _source_archive(folder: Path) -> set[str]:
    """The names in the sdist of this checkout, below its own top folder."""
    checkout = folder / "checkout"
    checkout.mkdir()
    for path in sorted(ROOT.iterdir()):
        if path.is_file() and path.name != ".git":
            shutil.copy2(path, checkout)
    for name in (*FOLDERS, "tests", "benchmarks", "examples", "docs"):
        unwanted = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=unwanted)
    code = "from setuptools.build_meta import build_sdist; build_sdist('dist')"
    subprocess.run([sys.executable, "-c", code], cwd=checkout, check=True, capture_output=True)
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        return {name.partition("/")[2] for name in opened.getnames()}
