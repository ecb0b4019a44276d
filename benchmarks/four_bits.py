"""Do registers and rotation help each other where linears have 4 bits, beside planted sinks?

Each encoder is compiled four ways with `--simulate w4a4`: with neither, with rotation alone (of the
stream, of attention's values and of what fc2 reads), with the search for registers alone, and with
both. All else is as `compile` does it: output-error ranges, equalization, GPTQ, and registers only
where the finished model is better for them. Calibrated and searched on 45 left halves of
photographs; 1 - cosine to float is measured on 27 right halves, with the paired 95 % interval of
what both gain over rotation alone and over registers alone. The last line adds up all encoders.

    PYTHONPATH=.:tests:examples python -m benchmarks.four_bits [--seeds 5] [--first 0]
        [--grown FILE.onnx]... [--natural] [--bits w4a4]
        [--calibrator min-max] [--json FILE]

FILE.onnx: what `benchmarks/grow_sinks.py --keep FOLDER` wrote. --natural: the un-planted DINOv2-S,
too.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx_graphsurgeon as gs
import typer
from numpy.typing import NDArray
from support.planted import draw_planting
from support.planted_photos import halves, model_graph, natural, planted_graph

import regcache
from benchmarks.plugin import RECIPE
from regcache.compiler.curation.decision import measure_improvement
from regcache.passes.canonicalize import canonicalize
from regcache.passes.onnx_file import load_model, save_graph
from regcache.runtime.session import OrtSession
from regcache.runtime.similarity import row_cosines

# What a way is compiled with: registers, rotation.
_WAYS = {"neither": ("off", False), "rotation": ("off", True)}
_WAYS |= {"registers": ("auto", False), "both": ("auto", True)}
Errors = NDArray[np.float64]


@dataclass(frozen=True)
class Row:
    """An encoder's errors [N] by way, and what the ways with registers ship."""

    encoder: str
    errors: dict[str, Errors]
    reasons: dict[str, str]

    def as_json(self) -> dict[str, Any]:
        """The means, the reasons, and the gains with their intervals."""
        means = {way: float(errors.mean()) for way, errors in self.errors.items()}
        return {"encoder": self.encoder, **means, "gains": gains(self.errors), **self.reasons}


def gains(errors: dict[str, Errors]) -> dict[str, list[float]]:
    """What both gain over each alone: the mean, and the ends of its interval."""
    found = {}
    for way in ("rotation", "registers"):
        seen = measure_improvement(errors[way].tolist(), errors["both"].tolist(), seed=0)
        found[way] = [seen.gain, seen.gain_low, seen.gain_high]
    return found


def encoders(seeds: range, grown: list[Path], with_natural: bool) -> Iterator[tuple[str, gs.Graph]]:
    """Canonical graphs by name, each made when its turn comes."""
    if with_natural:
        yield "un-planted", model_graph(natural())
    for seed in seeds:
        yield f"planted {seed}", planted_graph(draw_planting(seed))
    for path in grown:
        yield path.stem, canonicalize(load_model(path))


def measure(name: str, encoder: Path, left: Path, **options: Any) -> Row:
    """Compile an encoder in all ways, and run each on the right halves."""
    errors, reasons = dict[str, Errors](), dict[str, str]()
    right = halves(1, 3).numpy()
    for way, (registers, rotate) in _WAYS.items():
        artifact = regcache.compile(
            encoder,
            left,
            encoder.with_name(way),
            preprocess=RECIPE,
            registers=registers,
            rotate=rotate,
            **options,
        )
        with OrtSession(encoder) as wanted, OrtSession(artifact.folder / "model.onnx") as made:
            pairs = [[one.run(image[None])[0].ravel() for one in (wanted, made)] for image in right]
        one, other = (np.stack(rows).astype(np.float64) for rows in zip(*pairs, strict=True))
        errors[way] = 1 - row_cosines(one, other)
        if registers == "auto":
            reasons[f"{way}: found"] = artifact.manifest.curation.reason
        print(f"{name}, {way}: {errors[way].mean():.4f}", flush=True)
    return Row(name, errors, reasons)


def main(
    seeds: int = 5,
    first: int = 0,
    grown: Annotated[list[Path] | None, typer.Option(help="A grown encoder, ONNX.")] = None,
    natural_too: Annotated[bool, typer.Option("--natural")] = False,
    bits: Annotated[str, typer.Option(help="What --simulate is given.")] = "w4a4",
    calibrator: str = "output-error",
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print a line for each encoder and way, the gains of each encoder, and those of all."""
    rows = list[Row]()
    for name, graph in encoders(range(first, first + seeds), grown or [], natural_too):
        with tempfile.TemporaryDirectory() as scratch:
            encoder, left = Path(scratch) / "encoder.onnx", Path(scratch) / "left.npy"
            np.save(left, halves(0, 2).numpy())
            save_graph(graph, encoder)
            rows.append(measure(name, encoder, left, simulate=bits, calibrator=calibrator))
        print(json.dumps(rows[-1].as_json()), flush=True)
    every = {way: np.mean([row.errors[way] for row in rows], axis=0) for way in _WAYS}
    print(f"all, each image's mean over encoders: {json.dumps(gains(every))}")
    if json_file is not None:
        json_file.write_text(json.dumps([row.as_json() for row in rows], indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
