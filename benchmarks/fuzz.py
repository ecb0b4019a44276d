"""Broken and hostile files: is every one refused in one clear line, or read?

    PYTHONPATH=tests python benchmarks/fuzz.py [--onnx 20000] [--images 5000] [--first 0]
        [--compiled 20] [--seconds 60] [--megabytes 1024] [--folder build/fuzz] [--json FILE]

tests/support/onnx_mutations.py draws encoders, image_mutations.py images, the same for the same
seed. Encoders go through `inspect`; of those that it accepts one in `--compiled` goes through
`compile`, and what comes of that embeds images. Every image stands between two good ones in a
batch that is embedded. A pool of forked workers runs them; one that dies, hangs or takes too much
memory is ended and replaced. For each distinct cause a sample with the fewest changes is kept in
the folder. Exit code 1 where anything but a report or a clean refusal came out. Linux only.
"""

import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from support.fuzz_outcome import GOOD, Outcome
from support.fuzz_pool import Limits, Task, run_all
from support.fuzz_tasks import MutatedEncoder, MutatedImage, draw_images
from support.image_mutations import Picture, draw_image
from support.onnx_mutations import Sample, draw
from support.tiny_artifact import tiny_artifact

_WIDTH = 180

Drawn = Sample | Picture


def keep_samples(
    outcomes: list[Outcome], drawing: Callable[[int], Drawn], folder: Path
) -> dict[tuple[str, str], Path]:
    """For each bad cause the file with the fewest changes, written anew."""
    seeds: dict[tuple[str, str], list[int]] = {}
    for outcome in outcomes:
        if outcome.kind not in GOOD:
            seeds.setdefault((outcome.kind, outcome.cause), []).append(outcome.seed)
    kept = {}
    for key, several in seeds.items():
        drawn = {seed: drawing(seed) for seed in several[:50]}
        best = min(drawn, key=lambda seed: len(drawn[seed].changes))
        home = folder / f"{key[0]}-{best}"
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        kept[key] = drawn[best].write(home)
        (home / "changes.txt").write_text("\n".join(drawn[best].changes), encoding="utf-8")
    return kept


def table_of(what: str, outcomes: list[Outcome], samples: dict[tuple[str, str], Path]) -> Table:
    """One line for each distinct cause, the commonest first."""
    kinds = Counter(f"{outcome.kind} ({outcome.stage})" for outcome in outcomes)
    said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    table = Table(title=f"{len(outcomes)} {what}: {said}")
    for name in ("kind", "count", "cause < what it called", "message", "sample"):
        table.add_column(name, overflow="fold")
    counts = Counter((o.kind, o.cause) for o in outcomes if o.kind not in GOOD)
    first = {(o.kind, o.cause): o.message for o in reversed(outcomes)}
    for key, count in counts.most_common():
        cells = (key[0], str(count), key[1], first[key], samples[key].parent.name)
        table.add_row(*(cell.replace("[", r"\[") for cell in cells))
    return table


def try_all(
    what: str,
    task: Task,
    drawing: Callable[[int], Drawn],
    seeds: range,
    workers: int,
    limits: Limits,
    folder: Path,
) -> list[Outcome]:
    """Try the files of all seeds and print what came of them; returns it in their order."""
    started, outcomes = time.perf_counter(), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        for outcome in run_all(task, seeds, Path(scratch), workers, limits):
            outcomes.append(outcome)
            if len(outcomes) % 500 == 0:
                print(f"{len(outcomes)} {what}", file=sys.stderr)
    outcomes.sort(key=lambda outcome: outcome.seed)
    console = Console()
    console.width = max(console.width, _WIDTH)
    console.print(table_of(what, outcomes, keep_samples(outcomes, drawing, folder / what)))
    peak = max((outcome.megabytes for outcome in outcomes), default=0.0)
    console.print(f"{time.perf_counter() - started:.0f} s, at most {peak:.0f} MB")
    return outcomes


def main(
    onnx: Annotated[int, typer.Option(help="Mutated encoders.")] = 20_000,
    images: Annotated[int, typer.Option(help="Mutated images.")] = 5_000,
    first: Annotated[int, typer.Option(help="The first seed.")] = 0,
    compiled: Annotated[
        int, typer.Option(min=1, help="Of the encoders accepted, one in how many is compiled.")
    ] = 20,
    seconds: Annotated[float, typer.Option(help="That a file may take.")] = 60,
    megabytes: Annotated[
        float, typer.Option(help="Of memory that an encoder may take, an image twice.")
    ] = 1024,
    workers: Annotated[int, typer.Option(help="Processes.")] = 2,
    folder: Annotated[Path, typer.Option(help="For the samples.")] = Path("build/fuzz"),
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the distinct causes of everything that is no report and no clean refusal."""
    os.environ |= {"ORT_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}  # a fork keeps no threads
    import regcache.compiler.cli.main
    import regcache.export.onnx_file  # noqa: F401  # loaded once, before the workers are forked

    limits = Limits(seconds, megabytes)
    # An image of as many pixels as are decoded takes 0.7 GB, and another copy as RGB.
    image_limits = Limits(seconds, 2 * megabytes)
    seeds = [range(first, first + count) for count in (onnx, images)]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        calibration = draw_images(Path(scratch) / "images")
        encoders = MutatedEncoder(calibration, compiled)
        found = {"encoders": try_all("encoders", encoders, draw, seeds[0], workers, limits, folder)}
        if images:
            home = Path(scratch) / "tiny"
            home.mkdir()
            pictures = MutatedImage(tiny_artifact(home), calibration / "0.png")
            found["images"] = try_all(
                "images", pictures, draw_image, seeds[1], workers, image_limits, folder
            )
    if json_file is not None:
        content = {what: [vars(item) for item in items] for what, items in found.items()}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if any(outcome.kind not in GOOD for items in found.values() for outcome in items):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
