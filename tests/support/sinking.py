"""A tiny encoder with a sink that costs it bits, and that registers and deletion undo."""

from dataclasses import replace
from pathlib import Path

import onnx
from support import tiny_source
from support.tiny_source import RECIPE
from support.tiny_vit import TinyVit

from regcache.export.onnx_file import sidecar

SPEC = replace(tiny_source.SPEC, depth=3)
BLOCK = 1
"""The block whose fc2 reads what the sink makes massive."""
_TOKEN, _CHANNEL = 9, 5


def write_sinking(path: Path) -> Path:
    """Write it with its recipe beside it.

    One position is massive in a channel that no attention reads. A hidden unit of block 1 fires on
    that, and writes nothing: the range is lost, and no token but the sink is needed for it.
    """
    vit = TinyVit(SPEC)
    weights = vit.weights
    weights["position"][..., _TOKEN, _CHANNEL] = 40
    for block in range(SPEC.depth):
        weights[f"{block}.k"][_CHANNEL] = weights[f"{block}.v"][_CHANNEL] = 0
    weights[f"{BLOCK}.fc1"][_CHANNEL, 0] = 20
    weights[f"{BLOCK}.fc2"][0] = 0
    onnx.save(vit.model(), path)
    sidecar(path).write_text(RECIPE.to_json())
    return path
