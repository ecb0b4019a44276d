"""A PyTorch vision encoder at one input size, ready to be run or traced."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from regcache.export.reference import Reference
from regcache.passes.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class Tower:
    """`outputs` runs the library's own `module` (eval, float32, no grad) on float32 images.

    `outputs`: [B, 3, height, width] -> pooled [B, D], last_hidden_state [B, T, C].
    `freeze` rewrites the module in place, once, so that tracing `outputs` gives a static graph.
    """

    module: "nn.Module"
    outputs: "Callable[[Tensor], tuple[Tensor, Tensor]]"
    freeze: Callable[[], None]
    height: int
    width: int


def as_reference(tower: Tower) -> Reference:
    """The library's own module, untouched, as a function on arrays."""
    import torch

    def run(images: NDArray[np.float32]) -> list[NDArray[np.float32]]:
        with torch.no_grad():
            outputs = tower.outputs(torch.from_numpy(np.ascontiguousarray(images)))
        return [output.numpy() for output in outputs]

    return run


def check_patches(name: str, size: tuple[int, int], patch: tuple[int, int]) -> None:
    """Raise InputError, in the source's name, where an image is smaller than one patch."""
    if any(side < least for side, least in zip(size, patch, strict=True)):
        height, width = size
        raise InputError(f"{name}: {height} x {width} is smaller than one patch")
