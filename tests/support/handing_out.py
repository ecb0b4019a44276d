"""How several workers are given the tests: a file or group at a time, what takes long first.

A worker of its own for each test makes what a file shares in all of them, and pytest-xdist then
counts, after each of 8,500 tests, all those that it has handed out before.
"""

from typing import Any

import pytest
from support.quick import MARKERS, imports_torch
from xdist.scheduler import LoadGroupScheduling


class WholeFiles(LoadGroupScheduling):  # type: ignore[misc]
    """Hands out groups as `--dist loadgroup` does, and files where it hands out single tests."""

    def __init__(self, config: pytest.Config, log: Any = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # but in the order that sort_by_length leaves

    def _split_scope(self, nodeid: str) -> str:
        scope: str = super()._split_scope(nodeid)
        return scope.partition("::")[0]


def sort_by_length(items: list[pytest.Item]) -> None:
    """Put first what holds long tests: in the end both workers have something short to do."""
    long = {item.path for item in items if _is_long(item)}
    items.sort(key=lambda item: (not _is_grouped(item), item.path not in long))


def _is_grouped(item: pytest.Item) -> bool:
    return item.get_closest_marker("xdist_group") is not None


def _is_long(item: pytest.Item) -> bool:
    marked = any(mark.name in MARKERS for mark in item.iter_markers())
    return marked or imports_torch(item.path)
