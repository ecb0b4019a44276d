"""Is anything lost where processes meet, or one of them is killed?

    PYTHONPATH=tests python benchmarks/safety.py builds [--count 200]
    PYTHONPATH=tests python benchmarks/safety.py opens [--count 5000]
    PYTHONPATH=tests python benchmarks/safety.py kills [--count 200]

`builds`: two processes open one artifact, wait for each other, and each adds an engine. `opens`:
an artifact is loaded while another process replaces it again and again. `kills`: `compile`,
`build`, `bundle` and `parity` get SIGKILL, SIGTERM or SIGINT at a random moment; what a SIGKILL
left has to be gone once the command has run again. All on a tiny encoder, in temporary folders.
Exit code 1 where anything was lost, mixed up or left lying about. Linux and macOS only.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from support.engine_artifacts import engine_record
from support.tiny_artifact import tiny_artifact

import regcache
from regcache.compiler.artifact.artifact import Artifact, ReplacedError
from regcache.compiler.bundle.record import BUNDLE
from regcache.compiler.engines.update import NewEngine, add_engines
from regcache.compiler.job.staging import staged_folder
from regcache.passes.errors import InputError

app = typer.Typer(help=__doc__, rich_markup_mode=None)
Count = Annotated[int, typer.Option(min=1)]
_FORK = multiprocessing.get_context("fork")
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
_MAIN = "from regcache.compiler.cli.start import main; main()"
_EARLY = "ended before the signal came"
_BLACK = np.zeros((16, 16, 3), np.uint8)


@app.command()
def builds(count: Count = 200) -> None:
    """Pairs of builds that end together: is every engine kept?"""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        original = tiny_artifact(_made(home / "original"), "--target", "tensorrt")
        found = Counter(_pair(original, home / "pair") for _ in range(count))
    _tell("pairs of builds", found, {"both engines kept"})


def _pair(original: Path, folder: Path) -> str:
    """What came of two builds at once."""
    shutil.rmtree(folder, ignore_errors=True)
    artifact = Path(shutil.copytree(original, _made(folder) / "artifact"))
    together = _FORK.Barrier(2)
    files = ("engines/one.engine", "engines/two.engine")
    both = [_FORK.Process(target=_build, args=(artifact, file, together)) for file in files]
    for process in both:
        process.start()
    for process in both:
        process.join()
    try:
        kept = tuple(record.file for record in Artifact.open(artifact).manifest.engines)
    except InputError as error:
        return f"invalid: {error}"
    if any(process.exitcode for process in both):
        return "a build failed"
    if [path.name for path in folder.iterdir()] != ["artifact"]:
        return "littered"
    return "both engines kept" if kept == files else f"{len(kept)} engines kept"


def _build(artifact: Path, file: str, together: Any) -> None:
    opened = Artifact.open(artifact).manifest
    together.wait(60)
    add_engines(artifact, opened, [NewEngine(engine_record(file), file.encode())])


@app.command()
def opens(
    count: Count = 5000,
    pause: Annotated[float, typer.Option(help="Seconds between replacements.")] = 0.02,
) -> None:
    """Loads of an artifact that is replaced: is every one of them one of the two?"""
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        two = [tiny_artifact(_made(home / str(depth)), depth=depth) for depth in (1, 2)]
        wanted = {}
        for artifact in two:
            with regcache.load(artifact, threads=1) as encoder:
                wanted[_model_hash(encoder)] = encoder.embed(_BLACK)
        output = Path(shutil.copytree(two[0], home / "artifact"))
        replaced = _FORK.Value("i", 0)
        other = _FORK.Process(target=_keep_replacing, args=(output, two, pause, replaced))
        other.start()
        started = time.perf_counter()
        try:
            found = Counter(_load(output, wanted) for _ in range(count))
        finally:
            other.kill()
            other.join()
        print(f"{replaced.value / (time.perf_counter() - started):.0f} replacements a second")
    _tell("loads", found, {"right", "told to try again"})


def _keep_replacing(output: Path, two: list[Path], pause: float, replaced: Any) -> None:
    while True:
        time.sleep(pause)
        replaced.value += 1
        with staged_folder(output) as staging:
            shutil.copytree(two[replaced.value % 2], staging, dirs_exist_ok=True)


def _load(output: Path, wanted: dict[str, Any]) -> str:
    """What came of one load: the vector has to be that of the manifest's model."""
    try:
        with regcache.load(output, threads=1) as encoder:
            same = np.array_equal(encoder.embed(_BLACK), wanted[_model_hash(encoder)])
    except ReplacedError:
        return "told to try again"
    except Exception as error:  # what must not come
        return f"{type(error).__name__}: {error}"
    return "right" if same else "another model's vector"


def _model_hash(encoder: regcache.Embedder) -> str:
    return encoder.manifest.files["model.onnx"].sha256


@app.command()
def kills(
    count: Count = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
) -> None:
    """Commands that are killed: is an artifact lost, or anything left?"""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        original = tiny_artifact(_made(home / "original"), "--target", "tensorrt-rtx").parent
        commands = _commands()
        seconds = {name: _time(original, home / "timed", name) for name in commands}
        print(", ".join(f"{name} {each:.1f} s" for name, each in seconds.items()))
        found: Counter[str] = Counter()
        number = -1
        while found.total() - found[_EARLY] < count:
            number += 1
            name = list(commands)[number % len(commands)]
            sent = _SIGNALS[number // len(commands) % len(_SIGNALS)]
            after = draw.uniform(0.02, 0.9) * seconds[name]
            came = _kill(original, home / "killed", name, sent, after)
            found[came] += 1
            if came not in {"killed", _EARLY}:
                print(f"{name}, {sent.name} after {after:.2f} s: {came}", file=sys.stderr)
    _tell("commands", found, {"killed", _EARLY})


def _commands() -> dict[str, Callable[[Path], list[object]]]:
    """By name, the arguments of each command in a folder with an artifact and its source."""
    return {
        "compile": lambda home: [
            *("compile", home / "tiny.onnx", "--images", home / "calibration"),
            *("-o", home / "artifact", "--accept-slower", "--threads", 1),
        ],
        "build": lambda home: [
            *("build", home / "artifact", "--engine", "tensorrt-rtx"),
            *("--compute-capability", "8.6"),
        ],
        "bundle": lambda home: [
            *("bundle", home / "artifact", "-o", home / "bundle", "--format", "triton"),
        ],
        "parity": lambda home: [
            *("parity", home / "artifact", "--images", home / "calibration", "--threads", 1),
            *("--min-cosine", 0.5, "--json", home / "parity.json"),
        ],
    }


def _start(home: Path, name: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _MAIN, *map(str, _commands()[name](home))]
    environment = {**os.environ, "TMPDIR": str(home.parent / "tmp"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _fresh(original: Path, folder: Path) -> Path:
    """A folder `home` with an artifact and its source beside an empty one for temporary files."""
    shutil.rmtree(folder, ignore_errors=True)
    _made(folder / "tmp")
    return Path(shutil.copytree(original, folder / "home"))


def _time(original: Path, folder: Path, name: str) -> float:
    home = _fresh(original, folder)
    started = time.perf_counter()
    with _start(home, name) as process:
        _, err = process.communicate()
    if process.returncode:
        raise SystemExit(f"{name} does not even run: {err}")
    return time.perf_counter() - started


def _kill(original: Path, folder: Path, name: str, sent: signal.Signals, after: float) -> str:
    """What came of one command that got a signal so many seconds after its start."""
    home = _fresh(original, folder)
    with _start(home, name) as process:
        try:
            process.wait(after)
        except subprocess.TimeoutExpired:
            process.send_signal(sent)
        _, err = process.communicate()
    ended = process.returncode == 0
    if "Traceback" in err:
        return "traceback"
    if not ended and process.returncode not in {-sent, 128 + sent}:
        return f"exit code {process.returncode}: {err[-200:]}"
    fault = _lost(home)
    if fault is None and sent is signal.SIGKILL and not ended:
        with _start(home, name) as again:
            _, err = again.communicate()
        fault = f"does not run again: {err[-200:]}" if again.returncode else _lost(home)
    return fault or _litter(home) or (_EARLY if ended else "killed")


def _lost(home: Path) -> str | None:
    """What became of an artifact, a bundle or a report that is not whole."""
    try:
        Artifact.open(home / "artifact")
    except InputError as error:
        return f"lost: {error}"
    bundle = home / "bundle"
    if bundle.exists() and not (bundle / BUNDLE).is_file():
        return "half a bundle"
    report = home / "parity.json"
    if report.exists() and not report.read_text(encoding="utf-8").endswith("}\n"):
        return "half a report"
    return None


def _litter(home: Path) -> str | None:
    known = {"artifact", "calibration", "tiny.onnx", "tiny.preprocess.json", "bundle"}
    found = {path.name for path in home.iterdir()} - known - {"parity.json"}
    found = {name for name in found if not name.endswith(".search.jsonl")}  # to go on with
    found |= {path.name for path in (home.parent / "tmp").iterdir()}
    return f"littered: {sorted(found)}" if found else None


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _tell(what: str, found: Counter[str], good: set[str]) -> None:
    """Print how often each thing came; exit code 1 where one of them is not good."""
    print(f"{found.total()} {what}")
    for name, count in found.most_common():
        print(f"{count:>6} {name}")
    if found.keys() - good:
        raise typer.Exit(1)


if __name__ == "__main__":
    app()
