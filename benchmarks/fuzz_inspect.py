"""Broken and hostile ONNX files through `regcache inspect`: is every one refused in one clear line?

    PYTHONPATH=tests python benchmarks/fuzz_inspect.py [--count 5000] [--first 0] [--seconds 20]
        [--megabytes 1024] [--compile] [--folder build/fuzz] [--json FILE]

tests/support/onnx_mutations.py draws the files, the same for the same seed. A pool of forked
workers runs the command line on them; one that dies, hangs or takes too much memory is ended and
replaced.
With --compile those that inspect accepts are compiled on four small images, which takes seconds.
For each distinct cause a sample with the fewest changes is kept in the folder. Exit code 1 where
anything but a report or a clean refusal came out. Linux only.
"""

import faulthandler
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from support.onnx_mutations import draw

_RECYCLED = 200  # files; then what leaked is given back
_LARGEST_FILE = 2**28
_PACE = 0.02
_WIDTH = 180
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+) in (?P<name>\S+)')
_GOOD = ("ok", "refused")


@dataclass(frozen=True)
class Outcome:
    """What came of one file. `kind`: ok, refused, traceback, unclear, hang, memory or crash."""

    seed: int
    kind: str
    cause: str = ""
    message: str = ""
    megabytes: float = 0.0


# --- In a worker.


def work(connection: Connection, folder: Path, images: Path | None) -> None:
    """Take seeds and send outcomes until the connection ends."""
    # what hangs, and what is killed for its memory, leaves its stack here
    with (folder / "stack").open("w") as stack:
        faulthandler.enable(stack, all_threads=False)
        faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
        tempfile.tempdir = str(folder)
        for number, descriptor in (("out", 1), ("err", 2)):
            os.dup2(os.open(folder / number, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
        while True:
            try:
                seed = connection.recv()
            except EOFError:
                return
            for name in ("out", "err", "stack"):
                os.truncate(folder / name, 0)
            outcome = run_mutated(seed, folder, ["inspect"])
            if images is not None and outcome.kind == "ok":
                for name in ("out", "err", "stack"):
                    os.truncate(folder / name, 0)
                options = ["--images", str(images), "-o", str(folder / "artifact")]
                options += ["--registers", "off", "--accept-slower", "--threads", "1"]
                outcome = run_mutated(seed, folder, ["compile", *options])
            connection.send(outcome)


def run_mutated(seed: int, folder: Path, command: list[str]) -> Outcome:
    """Write the file of that seed and run a command on it."""
    from regcache.compiler.cli import main as cli

    home = folder / "file"
    for left in (home, folder / "artifact"):
        shutil.rmtree(left, ignore_errors=True)
    home.mkdir()
    path = draw(seed).write(home)
    Path("/proc/self/clear_refs").write_text("5")  # the peak of memory starts anew
    sys.argv = ["regcache", *command, str(path)]
    code: Any = 0
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (_LARGEST_FILE, hard))  # not for its own files
    try:
        cli.main()
    except SystemExit as error:
        code = error.code
    except BaseException as error:  # it is what is looked for
        return Outcome(seed, "traceback", cause_of(error), _cut(error), _peak())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sys.stdout.flush()
        sys.stderr.flush()
    said = [(folder / name).read_bytes().decode(errors="replace") for name in ("out", "err")]
    err = said[1].replace(str(path), path.name).replace(str(home), "FOLDER")
    return judge(seed, code or 0, said[0], err, folder)


def judge(seed: int, code: int, out: str, err: str, folder: Path) -> Outcome:
    """Exit code 0, or 2 with one line that says why and nothing else but steps."""
    errors = [line for line in err.splitlines() if line.startswith("regcache: error: ")]
    message = errors[0].removeprefix("regcache: error: ") if errors else ""
    faults = {
        "exit code": code not in {0, 2},
        "not one line of error": len(errors) != (1 if code else 0),
        "lines on stdout": bool(code and out),
        "more than 10 lines": bool(code) and len(err.splitlines()) > 10,
        "control characters": any(ord(sign) < 32 and sign != "\n" for sign in err),
        "names a temporary folder": str(folder) in err,
        "writes more than 256 MB": "File too large" in err,
        "no reason": bool(code) and len(message) < 8,
        "a line of more than 1,000 characters": max(map(len, err.splitlines()), default=0) > 1000,
    }
    found = [name for name, there in faults.items() if there]
    if found:
        return Outcome(seed, "unclear", found[0], _cut(message or out or err), _peak())
    return Outcome(seed, "refused" if code else "ok", "", _cut(message), _peak())


def cause_of(error: BaseException) -> str:
    """The type, and the innermost place in regcache; where the library is that raised it."""
    frames = [
        (_short(frame.filename), str(frame.lineno), frame.name)
        for frame in traceback.extract_tb(error.__traceback__)
    ]
    return f"{type(error).__name__} {place_of(frames[::-1])}"


def place_of(frames: list[tuple[str, str, str]]) -> str:
    """Innermost first: the first frame in regcache, and the library's that it called."""
    ours = [index for index, frame in enumerate(frames) if frame[0].startswith("regcache/")]
    if not ours:  # the stack of a hang is kept to a depth of 100
        return " ".join(["outside regcache", *(f"{frame[0]}:{frame[1]}" for frame in frames[:1])])
    file, line, name = frames[ours[0]]
    place = f"{file}:{line} {name}"
    if ours[0]:
        file, line, name = frames[ours[0] - 1]
        place += f" < {file}:{line} {name}"
    return place


def _short(file: str) -> str:
    for folder in ("/regcache/", "/site-packages/"):
        if folder in file:
            return file.rpartition(folder)[2]
    return Path(file).name


def _cut(text: object) -> str:
    return " ".join(str(text).split())[:160]


def _peak() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


# --- In the process that watches.


@dataclass
class Worker:
    """A forked process, the seed that it is busy with, and since when."""

    folder: Path
    images: Path | None = None
    context: Any = field(default_factory=lambda: multiprocessing.get_context("fork"))
    seed: int | None = None
    done: int = 0

    def start(self) -> None:
        """Fork, in an empty folder."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.connection, theirs = self.context.Pipe()
        self.process = self.context.Process(
            target=work, args=(theirs, self.folder, self.images), daemon=True
        )
        self.process.start()
        theirs.close()
        self.done = 0

    def give(self, seed: int) -> None:
        """Let it work on the file of that seed."""
        if self.done >= _RECYCLED:
            self.stop()
            self.start()
        self.seed, self.since = seed, time.monotonic()
        self.connection.send(seed)

    def look(self, seconds: float, megabytes: float) -> Outcome | None:
        """The outcome, where there is one."""
        seed = self.seed
        assert seed is not None
        if self.connection.poll():
            try:
                outcome: Outcome = self.connection.recv()
            except EOFError:
                return self._ended(seed, "crash")
            self.done, self.seed = self.done + 1, None
            over = outcome.megabytes > megabytes and outcome.kind in _GOOD
            cause = f"peak, then {outcome.kind}"
            return (
                Outcome(seed, "memory", cause, outcome.message, outcome.megabytes)
                if over
                else outcome
            )
        if not self.process.is_alive():
            return self._ended(seed, "crash")
        if self._megabytes() > megabytes:
            return self._ended(seed, "memory")
        if time.monotonic() - self.since > seconds:
            return self._ended(seed, "hang")
        return None

    def stop(self) -> None:
        """End the process and what it left."""
        self.connection.close()
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _ended(self, seed: int, kind: str) -> Outcome:
        size = self._megabytes()
        if self.process.is_alive() and self.process.pid is not None:
            os.kill(self.process.pid, signal.SIGUSR1)
            time.sleep(0.1)
        frames = _FRAME.findall((self.folder / "stack").read_text(errors="replace"))
        place = place_of([(_short(file), line, name) for file, line, name in frames])
        self.stop()
        code = self.process.exitcode if kind == "crash" else None
        cause = place if code is None else f"exit code {code} {place}"
        self.start()
        self.seed = None
        return Outcome(seed, kind, cause, "", size)

    def _megabytes(self) -> float:
        try:
            pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        except (OSError, IndexError):
            return 0.0
        return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def run(
    seeds: range,
    scratch: Path,
    workers: int,
    seconds: float,
    megabytes: float,
    images: Path | None = None,
) -> Iterator[Outcome]:
    """The outcomes of all seeds, as they come; with `images`, of compiling on them."""
    pool = [Worker(scratch / f"worker-{number}", images) for number in range(workers)]
    for worker in pool:
        worker.start()
    waiting = iter(seeds)
    try:
        while True:
            for worker in pool:
                if worker.seed is None and (seed := next(waiting, None)) is not None:
                    worker.give(seed)
            busy = [worker for worker in pool if worker.seed is not None]
            if not busy:
                return
            wait([worker.connection for worker in busy], _PACE)
            for worker in busy:
                outcome = worker.look(seconds, megabytes)
                if outcome is not None:
                    yield outcome
    finally:
        for worker in pool:
            worker.stop()


def _draw_images(folder: Path) -> Path:
    """Four images of noise to calibrate on."""
    from PIL import Image

    folder.mkdir()
    for number in range(4):
        pixels = random.Random(number).randbytes(16 * 16 * 3)
        Image.frombytes("RGB", (16, 16), pixels).save(folder / f"{number}.png")
    return folder


def keep_samples(outcomes: list[Outcome], folder: Path) -> dict[tuple[str, str], Path]:
    """For each bad cause the file with the fewest changes, then the smallest, written anew."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for outcome in outcomes:
        if outcome.kind not in _GOOD:
            seeds.setdefault((outcome.kind, outcome.cause), []).append(outcome.seed)
    kept = {}
    for key, several in seeds.items():
        drawn = {seed: draw(seed) for seed in several[:50]}
        best = min(drawn, key=lambda seed: (len(drawn[seed].changes), drawn[seed].model.ByteSize()))
        home = folder / f"{key[0]}-{best}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        kept[key] = drawn[best].write(home)
        (home / "changes.txt").write_text("\n".join(drawn[best].changes), encoding="utf-8")
    return kept


def table_of(outcomes: list[Outcome], samples: dict[tuple[str, str], Path]) -> Table:
    """One line for each distinct cause, the commonest first."""
    kinds = Counter(outcome.kind for outcome in outcomes)
    table = Table(
        title=f"{len(outcomes)} files: "
        + ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()),
    )
    for name in ("kind", "count", "cause < what it called", "message", "sample"):
        table.add_column(name, overflow="fold")
    counts = Counter((o.kind, o.cause) for o in outcomes if o.kind not in _GOOD)
    first = {(o.kind, o.cause): o.message for o in reversed(outcomes)}
    for key, count in counts.most_common():
        sample = samples[key].parent.name
        cells = (key[0], str(count), key[1], first[key], sample)
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def main(
    count: Annotated[int, typer.Option(help="Files.")] = 5000,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    seconds: Annotated[float, typer.Option(help="That a file may take.")] = 20,
    megabytes: Annotated[float, typer.Option(help="Of memory that a file may take.")] = 1024,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    compile_too: Annotated[
        bool, typer.Option("--compile", help="Compile those that can be inspected.")
    ] = False,
    folder: Annotated[Path, typer.Option(help="For the samples.")] = Path("build/fuzz"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the distinct causes of everything that is no report and no clean refusal."""
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}  # a fork keeps no threads
    import regcache.compiler.cli.main
    import regcache.export.onnx_file  # noqa: F401  # loaded once, before the workers are forked

    started, outcomes = time.perf_counter(), []
    seeds = range(first, first + count)
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        images = _draw_images(Path(scratch) / "images") if compile_too else None
        for outcome in run(seeds, Path(scratch), workers, seconds, megabytes, images):
            outcomes.append(outcome)
            if len(outcomes) % 500 == 0:
                print(f"{len(outcomes)} files", file=sys.stderr)
    outcomes.sort(key=lambda outcome: outcome.seed)
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table_of(outcomes, keep_samples(outcomes, folder)))
    peak = max(outcome.megabytes for outcome in outcomes)
    console.print(f"{time.perf_counter() - started:.0f} s, at most {peak:.0f} MB")
    if json_file is not None:
        json_file.write_text(json.dumps([vars(item) for item in outcomes], indent=2) + "\n")
    if any(outcome.kind not in _GOOD for outcome in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
