"""Artifacts of a tiny encoder for engines, and records of engines."""

from pathlib import Path

import onnx
from support.command_line import run_regcache
from support.tiny_source import RECIPE
from support.tiny_vit import Spec, TinyVit

from regcache.compiler.artifact.engine_record import (
    EngineKind,
    EngineRecord,
)
from regcache.export.onnx_file import sidecar
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_layers import EngineLayer, EngineTensor

SPEC = Spec(width=32, heads=4, hidden=64, depth=1, grid=4)

HALF, INTEGERS = EngineTensor("FP16", (2, 8)), EngineTensor("INT8", (2, 8))
LAYERS = (
    EngineLayer("a", "gemm", (INTEGERS,), (HALF,), ()),
    EngineLayer("_gemm_mha_b", "kgen", (HALF,), (HALF,), ()),
    EngineLayer("c", "kgen", (HALF, EngineTensor("FP32", (2, 8))), (INTEGERS,), ()),
)


def compiled(folder: Path, images: Path, *options: str) -> Path:
    """An artifact of a tiny encoder."""
    encoder, artifact = folder / "tiny.onnx", folder / "artifact"
    onnx.save(TinyVit(SPEC).model(), encoder)
    sidecar(encoder).write_text(RECIPE.to_json())
    command = ("compile", encoder, "--images", images, "-o", artifact, "--registers", "off")
    outcome = run_regcache(*command, *options)
    assert outcome.code == 0, outcome
    return artifact


def engine_build(batch: tuple[int, int, int] = (1, 1, 8), gpu: str | None = None) -> EngineBuild:
    return EngineBuild(b"", "1.7", ("8.6", "12.0"), batch, LAYERS, ("beware",), 3.0, gpu)


def engine_record(file: str, model: str = "model.onnx", **fields: object) -> EngineRecord:
    """A record of some engine."""
    record = EngineRecord.of(
        engine_build(), model=model, engine=EngineKind.TENSORRT_RTX, inputs="0"
    )
    return record.model_copy(update={"file": file, **fields})
