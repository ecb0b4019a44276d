"""What `regcache parity` costs beside the time that its two models run.

Parity is measured twice: the first time PyTorch is imported too, which takes as long for one image
as for a thousand. Then both models run alone, on tensors that are ready.

    python benchmarks/parity_cost.py ARTIFACT --images DIR [--json FILE]
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from regcache.compiler.artifact.artifact import Artifact
from regcache.compiler.parity.measure import measure_artifact
from regcache.compiler.parity.reference import ReferenceChoice
from regcache.compiler.reporter import Reporter
from regcache.export.source import open_source
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.thresholds import Thresholds

_BATCH = 4


def seconds(work: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main(
    artifact: Path,
    images: Annotated[Path, typer.Option()],
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the seconds of parity and of the models, and their ratios."""

    def measure() -> None:
        measure_artifact(
            artifact,
            images,
            Reporter(),
            thresholds=Thresholds(),
            choice=ReferenceChoice.PYTORCH,
            batch_size=_BATCH,
        )

    first, again = seconds(measure), seconds(measure)
    opened = Artifact.open(artifact)
    options = opened.manifest.options
    reference = open_source(options.source).reference(resolution=options.resolution)
    if reference is None:
        raise typer.BadParameter(f"{artifact}: its source has no PyTorch original")
    ready = [batch.images for batch in ImageFolder(list_images(images), opened.recipe, _BATCH)]
    with opened.session() as session:
        models = sum(
            seconds(partial(run, batch)) for run in (reference, session.run) for batch in ready
        )
    found = {
        "images": sum(map(len, ready)),
        "models_s": models,
        "first_s": first,
        "again_s": again,
        "first_ratio": first / models,
        "ratio": again / models,
    }
    for name, value in found.items():
        typer.echo(f"{name:<14}{value:>10.3f}")
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
