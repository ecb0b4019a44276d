"""Scales that a test knows to be of integers."""

from collections.abc import Mapping

from regcache.compiler.quantizer import Scale
from regcache.passes.affine import Affine


def affine(scale: Scale) -> Affine:
    """The scale itself."""
    assert isinstance(scale, Affine)
    return scale


def affines(scales: Mapping[str, Scale]) -> dict[str, Affine]:
    """The same scales."""
    return {name: affine(scale) for name, scale in scales.items()}
