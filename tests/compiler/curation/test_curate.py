"""The search on a tiny encoder: resumed, killed, on a cluster, out of time; and what ships."""

import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from PIL import Image
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.cli.main import main
from regcache.compiler.curation import workbench
from regcache.compiler.curation.curate import Curated, curate
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.workbench import Workbench
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, TargetName, resolve_target, simulate
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.passes.canonicalize import canonicalize
from regcache.passes.errors import InputError
from regcache.passes.onnx_file import load_model
from regcache.passes.preprocess import Preprocess

pytestmark = [pytest.mark.xdist_group("executor"), pytest.mark.slow]

SPEC = Spec(width=32, heads=4, hidden=64, depth=2, grid=4)
BLOCK = 1
"""The block whose fc2 reads an outlier."""
RECIPE = Preprocess(16, 16, "shortest", (16, 16), "bicubic", (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
W6A6 = simulate(resolve_target(TargetName.ORT_CPU, u8s8_saturates=False), Simulation.W6A6)


def with_outlier(vit: TinyVit) -> TinyVit:
    """One hidden unit that is massive on a few tokens and changes nothing."""
    weights = vit.weights
    weights[f"{BLOCK}.fc1"][:, 0] *= 60
    weights[f"{BLOCK}.fc2"][0] = 0
    return vit


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    onnx.save(with_outlier(TinyVit(SPEC)).model(), path)
    images = np.random.default_rng(3).standard_normal((18, 3, SPEC.size, SPEC.size))
    dealt = ReferenceImages.deal(images.astype(np.float32))
    return Study.of(canonicalize(load_model(path)), dealt, Quantizer(W6A6, Calibrator.MIN_MAX))


def run(study: Study, journal: Path, **options: Any) -> Curated:
    return curate(study, SearchOptions(journal, workers=2, **options), Reporter())


@pytest.fixture(scope="module")
def noted(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Curated, list[str]]:
    """The search without interruption, and its journal before that was removed."""
    journal = tmp_path_factory.mktemp("whole") / "journal"
    with _Copy(journal) as copy:
        found = run(study, journal)
    return found, copy.text.splitlines()


@pytest.fixture(scope="module")
def whole(noted: tuple[Curated, list[str]]) -> Curated:
    """The search without interruption."""
    return noted[0]


class _Again(NamedTuple):
    """What a second search found, the files that it left, and the workbenches that it made."""

    found: Curated
    left: list[Path]
    made: list["weakref.ref[Workbench]"]


@pytest.fixture(scope="module")
def again(study: Study, tmp_path_factory: pytest.TempPathFactory) -> _Again:
    folder = tmp_path_factory.mktemp("again")
    made: list[weakref.ref[Workbench]] = []

    class Watched(Workbench):
        def __init__(self, study: Study) -> None:
            made.append(weakref.ref(self))
            super().__init__(study)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workbench, "Workbench", Watched)
        found = run(study, folder / "journal")
    return _Again(found, list(folder.iterdir()), made)


def assert_same(found: Curated, whole: Curated) -> None:
    assert found.record == whole.record
    np.testing.assert_array_equal(found.tokens, whole.tokens)


def test_the_record_tells_everything(whole: Curated) -> None:
    record = whole.record
    assert len(record.block_damage) == SPEC.depth
    assert len(record.streams) == SPEC.depth + 1
    assert record.n_images == {"fit": 5, "rank": 5, "decide": 8}
    assert record.sensitive_block == BLOCK
    worst = max(record.sensitivity, key=lambda site: site.damage)
    assert (worst.site, worst.channel) == (f"blocks.{BLOCK}.fc2", 0)
    assert record.screened > 0
    assert len(record.tried) > 5
    assert record.reason
    best = min(tried.error for tried in record.tried if tried.error is not None)
    assert record.error_without is not None
    if record.setting.changes:
        assert best < record.error_without
        assert record.improvement is not None
        assert record.improvement.certain


def test_the_journal_is_gone_and_nothing_is_random(again: _Again, whole: Curated) -> None:
    assert_same(again.found, whole)
    assert again.left == []


def test_a_search_frees_its_workbench(again: _Again) -> None:
    assert [reference() for reference in again.made] == [None]


def test_a_search_goes_on_where_it_stopped(
    study: Study, whole: Curated, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every result that was noted is used: the second run adds only what was missing."""
    journal = tmp_path / "journal"
    search = importlib.import_module("regcache.compiler.curation.search")
    curation = importlib.import_module("regcache.compiler.curation.curate")

    def killed(*_: Any) -> Any:
        raise InputError("killed")

    monkeypatch.setattr(curation, "_reason", killed)
    with pytest.raises(InputError, match="killed"):
        run(study, journal)
    noted = len(journal.read_text().splitlines())
    assert noted > 20
    monkeypatch.undo()

    calls: list[str] = []
    for module, name in ((search, "try_setting"), (curation, "block_damage")):
        monkeypatch.setattr(module, name, _counted(getattr(module, name), calls))
    assert_same(run(study, journal), whole)
    assert calls == []


def _counted(function: Any, calls: list[str]) -> Any:
    def counted(*arguments: Any) -> Any:
        calls.append(function.__name__)
        return function(*arguments)

    counted.__name__ = function.__name__
    return counted


@pytest.mark.parametrize("kept", [0, 1, 7, 30])
def test_a_cut_journal_changes_nothing(
    study: Study, noted: tuple[Curated, list[str]], tmp_path: Path, kept: int
) -> None:
    whole, lines = noted
    assert len(lines) > kept
    journal = tmp_path / "journal"
    journal.write_text("\n".join([*lines[:kept], '{"key": "try_set']))
    assert_same(run(study, journal), whole)


class _Copy:
    """The longest text that a file had while it was there."""

    def __init__(self, path: Path) -> None:
        self.path, self.text = path, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            if self.path.exists():
                self.text = max(self.text, self.path.read_text(), key=len)

    def __enter__(self) -> "_Copy":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def test_no_time_tries_nothing_but_measures_sensitivity(study: Study, tmp_path: Path) -> None:
    found = run(study, tmp_path / "journal", budget=1e-9)
    assert not found.setting.changes
    assert found.record.tried == []
    assert len(found.record.sensitivity) == 4 * SPEC.depth
    assert found.record.out_of_time
    assert "time ran out" in found.record.reason


def test_passes_that_refuse_everything_leave_no_registers(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise InputError("the scores are masked")

    for module, name in (("screening", "run"), ("setting", "run_all")):
        where = importlib.import_module(f"regcache.compiler.curation.{module}")
        monkeypatch.setattr(where, name, refuse)
    found = run(study, tmp_path / "journal")
    assert not found.setting.changes
    assert "the passes refuse all 3 settings" in found.record.reason
    assert all("the scores are masked" in str(tried.refused) for tried in found.record.tried)
    assert all(tried.error is None for tried in found.record.tried)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with importlib.import_module("distributed").LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=":0",
        local_directory=str(tmp_path_factory.mktemp("dask")),
        silence_logs=logging.CRITICAL,
    ) as cluster:
        yield cluster


def test_a_cluster_gives_the_same_bits_though_a_worker_is_killed(
    study: Study, whole: Curated, tmp_path: Path, cluster: Any
) -> None:
    journal = tmp_path / "journal"
    victim = next(iter(cluster.workers.values())).pid

    def kill() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if journal.exists() and len(journal.read_text().splitlines()) > 10:
                os.kill(victim, signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=kill)
    thread.start()
    found = run(study, journal, scheduler=cluster.scheduler_address)
    thread.join()
    assert_same(found, whole)
    with pytest.raises(ProcessLookupError):
        os.kill(victim, 0)


def test_processes_give_the_same_bits(study: Study, whole: Curated, tmp_path: Path) -> None:
    assert_same(run(study, tmp_path / "journal", scheduler="processes"), whole)


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(with_outlier(TinyVit(SPEC)).model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder, random = tmp_path / "photos", np.random.default_rng(1)
    folder.mkdir()
    for index in range(18):
        coarse = random.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        picture = Image.fromarray(coarse).resize((16, 16), Image.Resampling.BICUBIC)
        picture.save(folder / f"{index:02}.png")
    return folder


def compile_it(encoder: Path, photos: Path, artifact: Path, *more: str) -> dict[str, Any]:
    """Run `regcache compile` in this process; returns the manifest."""
    sys.argv = ["regcache", "compile", str(encoder), "--images", str(photos), "-o", str(artifact)]
    sys.argv += more
    with pytest.raises(SystemExit) as caught:
        main()
    assert not caught.value.code, caught.value.code
    manifest: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())
    return manifest


def test_a_killed_compile_goes_on(encoder: Path, photos: Path, tmp_path: Path) -> None:
    arguments = ["--simulate", "w6a6", "--calibrator", "min-max"]
    whole = compile_it(encoder, photos, tmp_path / "whole", *arguments)
    artifact, journal = tmp_path / "artifact", tmp_path / ".artifact.search.jsonl"
    command = [sys.executable, "-m", "regcache", "compile", str(encoder)]
    command += ["--images", str(photos), "-o", str(artifact), *arguments]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        while not (journal.exists() and len(journal.read_text().splitlines()) > 6):
            assert child.poll() is None
            time.sleep(0.002)
        child.kill()
    assert not artifact.exists()
    noted = len(journal.read_text().splitlines())
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"going on with a search of {noted - 1} results" in done.stderr
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["curation"] == whole["curation"]
    assert manifest["files"] == whole["files"]
    assert not journal.exists()


def test_what_ships_is_in_the_artifact(encoder: Path, photos: Path, tmp_path: Path) -> None:
    """Here no registers; see test_ablation.py for an encoder that ships them."""
    artifact = tmp_path / "artifact"
    more = ["--simulate", "w4a4", "--calibrator", "min-max"]
    manifest = compile_it(encoder, photos, artifact, *more)
    setting = manifest["curation"]["setting"]
    graph = gs.import_onnx(onnx.load(artifact / "model.onnx"))
    names = [node.name for node in graph.nodes if node.name.startswith("regcache.registers/")]
    assert bool(setting["candidates"]) == any("/kv/" in n or "/token/" in n for n in names)
    assert bool(setting["delete_count"]) == any("/delete/" in name for name in names)
    assert (artifact / "registers.npz").exists() == bool(setting["candidates"])
    assert any(node.op == "Clip" for node in graph.nodes)
    assert manifest["quantization"]["activation_bits"] == 4


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--registers", "off"], "not asked for"),
        (["--simulate", "w4a16"], "activations stay float"),
    ],
)
def test_reasons_not_to_search(
    encoder: Path, photos: Path, tmp_path: Path, more: list[str], reason: str
) -> None:
    manifest = compile_it(encoder, photos, tmp_path / "artifact", *more)
    assert reason in manifest["curation"]["reason"]
    assert manifest["curation"]["tried"] == []
    if "w4a16" in more:
        assert manifest["quantization"]["sites"] == []


def test_too_few_images_to_search(encoder: Path, photos: Path, tmp_path: Path) -> None:
    for path in sorted(photos.iterdir())[15:]:
        path.unlink()
    manifest = compile_it(encoder, photos, tmp_path / "artifact")
    assert "needs 16 images, there are 15" in manifest["curation"]["reason"]


@pytest.mark.parametrize(("with_registers", "word"), [(0.99, "hardly"), (1.0, "not"), (1.5, "not")])
def test_the_reason_tells_a_small_help_from_none(with_registers: float, word: str) -> None:
    """An error that falls by too little to ship registers falls none the less."""
    curation = importlib.import_module("regcache.compiler.curation.curate")
    best = Setting()
    search = SimpleNamespace(
        tried={best: SimpleNamespace(mean=with_registers)}, tasks=SimpleNamespace(over=False)
    )
    told = curation._reason(search, best, 1.0, None, [])
    assert told.startswith(
        f"Registers: none (they would {word} have helped: error 1.00e+00 without"
    )
