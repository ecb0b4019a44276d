"""What `regcache compile` costs: time and memory of every step, against the float model's.

Each command runs in a process of its own, its standard error in a pipe, all in one run: the ratios
are what counts.

    python benchmarks/compile_cost.py SOURCE --images DIR [--batch-size 4] [--effort fast,balanced]
        [--target ort-cpu] [--json FILE]

For every effort: seconds, in float passes over the images and beside `--dry-run`'s forecast; peak
memory, in float weights; and the longest silence of standard error. Then every step: its seconds,
in images through the float model, as compiler/plan/steps.py has them, the same by what the CPUs
computed, which holds on a busy machine too, and its own peak memory.
"""

import json
import os
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
from regcache.runtime.images import ImageFolder
from regcache.runtime.list_images import list_images
from regcache.runtime.session import OrtSession

_BEGUN = re.compile(r"step \d+ of \d+: (.*)")
_HEARTBEAT = re.compile(r"\d:\d\d (so far|of about .*)$")


@dataclass
class StepCost:
    """A step: when it began, how long it took, the largest memory while it was done.

    `cpu_s`: seconds of all CPUs together, which other processes change less.
    """

    name: str
    began: float
    cpu_began: float
    seconds: float = 0.0
    cpu_s: float = 0.0
    peak_mb: float = 0.0


@dataclass
class Run:
    """A command as somebody sees it who reads its standard error from a pipe."""

    seconds: float
    cpu_s: float
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


def cpu_seconds(process: int) -> float:
    """What a process and those that it waited for have computed; 0 where it has ended."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    return sum(map(int, text.rpartition(")")[2].split()[11:15])) / os.sysconf("SC_CLK_TCK")


def watch(command: list[str]) -> Run:
    """Run a command and read its standard error line by line."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
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
                steps.append(StepCost(begun[1], now - start, cpu_seconds(process.pid)))
    seconds = time.perf_counter() - start
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = child.ru_utime + child.ru_stime - usage.ru_utime - usage.ru_stime
    ends = [*((one.began, one.cpu_began) for one in steps[1:]), (seconds, cpu)]
    for step, (end, computed) in zip(steps, ends, strict=True):
        step.seconds, step.cpu_s = end - step.began, computed - step.cpu_began
    larger = child.ru_maxrss / 1e3 if child.ru_maxrss > usage.ru_maxrss else 0.0
    peak = max([larger, *(one.peak_mb for one in steps)])
    return Run(seconds, cpu, max(silence, start + seconds - last), peak, steps)


def float_pass(
    model: Path, recipe: Preprocess, images: Path, batch_size: int
) -> tuple[float, float]:
    """Seconds of the float model for the images, decoded beforehand, after a warm-up; and CPUs'."""
    batches = [batch.images for batch in ImageFolder(list_images(images), recipe, batch_size)]
    with OrtSession(model) as session:
        session.run(batches[0])
        start, computed = time.perf_counter(), time.process_time()
        for batch in batches:
            session.run(batch)
        return time.perf_counter() - start, time.process_time() - computed


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
            behind = float_pass(model, recipe, images, batch_size)
            once, computed = ((one + other) / 2 for one, other in zip(before, behind, strict=True))
            found[name] = {
                "float_pass_s": once,
                "seconds": run.seconds,
                "float_passes": run.seconds / once,
                "cpu_float_passes": run.cpu_s / computed,
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
                passed, on_cpus = step.seconds / once * count, step.cpu_s / computed * count
                print(
                    f"  {step.name[:40]:40} {step.seconds:8.1f} s {passed:8.1f} images "
                    f"{on_cpus:8.1f} on CPUs {step.peak_mb:8.0f} MB"
                )
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
