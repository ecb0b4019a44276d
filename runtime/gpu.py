"""The GPU that CUDA would use first, seen through NVIDIA's management library (NVML)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from regcache.passes.errors import InputError, MissingExtraError


@dataclass(frozen=True)
class Gpu:
    """A GPU's name, compute capability ("8.9"), driver version and memory in bytes."""

    name: str
    compute_capability: str
    driver: str
    memory: int

    def __str__(self) -> str:
        """The GPU in words, without its memory."""
        return f"{self.name}, compute capability {self.compute_capability}, driver {self.driver}"


def find_gpu() -> Gpu:
    """The GPU that the GPU runners use: the first of CUDA_VISIBLE_DEVICES, else number 0.

    Raises MissingExtraError without nvidia-ml-py, and InputError where there is no GPU.
    """
    with open_device() as (nvml, device):
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(device)
        return Gpu(
            name=nvml.nvmlDeviceGetName(device),
            compute_capability=f"{major}.{minor}",
            driver=nvml.nvmlSystemGetDriverVersion(),
            memory=nvml.nvmlDeviceGetMemoryInfo(device).total,
        )


def used_memory() -> int:
    """Bytes in use on that GPU, by all processes. Raises as `find_gpu`."""
    with open_device() as (nvml, device):
        return int(nvml.nvmlDeviceGetMemoryInfo(device).used)


@contextmanager
def open_device() -> Iterator[tuple[Any, Any]]:
    """Yield `pynvml` and the GPU's handle; what NVML refuses inside the block is an InputError.

    Raises MissingExtraError without nvidia-ml-py, and InputError where there is no GPU.
    """
    try:
        import pynvml
    except ImportError as error:
        raise MissingExtraError("finding the GPU", extra="gpu", module="nvidia-ml-py") from error
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise InputError(f"no GPU: {_reason(error)}") from error
    try:
        yield pynvml, _handle(pynvml)
    except pynvml.NVMLError as error:
        raise InputError(f"no usable GPU: {_reason(error)}") from error
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any) -> Any:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0].strip()
    if chosen.startswith(("GPU-", "MIG-")):
        return nvml.nvmlDeviceGetHandleByUUID(chosen)
    if not chosen.isdigit():
        raise InputError(f"no GPU: CUDA_VISIBLE_DEVICES={chosen!r} hides them all")
    return nvml.nvmlDeviceGetHandleByIndex(int(chosen))


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0].lower()
