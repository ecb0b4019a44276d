"""Does an artifact hold out under load: no growth of memory, no wrong vector, and how long is p99?

    python benchmarks/load_test.py ARTIFACT --images DIR [--minutes 10] [--clients 32]
        [--threads 2] [--server] [--json FILE]

`--clients` threads embed images of the folder, in random batches of one to four, by file, as
Pillow images and as arrays, for so many minutes. With `--server` they send files to
examples/batch_server.py instead, one each, which embeds in batches. Every vector is held against
that of its image alone. Memory is the resident set of the process that embeds; it has grown where
the median of the last third of the minutes is more than a twentieth and 10 MB above that of the
third before. Linux only. Exit code 1 where it has grown, a vector is wrong or a call has failed.
"""

import http.client
import io
import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

import regcache
from regcache.runtime.list_images import list_images

_SERVER = Path(__file__).parents[1] / "examples" / "batch_server.py"
_PORT = 8765
# Batches of another size round otherwise; the vector of another image is far from it.
_LEAST_COSINE = 0.999
_EVERY = 1.0
Floats = NDArray[np.float32]


@dataclass
class Load:
    """What the clients share: the images with their vectors, and what has come of their calls."""

    paths: list[Path]
    vectors: Floats
    seconds: list[float] = field(default_factory=list)
    images: int = 0
    wrong: int = 0
    failed: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def run(self, call: "Callable[[list[int]], Floats]", largest: int, seed: int) -> None:
        """Call again and again until it is over. `call`: images, by number -> vectors [N, D]."""
        draw = random.Random(seed)
        while not self.over.is_set():
            chosen = [draw.randrange(len(self.paths)) for _ in range(draw.randint(1, largest))]
            started = time.perf_counter()
            try:
                found = call(chosen)
            except Exception as error:  # counted: nothing may fail
                self.failed.append(f"{type(error).__name__}: {error}")
                continue
            self.seconds.append(time.perf_counter() - started)
            self.images += len(chosen)
            self.wrong += int((_cosines(found, self.vectors[chosen]) < _LEAST_COSINE).sum())


def _cosines(left: Floats, right: Floats) -> NDArray[np.float64]:
    """Row by row; -1 where a row is not finite."""
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: NDArray[np.float64] = (left * right).sum(axis=1, dtype=np.float64) / norms
    return np.nan_to_num(cosines, nan=-1.0)


def main(
    artifact: Path,
    images: Annotated[Path, typer.Option()],
    minutes: Annotated[float, typer.Option(min=0)] = 10,
    clients: Annotated[int, typer.Option(min=1)] = 32,
    threads: Annotated[int, typer.Option(min=1, help="Of the runtime.")] = 2,
    server: Annotated[bool, typer.Option("--server")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print calls, wrong vectors, latencies and memory."""
    paths = [path for path in list_images(images) if isinstance(path, Path)]
    with regcache.load(artifact, threads=threads) as embedder:
        load = Load(paths, np.concatenate([embedder.embed(path) for path in paths]))
        if not server:
            memory = _drive(
                load, lambda _: _embedding(embedder, paths), 4, clients, minutes, os.getpid()
            )
    if server:
        command = [sys.executable, str(_SERVER), str(artifact), "--port", str(_PORT)]
        with subprocess.Popen([*command, "--threads", str(threads)]) as process:
            try:
                _wait_for_server()
                files = [path.read_bytes() for path in paths]
                memory = _drive(load, lambda _: _posting(files), 1, clients, minutes, process.pid)
            finally:
                process.terminate()
    found = _result(load, memory, minutes)
    for name, value in found.items():
        print(f"{name:<24}{value}")
    for line in sorted(set(load.failed))[:5]:
        print(line, file=sys.stderr)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    if found["wrong_vectors"] or found["failed_calls"] or found["grown"]:
        raise typer.Exit(1)


def _drive(
    load: Load,
    client: Callable[[int], Callable[[list[int]], Floats]],
    largest: int,
    clients: int,
    minutes: float,
    pid: int,
) -> list[float]:
    """Let the clients run; returns the megabytes of the process, a second apart."""
    crowd = [
        threading.Thread(target=load.run, args=(client(number), largest, number))
        for number in range(clients)
    ]
    for thread in crowd:
        thread.start()
    memory = []
    until = time.monotonic() + 60 * minutes
    while time.monotonic() < until:
        time.sleep(_EVERY)
        memory.append(_megabytes(pid))
    load.over.set()
    for thread in crowd:
        thread.join()
    return memory


def _embedding(embedder: regcache.Embedder, paths: list[Path]) -> Callable[[list[int]], Floats]:
    """Files, Pillow images and arrays in turn, which are the same pixels where they are RGB."""

    def call(chosen: list[int]) -> Floats:
        return embedder.embed([_given(paths[number], place) for place, number in enumerate(chosen)])

    return call


def _given(path: Path, place: int) -> Any:
    """An image as a file, as Pillow's, or as an array where that says the same."""
    if place % 3 == 0:
        return path
    image = Image.open(path)
    return np.asarray(image) if place % 3 == 2 and image.mode == "RGB" else image


def _posting(files: list[bytes]) -> Callable[[list[int]], Floats]:
    """One connection that stays open, and one image a call."""
    connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=120)

    def call(chosen: list[int]) -> Floats:
        connection.request("POST", "/embed", files[chosen[0]])
        response = connection.getresponse()
        content = response.read()
        if response.status != 200:
            raise RuntimeError(f"{response.status} {content[:100]!r}")
        return np.array([json.load(io.BytesIO(content))["embedding"]], np.float32)

    return call


def _wait_for_server() -> None:
    for _ in range(600):
        try:
            connection = http.client.HTTPConnection("127.0.0.1", _PORT, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the server does not answer")


def _megabytes(pid: int) -> float:
    pages = Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE") / 2**20


def _result(load: Load, memory: list[float], minutes: float) -> dict[str, Any]:
    third = max(len(memory) // 3, 1)
    before = statistics.median(memory[-2 * third : -third] or memory)
    after = statistics.median(memory[-third:])
    milliseconds = np.array(load.seconds or [np.nan]) * 1000
    quantiles = {f"p{share}_ms": round(float(np.percentile(milliseconds, share)), 1)
                 for share in (50, 99)}  # fmt: skip
    return {
        "minutes": minutes,
        "calls": len(load.seconds),
        "images_per_second": round(load.images / (60 * minutes), 1),
        "wrong_vectors": load.wrong,
        "failed_calls": len(load.failed),
        **quantiles,
        "slowest_ms": round(float(milliseconds.max()), 1),
        "memory_mb_before": round(before, 1),
        "memory_mb_after": round(after, 1),
        "grown": after > 1.05 * before and after > before + 10,
    }


if __name__ == "__main__":
    typer.run(main)
