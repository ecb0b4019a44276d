"""What each deployment target can run, as the number formats of its Q/DQ pairs."""

from dataclasses import dataclass, replace
from enum import StrEnum

from regcache.passes.affine import IntegerType
from regcache.passes.errors import InputError
from regcache.passes.float8 import Float8

# MatMulNBits takes 16 and more; a float32 scale for 32 weights is one more bit for each.
_BLOCK_SIZE = 32


class TargetName(StrEnum):
    """The targets `regcache compile` knows."""

    ORT_CPU = "ort-cpu"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"


class Precision(StrEnum):
    """What the linears compute in: 8-bit integers or floats, or float with weights of 4 bits."""

    INT8 = "int8"
    FP8 = "fp8"
    W4A16 = "w4a16"


class Simulation(StrEnum):
    """Bit-widths that the literature reports, as fake quantization: weights, activations."""

    W8A8 = "w8a8"
    W6A6 = "w6a6"
    W4A4 = "w4a4"
    W4A16 = "w4a16"

    @property
    def weight_bits(self) -> int:
        """Bits of a weight."""
        return int(self.value[1])

    @property
    def activation_bits(self) -> int | None:
        """Bits of an activation; None where it stays float."""
        return None if self is Simulation.W4A16 else int(self.value[3])


@dataclass(frozen=True)
class Target:
    """Number formats: activations per tensor, weights per channel and symmetric.

    Integers of fewer than 8 bits are simulated inside 8. `activation_bits` is None where only
    weights are quantized, 4 bits in blocks of 32 input channels: simulated in float, or stored as
    such in blocks of `block_size`. `float8`: both are E4M3, and the integer types say nothing.
    """

    name: TargetName
    activation_dtype: IntegerType
    activation_symmetric: bool
    weight_dtype: IntegerType
    why: str
    activation_bits: int | None = 8
    weight_bits: int = 8
    block_size: int | None = None
    float8: bool = False

    @property
    def dtypes(self) -> tuple[str, str]:
        """ONNX's names of what activations and weights are rounded to."""
        if self.float8:
            return Float8.dtype, Float8.dtype
        return self.activation_dtype, self.weight_dtype


def resolve_target(
    name: TargetName, *, u8s8_saturates: bool, precision: Precision = Precision.INT8
) -> Target:
    """The formats for a target; `u8s8_saturates` is measured on the CPU that compiles.

    TensorRT takes signed int8 with zero point 0 only. On a CPU, unsigned activations are one bit
    finer after GELU-like skew; weights are signed unless the CPU's U8S8 kernels saturate.
    Raises InputError where the target does not run the precision.
    """
    if name is not TargetName.ORT_CPU:
        return _tensorrt(name, precision)
    if precision is Precision.FP8:
        raise InputError(f"fp8 runs on TensorRT, not on {name.value}")
    if precision is Precision.W4A16:
        why = f"W4A16: 4-bit weights in blocks of {_BLOCK_SIZE}, MatMulNBits"
        return Target(name, "uint8", False, "int8", why, None, 4, _BLOCK_SIZE)
    if u8s8_saturates:
        why = "U8U8: this CPU's U8S8 kernels saturate in 16 bits"
        return Target(name, "uint8", False, "uint8", why)
    return Target(name, "uint8", False, "int8", "U8S8: this CPU's kernels are exact")


def _tensorrt(name: TargetName, precision: Precision) -> Target:
    if precision is Precision.W4A16:
        raise InputError(f"w4a16 runs on {TargetName.ORT_CPU.value}, not on {name.value}")
    if precision is Precision.FP8:
        return Target(name, "int8", True, "int8", "TensorRT: FP8, E4M3", float8=True)
    return Target(name, "int8", True, "int8", "TensorRT: signed int8, zero point 0")


def simulate(target: Target, simulation: Simulation) -> Target:
    """The target's rules with other bit-widths."""
    return replace(
        target,
        activation_bits=simulation.activation_bits,
        weight_bits=simulation.weight_bits,
        why=f"{simulation.value}, simulated; {target.why}",
    )


def default_int8_share(name: TargetName) -> float:
    """The least share of the linears' multiply-accumulates that stays int8 unless told.

    On a CPU the few layers that do the most damage cost little in float; TensorRT gets all int8.
    """
    return 0.95 if name is TargetName.ORT_CPU else 1.0


def runs_integers(name: TargetName) -> bool:
    """Whether ONNX Runtime measures the artifact with its own integer kernels.

    TensorRT's artifacts are measured dequantised, node by node as written: on a CPU without VNNI
    the signed kernels would saturate, which TensorRT's do not.
    """
    return name is TargetName.ORT_CPU
