"""A description of the machine, for readers of a benchmark."""

import platform
import re
from pathlib import Path

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.bench_result import Machine
from regcache.runtime.gpu import find_gpu
from regcache.runtime.session import available_cpus
from regcache.runtime.versions import installed_versions

_LIBRARIES = (
    "regcache",
    "numpy",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx-cu12",
    "polygraphy",
)
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
"""The instructions that decide which number format a CPU is fastest in."""
_CPUINFO = Path("/proc/cpuinfo")


def describe_machine() -> Machine:
    """The CPU, the GPU that would be used, the system and the libraries that are installed."""
    return Machine(
        cpu=cpu_name(),
        cpus=available_cpus(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        gpu=_gpu_name(),
        versions=installed_versions(_LIBRARIES),
    )


def cpu_name(cpuinfo: Path = _CPUINFO) -> str:
    """The CPU's name as Linux gives it, else as Python does."""
    try:
        match = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_features(cpuinfo: Path = _CPUINFO) -> tuple[str, ...]:
    """Which instructions for small numbers the CPU has, by Linux's names; empty where not told."""
    try:
        match = re.search(r"^flags\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        match = None
    flags = set(match[1].split()) if match else set()
    return tuple(name for name in FEATURES if name in flags)


def _gpu_name() -> str | None:
    try:
        return str(find_gpu())
    except (InputError, MissingExtraError):
        return None
