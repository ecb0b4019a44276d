"""What the manifest keeps of an engine that `regcache build` added to an artifact."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Self

from pydantic import Field

from regcache.compiler.job.record import Record
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.engine_cost import PredictedTime
from regcache.runtime.engine_layers import layers_by_precision, products_by_precision

ENGINES = "engines"
"""The folder inside an artifact that holds its engines."""


class EngineKind(StrEnum):
    """The libraries that build engines: ahead of time for many GPUs, or on the GPU itself."""

    TENSORRT_RTX = "tensorrt-rtx"
    TENSORRT = "tensorrt"


class EngineRecord(Record):
    """One engine of an artifact; its size and hash are in the manifest's `files`."""

    file: str
    """Path of the engine inside the artifact, its key in `files`."""
    model: str
    """Name of the ONNX file that it was built from."""
    engine: EngineKind
    """The library that built it."""
    version: str
    """Version of that library, which must be the same where the engine is loaded."""
    compute_capabilities: list[str]
    """Compute capabilities of the GPUs that run it, such as `8.6`."""
    gpu: str | None
    """Name of the GPU that it was tuned on; None for TensorRT-RTX, which needs none."""
    batch: tuple[int, int, int]
    """The least, the tuned and the largest batch size."""
    products: dict[str, int]
    """Matrix products, convolutions and fused attentions, counted by the number format they compute
    in; empty where the library's list of layers could not be read.
    """
    layers: dict[str, int]
    """All kernels, counted by the widest number format they read; empty likewise."""
    fused_attentions: int
    """How many kernels compute a whole attention."""
    warnings: list[str]
    """What the library warned of, one line each."""
    inputs: str
    """SHA-256 of all that decides what is built."""
    size_ratio: float | None = None
    """Its size over that of the float engine that was built alike; None where there is none."""
    rewrite: str | None = None
    """Passes, and their versions, that brought `model` into what the library takes; None where it
    was built as it is.
    """
    predicted: list[PredictedTime] = Field(default_factory=list)
    """Its times on the GPUs that are known, predicted from peak rates and not measured; empty where
    the library lists no shapes, or nobody asked.
    """

    @classmethod
    def of(
        cls,
        built: EngineBuild,
        *,
        model: str,
        engine: EngineKind,
        inputs: str,
        rewrite: str | None = None,
        predicted: Sequence[PredictedTime] = (),
    ) -> Self:
        """Describe a build; all its `seconds` are left out, for they differ from run to run."""
        return cls(
            file=_file_name(built, model, engine),
            model=model,
            engine=engine,
            version=built.version,
            compute_capabilities=list(built.compute_capabilities),
            gpu=built.gpu,
            batch=built.batch,
            products=products_by_precision(built.layers),
            layers=layers_by_precision(built.layers),
            fused_attentions=sum(layer.fused_attention for layer in built.layers),
            warnings=list(built.warnings),
            inputs=inputs,
            rewrite=rewrite,
            predicted=list(predicted),
        )

    def built_like(self, other: Self) -> bool:
        """Whether both were built in the same way, be it from other models."""
        return self._way() == other._way()

    def _way(self) -> tuple[object, ...]:
        return self.engine, self.version, self.compute_capabilities, self.gpu, self.batch


def inputs_key(hashes: Mapping[str, str], settings: Mapping[str, object]) -> str:
    """SHA-256 of what decides what is built: the hashes of the files, and the build's settings."""
    text = json.dumps({"files": dict(hashes), "options": dict(settings)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def with_size_ratios(
    records: Iterable[EngineRecord], sizes: Mapping[str, int], float_model: str
) -> list[EngineRecord]:
    """The records in order of their files, each with its engine's size over the float engine's.

    The float engine is the one that was built in the same way; without one the ratio is None.
    `sizes`: bytes of the engines, by file.
    """
    ordered = sorted(records, key=lambda record: record.file)
    floats = [record for record in ordered if record.model == float_model]
    return [_with_ratio(record, floats, sizes) for record in ordered]


def _with_ratio(
    record: EngineRecord, floats: Sequence[EngineRecord], sizes: Mapping[str, int]
) -> EngineRecord:
    alike = [item for item in floats if item.built_like(record) and item.model != record.model]
    ratio = round(sizes[record.file] / sizes[alike[0].file], 4) if alike else None
    return record.model_copy(update={"size_ratio": ratio})


def _file_name(built: EngineBuild, model: str, engine: EngineKind) -> str:
    """The name of an engine's file, made of model, library, GPUs and batch sizes.

    The next engine for the same takes the file's place.
    """
    gpus = built.gpu or "-".join(built.compute_capabilities)
    words = re.sub(r"[^a-z0-9.]+", "-", gpus.lower()).strip("-")
    batch = "-".join(map(str, built.batch))
    return f"{ENGINES}/{model.removesuffix('.onnx')}-{engine.value}-{words}-batch-{batch}.engine"
