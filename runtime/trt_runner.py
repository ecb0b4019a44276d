"""TensorRT and TensorRT-RTX engines as runners, through the Python API that both share.

Polygraphy's TrtRunner is not used: it allocates outputs and copies inside one call, so its time
cannot be split, and one process can have it for TensorRT or for TensorRT-RTX only. Its arrays on
the GPU are.
"""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from regcache.passes.errors import InputError, MissingExtraError, first_line
from regcache.runtime.runners import LIBRARIES, Lap, Loading, Ran
from regcache.runtime.session import put_first
from regcache.runtime.tensorrt_network import collecting_logger, no_collection


class TensorRtRunner:
    """A serialized engine, loaded onto the GPU, with one input and static output types.

    `loading.model`: the engine's file. Raises MissingExtraError without the library or Polygraphy;
    InputError, with the library's own reason, when the file cannot be read or the engine was built
    for another GPU or version, or there is no GPU.
    """

    placement: dict[str, int] | None = None

    def __init__(self, loading: Loading) -> None:
        self.name = str(loading.model)
        self._trt, self._cuda = _import(loading)
        self._log = collecting_logger(self._trt)
        try:
            content = loading.model.read_bytes()
        except OSError as error:
            raise InputError(f"{self.name}: {error.strerror or error}") from error
        with no_collection():
            # Held as long as the engine, which needs it.
            self._runtime = self._trt.Runtime(self._log)
            self._engine = self._loaded(self._runtime.deserialize_cuda_engine(content))
            self._context = self._loaded(self._engine.create_execution_context())
        self._input, given = self._tensors()
        self._outputs = put_first(given, loading.outputs, self.name)
        batch = self._engine.get_tensor_shape(self._input)[0]
        self.fixed_batch: int | None = batch if batch > 0 else None
        self._arrays: dict[str, Any] = {}
        self._shape: tuple[int, ...] = ()
        with cuda_errors(self.name):
            self._stream = self._cuda.Stream()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for array in self._arrays.values():
            array.free()
        self._stream.free()
        del self._context, self._engine, self._runtime

    def run(self, images: NDArray[Any]) -> Ran:
        """Encode [B, *shape], copied from ordinary memory and the outputs back to it."""
        if images.dtype != self._dtype(self._input):
            raise InputError(f"{self.name}: takes {self._dtype(self._input)}, not {images.dtype}")
        with cuda_errors(self.name):
            if images.shape != self._shape:
                self._allocate(images.shape)
            return self._run(np.ascontiguousarray(images))

    def _run(self, images: NDArray[Any]) -> Ran:
        outputs = [self._host(name) for name in self._outputs]
        times = [time.perf_counter()]
        self._arrays[self._input].copy_from(images, self._stream)
        self._stream.synchronize()
        times.append(time.perf_counter())
        done = self._context.execute_async_v3(self._stream.ptr)
        self._stream.synchronize()
        times.append(time.perf_counter())
        if not done:
            raise InputError(f"{self.name}: {self._reason()}")
        for name, output in zip(self._outputs, outputs, strict=True):
            self._arrays[name].copy_to(output, self._stream)
        self._stream.synchronize()
        times.append(time.perf_counter())
        return Ran(outputs, Lap(*(float(part) for part in np.diff(times))))

    def _allocate(self, shape: tuple[int, ...]) -> None:
        """Memory on the GPU for images of a shape and for what comes out, at fixed addresses."""
        if not self._context.set_input_shape(self._input, shape):
            raise InputError(f"{self.name}: does not take {list(shape)}: {self._reason()}")
        for name in (self._input, *self._outputs):
            size = tuple(self._context.get_tensor_shape(name))
            if name not in self._arrays:
                self._arrays[name] = self._cuda.DeviceArray(dtype=self._dtype(name))
            array = self._arrays[name].resize(size)
            self._context.set_tensor_address(name, array.ptr)
        self._shape = shape

    def _loaded(self, made: Any) -> Any:
        if made is None:
            raise InputError(f"{self.name}: {self._trt.__name__} cannot load it: {self._reason()}")
        return made

    def _tensors(self) -> tuple[str, list[str]]:
        """The name of the image input, and those of the outputs in the engine's order."""
        engine, is_input = self._engine, self._trt.TensorIOMode.INPUT
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == is_input]
        if len(inputs) != 1:
            raise InputError(f"{self.name}: needs one image input, has {', '.join(inputs)}")
        return inputs[0], [name for name in names if name not in inputs]

    def _host(self, name: str) -> NDArray[Any]:
        return np.empty(tuple(self._context.get_tensor_shape(name)), self._dtype(name))

    def _dtype(self, name: str) -> np.dtype[Any]:
        kind: type[np.generic] = self._trt.nptype(self._engine.get_tensor_dtype(name))
        return np.dtype(kind)

    def _reason(self) -> str:
        return _tidy(self._log.errors[0]) if self._log.errors else "no reason given"


@contextmanager
def cuda_errors(name: str) -> Iterator[None]:
    """Turn what CUDA refuses inside the block (no memory, no driver) into an InputError."""
    from polygraphy.exception import PolygraphyException
    from polygraphy.logger import G_LOGGER

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):  # what it logs it also raises
            yield
    except PolygraphyException as error:
        code = first_line(error).partition(". To figure")[0]
        raise InputError(f"{name}: {code}") from error


def _import(loading: Loading) -> tuple[Any, Any]:
    """The library that runs the engine, and Polygraphy's arrays on the GPU."""
    module, extra = LIBRARIES[loading.runner]
    try:
        library = import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"runner {loading.runner}", extra=extra, module=module) from error
    try:
        from polygraphy import cuda
    except ImportError as error:
        raise MissingExtraError(
            f"runner {loading.runner}", extra="gpu", module="polygraphy"
        ) from error
    return library, cuda


def _tidy(message: str) -> str:
    """What a runtime logged, on one line without its own functions, source files and codes."""
    text = " ".join(message.split())
    text = re.sub(r"^.*?Error Code \d+: [\w ]+ \(", "", text)
    text = re.sub(r" *In [\w:]+ at /\S+ ?", "", text)
    return text.strip(" .()")
