"""Does curation find what was planted? Drawn planted encoders, quantized without and with it.

For each seed: block, token share and channels are drawn (see tests/support/planted.py), registers
are curated on one half of the photographs, and 1 - cosine to the float encoder is measured on the
other. The un-planted DINOv2-S, quantized the same way, is what the gap is measured against.

    PYTHONPATH=tests:examples python benchmarks/planted_curation.py [--seeds 20] [--bits 8]
        [--calibrator min-max] [--json FILE]
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import typer
from support.planted import draw_planting
from support.planted_photos import halves, model_graph, natural, planted_graph

from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.curation.curate import curate
from regcache.compiler.curation.setting import Setting
from regcache.compiler.curation.study import ReferenceImages, Study
from regcache.compiler.curation.trial import Trial, decide_setting
from regcache.compiler.curation.workbench import HeldStudy
from regcache.compiler.job.context import SearchOptions
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import Simulation, TargetName, resolve_target, simulate
from regcache.compiler.reporter import Reporter


def study_of(graph: gs.Graph, quantizer: Quantizer) -> Study:
    """Ranges and ranking on left halves of the photographs, the decision on right halves."""
    left, right = halves(0, 2).numpy(), halves(1, 3).numpy()
    return Study.of(graph, ReferenceImages(left[0::2], left[1::2], right), quantizer)


def plain_error(graph: gs.Graph, quantizer: Quantizer) -> float:
    """Of an encoder without registers on the right halves."""
    study = study_of(graph, quantizer)
    nothing = Trial(Setting(), np.zeros((0, 1), np.float32))
    return decide_setting(HeldStudy(study), nothing).mean


def measure_seed(seed: int, quantizer: Quantizer, natural_error: float) -> dict[str, Any]:
    """One planted encoder."""
    planting = draw_planting(seed)
    study = study_of(planted_graph(planting), quantizer)
    with tempfile.TemporaryDirectory() as scratch:
        record = curate(study, SearchOptions(Path(scratch) / "journal"), Reporter()).record
    row = {
        "seed": seed,
        "planted_block": planting.block,
        "share": planting.share,
        "found_block": record.sensitive_block,
        "setting": str(record.setting),
        "reason": record.reason,
    }
    seen = record.improvement
    if seen is not None:
        shipped = seen.with_setting if record.setting.changes else seen.without
        gap = seen.without - natural_error
        row |= {"error_without": seen.without, "error_shipped": shipped}
        row |= {"gap": gap, "gap_closed": (seen.without - shipped) / gap}
    return row


def main(
    seeds: int = 20,
    first: int = 0,
    bits: int = 8,
    calibrator: Calibrator = Calibrator.MIN_MAX,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print one line a seed, then how many were found and how much of the gap was closed."""
    target = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False)
    quantizer = Quantizer(simulate(target, Simulation(f"w{bits}a{bits}")), calibrator)
    plain = plain_error(model_graph(natural()), quantizer)
    print(f"natural {plain:.5f}")
    rows = []
    for seed in range(first, first + seeds):
        rows.append(measure_seed(seed, quantizer, plain))
        print(json.dumps(rows[-1]), flush=True)
    found = sum(row["found_block"] == row["planted_block"] for row in rows)
    closed = [row.get("gap_closed", 0.0) for row in rows]
    worse = sum(row.get("gap_closed", 0.0) * row.get("gap", 1.0) < 0 for row in rows)
    print(f"blocks found: {found} of {len(rows)}; worse with what ships: {worse}")
    print(f"gap closed: least {min(closed):.3f}, median {np.median(closed):.3f}")
    if json_file is not None:
        figures = {"natural_error": plain, "rows": rows}
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
