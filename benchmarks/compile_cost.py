"""What `regcache compile` costs: time and memory of every step, against the float model's.

Each command runs in a process of its own, its standard error in a pipe, all in one run: the ratios
are what counts.

    python benchmarks/compile_cost.py SOURCE --images DIR [--batch-size 4] [--effort fast,balanced]
        [--target ort-cpu] [--json FILE]

For every effort: seconds, in float passes over the images and beside `--dry-run`'s forecast; peak
memory, in float weights; and the longest silence of standard error. Then every step: its seconds,
in images through the float model, as compiler/plan/steps.py has them, and its own peak memory.
"""

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.reporter import Reporter
from regcache.passes.model_files import model_size
from regcache.passes.preprocess import Preprocess
from regcache.runtime.images import ImageFolder, list_images
from regcache.runtime.session import OrtSession

_BEGUN = re.compile(r"step \d+ of \d+: (.*)")
_HEARTBEAT = re.compile(r"\d:\d\d (so far|of about .*)$")


@dataclass
class StepCost:
    """A step: when it began, how long it took, the largest memory while it was done."""

    name: str
    began: float
    seconds: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Run:
    """A command as somebody sees it who reads its standard error from a pipe."""

    seconds: float
    silence: float
    peak_mb: float
    steps: list[StepCost]


def memory_mb(process: int) -> float:
    """The largest resident memory of a process since that was last asked; 0 where it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
        Path(f"/proc/{process}/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        return 0.0
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(found[1]) / 1e3 if found else 0.0


def watch(command: list[str]) -> Run:
    """Run a command and read its standard error line by line."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    start = last = time.perf_counter()
    silence, steps = 0.0, list[StepCost]()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            now = time.perf_counter()
            silence, last = max(silence, now - last), now
            begun = None if _HEARTBEAT.search(line) else _BEGUN.match(line)
            peak = memory_mb(process.pid)
            if steps:
                steps[-1].peak_mb = max(steps[-1].peak_mb, peak)
            if begun is not None:
                steps.append(StepCost(begun[1], now - start))
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    for step, end in zip(steps, [*(one.began for one in steps[1:]), seconds], strict=True):
        step.seconds = end - step.began
    child = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peak = max([child / 1e3 if child > before else 0.0, *(one.peak_mb for one in steps)])
    return Run(seconds, max(silence, start + seconds - last), peak, steps)


def float_pass(model: Path, recipe: Preprocess, images: Path, batch_size: int) -> float:
    """Seconds that the float model takes for the images, decoded beforehand, after a warm-up."""
    batches = [batch.images for batch in ImageFolder(list_images(images), recipe, batch_size)]
    with OrtSession(model) as session:
        session.run(batches[0])
        start = time.perf_counter()
        for batch in batches:
            session.run(batch)
        return time.perf_counter() - start


def forecast(command: list[str]) -> dict[str, Any]:
    """What --dry-run says of a command."""
    told = subprocess.run(
        [*command, "--dry-run", "--json", "-"], stdout=subprocess.PIPE, check=True
    )
    return dict(json.loads(told.stdout))


def main(
    source: str,
    images: Annotated[Path, typer.Option()],
    batch_size: int = 4,
    effort: str = "balanced",
    target: str = "ort-cpu",
    options: Annotated[str, typer.Option(help="More options of compile, in one text.")] = "",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print what each effort costs, and each of its steps."""
    count, found = len(list_images(images)), {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "float.onnx"
        recipe = export_source(source, model, None, Reporter())
        if recipe is None:
            raise typer.BadParameter("the source has no preprocessing recipe")
        megabytes = model_size(model) / 1e6
        for name in effort.split(","):
            command = [sys.executable, "-m", "regcache", "compile", source, "--images", str(images)]
            command += ["-o", f"{scratch}/{name}", "--batch-size", str(batch_size)]
            command += ["--target", target, "--effort", name, *options.split()]
            before = float_pass(model, recipe, images, batch_size)
            planned = forecast(command)
            run = watch(command)
            once = (before + float_pass(model, recipe, images, batch_size)) / 2
            found[name] = {
                "float_pass_s": once,
                "seconds": run.seconds,
                "float_passes": run.seconds / once,
                "planned_s": planned["seconds"],
                "peak_mb": run.peak_mb,
                "float_weights": run.peak_mb / megabytes,
                "planned_mb": planned["memory"] / 1e6,
                "longest_silence_s": run.silence,
                "steps": [asdict(step) for step in run.steps],
            }
            print(f"effort {name}, target {target}, {count} images, {megabytes:.0f} MB of weights")
            for key, value in found[name].items():
                if isinstance(value, float):
                    print(f"  {key:18} {value:8.1f}")
            for step in run.steps:
                passed = step.seconds / once * count
                print(
                    f"  {step.name[:40]:40} {step.seconds:8.1f} s {passed:8.1f} images "
                    f"{step.peak_mb:8.0f} MB"
                )
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
