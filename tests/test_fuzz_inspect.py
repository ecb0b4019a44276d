"""`benchmarks/fuzz_inspect.py`: every kind of failure is seen, named and survived."""

import importlib.util
import os
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
from support.onnx_mutations import SPECS, Sample, draw
from support.tiny_vit import TinyVit

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "fuzz_inspect.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fuzz_inspect", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz_inspect"] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    return module


def above_now(megabytes: int) -> float:
    """A limit of memory for what is forked from here, which holds all that this process does."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20 + megabytes


def test_a_seed_always_draws_the_same_file(tmp_path: Path) -> None:
    for seed in range(40):
        first, second = draw(seed), draw(seed)
        assert first.changes == second.changes
        for sample, name in ((first, "a"), (second, "b")):
            (tmp_path / f"{name}{seed}").mkdir()
            sample.write(tmp_path / f"{name}{seed}")
        files = [(tmp_path / f"{name}{seed}" / "mutated.onnx").read_bytes() for name in "ab"]
        assert files[0] == files[1]


@pytest.mark.slow
def test_each_encoder_is_good_until_it_is_mutated(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "draw", lambda seed: Sample(TinyVit(SPECS[seed]).model()))
    outcomes = list(script.run(range(len(SPECS)), tmp_path, 1, 60, above_now(2048)))
    assert [outcome.kind for outcome in outcomes] == ["ok"] * len(SPECS), outcomes


@pytest.mark.slow
def test_five_hundred_broken_files_are_reported_or_refused(
    script: ModuleType, tmp_path: Path
) -> None:
    """About 20 s; benchmarks/fuzz_inspect.py tries as many as it is told to."""
    outcomes = list(script.run(range(500), tmp_path, 1, 60, above_now(1024)))
    assert [item for item in outcomes if item.kind not in {"ok", "refused"}] == []
    kinds = Counter(item.kind for item in outcomes)
    assert kinds["ok"] > 50  # else too much is refused
    assert kinds["refused"] > 300


@pytest.mark.slow
def test_whatever_happens_is_named(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regcache.compiler.cli import main as cli
    from regcache.passes.errors import InputError

    def hang() -> None:
        time.sleep(60)

    def grow() -> None:
        blocks = []
        while True:
            blocks.append(b"x" * (1 << 24))  # written, or it is no memory yet
            time.sleep(0.001)

    def talk() -> None:
        print("on standard output")
        refuse()

    def refuse() -> None:
        cli._fail("this is the reason")

    def escape() -> None:
        print("regcache: error: \x1b[31mthis is the reason", file=sys.stderr)
        sys.exit(2)

    def raise_input_error() -> None:
        raise InputError("which main() has to catch")

    happens = (hang, grow, os.abort, raise_input_error, talk, escape, refuse, lambda: None)

    def main() -> None:
        happens[int(Path(sys.argv[2]).read_text())]()

    monkeypatch.setattr(script, "draw", _Chosen)
    monkeypatch.setattr(cli, "main", main)
    outcomes = script.run(range(len(happens)), tmp_path, 2, 6, above_now(600))
    found = sorted(outcomes, key=lambda outcome: outcome.seed)
    kinds = [outcome.kind for outcome in found]
    assert kinds == [
        *("hang", "memory", "crash", "traceback", "unclear", "unclear", "refused", "ok")
    ]
    assert "test_fuzz_inspect.py" in found[0].cause
    assert found[3].cause.startswith("InputError")
    assert [outcome.cause for outcome in found[4:6]] == ["lines on stdout", "control characters"]
    assert not list(tmp_path.iterdir())


class _Chosen:
    """A file that holds its own seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def write(self, folder: Path) -> Path:
        path = folder / "mutated.onnx"
        path.write_text(str(self.seed))
        return path
