"""What `regcache.load(ARTIFACT).embed` costs beside what it cannot do without.

That is ONNX Runtime on tensors that are ready, plus reading the images. Both run in turn, in one
process; the ratio is what counts.

    python benchmarks/embed_cost.py ARTIFACT --images DIR [--rounds 5] [--threads N] [--json FILE]
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import onnxruntime as ort
import typer

import regcache
from regcache.compiler.artifact.artifact import MODEL
from regcache.runtime.images import list_images, read_image
from regcache.runtime.session import available_cpus


def main(
    artifact: Path,
    images: Annotated[Path, typer.Option()],
    batch_size: int = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: int | None = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the time of loading and embedding, over raw ONNX Runtime's plus decoding's."""
    threads = threads or available_cpus()
    paths = list_images(images)
    with regcache.load(artifact, threads=threads) as embedder:
        recipe = embedder.recipe
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(
        os.fspath(artifact / MODEL), options, providers=["CPUExecutionProvider"]
    )
    name = session.get_inputs()[0].name
    ready = np.stack([read_image(path, recipe) for path in paths])

    def embed() -> None:
        with regcache.load(artifact, threads=threads) as loaded:
            loaded.embed(paths, batch_size=batch_size)

    def run() -> None:
        for start in range(0, len(ready), batch_size):
            session.run(None, {name: ready[start : start + batch_size]})

    def decode() -> None:
        for path in paths:
            read_image(path, recipe)

    run()
    times: list[dict[str, float]] = []
    for turn in range(rounds):
        steps: list[Callable[[], None]] = [embed, decode, run]
        steps = steps if turn % 2 else steps[::-1]
        times.append({step.__name__: _seconds(step) for step in steps})
    figures = {
        "images": float(len(paths)),
        "threads": float(threads),
        **{f"{key}_s": statistics.median(turn[key] for turn in times) for key in times[0]},
        "ratio": statistics.median(t["embed"] / (t["run"] + t["decode"]) for t in times),
        "least_ratio": min(t["embed"] / (t["run"] + t["decode"]) for t in times),
        "most_ratio": max(t["embed"] / (t["run"] + t["decode"]) for t in times),
    }
    for key, value in figures.items():
        print(f"{key:12} {value:9.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
