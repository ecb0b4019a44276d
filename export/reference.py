"""What every source of a vision encoder offers, and the PyTorch original as a function."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from regcache.passes.preprocess import Preprocess

Reference = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]
"""float32 images [B, 3, H, W] -> [pooled [B, D], last_hidden_state [B, T, C]], both float32."""


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
