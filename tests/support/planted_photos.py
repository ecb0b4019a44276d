"""Photographs for the planted encoder, and its canonical graph."""

import copy
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import torch
from demo_photos import crops, photographs
from PIL import Image
from support.planted import Planted, Planting, plant
from support.torchlib import share_torchlib
from torch import Tensor

from regcache.export.sample_weights import load_sample_model
from regcache.export.to_onnx import write_onnx
from regcache.export.vit_families import FAMILIES
from regcache.passes.canonicalize import canonicalize
from regcache.passes.onnx_file import load_model

share_torchlib()

SIDE = 126  # 9 x 9 patches: a third of what 224 take


@cache
def halves(side: int, every: int) -> Tensor:
    """Crops of the left (0) or right (1) half of every photograph, one in `every` of nine."""
    found = []
    for photo in photographs().values():
        middle = photo.width // 2
        half = photo.crop((middle * side, 0, middle * (side + 1), photo.height))
        found += [_pixels(crop) for crop in crops(half)[::every]]
    return torch.stack(found)


def _pixels(image: Image.Image) -> Tensor:
    scaled = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float32) / 255
    normal = (scaled - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.from_numpy(normal.astype(np.float32).transpose(2, 0, 1))


@cache
def natural() -> Any:
    return load_sample_model()


@lru_cache(maxsize=3)
def planted(planting: Planting) -> Planted:
    """Planted with left halves of the photographs."""
    return plant(natural(), planting, halves(0, 5))


def model_graph(model: Any) -> gs.Graph:
    """A DINOv2-S as a canonical graph."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        model = copy.deepcopy(model)  # exporting freezes it in place
        write_onnx(lambda: FAMILIES["dinov2"].tower(model, SIDE, SIDE), path)
        return canonicalize(load_model(path))


def planted_graph(planting: Planting) -> gs.Graph:
    """The planted encoder's canonical graph."""
    return model_graph(planted(planting).model)
