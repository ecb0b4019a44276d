"""What `regcache compile --device cuda` costs beside the CPU, and whether it decides alike.

Each source is compiled on the CPU, then on the GPU, in one run. Compared are the times, what was
decided, and the embeddings of both artifacts, run on the CPU.
Exit code 0: the decisions are alike; 1: too few are the same; 2: there is no GPU.

    python benchmarks/device_cost.py SOURCE... --images DIR [--evaluation DIR] [--target tensorrt]
        [--registers off] [--device cuda] [--rehearse] [--json FILE]

--rehearse takes PyTorch's algebra on the CPU for the GPU: its decisions count, its time does not.
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import numpy as np
import typer
from rich.table import Table

from regcache.compiler.artifact.embedder import Embedder
from regcache.compiler.artifact.manifest import Manifest
from regcache.compiler.cli.tables import print_tables
from regcache.compiler.job.effort import RegisterChoice
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import TargetName
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.runtime.device import CPU, Device, find_device
from regcache.runtime.list_images import list_images
from regcache.runtime.session import silence_runtime
from regcache.runtime.similarity import row_cosines

# Of the decisions at an activation; the rest may be ties.
LEAST_ALIKE = 0.9
# Scales are shares of the observed range, which itself differs in the last bits.
_SAME_SCALE = 1e-3


@dataclass(frozen=True)
class Outcome:
    """A source compiled on both: seconds, shares of 1 that are the same, cosines.

    `alike`: activations with the same shift, factors, zero point and scale; `left_float`: whether
    the same sites stay float; `registers`: whether the same ship. `cpu_cosine`, `gpu_cosine`: to
    float, of the first look at parity; `between`: least cosine of the two artifacts' embeddings.
    """

    source: str
    cpu_s: float
    gpu_s: float
    alike: float
    left_float: bool
    registers: bool
    cpu_cosine: float
    gpu_cosine: float
    between: float

    @property
    def passed(self) -> bool:
        """Whether the decisions are alike."""
        return self.alike >= LEAST_ALIKE and self.registers


def decisions_alike(one: Manifest, other: Manifest) -> float:
    """The share of the activations of both for which the same was decided."""
    known = {site.site: site for site in other.quantization.sites}
    same = [
        (site.equalization, site.zero_point)
        == (known[site.site].equalization, known[site.site].zero_point)
        and abs(site.scale / known[site.site].scale - 1) < _SAME_SCALE
        for site in one.quantization.sites
        if site.site in known
    ]
    return float(np.mean(same)) if same else 1.0


def compare(options: CompileOptions, device: Device, evaluation: Path, folder: Path) -> Outcome:
    """Compile on the CPU and on the device, into `folder`."""
    seconds, manifests, embedded = [], [], []
    paths = list_images(evaluation)
    for name, place in (("cpu", CPU), ("gpu", device)):
        chosen = options.model_copy(update={"device": str(place)})
        start = time.perf_counter()
        manifests.append(compile_encoder(chosen, folder / name, Reporter(), place))
        seconds.append(time.perf_counter() - start)
        with Embedder(folder / name) as encoder:
            embedded.append(encoder.embed(paths, on_error="nan").astype(np.float64))
    one, other = manifests
    return Outcome(
        source=options.source,
        cpu_s=seconds[0],
        gpu_s=seconds[1],
        alike=decisions_alike(one, other),
        left_float=one.quantization.left_float == other.quantization.left_float,
        registers=one.curation.setting == other.curation.setting,
        cpu_cosine=one.parity.result.cosine_mean,
        gpu_cosine=other.parity.result.cosine_mean,
        between=float(np.nanmin(row_cosines(*embedded))),
    )


def table(outcomes: list[Outcome], device: str) -> Table:
    """One row for each source."""
    shown = Table(title=f"compile on {device} beside the CPU")
    for name in ("source", "CPU s", "GPU s", "ratio", "decisions alike", "left float", "registers",
                 "cosine, CPU", "cosine, GPU", "least between"):  # fmt: skip
        shown.add_column(name, no_wrap=True)
    for one in outcomes:
        shown.add_row(*_cells(one))
    return shown


def _cells(one: Outcome) -> Iterator[str]:
    yield one.source
    yield from (f"{one.cpu_s:.1f}", f"{one.gpu_s:.1f}", f"{one.gpu_s / one.cpu_s:.2f}")
    yield f"{100 * one.alike:.1f} %"
    yield from ("the same" if same else "others" for same in (one.left_float, one.registers))
    yield from (f"{value:.6f}" for value in (one.cpu_cosine, one.gpu_cosine, one.between))


def main(
    sources: list[str],
    images: Annotated[Path, typer.Option()],
    evaluation: Path | None = None,
    target: TargetName = TargetName.ORT_CPU,
    registers: RegisterChoice = RegisterChoice.OFF,
    device: str = "cuda",
    rehearse: Annotated[bool, typer.Option("--rehearse")] = False,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print times, decisions and cosines; exit 2 without a GPU."""
    silence_runtime()
    try:
        found = Device(arrays="cpu") if rehearse else find_device(device, algebra=True)
    except InputError as error:
        print(f"device-cost: no GPU: {error}", file=sys.stderr)
        raise typer.Exit(2) from error
    outcomes = []
    for source in sources:
        options = CompileOptions(
            source=source,
            images=str(images),
            target=target,
            registers=registers,
            accept_slower=True,
        )
        with TemporaryDirectory() as scratch:
            outcomes.append(compare(options, found, evaluation or images, Path(scratch)))
    name = "PyTorch on the CPU" if rehearse else str(found)
    print_tables([table(outcomes, name)])
    if json_file is not None:
        json_file.write_text(json.dumps([asdict(one) for one in outcomes], indent=2) + "\n")
    if not all(one.passed for one in outcomes):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
