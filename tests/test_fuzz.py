"""`benchmarks/fuzz.py`: every kind of failure is seen, named and survived; 500 of its files."""

import io
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.fuzz_pool import Limits, run_all
from support.fuzz_tasks import MutatedEncoder, MutatedImage, draw_images
from support.image_mutations import KINDS, draw_image, stored
from support.onnx_mutations import SPECS, Sample, draw
from support.tiny_artifact import tiny_artifact
from support.tiny_vit import TinyVit

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/statm").exists(), reason="reads memory from /proc"
)


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
        assert draw_image(seed) == draw_image(seed)


@pytest.mark.slow
def test_each_encoder_is_good_until_it_is_mutated(tmp_path: Path) -> None:
    task = MutatedEncoder(draw=lambda seed: Sample(TinyVit(SPECS[seed]).model()))
    limits = Limits(60, above_now(2048))
    outcomes = list(run_all(task, range(len(SPECS)), tmp_path, 1, limits))
    assert [outcome.kind for outcome in outcomes] == ["ok"] * len(SPECS), outcomes


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 150])
def test_broken_encoders_are_reported_or_refused(first: int, tmp_path: Path) -> None:
    """`make fuzz` tries as many as it is told to."""
    task = MutatedEncoder(draw_images(tmp_path / "images"), compiled=12)
    seeds = range(first, first + 150)
    outcomes = list(run_all(task, seeds, tmp_path, 1, Limits(60, above_now(1024))))
    assert [item for item in outcomes if item.kind not in {"ok", "refused"}] == []
    kinds = Counter(item.kind for item in outcomes)
    assert kinds["ok"] > 15  # else too much is refused
    assert kinds["refused"] > 90
    assert any(item.stage == "embed" for item in outcomes)


def test_each_image_is_good_until_it_is_mutated() -> None:
    for index, (kind, mode, _) in enumerate(KINDS):
        with Image.open(io.BytesIO(stored(index))) as image:
            image.load()
            assert (image.format, image.size) == (kind, (24, 20)), mode


def test_broken_images_cost_a_batch_nothing(tmp_path: Path) -> None:
    good = draw_images(tmp_path / "images") / "0.png"
    (tmp_path / "tiny").mkdir()
    task = MutatedImage(tiny_artifact(tmp_path / "tiny"), good)
    outcomes = list(run_all(task, range(200), tmp_path, 1, Limits(60, above_now(1024))))
    assert [item for item in outcomes if item.kind not in {"ok", "refused"}] == []
    kinds = Counter(item.kind for item in outcomes)
    assert min(kinds["ok"], kinds["refused"]) > 30


class _Embedder:
    """Gives what it is told to for the image between two good ones."""

    def __init__(self, *rows: list[float]) -> None:
        self.rows = np.array(rows, np.float32)

    def embed(self, images: list[Any], **_: object) -> Any:
        if len(images) > len(self.rows):
            raise RuntimeError("which embed has to handle")
        return self.rows


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (([1, 2], [3, 4], [1, 2]), ("ok", "")),
        (([1, 2], [np.nan, np.nan], [1, 2]), ("refused", "")),
        (([1, 2], [3, np.nan], [1, 2]), ("unclear", "a row that is NaN in part")),
        (([1, 2], [3, 4], [1, 3]), ("unclear", "another vector of a good image")),
        ((), ("traceback", "RuntimeError outside regcache test_fuzz.py:")),
    ],
)
def test_what_embed_gives_for_a_broken_image_is_judged(
    rows: tuple[list[float], ...], found: tuple[str, str], tmp_path: Path
) -> None:
    task = MutatedImage(tmp_path, tmp_path / "good.png")
    task._opened = (_Embedder(*rows), np.array([1, 2], np.float32))
    outcome = task(1, tmp_path)
    assert (outcome.kind, outcome.cause[: len(found[1])]) == found


@pytest.mark.slow
def test_whatever_happens_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(cli, "main", main)
    task: Any = MutatedEncoder(draw=_Chosen)  # type: ignore[arg-type]
    outcomes = run_all(task, range(len(happens)), tmp_path, 2, Limits(5, above_now(600)))
    found = sorted(outcomes, key=lambda outcome: outcome.seed)
    kinds = [outcome.kind for outcome in found]
    assert kinds == [
        *("hang", "memory", "crash", "traceback", "unclear", "unclear", "refused", "ok")
    ]
    assert "test_fuzz.py" in found[0].cause
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
