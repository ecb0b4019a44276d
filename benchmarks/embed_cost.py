"""What `regcache.load(ARTIFACT).embed` costs beside what it cannot do without.

That is the runtime on tensors that are ready, plus reading the images. Both run in turn, in one
process; the ratio is what counts. OpenVINO loads its compiled model from a cache on both sides.

    python benchmarks/embed_cost.py ARTIFACT --images DIR [--runtime openvino] [--rounds 5]
        [--threads N] [--json FILE]
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import typer
from numpy.typing import NDArray

import regcache
from regcache.compiler.artifact.artifact import MODEL
from regcache.runtime.images import read_image
from regcache.runtime.list_images import list_images
from regcache.runtime.run_with import RuntimeName
from regcache.runtime.session import available_cpus


def main(
    artifact: Path,
    images: Annotated[Path, typer.Option()],
    batch_size: int = 8,
    rounds: Annotated[int, typer.Option(min=1)] = 5,
    threads: int | None = None,
    runtime: RuntimeName = RuntimeName.ONNXRUNTIME,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the time of loading and embedding, over the raw runtime's plus decoding's."""
    threads = threads or available_cpus()
    paths = list_images(images)
    cache = TemporaryDirectory(prefix="regcache-")  # removed when the process ends
    folder = cache.name if runtime is RuntimeName.OPENVINO else None
    load = partial(
        regcache.load, artifact, threads=threads, runtime=runtime.value, model_cache=folder
    )
    with load() as embedder:
        recipe = embedder.recipe
    infer = _openvino if runtime is RuntimeName.OPENVINO else _onnxruntime
    run_raw = infer(artifact / MODEL, threads)
    ready = np.stack([read_image(path, recipe) for path in paths])

    def embed() -> None:
        with load() as loaded:
            loaded.embed(paths, batch_size=batch_size)

    def run() -> None:
        for start in range(0, len(ready), batch_size):
            run_raw(ready[start : start + batch_size])

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


def _onnxruntime(model: Path, threads: int) -> Callable[[NDArray[Any]], object]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(os.fspath(model), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})


def _openvino(model: Path, threads: int) -> Callable[[NDArray[Any]], object]:
    from openvino import compile_model

    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = compile_model(model, "CPU", hints).create_infer_request()
    return lambda images: request.infer({0: images}, share_inputs=True)


def _seconds(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    typer.run(main)
