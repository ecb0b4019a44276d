"""The model zoo: random encoders of the released architectures, and their exports.

`export_family` keeps what it makes in a folder, so that a test session makes everything once.
Importing this module imports no PyTorch; making a source does (see `zoo_models`).
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_graphsurgeon as gs
import pytest
from filelock import FileLock

from regcache.export.cache import written_whole
from regcache.export.onnx_file import sidecar
from regcache.export.reference import Source
from regcache.passes.canonicalize import canonicalize
from regcache.passes.onnx_file import load_model
from regcache.passes.preprocess import Preprocess

FAMILIES = (
    "clip-b16",
    "siglip-b16",
    "siglip2-so400m14",
    "dinov2-s14",
    "dinov2-s14-swiglu",
    "dinov2-s14-registers",
    "dinov3-s16",
    "dinov3-s16plus",
    "vit-b16",
    "deit-s16",
    "timm-vit-b16",
    "timm-dinov2-s14-registers",
    "timm-siglip-b16",
    "timm-deit3-s16",
    "openclip-b16",
    "openclip-b16-quickgelu",
    "openclip-siglip-b16",
)


@dataclass(frozen=True)
class Exported:
    """One family's graph on disk, its recipe, and the source it came from."""

    path: Path
    recipe: Preprocess
    source: Source


SIDE = 112
"""Pixels of the random encoders' images: half the released ones', for a quarter of their tokens."""


@functools.cache
def family_source(name: str, folder: Path) -> Source:
    """The source of one family, its checkpoint kept in `folder`."""
    from support.zoo_models import FAMILIES as BUILDERS
    from support.zoo_models import seeded

    assert tuple(BUILDERS) == FAMILIES
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{name}.lock"), seeded():
        return BUILDERS[name](folder / name)


@functools.cache
def export_family(name: str, folder: Path) -> Exported:
    """One family's ONNX, at SIDE x SIDE, made once in `folder` even when processes share it."""
    source = family_source(name, folder)
    path = folder / f"{name}.onnx"
    with FileLock(folder / f"{name}.lock"):
        if not sidecar(path).is_file():
            with written_whole(path) as partial:
                recipe = source.export(partial, resolution=SIDE)
            assert recipe is not None
            with written_whole(sidecar(path)) as partial:
                partial.write_text(recipe.to_json(), encoding="utf-8")
    return Exported(path, Preprocess.from_json(sidecar(path).read_text("utf-8")), source)


@functools.lru_cache(maxsize=1)
def _canonical(path: Path) -> gs.Graph:
    return canonicalize(load_model(path))


def canonical_family(name: str, folder: Path) -> gs.Graph:
    """One family's canonical graph, a copy of one's own; only the weights' arrays are shared.

    Tests of one family follow one another on a worker, so only the last one's is kept in memory.
    """
    return _canonical(export_family(name, folder).path).copy()


def family_params() -> list[Any]:
    """The families as pytest parameters, each bound to one xdist worker, which exports it once."""
    return [family_param(name) for name in FAMILIES]


def family_param(name: str) -> Any:
    """One of them."""
    return pytest.param(name, marks=[pytest.mark.torch, pytest.mark.xdist_group(name)])
