"""The number formats that tests quantize to, and scales that a test knows to be of integers."""

from collections.abc import Mapping

from regcache.compiler.calibration.number_format import Scale
from regcache.compiler.job.targets import Precision, TargetName, resolve_target
from regcache.passes.affine import Affine

U8S8 = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False)
U8U8 = resolve_target(TargetName.ORT_CPU, u8s8_saturates=True)
S8S8 = resolve_target(TargetName.TENSORRT, u8s8_saturates=False)
W4A16 = resolve_target(TargetName.ORT_CPU, u8s8_saturates=False, precision=Precision.W4A16)
FP8 = resolve_target(TargetName.TENSORRT, u8s8_saturates=False, precision=Precision.FP8)
NVFP4 = resolve_target(TargetName.TENSORRT, u8s8_saturates=False, precision=Precision.NVFP4)
MXFP8 = resolve_target(TargetName.TENSORRT, u8s8_saturates=False, precision=Precision.MXFP8)


def affine(scale: Scale) -> Affine:
    """The scale itself."""
    assert isinstance(scale, Affine)
    return scale


def affines(scales: Mapping[str, Scale]) -> dict[str, Affine]:
    """The same scales."""
    return {name: affine(scale) for name, scale in scales.items()}
