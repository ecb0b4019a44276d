"""How several workers are given the tests: whole groups and files, and which of them first."""

from pathlib import Path

import pytest
from support.handing_out import WholeFiles, sort_by_length

HERE = Path(__file__)


@pytest.mark.parametrize(
    ("nodeid", "unit"),
    [
        ("tests/a/test_b.py::test_c", "tests/a/test_b.py"),
        ("tests/a/test_b.py::TestC::test_d[x::y]", "tests/a/test_b.py"),
        ("tests/a/test_b.py::test_c[x@y]", "tests/a/test_b.py"),
        ("tests/a/test_b.py::test_c[x@y]@sample", "sample"),
    ],
)
def test_groups_and_files_stay_whole(nodeid: str, unit: str) -> None:
    assert object.__new__(WholeFiles)._split_scope(nodeid) == unit


def test_what_takes_long_comes_first(request: pytest.FixtureRequest) -> None:
    """By what the tests are marked with, and whether their file imports PyTorch."""

    def item(name: str, path: Path, *marks: pytest.MarkDecorator) -> pytest.Item:
        made: pytest.Item = pytest.Function.from_parent(
            request.node.parent, name=name, callobj=item
        )
        made.path = path
        for mark in marks:
            made.add_marker(mark)
        return made

    short, other = HERE.with_name("test_lock.py"), HERE.with_name("test_layout.py")
    items = [
        item("short", short),
        item("beside a long one", other),
        item("long", other, pytest.mark.slow),
        item("of PyTorch", HERE.with_name("test_torch_reference.py")),
        item("grouped", short, pytest.mark.xdist_group("a")),
    ]
    sort_by_length(items)
    names = [made.name for made in items]
    assert names == ["grouped", "beside a long one", "long", "of PyTorch", "short"]
