"""Time and memory of `regcache compile` against one pass of the float model over the images.

Each is measured in a process of its own, in one run: the ratio is what counts.

    python benchmarks/compile_cost.py SOURCE --images DIR [--batch-size 4] [--registers off]
        [--json FILE]

The budget is for a compile without a search for registers; curation_cost.py measures that.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.reporter import Reporter
from regcache.passes.model_files import model_size
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import ImageFolder, list_images
from regcache.runtime.session import OrtSession


def float_pass(model: Path, recipe: Preprocess, images: Path, batch_size: int) -> float:
    """Seconds that the float model takes for the images, decoded beforehand, after a warm-up."""
    batches = [batch.images for batch in ImageFolder(list_images(images), recipe, batch_size)]
    with OrtSession(model) as session:
        session.run(batches[0])
        start = time.perf_counter()
        for batch in batches:
            session.run(batch)
        return time.perf_counter() - start


def main(
    source: str,
    images: Annotated[Path, typer.Option()],
    batch_size: int = 4,
    registers: str = "off",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print float pass, compile time, their budget, and peak memory."""
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "float.onnx"
        recipe = export_source(source, model, None, Reporter())
        if recipe is None:
            raise typer.BadParameter("the source has no preprocessing recipe")
        command = [sys.executable, "-m", "regcache", "compile", source]
        command += ["--images", str(images), "-o", f"{scratch}/artifact"]
        command += ["--batch-size", str(batch_size), "--registers", registers]
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds = time.perf_counter() - start
        # The largest process so far; the export above ran in a child too, when it ran at all.
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        megabytes = model_size(model) / 1e6
        once = float_pass(model, recipe, images, batch_size)
    figures = {
        "float_pass_s": once,
        "compile_s": seconds,
        "compile_budget_s": 1.5 * once + 20,
        "peak_mb": peak / 1e3,
        "export_peak_mb": before / 1e3,
        "peak_budget_mb": 3 * megabytes + 1000,
    }
    for name, value in figures.items():
        print(f"{name:18} {value:8.1f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
