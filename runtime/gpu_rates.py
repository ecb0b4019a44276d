"""What GPUs can do at most: rates, memory bandwidth and the time between two kernels.

All are NVIDIA's own figures for dense matrices, at the boost clock; products in FP16, and in FP8 on
GeForce, sum in FP32 as TensorRT's do. No GPU reaches them all the time.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from regcache.passes.errors import InputError

# "Getting Started with CUDA Graphs", NVIDIA Technical Blog, 2019: kernels of 2.9 us follow one
# another every 3.8 us on a stream.
_BETWEEN_KERNELS = 0.9e-6

# Words of the driver's names that say nothing of which GPU it is.
_MAKERS = frozenset({"nvidia", "geforce", "jetson", "agx"})


@dataclass(frozen=True)
class GpuRates:
    """A GPU's peak rates.

    `operations`: by number format, a second; a multiplication and an addition are two. `FP32`
    stands for TF32, which TensorRT multiplies float32 in. A format that is missing it does not
    multiply. `bandwidth`: bytes of its memory a second. `between_kernels`: seconds that a kernel
    costs beside what it computes. `source`: where the figures are published.
    """

    name: str
    compute_capability: str
    operations: Mapping[str, float]
    bandwidth: float
    source: str
    between_kernels: float = _BETWEEN_KERNELS


def _rates(
    fp32: float, fp16: float, int8: float, fp8: float | None = None, fp4: float | None = None
) -> dict[str, float]:
    """Peak rates, given in 10^12 a second."""
    known = {"FP32": fp32, "BF16": fp16, "FP16": fp16, "INT8": int8, "FP8": fp8, "FP4": fp4}
    return {name: rate * 1e12 for name, rate in known.items() if rate is not None}


_ADA = "NVIDIA Ada GPU Architecture whitepaper, appendix A"
_BLACKWELL = "NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A"

# FP4 of the RTX 5090: half of NVIDIA's 3,352 "AI TOPS", which count sparsity.
GPUS: tuple[GpuRates, ...] = (
    GpuRates("L4", "8.9", _rates(60, 121, 242.5, 242.5), 300e9, "NVIDIA L4 datasheet"),
    GpuRates("A10", "8.6", _rates(62.5, 125, 250), 600e9, "NVIDIA A10 datasheet"),
    GpuRates("RTX 4090", "8.9", _rates(82.6, 165.2, 660.6, 330.3), 1008e9, _ADA),
    GpuRates("RTX 5090", "12.0", _rates(104.8, 209.5, 838, 419, 1676), 1792e9, _BLACKWELL),
    GpuRates("A100", "8.0", _rates(156, 312, 624), 2039e9, "NVIDIA A100 80GB SXM datasheet"),
    GpuRates("H100", "9.0", _rates(494.7, 989.4, 1979, 1979), 3350e9, "NVIDIA H100 SXM datasheet"),
    GpuRates("Orin", "8.7", _rates(21.3, 42.5, 85), 204.8e9, "Jetson AGX Orin 64GB brief, GPU"),
)
"""The GPUs that times are predicted for."""


def find_rates(name: str) -> GpuRates:
    """The GPU of a name: "RTX 4090", "rtx4090", or the driver's, "NVIDIA GeForce RTX 4090".

    Raises InputError where there is none in the table; one for laptops is another GPU.
    """
    words = [word for word in name.casefold().replace("-", " ").split() if word not in _MAKERS]
    for gpu in GPUS:
        wanted = gpu.name.casefold().split()
        begins = words[: len(wanted)] == wanted and "laptop" not in words
        if begins or words == ["".join(wanted)]:
            return gpu
    raise InputError(f"no GPU {name!r} in the table: {', '.join(gpu.name for gpu in GPUS)}")


def gpus_of(compute_capabilities: Iterable[str]) -> tuple[GpuRates, ...]:
    """The GPUs in the table of some compute capabilities, such as "8.6", in the table's order."""
    wanted = set(compute_capabilities)
    return tuple(gpu for gpu in GPUS if gpu.compute_capability in wanted)
