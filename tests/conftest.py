"""Fixtures that several test files share, and what a quick run leaves out."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from support.garbage import ShortCollections
from support.handing_out import WholeFiles, sort_by_length
from support.quick import TORCH, forbid_torch, imports_torch, is_quick


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="what needs neither PyTorch nor long")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(ShortCollections())
    if config.getoption("--quick"):
        forbid_torch()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if config.getoption("--quick") and collection_path.suffix == ".py":
        return imports_torch(collection_path) or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--quick"):
        left_out = [item for item in items if not is_quick(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if is_quick(item)]
    if hasattr(config, "workerinput"):
        sort_by_length(items)


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> WholeFiles | None:
    return WholeFiles(config, log) if config.getoption("dist") == "loadgroup" else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--quick"):
        assert not TORCH & set(sys.modules)


@pytest.fixture(scope="session", autouse=True)
def long_looks() -> Iterator[Mapping[str, float]]:
    """Of a tiny encoder int8 is no faster, which a compilation measures twice, for 4 seconds.

    The tests' do so briefly; these are the seconds that they would take for each batch size.
    """
    from regcache.compiler.artifact import speed_check

    brief = {"_SECONDS": 0.02, "_SECONDS_AGAIN": 0.03}
    seconds = {name: getattr(speed_check, name) for name in brief}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in brief.items():
            patch.setattr(speed_check, name, value)
        yield seconds


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """Where the zoo keeps its checkpoints and exports, shared by all xdist workers.

    Tests of one family carry the same xdist group, so that one worker makes each of them.
    """
    base = tmp_path_factory.getbasetemp()
    return (base if worker_id == "master" else base.parent) / "zoo"
