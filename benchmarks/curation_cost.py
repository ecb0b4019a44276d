"""What curation costs, as a ratio to float passes measured in the same run.

Sensitivity of every layer on 32 images against (number of linear layers) float passes over them,
and the whole search, sensitivity and decision included, against one float pass over its images.

    python benchmarks/curation_cost.py SOURCE --images DIR [--calibrator min-max] [--json FILE]
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from regcache.compiler.calibration.graph_session import open_graph, run_all
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import curate
from regcache.compiler.curation.sensitivity import block_damage
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.workbench import HeldStudy
from regcache.compiler.encoder.prepare import prepare
from regcache.compiler.job.breadth import Breadth
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.job.options import Calibrator, CompileOptions
from regcache.compiler.job.targets import TargetName, resolve_target
from regcache.compiler.reporter import Reporter
from regcache.compiler.workers.open_workers import open_workers
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.session import available_cpus

SENSITIVITY_IMAGES = 32


def float_pass(study: Study, images: np.ndarray) -> float:
    """Seconds of one float run over the images, with all threads: the better of two."""
    session = open_graph(study.graph)
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        run_all(session, images, study.batch)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def sensitivity_seconds(study: Study) -> float:
    """All layers and all blocks, from the images on."""
    start = time.perf_counter()
    held = HeldStudy(study)
    with open_workers("threads", available_cpus()) as workers:
        blocks = range(held.workbench().depth)
        list(workers.map(block_damage, workers.share(held), blocks))
    return time.perf_counter() - start


def search_seconds(study: Study) -> float:
    """The whole curation."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        curated = curate(study, SearchOptions(Path(scratch) / "journal"), Reporter())
    seconds = time.perf_counter() - start
    print(f"{curated.record.screened} screened, {len(curated.record.tried)} tried")
    return seconds


def main(
    source: str,
    images: Annotated[Path, typer.Option()],
    calibrator: Calibrator = Calibrator.OUTPUT_ERROR,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the two ratios."""
    quantizer = Quantizer(resolve_target(TargetName.ORT_CPU, u8s8_saturates=False), calibrator)
    with tempfile.TemporaryDirectory() as scratch:
        options = CompileOptions(source=source, images=str(images))
        encoder = prepare(options, Path(scratch), Reporter())
    folder = ImageFolder(list_images(images), encoder.recipe, options.batch_size)
    dealt = ReferenceImages.of(folder, Breadth().images)
    every = np.concatenate([dealt.fit, dealt.rank, dealt.decide])
    few = every[:SENSITIVITY_IMAGES]
    sensitive = Study.of(
        encoder.graph,
        ReferenceImages(few, few[:1], few[:1]),
        quantizer,
        sensitivity_images=SENSITIVITY_IMAGES,
    )
    study = Study.of(encoder.graph, dealt, quantizer)
    layers = len(encoder.view.linears)
    few_seconds, sensitivity = float_pass(study, few), sensitivity_seconds(sensitive)
    every_seconds, search = float_pass(study, every), search_seconds(study)
    figures = {
        "layers": layers,
        "images": len(every),
        "float_pass_s": every_seconds,
        "sensitivity_s": sensitivity,
        "sensitivity_ratio": sensitivity / (layers * few_seconds),
        "search_s": search,
        "search_float_passes": search / every_seconds,
    }
    for name, value in figures.items():
        print(f"{name:20} {value:10.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
