"""What registers in K and V cost: operations counted on the graph, time on ONNX Runtime CPU.

The encoder with and without registers run in turn, in one process; the ratio is what counts.

    python benchmarks/register_cost.py SOURCE [--count 4] [--start 0] [--batch-size 1] [--json FILE]
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from regcache.compiler.curation.registers import capture_registers
from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.reporter import Reporter
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize
from regcache.passes.count_flops import count_flops
from regcache.passes.find_blocks import view_encoder
from regcache.passes.onnx_file import load_model, save_graph
from regcache.passes.splice_registers import SpliceRegisters
from regcache.runtime.speed import compare_speed


def main(
    source: str,
    count: int = 4,
    start: int = 0,
    batch_size: int = 1,
    runs: int = 60,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the overhead of `count` registers from block `start` to the last."""
    with tempfile.TemporaryDirectory() as scratch:
        plain, spliced = Path(scratch) / "plain.onnx", Path(scratch) / "spliced.onnx"
        export_source(source, plain, None, Reporter())
        graph = canonicalize(load_model(plain))
        view = view_encoder(graph)
        tokens = np.random.default_rng(0).standard_normal((count, view.width)).astype(np.float32)
        end = len(view.blocks)
        keys, values = capture_registers(view, start, end, tokens)
        with_registers = run(SpliceRegisters(start, end, keys, values), graph).graph
        save_graph(graph, plain)
        save_graph(with_registers, spliced)
        flops = [count_flops(item).total for item in (graph, with_registers)]
        height, width = graph.inputs[0].shape[2:]
        images = np.zeros((1, 3, height, width), np.float32)
        (speed,) = compare_speed(
            plain, spliced, images, batches=(batch_size,), seconds=10, rounds=runs
        )
    figures = {
        "gflops": flops[0] / 1e9,
        "flops_overhead": flops[1] / flops[0] - 1,
        "plain_ms": speed.float_ms,
        "time_overhead": speed.ratio - 1,
    }
    for name, value in figures.items():
        print(f"{name:15} {value:10.5f}")
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
