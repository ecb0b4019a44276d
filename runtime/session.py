"""ONNX Runtime: one session per model, and what the CPU's integer kernels really compute."""

import functools
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from regcache.passes.errors import InputError
from regcache.passes.external_weights import KEPT
from regcache.passes.model_files import check_name
from regcache.runtime.device import CPU, LOG_NOTHING, Device, open_session

# The images an encoder may take, by ONNX Runtime's names.
INPUT_TYPES = {"tensor(float)": np.dtype(np.float32), "tensor(uint8)": np.dtype(np.uint8)}
_IMAGE_TYPES = [[name] for name in INPUT_TYPES]
# Bytes of weights from which memory is to hold no second copy: graphs keep them on disk.
LARGE = 200_000_000


class OrtSession:
    """An encoder loaded into ONNX Runtime, on the CPU or on a GPU.

    `model`: an ONNX file (a path keeps the peak memory lowest) or its bytes.
    `threads`: defaults to the CPUs this process may use.
    `integers`: False computes linears between Q/DQ pairs in float, rounded as written.
    `fixed_batch` is the model's batch size where the graph fixes it, else None; `input_dtype` that
    of the images it takes.
    `deployed`: True runs as ONNX Runtime does by default: freed buffers are kept for reuse, and
    threads spin while they wait for work. False leaves both to what else the machine does.
    `resting`: whether a deployed model's threads stop to spin as soon as a run ends: they spin on
    for 30 ms otherwise, and take CPUs from another model that is timed beside this one.
    `outputs`: the names of those that come first; the others follow in the file's order.
    `inputs`: how many inputs the model has; what the others take comes behind the images.
    `weights`: initializers that the bytes of the model leave out, by name. ONNX Runtime copies
    them, but for those of `in_files`: the bytes say where these lie in files in `folder`.
    `brief`: whether a few images are all that it will run, for which weights need no packing.
    `device`: a GPU has no integer kernels, and computes as for `integers` = False.
    Raises InputError, naming the file and the reason, when the model cannot be loaded, has no such
    output or not so many inputs of float32 (the images may be uint8). Use it as a context manager
    to free the weights early.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        threads: int | None = None,
        integers: bool = True,
        deployed: bool = False,
        resting: bool = False,
        outputs: Sequence[str] = (),
        inputs: int = 1,
        weights: Mapping[str, NDArray[Any]] | None = None,
        folder: Path | None = None,
        in_files: Collection[str] = (),
        brief: bool = False,
        device: Device = CPU,
    ) -> None:
        self.name = "the model in memory" if isinstance(model, bytes) else str(model)
        if not isinstance(model, bytes):
            check_name(model)
        integers = integers and not device.on_gpu
        options = cpu_session_options(threads, integers, deployed)
        if resting:
            options.add_session_config_entry("session.force_spinning_stop", "1")
        weights = weights or {}
        lent = {name: array for name, array in weights.items() if name not in in_files}
        self._weights = _lend(options, lent)
        # Without integer kernels, integers are in memory as the float numbers that they stand for.
        least = 1 if integers else 4
        sizes = (array.size * max(array.itemsize, least) for array in weights.values())
        if brief or sum(sizes) > LARGE:
            # Packed for its kernels weights are in memory twice; 2 % slower without (DINOv2-S).
            options.add_session_config_entry("session.disable_prepacking", "1")
        # It deletes a Relu before an FP8 QuantizeLinear, as if that began at zero.
        disabled = None if integers else ["ReluQuantRewrite"]
        self._device = device
        try:
            with _readable(model, folder) as source:
                self._session = open_session(source, device, options, disabled)
        except InputError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise InputError(f"{self.name}: ONNX Runtime: {_reason(error)}") from error
        taken = self._session.get_inputs()
        kinds = [item.type for item in taken]
        if kinds[:1] not in _IMAGE_TYPES or kinds[1:] != ["tensor(float)"] * (inputs - 1):
            found = ", ".join(f"{item.name}: {item.type}" for item in taken) or "none"
            raise InputError(f"{self.name}: needs one image input, float32 or uint8, has {found}")
        self.input_dtype = INPUT_TYPES[taken[0].type]
        self.input_name: str = taken[0].name
        self._other_inputs = [item.name for item in taken[1:]]
        self.input_shape: tuple[int | str | None, ...] = tuple(taken[0].shape)
        batch = self.input_shape[0] if self.input_shape else None
        self.fixed_batch: int | None = batch if isinstance(batch, int) else None
        given = [item.name for item in self._session.get_outputs()]
        self.output_names: list[str] = put_first(given, outputs, self.name)

    def run(self, images: NDArray[Any], *others: NDArray[np.float32]) -> list[NDArray[Any]]:
        """Encode images of the model's dtype and layout; outputs in the order of `output_names`.

        Where the model's batch is fixed, fewer images are filled up with copies of the last.

        Raises InputError when the dtype or shape is not the model's, or the model fails on it.
        """
        count, images = len(images), self.filled(images)
        if images.dtype != self.input_dtype:
            raise InputError(f"{self.name}: takes {self.input_dtype}, not {images.dtype}")
        if not _fits(images.shape, self.input_shape):
            raise InputError(
                f"{self.name}: takes {_shape(self.input_shape)}, not {_shape(images.shape)}"
            )
        feed = {self.input_name: images}
        feed |= zip(self._other_inputs, map(self.filled, others), strict=True)
        try:
            outputs: list[NDArray[Any]] = self._session.run(self.output_names, feed)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise InputError(
                f"{self.name}: ONNX Runtime on {_shape(images.shape)}: {_reason(error)}"
            ) from error
        if count < len(images):
            outputs = [output[:count] for output in outputs]
        return outputs

    def run_each(self, batches: Iterable[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
        """Encode batches one after the other, as `run` does."""
        return map(self.run, batches)

    def at_once(self, wanted: int) -> int:
        """How many of the `wanted` runs gain by sharing the session: on a GPU, which has a queue
        and memory of its own, one.
        """
        return 1 if self._device.on_gpu else wanted

    def filled(self, images: NDArray[Any]) -> NDArray[Any]:
        """The images, with copies of the last up to the batch size that the model fixes."""
        return fill_batch(images, self.fixed_batch)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        del self._session


def fill_batch(images: NDArray[Any], fixed: int | None) -> NDArray[Any]:
    """The images, with copies of the last up to the batch size `fixed`, if there is one."""
    missing = (fixed or 0) - len(images)
    if missing <= 0 or not len(images):
        return images
    return np.concatenate([images, np.repeat(images[-1:], missing, axis=0)])


def put_first(names: Sequence[str], first: Sequence[str], model: str) -> list[str]:
    """The names of a model's outputs, those of `first` in front. Raises InputError without one."""
    missing = [name for name in first if name not in names]
    if missing:
        raise InputError(f"{model}: has no output {missing[0]!r}, only {', '.join(names)}")
    return [*first, *(name for name in names if name not in first)]


def silence_runtime() -> None:
    """Keep ONNX Runtime's warnings off stderr in this process, also of sessions made elsewhere."""
    ort.set_default_logger_severity(LOG_NOTHING)


def available_cpus() -> int:
    """The number of CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def u8s8_saturates() -> bool:
    """Whether this CPU's kernels for uint8 activations and int8 weights give wrong sums.

    Without VNNI, ONNX Runtime adds pairs of products in 16 bits, which clip at 32,767.
    Measured, not read from the CPU's feature flags.
    """
    return not u8_matmul_exact(np.int8)


def u8_matmul_exact(weight: type[np.integer[Any]]) -> bool:
    """Whether ONNX Runtime's MatMul of uint8 by `weight` (np.uint8 or np.int8) has exact sums.

    Run at the extreme values, in both forms in which a quantized model reaches the kernels:
    MatMulInteger, and MatMul between DequantizeLinear nodes.
    """
    random = np.random.default_rng(0)
    low, high = np.iinfo(weight).min, np.iinfo(weight).max
    for rows, inner, columns in ((1, 64, 16), (7, 66, 24), (64, 128, 32), (97, 257, 33)):
        # Whole columns at either end clip surely; mixed ones meet the other orders of adding.
        weights = random.choice(np.array([low, high], weight), (inner, columns))
        weights[:, 0::3], weights[:, 1::3] = high, low
        images = np.full((rows, inner), 255, np.uint8)
        exact = images.astype(np.int64) @ weights.astype(np.int64)
        session = ort.InferenceSession(
            _probe_model(weights),
            cpu_session_options(threads=1, integers=True, deployed=False),
            providers=["CPUExecutionProvider"],
        )
        if any(not np.array_equal(found, exact) for found in session.run(None, {"x": images})):
            return False
    return True


def _probe_model(weights: NDArray[np.integer[Any]]) -> bytes:
    inner, columns = weights.shape
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w"], ["sums"]),
        helper.make_node("DequantizeLinear", ["x", "one", "x_zero"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["w", "one", "w_zero"], ["w_float"]),
        helper.make_node("MatMul", ["x_float", "w_float"], ["products"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, ["rows", inner])],
        [
            helper.make_tensor_value_info("sums", TensorProto.INT32, ["rows", columns]),
            helper.make_tensor_value_info("products", TensorProto.FLOAT, ["rows", columns]),
        ],
        [
            numpy_helper.from_array(weights, "w"),
            numpy_helper.from_array(np.ones((), np.float32), "one"),
            numpy_helper.from_array(np.zeros((), np.uint8), "x_zero"),
            numpy_helper.from_array(np.zeros((), weights.dtype), "w_zero"),
        ],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    return bytes(model.SerializeToString())


def cpu_session_options(
    threads: int | None, integers: bool = True, deployed: bool = False
) -> ort.SessionOptions:
    """Options of a silent session on the CPU; see OrtSession for what they mean."""
    options = ort.SessionOptions()
    options.log_severity_level = LOG_NOTHING
    options.intra_op_num_threads = threads or available_cpus()
    # Measured on DINOv2-S: the arena and its pattern planner cost memory and save no time.
    options.enable_cpu_mem_arena = options.enable_mem_pattern = deployed
    if not deployed:
        # A third of what several sessions take side by side, and all that a busy machine lacks.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not integers:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    return options


@contextmanager
def _readable(model: Path | bytes, folder: Path | None) -> Iterator[str | bytes]:
    """What ONNX Runtime reads: the bytes as a file for a while, if they name files in `folder`."""
    if not isinstance(model, bytes):
        yield os.fspath(model)
    elif folder is None:
        yield model
    else:
        descriptor, name = tempfile.mkstemp(prefix=KEPT, suffix=".onnx", dir=folder)
        try:
            with open(descriptor, "wb") as file:
                file.write(model)
            yield name
        finally:
            os.unlink(name)


def _lend(options: ort.SessionOptions, weights: Mapping[str, NDArray[Any]]) -> list[ort.OrtValue]:
    """Let a session find initializers that its model leaves out; it reads them while it lives."""
    values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(w)) for w in weights.values()]
    if values:
        options.add_external_initializers(list(weights), values)
    return values


def _fits(shape: tuple[int, ...], expected: tuple[int | str | None, ...]) -> bool:
    return len(shape) == len(expected) and all(
        have == want for have, want in zip(shape, expected, strict=True) if isinstance(want, int)
    )


def _shape(shape: tuple[int | str | None, ...]) -> str:
    return "[" + ", ".join("?" if side is None else str(side) for side in shape) + "]"


def _reason(error: Exception) -> str:
    """The first line of an ONNX Runtime error, without its codes and the file's name."""
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", str(error).strip())
    text = re.sub(r"^Load model from .*? failed: ?", "", text, flags=re.DOTALL)
    return text.splitlines()[0] if text else type(error).__name__
