"""What this machine has for regcache, and what it costs where a piece is missing."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import onnxruntime as ort

from regcache.compiler.job.record import Record
from regcache.export.cache import cache_folder
from regcache.passes.errors import InputError, MissingExtraError, install_command
from regcache.runtime.device import CUDA
from regcache.runtime.gpu import find_gpu
from regcache.runtime.machine import cpu_features, cpu_name
from regcache.runtime.openvino_options import computes_bf16, has_openvino
from regcache.runtime.session import available_cpus, u8s8_saturates
from regcache.runtime.versions import installed_versions

# A ViT-L and its int8 model fit; less fails in the middle of a compile.
_LEAST_FREE = 3_000_000_000
_GB = 1e9


class Finding(Record):
    """One piece that was looked for."""

    name: str
    """What was looked for."""
    found: str | None = None
    """What there is, in words; None where it is missing."""
    fault: str | None = None
    """What is wrong with what there is; None where nothing is."""
    costs: str | None = None
    """What cannot be done without it, or goes slower; None where nothing is missing."""
    fix: str | None = None
    """The command that mends it, if there is one."""

    @property
    def state(self) -> str:
        """ "ok", "missing" or "broken"."""
        if self.fault is not None:
            return "broken"
        return "missing" if self.found is None else "ok"


class Diagnosis(Record):
    """All that was looked for."""

    findings: list[Finding]
    """One for each piece: the machine first, then what runs models, then the extras."""

    @property
    def healthy(self) -> bool:
        """Whether all that is there works; an extra that is not installed is no fault."""
        return all(finding.fault is None for finding in self.findings)


@dataclass(frozen=True)
class _Extra:
    """An optional part: the modules it needs, and what there is none of without it."""

    name: str
    extra: str
    modules: tuple[str, ...]
    distributions: tuple[str, ...]
    costs: str


_EXTRAS = (
    _Extra(
        "PyTorch sources",
        "export",
        ("torch", "torchvision", "transformers", "timm", "open_clip", "onnxscript", "safetensors"),
        ("torch", "transformers", "timm", "open_clip_torch"),
        "no hf:, timm: and openclip: sources, no parity with PyTorch; ONNX files compile",
    ),
    _Extra(
        "TensorRT",
        "trt",
        ("tensorrt", "polygraphy"),
        ("tensorrt", "polygraphy"),
        "build --engine tensorrt and the runner tensorrt do not work",
    ),
    _Extra(
        "TensorRT-RTX",
        "trt-rtx",
        ("tensorrt_rtx",),
        ("tensorrt-rtx-cu12",),
        "build makes no engines for RTX GPUs, which takes no GPU",
    ),
    _Extra(
        "linear probe",
        "eval",
        ("sklearn",),
        ("scikit-learn",),
        "parity and reproduce measure no linear probe",
    ),
    _Extra("reports", "report", ("jinja2",), ("jinja2",), "nothing writes reports"),
    _Extra("plots", "report", ("matplotlib",), ("matplotlib",), "bench --plot draws nothing"),
    _Extra("data sets", "datasets", ("pyarrow",), ("pyarrow",), "--images reads no data sets"),
    _Extra(
        "clusters",
        "scale",
        ("distributed",),
        ("distributed",),
        "--scheduler takes no Dask cluster",
    ),
)


def examine() -> Diagnosis:
    """Look for everything that regcache uses. Nothing large is imported, nothing is fetched."""
    findings = [*_machine(), _onnxruntime(), _openvino(), _gpu(), *map(_extra, _EXTRAS)]
    return Diagnosis(findings=findings)


def _machine() -> Iterator[Finding]:
    system = f"{platform.system()} {platform.machine()}"
    yield Finding(name="Python", found=f"{platform.python_version()}, {system}, {sys.prefix}")
    yield _cpu()
    memory = _memory()
    if memory is not None:
        yield Finding(name="memory", found=f"{memory / _GB:.1f} GB")
    yield _disk("temporary files", Path(tempfile.gettempdir()), "set TMPDIR to a larger disk")
    try:
        folder = cache_folder()
    except InputError as error:
        yield Finding(
            name="cache",
            fault=str(error),
            costs="exported models are not kept, and the sample is not found",
            fix="export REGCACHE_CACHE=FOLDER",
        )
    else:
        yield _disk("cache", folder, "export REGCACHE_CACHE=FOLDER")


def _cpu() -> Finding:
    """The CPU by what decides how fast int8 is on it; kernels that saturate are measured."""
    features = cpu_features()
    told = ", ".join(features) or "instructions not told by the system"
    found = f"{cpu_name()}, {available_cpus()} for this process; {told}"
    saturates = u8s8_saturates()
    costs = "without VNNI int8 gains less: weights are unsigned, as sums would saturate"
    return Finding(name="CPU", found=found, costs=costs if saturates else None)


def _memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _disk(name: str, folder: Path, fix: str) -> Finding:
    free = shutil.disk_usage(folder).free
    found = f"{folder}, {free / _GB:.1f} GB free"
    if not os.access(folder, os.W_OK):
        return Finding(name=name, found=found, fault="it cannot be written to", fix=fix)
    if free < _LEAST_FREE:
        return Finding(name=name, found=found, fault="too little for a large encoder", fix=fix)
    return Finding(name=name, found=found)


def _onnxruntime() -> Finding:
    installed = installed_versions(("onnxruntime", "onnxruntime-gpu"))
    providers = ", ".join(
        name.removesuffix("ExecutionProvider") for name in ort.get_available_providers()
    )
    finding = Finding(name="ONNX Runtime", found=f"{ort.__version__}: {providers}")
    if len(installed) < 2:
        return finding
    return finding.model_copy(
        update={
            "fault": "onnxruntime and onnxruntime-gpu overwrite one another's files",
            "fix": "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu",
        }
    )


def _openvino() -> Finding:
    name, fix = "OpenVINO", install_command("openvino")
    if not has_openvino():
        costs = "no target openvino, nor as a choice of --target cpu"
        return Finding(name=name, costs=costs, fix=fix)
    version = installed_versions(["openvino"]).get("openvino", "of unknown version")
    try:
        bf16 = computes_bf16()
    except (ImportError, RuntimeError) as error:
        fault = str(error).splitlines()[0] if str(error) else type(error).__name__
        return Finding(name=name, found=version, fault=fault, fix=f"{fix} --force-reinstall")
    halves = "bf16 and f32" if bf16 else "f32 alone: this CPU computes no bf16"
    return Finding(name=name, found=f"{version}: int8, {halves}")


def _gpu() -> Finding:
    costs = "engines are built ahead of time for RTX alone and run nowhere; no --device cuda"
    try:
        gpu = find_gpu()
    except MissingExtraError:
        return Finding(name="GPU", costs=f"not looked for; {costs}", fix=install_command("gpu"))
    except InputError as error:
        return Finding(name="GPU", costs=f"{error}; {costs}")
    found = f"{gpu}, {gpu.memory / _GB:.0f} GB"
    if CUDA in ort.get_available_providers():
        return Finding(name="GPU", found=found)
    return Finding(
        name="GPU",
        found=found,
        costs="ONNX Runtime was installed without CUDA: no --device cuda",
        fix="pip uninstall -y onnxruntime && pip install 'onnxruntime-gpu[cuda,cudnn]'",
    )


def _extra(extra: _Extra) -> Finding:
    fix = install_command(extra.extra)
    missing = [module for module in extra.modules if find_spec(module) is None]
    if missing:
        without = f" (without {', '.join(missing)})" if len(missing) < len(extra.modules) else ""
        return Finding(name=extra.name, costs=extra.costs + without, fix=fix)
    versions = installed_versions(extra.distributions)
    return Finding(name=extra.name, found=", ".join(map(" ".join, versions.items())))
