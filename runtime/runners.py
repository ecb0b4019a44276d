"""What can run an encoder to be timed: one runner per library, behind one protocol."""

from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from regcache.passes.preprocess import PixelType
from regcache.runtime.openvino_options import OpenVinoOptions


class RunnerName(StrEnum):
    """A library, and what it runs on."""

    ORT_CPU = "ort-cpu"
    ORT_CUDA = "ort-cuda"
    ORT_TENSORRT = "ort-tensorrt"
    TENSORRT = "tensorrt"
    TENSORRT_RTX = "tensorrt-rtx"
    OPENVINO = "openvino"

    @property
    def on_gpu(self) -> bool:
        """Whether it needs a GPU, with copies to it and back."""
        return self not in (RunnerName.ORT_CPU, RunnerName.OPENVINO)

    @property
    def takes_engines(self) -> bool:
        """Whether it runs engines that were built before, not ONNX files."""
        return self in (RunnerName.TENSORRT, RunnerName.TENSORRT_RTX)


LIBRARIES = {
    RunnerName.TENSORRT: ("tensorrt", "trt"),
    RunnerName.TENSORRT_RTX: ("tensorrt_rtx", "trt-rtx"),
}
"""The module of a runner that takes engines, and the extra that installs it."""


@dataclass(frozen=True)
class Lap:
    """Seconds of the parts of a run on a device: copy in, compute, copy out."""

    to_device: float
    compute: float
    to_host: float


@dataclass(frozen=True)
class Ran:
    """What a run gave: `outputs`, first those that Loading names; `lap`: seconds of its parts.

    A runner on the CPU copies nothing, and has no lap.
    """

    outputs: list[NDArray[Any]]
    lap: Lap | None = None


@dataclass(frozen=True)
class Loading:
    """A model, how to load it, and the images that it will be run on.

    `model`: an ONNX file, or for TensorRT an engine. `threads`: of the runner on the CPU.
    `batches`: the sizes to be run. `shape`, `dtype`: of one image, float32 [3, H, W] unless the
    model takes others. `outputs`: the names of those that come first. `openvino`: how that runs it.
    """

    runner: RunnerName
    model: Path
    threads: int
    batches: tuple[int, ...]
    shape: tuple[int, int, int]
    dtype: PixelType = "float32"
    outputs: tuple[str, ...] = ()
    openvino: OpenVinoOptions = field(default_factory=OpenVinoOptions)

    def images(self, batch: int) -> NDArray[Any]:
        """Random pixels, [batch, *shape]: a transformer's time is the same for all."""
        random = np.random.default_rng(0)
        if self.dtype == "uint8":
            return random.integers(0, 256, (batch, *self.shape), dtype=np.uint8)
        return random.standard_normal((batch, *self.shape), dtype=np.float32)


class Session(Protocol):
    """An encoder loaded on the CPU, as OrtSession and OpenVinoSession are."""

    name: str
    fixed_batch: int | None

    def run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Encode images of the model's dtype and layout."""


class SessionRunner:
    """A session on the CPU as a runner: nothing is copied."""

    placement: dict[str, int] | None = None

    def __init__(self, session: Session) -> None:
        self._session = session
        self.name, self.fixed_batch = session.name, session.fixed_batch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        del self._session

    def run(self, images: NDArray[Any]) -> Ran:
        """Encode images of the model's dtype and layout."""
        return Ran(self._session.run(images))


class Runner(Protocol):
    """An encoder ready to run; a context manager that frees it.

    `name`: the model's, for messages. `fixed_batch`: its batch size where it takes one only.
    `placement`: nodes by the ONNX Runtime provider that computes them; None where it is one.
    """

    name: str
    fixed_batch: int | None
    placement: dict[str, int] | None

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def run(self, images: NDArray[Any]) -> Ran:
        """Encode [B, *shape]. Raises InputError when the model does not take them."""
