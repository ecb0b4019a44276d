"""What are registers worth where sinks grew, and nobody planted them?

DINOv2-S is trained on crops of the photographs' left halves until three flat patches of an image
are massive behind a chosen block and attract attention (see tests/support/grown.py: terms of loss
alone). Registers are curated on left halves, and 1 - cosine to the float encoder is measured on
right halves, without them and with. The un-trained DINOv2-S, quantized the same way, is what the
gap is measured against. Everything is seeded; the last bits of the weights depend on the machine.

    PYTHONPATH=.:tests:examples python benchmarks/grow_sinks.py [--block 6] [--seed 0]
        [--steps 260 50] [--keep FILE.onnx] [--json FILE]
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
import typer
from support.grown import Growth, grow, look
from support.planted_photos import halves, model_graph, natural, random_crops
from support.running import run_graph

from benchmarks.planted_curation import natural_error, study_of
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import Curated, curate
from regcache.compiler.curation.setting import place_registers
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, TargetName, resolve_target, simulate
from regcache.compiler.reporter import Reporter
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import save_graph
from regcache.runtime.similarity import row_cosines

_CROPS = 24  # of every photograph, to learn from
_BITS = (8, 6)


def float_cosine(graph: gs.Graph, found: Curated) -> float:
    """How close the float encoder stays to itself with what was found, on right halves."""
    placed, _ = place_registers(graph, view_encoder(graph), found.setting, found.tokens)
    before, after = (
        run_graph(one, halves(1, 3).numpy())[0].astype(np.float64) for one in (graph, placed)
    )
    return float(row_cosines(before, after).mean())


def measure(graph: gs.Graph, bits: int) -> dict[str, Any]:
    """Curate and quantize a grown encoder, weights and activations in so many bits."""
    target = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False)
    quantizer = Quantizer(simulate(target, Simulation(f"w{bits}a{bits}")), Calibrator.MIN_MAX)
    plain, study = natural_error(quantizer), study_of(graph, quantizer)
    with tempfile.TemporaryDirectory() as scratch:
        found = curate(study, SearchOptions(Path(scratch) / "journal"), Reporter())
    record, seen = found.record, found.record.improvement
    row: dict[str, Any] = {"bits": bits, "natural": plain, "reason": record.reason}
    row |= {"found_block": record.sensitive_block, "setting": str(record.setting)}
    if seen is not None:
        shipped = seen.with_setting if record.setting.changes else seen.without
        row |= {"error_without": seen.without, "error_shipped": shipped}
        row |= {"gain_low": seen.gain_low, "gain_high": seen.gain_high}
        row |= {"gap_regained": (seen.without - shipped) / (seen.without - plain)}
    if record.setting.changes:
        row |= {"float_cosine": float_cosine(graph, found)}
    return row


def main(
    steps: tuple[int, int] = Growth.steps,
    block: int = Growth.block,
    seed: int = Growth.seed,
    keep: Annotated[Path | None, typer.Option(help="Where the grown encoder goes, ONNX.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print how training goes, what grew, and a line for each number of bits."""
    torch.manual_seed(seed)
    growth = Growth(block, steps, seed=seed)
    grown = grow(natural(), growth, random_crops(0, _CROPS, seed))
    figures = {**asdict(growth), **asdict(look(natural(), grown, growth, halves(1, 3)))}
    print(json.dumps(figures), flush=True)
    graph, rows = model_graph(grown), list[dict[str, Any]]()
    if keep is not None:
        save_graph(graph, keep)
    for bits in _BITS:
        rows.append(measure(graph, bits))
        print(json.dumps(rows[-1]), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps({**figures, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
