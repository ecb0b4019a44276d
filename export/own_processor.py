"""What each library makes of an image by itself: what recipes are held against.

A processor takes an image as Pillow opens it, of any mode, to the pixels that the library's own
users would hand to the model: float32 [3, height, width].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.export.reference import Processor
from regcache.passes.preprocess import Preprocess


def processor_of_transformers(processor: Any, asked: Preprocess | None) -> Processor:
    """An image processor of transformers.

    `asked`: the recipe for a resolution that is not the processor's own, whose sizes it then takes.
    One that does not convert to RGB takes nothing else: whoever uses it converts before.
    """
    options: dict[str, Any] = {}
    if asked is not None:
        height, width = asked.resize_to
        shortest = asked.resize == "shortest"
        size = {"shortest_edge": height} if shortest else {"height": height, "width": width}
        crop = {"height": asked.height, "width": asked.width}
        options = {"size": size} | ({"crop_size": crop} if processor.do_center_crop else {})
    converts = bool(getattr(processor, "do_convert_rgb", False))

    def run(image: Image.Image) -> NDArray[np.float32]:
        given = image if converts else image.convert("RGB")
        found = processor(given, return_tensors="np", **options)["pixel_values"][0]
        return np.asarray(found, np.float32)

    return run


def processor_of_timm(data: Mapping[str, Any]) -> Processor:
    """timm's transform for evaluation. `data`: what its `resolve_data_config` returns."""
    from timm.data.transforms_factory import create_transform

    transform: Any = create_transform(**data, is_training=False)
    # timm's own datasets convert before they transform
    return lambda image: np.asarray(transform(image.convert("RGB")), np.float32)


def processor_of_open_clip(config: Mapping[str, Any], size: tuple[int, int]) -> Processor:
    """open_clip's transform for evaluation.

    `config`: of the checkpoint's tag; what is missing is open_clip's. `size`: height and width.
    """
    from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

    settings = merge_preprocess_dict(PreprocessCfg(), {**config, "size": size})
    transform = image_transform_v2(PreprocessCfg(**settings), is_train=False)
    return lambda image: np.asarray(transform(image), np.float32)
