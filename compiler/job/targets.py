"""The deployment targets, and the number formats of their Q/DQ pairs."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from regcache.passes.affine import IntegerType
from regcache.passes.block_floats import BlockFormat
from regcache.passes.errors import InputError
from regcache.passes.float8 import Float8
from regcache.runtime.openvino_options import InferencePrecision
from regcache.runtime.run_with import RuntimeName

# MatMulNBits takes 16 and more; a float32 scale for 32 weights is one more bit for each.
_BLOCK_SIZE = 32
# ONNX Runtime reads and writes the whole activation for a node: a 500th of the time (DINOv2-S).
_NODE_GAIN = 0.45


class TargetName(StrEnum):
    """The targets `regcache compile` knows."""

    ORT_CPU = "ort-cpu"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    OPENVINO = "openvino"

    @property
    def profile(self) -> "TargetProfile":
        """All that is particular to it."""
        return PROFILES[self]


class Precision(StrEnum):
    """What the linears compute in: 8-bit integers or floats, or float with weights of 4 bits.

    In mxfp8 and nvfp4, floats of 8 and 4 bits share a scale in blocks of channels. In bf16, fp16
    and fp32 nothing is quantized.
    """

    INT8 = "int8"
    FP8 = "fp8"
    MXFP8 = "mxfp8"
    NVFP4 = "nvfp4"
    W4A16 = "w4a16"
    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"

    @property
    def quantizes(self) -> bool:
        """Whether weights are rounded to fewer bits, which takes images to calibrate on."""
        return self not in (Precision.BF16, Precision.FP16, Precision.FP32)

    @property
    def in_narrow_floats(self) -> bool:
        """Whether linears multiply floats of 8 bits or 4."""
        return self in (Precision.FP8, Precision.MXFP8, Precision.NVFP4)

    @property
    def in_openvino(self) -> InferencePrecision:
        """What OpenVINO computes in where nothing is quantized, unless told."""
        known = {Precision.BF16: InferencePrecision.BF16, Precision.FP32: InferencePrecision.F32}
        return known.get(self, InferencePrecision.AUTO)


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
    """The number formats of a target: activations per tensor, weights per channel and symmetric.

    `name`: the target they belong to; `why`: the reason, in words. Integers of fewer than 8 bits
    are simulated inside 8. `activation_bits` is None where only weights are quantized, to 4 bits in
    blocks of 32 input channels: simulated in float, or stored as integers in blocks of
    `block_size`. `float8`: activations and weights are E4M3; `blocks`: they are floats with a scale
    for each block of channels; `floats`: nothing is quantized, all is computed in that. The integer
    types do not count then. `node_gain`: of the error at a layer, the least share that factors or a
    rotation must take away where they cost a node.
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
    floats: str | None = None
    blocks: BlockFormat | None = None
    node_gain: float = 0.1

    @property
    def profile(self) -> "TargetProfile":
        """The profile of the target."""
        return PROFILES[self.name]

    @property
    def dtypes(self) -> tuple[str, str]:
        """ONNX's names of what activations and weights are rounded to."""
        if self.float8:
            return Float8.dtype, Float8.dtype
        if self.blocks is not None:
            return self.blocks.onnx_name, self.blocks.onnx_name
        if self.floats is not None:
            return self.floats, self.floats
        return self.activation_dtype, self.weight_dtype


@dataclass(frozen=True)
class TargetProfile:
    """All that is particular to a target; to add one is to add its profile.

    `formats`: number formats by precision; `saturating`: those of int8 where the CPU's kernels for
    unsigned activations and signed weights saturate. `int8_share`: the least share of the linears'
    multiply-accumulates that is quantized unless told, and `shares`: that of a precision which
    another suits. `half`: whether the rest is FP16 unless told, and whether it, and attention in
    int8, can be asked for. `integers`: whether ONNX Runtime measures the artifact with its own
    integer kernels, and not dequantized, node by node as written. It does not where a CPU's kernels
    may saturate and the target's do not. `runner`: the name of the runner that times it. `scores`:
    whether attention's q k^T is int8 unless told, and `patches` whether the patch convolution is.
    `split`: whether packed projections become one for each of q, k and v, and `merged` whether
    these are one again once they are quantized, and lose their biases where they stay float.
    """

    formats: Mapping[Precision, Target]
    int8_share: float
    half: bool
    integers: bool
    runner: str
    saturating: Target | None = None
    scores: bool = False
    patches: bool = False
    split: bool = False
    merged: bool = False
    shares: Mapping[Precision, float] = field(default_factory=dict)

    def least_share(self, precision: Precision) -> float:
        """The least share of the linears' work that is quantized, unless told."""
        return self.shares.get(precision, self.int8_share)

    @property
    def timed(self) -> bool:
        """Whether `compile` compares its speed with float: it does in ONNX Runtime's integers."""
        return self.integers and self.runtime is RuntimeName.ONNXRUNTIME

    @property
    def runtime(self) -> RuntimeName:
        """The runtime of `load` and `parity` that suits it."""
        own = self.runner == RuntimeName.OPENVINO
        return RuntimeName.OPENVINO if own else RuntimeName.ONNXRUNTIME


def _floats(name: TargetName, why: str, kind: str) -> Target:
    """Nothing is quantized, and all is computed in `kind`."""
    return Target(
        *(name, "int8", True, "int8", f"{why}, nothing is quantized"),
        activation_bits=None,
        weight_bits=16,
        floats=kind,
    )


def _blocks(name: TargetName, why: str, kind: BlockFormat) -> Target:
    """Floats with a scale for each block of channels, activations' as the engine runs."""
    return Target(name, "int8", True, "int8", why, blocks=kind)


def _tensorrt(name: TargetName) -> TargetProfile:
    """TensorRT takes signed int8 with zero point 0 only, and computes the rest in FP16."""
    formats = {
        Precision.INT8: Target(name, "int8", True, "int8", "TensorRT: signed int8, zero point 0"),
        Precision.FP8: Target(name, "int8", True, "int8", "TensorRT: FP8, E4M3", float8=True),
        Precision.NVFP4: _blocks(name, "TensorRT: NVFP4, E2M1 in blocks of 16", BlockFormat.NVFP4),
        Precision.FP16: _floats(name, "TensorRT: FP16", "float16"),
    }
    # TensorRT-RTX 1.7 parses MXFP8, and multiplies it in FP16.
    if name is TargetName.TENSORRT:
        why = "TensorRT: MXFP8, E4M3 in blocks of 32"
        formats[Precision.MXFP8] = _blocks(name, why, BlockFormat.MXFP8)
    # Plain TensorRT was never seen to gain by it.
    merged = name is TargetName.TENSORRT_RTX
    # On DINOv2-S a tenth of the work does nearly half of MXFP8's damage, most of it one linear.
    shares = {Precision.MXFP8: 0.9}
    return TargetProfile(formats, 1.0, True, False, name.value, merged=merged, shares=shares)


def _cpu(name: TargetName) -> TargetProfile:
    """Unsigned activations are one bit finer after GELU-like skew.

    The few layers that do the most damage cost little in float.
    """
    blocks = f"W4A16: 4-bit weights in blocks of {_BLOCK_SIZE}, MatMulNBits"
    exact = "U8S8: this CPU's kernels are exact"
    full = "U8U8: this CPU's U8S8 kernels saturate in 16 bits"
    formats = {
        Precision.INT8: Target(name, "uint8", False, "int8", exact, node_gain=_NODE_GAIN),
        Precision.W4A16: Target(name, "uint8", False, "int8", blocks, None, 4, _BLOCK_SIZE),
        Precision.FP32: _floats(name, "ONNX Runtime: FP32", "float32"),
    }
    saturating = Target(name, "uint8", False, "uint8", full, node_gain=_NODE_GAIN)
    return TargetProfile(formats, 0.967, False, True, name.value, saturating, patches=True)


def _openvino(name: TargetName) -> TargetProfile:
    """What OpenVINO fuses on the CPU: everything that multiplies, so few linears are worth float.

    The share leaves room for the rotation of the stream, and for the output projection that does
    the most damage: 1 - cosine of DINOv2-S is a tenth less for it, and time 0.3 to 1 % more.
    Only with packed projections apart does one of them hand q, k or v on as integers.
    """
    why = "OpenVINO: uint8 activations, int8 weights"
    exact = Target(name, "uint8", False, "int8", why)
    # 2 x 255 x 63 fits into 16 bits, which is where such CPUs add pairs of products.
    saturating = replace(
        exact, weight_bits=7, why=f"{why} of 7 bits: this CPU's kernels saturate in 16 bits"
    )
    return TargetProfile(
        {
            Precision.INT8: exact,
            Precision.BF16: _floats(name, "OpenVINO: bf16", "bfloat16"),
            Precision.FP32: _floats(name, "OpenVINO: FP32", "float32"),
        },
        int8_share=0.975,
        half=False,
        integers=True,
        runner=name.value,
        saturating=saturating,
        scores=True,
        patches=True,
        split=True,
    )


PROFILES: Mapping[TargetName, TargetProfile] = {
    TargetName.ORT_CPU: _cpu(TargetName.ORT_CPU),
    TargetName.TENSORRT: _tensorrt(TargetName.TENSORRT),
    TargetName.TENSORRT_RTX: _tensorrt(TargetName.TENSORRT_RTX),
    TargetName.OPENVINO: _openvino(TargetName.OPENVINO),
}


def resolve_target(
    name: TargetName, *, u8s8_saturates: bool, precision: Precision = Precision.INT8
) -> Target:
    """The formats for a target; `u8s8_saturates` is measured on the CPU that compiles.

    Raises InputError where the target does not run the precision.
    """
    profile = PROFILES[name]
    if precision not in profile.formats:
        able = [other.value for other, profile in PROFILES.items() if precision in profile.formats]
        raise InputError(f"{precision.value} runs on {' and '.join(able)}, not on {name.value}")
    if precision is Precision.INT8 and u8s8_saturates and profile.saturating is not None:
        return profile.saturating
    return profile.formats[precision]


def simulate(target: Target, simulation: Simulation) -> Target:
    """The target's rules with other bit-widths."""
    return replace(
        target,
        activation_bits=simulation.activation_bits,
        weight_bits=simulation.weight_bits,
        why=f"{simulation.value}, simulated; {target.why}",
        node_gain=Target.node_gain,
    )
