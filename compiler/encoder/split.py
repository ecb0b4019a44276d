"""The stage that splits packed projections where the target would compute them in float."""

from regcache.compiler.encoder.float_encoder import FloatEncoder
from regcache.compiler.job.targets import Target
from regcache.passes.block_floats import BlockFormat
from regcache.passes.errors import InputError
from regcache.passes.split_qkv import SplitQkv


def split_for_target(encoder: FloatEncoder, target: Target) -> FloatEncoder:
    """Split packed qkv projections where the target would compute them in float otherwise.

    TensorRT computes most of them in float; in 4-bit blocks, the weights of v have more bits than
    those of q and k. OpenVINO hands q and k on as integers where each has a linear of its own.

    Raises InputError for block-scaled floats where a linear's channels fill no whole blocks.
    """
    if target.blocks is not None:
        _check_blocks(encoder, target.blocks)
    if target.floats is not None:
        return encoder
    integers = target.profile.integers
    if integers and target.block_size is None and not target.profile.split:
        return encoder
    return encoder.after([SplitQkv(for_tensorrt=not integers)])


def _check_blocks(encoder: FloatEncoder, kind: BlockFormat) -> None:
    for linear in encoder.view.linears:
        channels = linear.weight_shape[0]
        if channels % kind.block_size:
            raise InputError(
                f"{kind.value} has a scale for every {kind.block_size} channels: {linear.name} "
                f"reads {channels}"
            )
