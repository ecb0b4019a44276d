"""PyTorch's tables of operators, made once instead of for every export."""

import functools

from torch._export import utils
from torch.onnx._internal.exporter import _registration


def share_torchlib() -> None:
    """Let all exports of this process have one table: to make it takes a fifth of a small export.

    PyTorch reads the source of all its operators for it, and leaves it as it is afterwards.
    """
    registry = _registration.ONNXRegistry
    if not hasattr(registry.from_torchlib, "cache_info"):
        shared = staticmethod(functools.cache(registry.from_torchlib))
        registry.from_torchlib = shared  # type: ignore[method-assign]
        # Looks up every operator that there is, twenty times an export.
        once = functools.cache(utils._materialize_cpp_cia_ops)
        utils._materialize_cpp_cia_ops = once
