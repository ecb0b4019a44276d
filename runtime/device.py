"""Where graphs run and arrays live: the CPU, or one GPU that CUDA sees."""

import contextlib
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from regcache.passes.errors import InputError, first_line
from regcache.runtime.plain_model import plain_model

CUDA, CPU_PROVIDER = "CUDAExecutionProvider", "CPUExecutionProvider"
INSTALL_GPU = 'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]"'
# Above "error": whatever goes wrong is also raised, and a log line would repeat it.
LOG_NOTHING = 4


@dataclass(frozen=True)
class Device:
    """The CPU, or the GPU that CUDA gives the number `gpu`.

    `arrays`: PyTorch's name of where dense arrays are multiplied; None: NumPy multiplies them.
    """

    gpu: int | None = None
    arrays: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Device":
        """The device that is called "cpu", "cuda" (the first GPU) or "cuda:N".

        Raises InputError for any other text. Whether there is such a GPU, find_device asks.
        """
        if text == "cpu":
            return cls()
        found = re.fullmatch(r"cuda(?::(\d{1,4}))?", str(text))
        if found is None:
            raise InputError(f"device {text!r}: must be cpu, cuda or cuda:N")
        return cls(int(found[1] or 0))

    def __str__(self) -> str:
        return "cpu" if self.gpu is None else f"cuda:{self.gpu}"

    @property
    def on_gpu(self) -> bool:
        """Whether graphs run on a GPU."""
        return self.gpu is not None

    @property
    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """ONNX Runtime's provider and its options: FP32 as written, and the same at every run.

        TF32 has 10 bits of mantissa; convolutions would be chosen by which was fastest just then.
        """
        if self.gpu is None:
            return [(CPU_PROVIDER, {})]
        options = {
            "device_id": str(self.gpu),
            "use_tf32": "0",
            "cudnn_conv_algo_search": "DEFAULT",
            "arena_extend_strategy": "kSameAsRequested",
        }
        return [(CUDA, options)]


CPU = Device()


def find_device(text: str, *, algebra: bool = False) -> Device:
    """The device that `text` names, once it has computed something.

    `algebra`: dense arrays go to it too, where PyTorch is installed; NumPy keeps them elsewhere.
    Raises InputError, in one line that says what is missing and what to do, where ONNX Runtime, or
    PyTorch, has no CUDA, or there is no such GPU.
    """
    device = Device.parse(text)
    if not device.on_gpu:
        return device
    check_offered(CUDA, f"device {device}")
    if algebra and find_spec("torch") is not None:
        _check_torch(device)
        device = replace(device, arrays=str(device))
    _check_computes(device)
    return device


@contextlib.contextmanager
def computing_on(device: Device) -> Iterator[None]:
    """Inside the block, PyTorch multiplies FP32 as it is, whatever the process chose before.

    A device without memory for what it is given is an InputError.
    """
    if device.arrays is None:
        yield
        return
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(f"device {device}: {first_line(error)}") from error
    finally:
        torch.set_float32_matmul_precision(before)


def device_name(device: Device) -> str | None:
    """What the maker calls the GPU; None for the CPU, and where nothing here can say."""
    if device.arrays is None or device.gpu is None:
        return None
    import torch

    return str(torch.cuda.get_device_name(device.gpu))


def load_libraries() -> None:
    """Load CUDA from its wheels, where ONNX Runtime's own loader does not look."""
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def open_session(
    model: str | bytes, device: Device, settings: Any, disabled: list[str] | None = None
) -> Any:
    """An onnxruntime.InferenceSession of a file or its bytes on the device.

    `settings`: its SessionOptions; `disabled`: optimizers. Raises InputError where CUDA's provider
    does not load and ONNX Runtime goes on without it, and whatever else ONNX Runtime raises.
    """
    if device.on_gpu:
        load_libraries()
        settings.use_deterministic_compute = True
    with plain_model(model, on_gpu=device.on_gpu) as source:
        session = ort.InferenceSession(
            source,
            settings,
            providers=device.providers,
            disabled_optimizers=disabled,
            enable_fallback=0,
        )
    check_loaded(session, device.providers[0][0], f"device {device}")
    return session


def check_offered(provider: str, who: str) -> None:
    """Raise InputError, for `who` asks, where the installed ONNX Runtime has no such provider.

    The message ends with the command that installs one.
    """
    found = ort.get_available_providers()
    if provider not in found:
        raise InputError(
            f"{who}: onnxruntime {ort.__version__} here has no {provider}, only "
            f"{', '.join(found)}: {INSTALL_GPU}"
        )


def check_loaded(session: Any, provider: str, who: str) -> None:
    """Raise InputError, for `who` asks, where a session went on without the provider."""
    loaded = session.get_providers()[0]
    if loaded != provider:
        raise InputError(
            f"{who}: {provider} does not load and ONNX Runtime fell back to {loaded}: are "
            f"CUDA, cuDNN and the driver those it was built for? {INSTALL_GPU}"
        )


def _check_torch(device: Device) -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            f"device {device}: PyTorch {torch.__version__} here finds no CUDA: install a build for "
            "CUDA, and a driver that it takes"
        )
    count = torch.cuda.device_count()
    if device.gpu is not None and device.gpu >= count:
        raise InputError(f"device {device}: there are {count} GPUs, the last is cuda:{count - 1}")


def _check_computes(device: Device) -> None:
    """Multiply two numbers there."""
    shape = [1, 1]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "x"], ["y"])],
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    settings = ort.SessionOptions()
    settings.log_severity_level = LOG_NOTHING
    try:
        session = open_session(model.SerializeToString(), device, settings)
        session.run(None, {"x": np.ones(shape, np.float32)})
    except InputError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise InputError(f"device {device}: ONNX Runtime: {first_line(error)}") from error
