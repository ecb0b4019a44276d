"""Where dense arrays live: the one place that decides it, by the device or by where they are."""

from functools import cache

import numpy as np

from regcache.compiler.calibration.algebra import NUMPY, Algebra, Array
from regcache.runtime.device import Device


@cache
def _torch_algebra(place: str) -> Algebra:
    from regcache.compiler.calibration.torch_algebra import TorchAlgebra

    return TorchAlgebra(place)


def algebra_on(device: Device) -> Algebra:
    """What computes with dense arrays on a device."""
    return NUMPY if device.arrays is None else _torch_algebra(device.arrays)


def algebra_of(values: Array) -> Algebra:
    """What computes with an array where it lives."""
    return NUMPY if isinstance(values, np.ndarray) else _torch_algebra(str(values.device))
