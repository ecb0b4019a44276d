"""Kernels, bytes and predicted times of an encoder in FP16, int8, FP8 and `--prefer fastest`.

By the builder's list of the installed TensorRT-RTX, for each compute capability; no GPU is needed,
and nothing is timed. Only shapes count, so that weights may be random and scales are made up.

    python benchmarks/predicted_times.py SOURCE [SOURCE ...] [--batch 32] [--json FILE]
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import onnx_graphsurgeon as gs
import typer

from regcache.compiler.encoder.prepare import export_source
from regcache.compiler.job.effort import Preference
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.job.targets import TargetName
from regcache.compiler.quantization.fastest import TimeModel, fastest_sites
from regcache.compiler.reporter import Reporter
from regcache.passes.affine import Affine
from regcache.passes.base import Pass, run_all
from regcache.passes.canonicalize import canonicalize
from regcache.passes.encoder import EncoderView, Site
from regcache.passes.find_blocks import view_encoder
from regcache.passes.float8 import Float8
from regcache.passes.fold_biases import FoldBiases
from regcache.passes.half_precision import HalfPrecision
from regcache.passes.merge_qkv import MergeQkv
from regcache.passes.onnx_file import load_model, save_graph
from regcache.passes.quantize_float8 import QuantizeFloat8
from regcache.passes.quantize_linears import QuantizeLinears
from regcache.passes.split_qkv import SplitQkv
from regcache.passes.temporary import temporary_folder
from regcache.runtime.engine_cost import Kernel, moved_bytes, multiplies_on, predict
from regcache.runtime.gpu_rates import gpus_of
from regcache.runtime.tensorrt_rtx import COMPUTE_CAPABILITIES, kernels_at

Kernels = tuple[Kernel, ...]


def main(
    sources: list[str],
    batch: int = 32,
    json_file: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print a line for each form, compute capability and GPU."""
    rows = []
    for source in sources:
        with temporary_folder() as folder:
            export_source(source, folder / "float.onnx", None, Reporter())
            graph = canonicalize(load_model(folder / "float.onnx"))
            split, _ = run_all([SplitQkv()], graph)
            for row in _rows(graph, view_encoder(split), folder / "model.onnx", batch):
                print(
                    source, *(f"{key} {value}" for key, value in row.items()), sep=", ", flush=True
                )
                rows.append({"source": source} | row)
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=2))


def _rows(
    graph: gs.Graph, view: EncoderView, path: Path, batch: int
) -> Iterator[dict[str, object]]:
    for capability in COMPUTE_CAPABILITIES:

        def built(made: gs.Graph, capability: str = capability) -> Kernels:
            save_graph(made, path)
            return kernels_at(path, [capability], batch)

        plain = built(run_all([HalfPrecision()], graph)[0])
        half = built(_finished(graph))
        forms = {"FP16 with biases": plain, "FP16": half}
        forms["all int8"] = built(_quantized(view, view.sites, float8=False))
        if capability != "8.6":
            forms["all FP8"] = built(_quantized(view, view.sites, float8=True))
        for gpu in gpus_of([capability]):
            names = _fastest(view, gpu.name)
            sites = [site for site in view.sites if site.name in names]
            chosen = built(_quantized(view, sites, float8=False)) if sites else half
            for name, kernels in (forms | {"--prefer fastest": chosen}).items():
                if not multiplies_on(kernels, gpu):
                    continue
                ratios = {
                    size: round(
                        predict(kernels, gpu, size).total_ms / predict(half, gpu, size).total_ms, 3
                    )
                    for size in (1, 8, batch)
                }
                roles = sorted({site.role.value for site in sites})
                yield {
                    "gpu": gpu.name,
                    "form": name + (f" ({' '.join(roles)})" if name.startswith("--") else ""),
                    "kernels": len(kernels),
                    "products": dict(Counter(k.format for k in kernels if k.operations)),
                    "MB an image": round(moved_bytes(kernels, batch) / batch / 1e6, 2),
                    "bytes / FP16's": round(
                        moved_bytes(kernels, batch) / moved_bytes(half, batch), 3
                    ),
                    "predicted ms": round(predict(kernels, gpu, batch).total_ms, 3),
                    "x FP16's by batch": ratios,
                }


def _fastest(view: EncoderView, gpu: str) -> tuple[str, ...]:
    options = CompileOptions(
        source="a", images="b", target=TargetName.TENSORRT_RTX,
        prefer=Preference.FASTEST, gpu=gpu,
    )  # fmt: skip
    model = TimeModel.of(view, options)
    assert model is not None
    return fastest_sites(model, view.sites)


def _finished(graph: gs.Graph) -> gs.Graph:
    return run_all([FoldBiases(), HalfPrecision()], graph)[0]


def _quantized(view: EncoderView, sites: list[Site] | tuple[Site, ...], float8: bool) -> gs.Graph:
    tensors = [site.tensor.name for site in sites]
    step: Pass = (
        QuantizeFloat8(dict.fromkeys(tensors, Float8.from_range(-8.0, 8.0)))
        if float8
        else QuantizeLinears(dict.fromkeys(tensors, Affine(8 / 127, 0, "int8")))
    )
    return _finished(run_all([step, MergeQkv()], view.graph)[0])


if __name__ == "__main__":
    typer.run(main)
