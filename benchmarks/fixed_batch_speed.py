"""Whether an encoder exported with a fixed batch is as fast in int8 as one with a free batch.

    python benchmarks/fixed_batch_speed.py --images CALIBRATION [--threads 2]

Exports one random ViT-S/16 twice with PyTorch's TorchScript exporter, with a batch of 1 fixed and
with a free one, compiles both for `ort-cpu` and times, in turn in one process: int8 of the fixed
one beside int8 of the free one, and beside the fixed file itself in float. Needs regcache[export].
"""

import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from regcache.compiler.artifact.artifact import MODEL
from regcache.compiler.job.effort import RegisterChoice
from regcache.compiler.job.options import CompileOptions, Rounding
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.runtime.machine import cpu_name
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops
from regcache.runtime.session import silence_runtime
from regcache.runtime.speed import compare_speed

_SIDE = 224


def export_twice(folder: Path) -> tuple[Path, Path]:
    """The same random weights with a batch of 1, and with a free batch."""
    import torch
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(embed_dim=384, depth=12, num_heads=6, num_classes=0).eval()
    paths = folder / "fixed.onnx", folder / "free.onnx"
    for path, axes in zip(paths, (None, {"pixel_values": {0: "batch"}}), strict=True):
        images = torch.randn(1 if axes is None else 2, 3, _SIDE, _SIDE)
        with torch.no_grad():
            torch.onnx.export(
                model,
                (images,),
                path,
                dynamo=False,
                opset_version=17,
                input_names=["pixel_values"],
                dynamic_axes=axes,
            )
    return paths


def main(
    images: Annotated[Path, typer.Option(help="Images to calibrate on.")],
    threads: Annotated[int | None, typer.Option(help="Threads of ONNX Runtime.")] = None,
    seconds: Annotated[float, typer.Option(help="Time for each comparison.")] = 20.0,
) -> None:
    """Print integer kernels and both ratios."""
    silence_runtime()
    with tempfile.TemporaryDirectory(prefix="regcache-") as name:
        folder = Path(name)
        fixed, free = export_twice(folder)
        models = []
        for source in (fixed, free):
            options = CompileOptions(
                source=str(source),
                images=str(images),
                registers=RegisterChoice.OFF,
                rounding=Rounding.NEAREST,
                accept_slower=True,
                threads=threads,
            )
            artifact = folder / source.stem
            compile_encoder(options, artifact, Reporter())
            models.append(artifact / MODEL)
            count = integer_matmuls(optimised_ops(models[-1], threads=threads))
            print(f"{source.stem}: {count} integer kernels")
        pixels = np.random.default_rng(0).standard_normal((1, 3, _SIDE, _SIDE), np.float32)
        for label, other in (("its free twin in int8", models[1]), ("itself in float", fixed)):
            (ratio,) = compare_speed(
                other, models[0], pixels, batches=(1,), threads=threads, seconds=seconds, rounds=50
            )
            print(f"fixed batch in int8 / {label}: {ratio.ratio:.3f} ({ratio.quantized_ms:.1f} ms)")
    print(f"{cpu_name()}, {ratio.threads} threads")


if __name__ == "__main__":
    typer.run(main)
