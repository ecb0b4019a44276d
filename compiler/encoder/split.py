"""The stage that splits packed projections where the target would compute them in float."""

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.targets import Target
from regcache.passes.split_qkv import SplitQkv


def split_for_target(encoder: FloatEncoder, target: Target) -> FloatEncoder:
    """Split packed qkv projections where the target would compute them in float otherwise.

    TensorRT computes most of them in float; in 4-bit blocks, the weights of v have more bits than
    those of q and k. OpenVINO hands q and k on as integers where each has a linear of its own.
    """
    if target.floats is not None:
        return encoder
    integers = target.profile.integers
    if integers and target.block_size is None and not target.profile.split:
        return encoder
    return encoder.after([SplitQkv(for_tensorrt=not integers)])
