"""What the view of every source family of the zoo holds."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support import zoo

from regcache.passes.encoder import EncoderView
from regcache.passes.find_blocks import view_encoder

# Per family: blocks, tokens before the patches, heads, activation, linears of a block.
SEPARATE = ("q", "k", "v", "out", "fc1", "fc2")
GATED = ("q", "k", "v", "out", "gate", "up", "fc2")
FUSED = ("qkv", "out", "fc1", "fc2")
EXPECTED = {
    "clip-b16": (2, 1, 12, "quick_gelu", SEPARATE),
    "siglip-b16": (2, 0, 3, "gelu_tanh", SEPARATE),
    "siglip2-so400m14": (2, 0, 4, "gelu_tanh", SEPARATE),
    "dinov2-s14": (2, 1, 3, "gelu", SEPARATE),
    "dinov2-s14-swiglu": (2, 1, 3, "swiglu", GATED),
    "dinov2-s14-registers": (2, 5, 3, "gelu", SEPARATE),
    "dinov3-s16": (2, 5, 3, "gelu", SEPARATE),
    "dinov3-s16plus": (2, 5, 3, "swiglu", GATED),
    "vit-b16": (2, 1, 3, "gelu", SEPARATE),
    "deit-s16": (2, 2, 3, "gelu", SEPARATE),
    "timm-vit-b16": (2, 1, 3, "gelu", FUSED),
    "timm-dinov2-s14-registers": (2, 5, 3, "gelu", FUSED),
    "timm-siglip-b16": (2, 0, 3, "gelu", FUSED),
    "timm-deit3-s16": (2, 1, 3, "gelu", FUSED),
    "openclip-b16": (2, 1, 3, "gelu", SEPARATE),
    "openclip-b16-quickgelu": (2, 1, 3, "quick_gelu", SEPARATE),
    "openclip-siglip-b16": (2, 0, 3, "gelu", FUSED),
}


def images(batch: int) -> NDArray[np.float32]:
    shape = (batch, 3, zoo.SIDE, zoo.SIDE)
    return np.random.default_rng(batch).standard_normal(shape, dtype=np.float32)


def view(name: str, folder: Path) -> EncoderView:
    return view_encoder(zoo.canonical_family(name, folder))
