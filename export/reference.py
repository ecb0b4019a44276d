"""What every source of a vision encoder offers: its PyTorch original and its processor."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from regcache.passes.preprocess import Preprocess

Reference = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]
"""float32 images [B, 3, H, W] -> [pooled [B, D], last_hidden_state [B, T, C]], both float32."""

Processor = Callable[[Image.Image], NDArray[np.float32]]
"""An image of any mode, as Pillow opens it -> float32 [3, H, W], as the library itself makes it."""


class Source(Protocol):
    """A vision encoder somebody trained, wherever it comes from."""

    @property
    def name(self) -> str:
        """The source as the user wrote it."""

    def export(self, path: Path, *, resolution: int | None = None) -> Preprocess | None:
        """Write the encoder to `path` as ONNX and return its preprocessing recipe.

        The graph takes float32 "pixel_values" [batch, 3, H, W] with a dynamic batch, and yields
        "pooled" [batch, D] and "last_hidden_state" [batch, T, C]. `resolution` is the side of a
        square input; the default is the recipe's, else the model's own. None where the source
        comes without a recipe. Raises InputError when the source cannot be read or exported.
        """

    def reference(self, *, resolution: int | None = None) -> Reference | None:
        """The PyTorch original at that resolution (eval, float32), None for a plain ONNX file.

        Raises InputError when the source cannot be read.
        """

    def processor(self, *, resolution: int | None = None) -> Processor | None:
        """What the source's own library makes of an image; None where it comes without.

        Nothing of ours is in it: it shows whether the recipe does the same. Raises InputError when
        the source cannot be read.
        """
