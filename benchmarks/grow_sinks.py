"""What are registers worth where sinks grew, and nobody planted them?

DINOv2-S is trained on crops of the photographs' left halves until three flat patches of an image
are massive behind a chosen block and attract attention (see tests/support/grown.py: terms of loss
alone). Registers are curated on left halves, and 1 - cosine to the float encoder is measured on
right halves, without them and with. The un-trained DINOv2-S, quantized the same way, is what the
gap is measured against. Everything is seeded; the last bits of the weights depend on the machine.

--control trains one more for as long, on the same images, without the terms that grow sinks: it
learns to compute what the grown one does. The gap to it is printed as well.

    PYTHONPATH=.:tests:examples python benchmarks/grow_sinks.py [--block 6] [--seed 0]
        [--steps 260 50] [--control] [--keep FOLDER] [--json FILE]
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
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

from benchmarks.planted_curation import plain_error, study_of
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


def quantizer_of(bits: int) -> Quantizer:
    """Weights and activations in so many bits, min-max ranges."""
    target = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False)
    return Quantizer(simulate(target, Simulation(f"w{bits}a{bits}")), Calibrator.MIN_MAX)


def measure(graph: gs.Graph, others: Mapping[str, gs.Graph], bits: int) -> dict[str, Any]:
    """Curate and quantize a grown encoder; `others`: without sinks, by name."""
    quantizer = quantizer_of(bits)
    plain = {name: plain_error(other, quantizer) for name, other in others.items()}
    study = study_of(graph, quantizer)
    with tempfile.TemporaryDirectory() as scratch:
        found = curate(study, SearchOptions(Path(scratch) / "journal"), Reporter())
    record, seen = found.record, found.record.improvement
    row: dict[str, Any] = {"bits": bits, "plain": plain, "reason": record.reason}
    row |= {"found_block": record.sensitive_block, "setting": str(record.setting)}
    if seen is not None:
        shipped = seen.with_setting if record.setting.changes else seen.without
        row |= {"error_without": seen.without, "error_shipped": shipped}
        row |= {"gain_low": seen.gain_low, "gain_high": seen.gain_high}
        gained = seen.without - shipped
        row["gap_regained"] = {name: gained / (seen.without - one) for name, one in plain.items()}
    if record.setting.changes:
        row |= {"float_cosine": float_cosine(graph, found)}
    return row


def train(growth: Growth, with_control: bool) -> Iterator[tuple[str, Any]]:
    """The grown encoder, then its control, by name."""
    lesson = random_crops(0, _CROPS, growth.seed)
    grown = grow(natural(), growth, lesson)
    yield "grown", grown
    if with_control:
        yield "control", grow(natural(), growth, lesson, teacher=grown)


def main(
    steps: tuple[int, int] = Growth.steps,
    block: int = Growth.block,
    seed: int = Growth.seed,
    control: bool = False,
    keep: Annotated[Path | None, typer.Option(help="A folder for what is trained, ONNX.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print how training goes, what grew, and a line for each number of bits."""
    torch.manual_seed(seed)
    growth = Growth(block, steps, seed=seed)
    figures, graphs = dict[str, Any](asdict(growth)), {"un-trained": model_graph(natural())}
    for name, model in train(growth, control):
        figures[name] = asdict(look(natural(), model, growth, halves(1, 3)))
        print(json.dumps({name: figures[name]}), flush=True)
        graphs[name] = model_graph(model)
        if keep is not None:
            keep.mkdir(exist_ok=True)
            save_graph(graphs[name], keep / f"{name}.onnx")
    graph, rows = graphs.pop("grown"), list[dict[str, Any]]()
    for bits in _BITS:
        rows.append(measure(graph, graphs, bits))
        print(json.dumps(rows[-1]), flush=True)
    if json_file is not None:
        json_file.write_text(json.dumps({**figures, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
