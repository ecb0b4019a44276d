"""Does curation find what was planted? Drawn planted encoders, quantized without and with it.

For each seed: block, token share and channels are drawn (see tests/planted.py), registers are
curated on one half of the photographs, and 1 - cosine to the float encoder is measured on the
other. The un-planted DINOv2-S, quantized the same way, is what the gap is measured against.

    PYTHONPATH=tests:examples python benchmarks/planted_curation.py [--seeds 20] [--bits 8]
        [--calibrator min-max] [--json FILE]
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import typer
from planted import draw_planting
from planted_photos import halves, model_graph, natural, planted_graph

from regcache.compiler.curation import Curated, SearchOptions, curate
from regcache.compiler.quantizer import Calibrator, Quantizer
from regcache.compiler.reporter import Reporter
from regcache.compiler.setting import Setting
from regcache.compiler.study import ReferenceImages, Study
from regcache.compiler.targets import Simulation, TargetName, resolve_target, simulate
from regcache.compiler.trial import Trial, decide_setting
from regcache.compiler.workbench import close_workbench


def study_of(graph: gs.Graph, quantizer: Quantizer) -> Study:
    """Ranges and ranking on left halves of the photographs, the decision on right halves."""
    left = halves(0, 2).numpy()
    calibration = ReferenceImages.deal(left)
    return Study.of(graph, calibration, quantizer)


def unseen_errors(study: Study, trial: Trial) -> list[float]:
    """1 - cosine on the right halves, ranges from the images that the study fits on."""
    images = ReferenceImages(study.images.fit, study.images.rank[:1], halves(1, 2).numpy())
    other = Study.of(study.graph, images, study.quantizer)
    errors = list(decide_setting(other, trial).errors)
    close_workbench()
    return errors


def measure_seed(seed: int, quantizer: Quantizer, natural_error: float) -> dict[str, Any]:
    """One planted encoder."""
    planting = draw_planting(seed)
    study = study_of(planted_graph(planting), quantizer)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        options = SearchOptions(Path(scratch) / "journal")
        curated: Curated = curate(study, options, Reporter())
    seconds = time.perf_counter() - start
    none = Trial(Setting(), np.zeros((0, curated.tokens.shape[1]), np.float32))
    without = float(np.mean(unseen_errors(study, none)))
    shipped = curated.setting.changes
    with_registers = without
    if shipped:
        trial = Trial(curated.setting, curated.tokens)
        with_registers = float(np.mean(unseen_errors(study, trial)))
    return {
        "seed": seed,
        "planted_block": planting.block,
        "share": planting.share,
        "found_block": curated.record.sensitive_block,
        "setting": str(curated.setting),
        "error_without": without,
        "error_with": with_registers,
        "gap_closed": (without - with_registers) / (without - natural_error),
        "seconds": seconds,
    }


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
    plain = study_of(model_graph(natural()), quantizer)
    width = 384
    nothing = Trial(Setting(), np.zeros((0, width), np.float32))
    natural_error = float(np.mean(unseen_errors(plain, nothing)))
    print(f"natural {natural_error:.5f}")
    rows = []
    for seed in range(first, first + seeds):
        rows.append(measure_seed(seed, quantizer, natural_error))
        print(json.dumps(rows[-1]), flush=True)
    found = sum(row["found_block"] == row["planted_block"] for row in rows)
    closed = [row["gap_closed"] for row in rows]
    worse = sum(row["error_with"] > row["error_without"] for row in rows)
    print(f"blocks found: {found} of {len(rows)}; worse with registers: {worse}")
    print(f"gap closed: least {min(closed):.3f}, median {np.median(closed):.3f}")
    if json_file is not None:
        figures = {"natural_error": natural_error, "rows": rows}
        json_file.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
