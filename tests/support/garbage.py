"""Keep collections of cyclic garbage short, which else take a third of the tests' time.

Modules, examples that Hypothesis keeps and what tests share live for as long as the process, and a
full collection walks through all of it: half a second each, and building an engine begins with one.
"""

import gc
from collections.abc import Generator

import pytest

_FREEZE_EVERY, _THAW_EVERY = 50, 1000


class ShortCollections:
    """A plugin that now and then sets apart what has outlived its test (`gc.freeze`)."""

    def __init__(self) -> None:
        self._tests = 0

    @pytest.hookimpl(wrapper=True)
    def pytest_collection(self) -> Generator[None, object, object]:
        """Look for none while modules are imported, and tests made, all of which stay."""
        gc.disable()
        try:
            return (yield)
        finally:
            gc.enable()

    def pytest_collection_finish(self) -> None:
        """Set apart all modules and tests, and let more objects arise before a collection."""
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 10, 10)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self) -> None:
        """Set apart what is left behind a test; what was and is garbage by now goes first."""
        self._tests += 1
        if self._tests % _THAW_EVERY == 0:
            gc.unfreeze()
        if self._tests % _FREEZE_EVERY == 0:
            gc.collect()
            gc.freeze()
