"""Artifacts as a report may meet them, made up from the manifest of a real one."""

from dataclasses import replace

from support.bench_results import runner

from regcache.compiler.artifact.engine_record import EngineKind, EngineRecord
from regcache.compiler.curation.decision import Improvement
from regcache.compiler.curation.record import CandidateRecord, TriedRecord, UniversalityRecord
from regcache.compiler.curation.setting import Setting
from regcache.compiler.report.subject import Subject
from regcache.runtime.bench_result import BenchResult, Machine
from regcache.runtime.engine_cost import PredictedTime
from regcache.runtime.openvino_primitives import Primitives
from regcache.runtime.runners import RunnerName

SHIPPED = Setting(candidates=(0, 0), start=1, end=3)


def with_registers(subject: Subject) -> Subject:
    """Of an artifact that ships two registers."""
    curation = subject.manifest.curation.model_copy(
        update={
            "reason": "2 registers: the error falls from 2.0e-03 to 1.0e-03",
            "setting": SHIPPED,
            "n_images": {"fit": 4, "rank": 4, "decide": 8},
            "sensitive_block": 1,
            "screened": 28,
            "candidates": [
                CandidateRecord(block=1, norm=250.0, members=12, image=2, token=5),
                CandidateRecord(block=-1, norm=2.0, members=3, image=None, token=None),
            ],
            "universality": UniversalityRecord(block=1, outliers=9, largest=0.98, ordinary=0.2),
            "error_without": 2e-3,
            "tried": [
                TriedRecord(setting=SHIPPED, error=1e-3, refused=None),
                TriedRecord(setting=Setting(candidates=(1,), end=1), error=3e-3, refused=None),
                TriedRecord(setting=Setting(delete_count=4), error=None, refused="<no patches>"),
            ],
            "improvement": Improvement(
                n_images=8, without=2e-3, with_setting=1e-3, gain=1e-3, gain_low=4e-4,
                gain_high=1.5e-3,
            ),
        }
    )  # fmt: skip
    return replace(subject, manifest=subject.manifest.model_copy(update={"curation": curation}))


def with_engine(subject: Subject) -> Subject:
    """Of an artifact with an engine, predicted times and OpenVINO's primitives."""
    time = PredictedTime(
        gpu="RTX 4090", batch=8, total_ms=1.5, memory_ms=1.0, arithmetic_ms=1.0, launches_ms=0.5,
        ratio=0.75,
    )  # fmt: skip
    file = "engines/model-tensorrt-rtx-8.9-batch-1-1-8.engine"
    engine = EngineRecord(
        file=file, model="model.onnx", engine=EngineKind.TENSORRT_RTX, version="1.7",
        compute_capabilities=["8.9"], gpu=None, batch=(1, 1, 8), products={"INT8": 45, "FP16": 8},
        layers={"INT8": 60}, fused_attentions=3, warnings=[], inputs="0" * 64,
    )  # fmt: skip
    manifest = subject.manifest
    quantization = manifest.quantization.model_copy(update={"predicted": [time]})
    changed = {
        "engines": [engine],
        "files": {**manifest.files, file: manifest.files["model.onnx"]},
        "quantization": quantization,
        "primitives": Primitives(precision="f32", int8=49, f32=30, float_products=3),
    }
    return replace(subject, manifest=manifest.model_copy(update=changed))


def bench_result(artifact: str = "artifact") -> BenchResult:
    """A benchmark of two runners, one on a GPU."""
    machine = Machine(
        cpu="A <CPU>", cpus=2, system="Linux", python="3.11", gpu="A GPU", versions={}
    )
    return BenchResult(
        artifact=artifact, target="ort-cpu", against="float.onnx", seconds=1.0, machine=machine,
        runners=(runner(RunnerName.ORT_CPU), runner(RunnerName.ORT_CUDA)), max_ratio=None,
        passed=True,
    )  # fmt: skip
