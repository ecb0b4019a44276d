"""What becomes of one exporter's form: adopted, quantized to nearest, run beside its original."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_graphsurgeon as gs
from numpy.typing import NDArray
from support.exporter_forms import SIDE, Form, export, model_of

from regcache.compiler.calibration.observe import observe, site_statistics
from regcache.compiler.calibration.quantizer import Quantizer
from regcache.compiler.job.options import Calibrator
from regcache.compiler.job.targets import TargetName, resolve_target
from regcache.export.adopt import adopt
from regcache.passes.base import run
from regcache.passes.canonicalize import canonicalize_graph
from regcache.passes.choose_outputs import choose_outputs
from regcache.passes.encoder import EncoderView, by_tensor
from regcache.passes.find_blocks import view_encoder
from regcache.passes.keep_bias_apart import KeepBiasApart
from regcache.passes.onnx_file import save_graph
from regcache.runtime.optimised_graph import integer_matmuls, optimised_ops
from regcache.runtime.original import OriginalSession
from regcache.runtime.session import OrtSession, u8s8_saturates
from regcache.runtime.similarity import row_cosines

Floats = NDArray[np.float32]
BATCHES = (1, 3, 8)


@dataclass(frozen=True)
class Cell:
    """One form: what its exporter complained of, or what regcache made of it.

    `batch`: of the compiled encoder, a number where it stayed fixed. `cosine`: the mean over
    images, the least of all batch sizes that it takes.
    """

    refused: str | None = None
    linears: int = 0
    kernels: int = 0
    batch: int | str = ""
    cosine: float = 0.0

    @property
    def good(self) -> bool:
        """All linears in integers, and close to the original."""
        return 0 < self.linears == self.kernels and self.cosine >= 0.999

    def __str__(self) -> str:
        if self.refused is not None:
            return "not exported"
        kept = "" if isinstance(self.batch, str) else f", batch {self.batch}"
        return f"{self.kernels} of {self.linears}, {self.cosine:.4f}{kept}"


def measure(form: Form, folder: Path) -> Cell:
    """Export the form to `folder` and compile it for ONNX Runtime, weights to the nearest."""
    path = folder / "original.onnx"
    complaint = export(model_of(form), form, path)
    if complaint is not None:
        return Cell(refused=complaint)
    return measure_file(path, folder, resolution=SIDE if form.batch == "all free" else None)


def measure_file(path: Path, folder: Path, *, resolution: int | None = None) -> Cell:
    """Compile a file of `SIDE` pixels for ONNX Runtime, weights to the nearest, into `folder`."""
    compiled = folder / "compiled.onnx"
    adopted = adopt(path, resolution=resolution)
    view = view_encoder(canonicalize_graph(adopted.graph))
    embedding = choose_outputs(view, None).embedding
    images = np.random.default_rng(0).standard_normal((8, 3, SIDE, SIDE), np.float32)
    save_graph(_quantized(view, images), compiled)
    with OriginalSession(path, adopted.image.name, threads=1) as original:
        (wanted,) = original.run(images, [embedding])
    with OrtSession(compiled, threads=1, outputs=(embedding,)) as session:
        batches = BATCHES if session.fixed_batch is None else (session.fixed_batch,)
        found = [(n, session.run(images[:n])[0].astype(np.float64)) for n in batches]
    return Cell(
        linears=len(view.linears),
        kernels=integer_matmuls(optimised_ops(compiled, threads=1)),
        batch=adopted.graph.inputs[0].shape[0],
        cosine=min(float(row_cosines(wanted[:n], one).mean()) for n, one in found),
    )


def _quantized(view: EncoderView, images: Floats) -> gs.Graph:
    statistics = site_statistics(view, len(images), seed=0)
    size = view.graph.inputs[0].shape[0]
    size = size if isinstance(size, int) else len(images)
    batches = (images[start : start + size] for start in range(0, len(images), size))
    observe(view.graph, by_tensor(view.sites, statistics), batches, threads=1)
    target = resolve_target(TargetName.ORT_CPU, u8s8_saturates=u8s8_saturates())
    quantizer = Quantizer(target, Calibrator.MIN_MAX)
    step = quantizer.step(view.sites, quantizer.scales(view.sites, statistics))
    return run(KeepBiasApart(), run(step, view.graph).graph).graph
