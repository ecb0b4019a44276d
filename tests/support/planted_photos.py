"""Photographs for the planted encoder, and its canonical graph."""

import copy
import math
import random
import tempfile
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import torch
from demo_photos import crops, photographs
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image, ImageOps
from support.planted import Planted, Planting, plant
from support.torchlib import share_torchlib
from torch import Tensor

from regcache.export.sample_weights import load_sample_model
from regcache.export.source import open_source
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
        found += [_pixels(crop) for crop in crops(_half(photo, side))[::every]]
    return torch.stack(found)


def random_crops(side: int, count: int, seed: int) -> Tensor:
    """So many random squares of one half (see halves) of every photograph, some mirrored."""
    draw, found = random.Random(seed), []
    for photo in photographs().values():
        half = _half(photo, side)
        for _ in range(count):
            edge = int(min(half.size) * draw.uniform(0.4, 1))
            left, top = (draw.randint(0, length - edge) for length in half.size)
            crop = half.crop((left, top, left + edge, top + edge))
            mirrored = draw.random() < 0.5
            found.append(_pixels(ImageOps.mirror(crop) if mirrored else crop))
    return torch.stack(found)


def _half(photo: Image.Image, side: int) -> Image.Image:
    middle = photo.width // 2
    return photo.crop((middle * side, 0, middle * (side + 1), photo.height))


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
    """A DINOv2-S as a canonical graph: the un-planted one's file with `model`'s weights in it."""
    file, places = _exported()
    file, weights = copy.deepcopy(file), _frozen(model)
    for stored in file.graph.initializer:
        if stored.name in places:
            name, transposed = places[stored.name]
            weight = weights[name].T if transposed else weights[name]
            stored.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(weight), stored.name))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(file, path)
        return canonicalize(load_model(path))


@cache
def _exported() -> tuple[onnx.ModelProto, dict[str, tuple[str, bool]]]:
    """The un-planted encoder's file, and what each initializer holds: a weight, as it is or turned.

    Exporting takes ten times as long as all else, and this file is kept in the cache.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        open_source("sample:dinov2-small").export(path, resolution=SIDE)
        file = onnx.load(path)
    held: dict[bytes, tuple[str, bool]] = {}
    for name, weight in _frozen(natural()).items():
        for turned in (False, True):
            told, _ = held.setdefault((weight.T if turned else weight).tobytes(), (name, turned))
            assert told == name, f"{name} and {told} are alike"
    places = {
        stored.name: held[numpy_helper.to_array(stored).tobytes()]
        for stored in file.graph.initializer
        if math.prod(stored.dims) >= natural().config.hidden_size  # no shapes and scales
    }
    return file, places


def _frozen(model: Any) -> dict[str, NDArray[np.float32]]:
    """All weights of a model whose positions are made for these photographs."""
    tower = FAMILIES["dinov2"].tower(copy.deepcopy(model), SIDE, SIDE)
    tower.freeze()  # in place
    tensors = (*tower.module.named_parameters(), *tower.module.named_buffers())
    return {name: tensor.detach().numpy() for name, tensor in tensors}


def planted_graph(planting: Planting) -> gs.Graph:
    """The planted encoder's canonical graph."""
    return model_graph(planted(planting).model)
