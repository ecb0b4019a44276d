"""The stage that brings a float encoder into the form that its target computes."""

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.targets import Target
from regcache.passes.split_qkv import SplitQkv


def split_for_target(encoder: FloatEncoder, target: Target) -> FloatEncoder:
    """Split packed qkv projections where the target computes them in float otherwise.

    TensorRT does so with most; blocks of weights are wider for v than for q and k.
    """
    integers = target.profile.integers
    if integers and target.block_size is None:
        return encoder
    return encoder.after([SplitQkv(for_tensorrt=not integers)])
