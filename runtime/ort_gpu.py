"""ONNX Runtime on a GPU: inputs and outputs bound to device memory, copies timed apart.

ONNX Runtime runs on the CPU what a provider does not take, and everything where the provider does
not load, without an error: where every node went is asked, and a product on the CPU is refused.
"""

import re
import time
from collections import Counter
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from regcache.passes.errors import InputError, first_line
from regcache.runtime.device import (
    CPU_PROVIDER,
    CUDA,
    LOG_NOTHING,
    check_loaded,
    check_offered,
    load_libraries,
)
from regcache.runtime.plain_model import plain_model
from regcache.runtime.runners import Lap, Loading, Ran, RunnerName
from regcache.runtime.session import put_first

TENSORRT = "TensorrtExecutionProvider"
_PROVIDERS = {RunnerName.ORT_CUDA: CUDA, RunnerName.ORT_TENSORRT: TENSORRT}
_PRODUCT = re.compile("MatMul|Gemm|Conv|Attention")


def check_provider(name: RunnerName) -> None:
    """Check that the installed ONNX Runtime was built with a runner's provider.

    Raises InputError with the command that installs such a one.
    """
    check_offered(_PROVIDERS[name], f"runner {name}")


def provider_of(loading: Loading) -> tuple[str, dict[str, str], str]:
    """The provider for a model, its options, and ONNX Runtime's name of its device.

    TensorRT may compute in FP16 and INT8 what the file does not bind to FP32, in the float model
    as well, and builds one engine for all batch sizes, tuned for the first.
    """
    options = {"device_id": "0"}
    if loading.runner is RunnerName.ORT_TENSORRT:
        name, sizes = _input_name(loading), loading.batches
        for which, batch in (("min", min(sizes)), ("opt", sizes[0]), ("max", max(sizes))):
            shape = "x".join(map(str, (batch, *loading.shape)))
            options[f"trt_profile_{which}_shapes"] = f"{name}:{shape}"
        options |= {"trt_fp16_enable": "True", "trt_int8_enable": "True"}
    return _PROVIDERS[loading.runner], options, "cuda"


class OrtDeviceRunner:
    """A model in an ONNX Runtime provider, its images and outputs in the provider's memory.

    `provider`, `options`: ONNX Runtime's names; `device`: of its memory, "cuda" or "cpu".
    Raises InputError when the model cannot be loaded, the provider was not, or a matrix product
    would run elsewhere. `placement` says how many nodes run where.
    """

    def __init__(
        self, loading: Loading, provider: str, options: Mapping[str, str], device: str
    ) -> None:
        self.name = str(loading.model)
        self._device = device
        self._session = _session(loading, provider, options)
        check_loaded(self._session, provider, f"runner {loading.runner}")
        self.placement: dict[str, int] | None = _placement(self._session, provider, self.name)
        inputs = self._session.get_inputs()
        self._input = inputs[0].name
        batch = inputs[0].shape[0]
        self.fixed_batch: int | None = batch if isinstance(batch, int) else None
        given = [output.name for output in self._session.get_outputs()]
        self._outputs = put_first(given, loading.outputs, self.name)
        self._images: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        del self._images, self._session

    def run(self, images: NDArray[Any]) -> Ran:
        """Encode [B, *shape], copied from ordinary memory and the outputs back to it."""
        try:
            binding = self._bind(images)
            times = [time.perf_counter()]
            self._images.update_inplace(images)
            binding.synchronize_inputs()
            times.append(time.perf_counter())
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
            times.append(time.perf_counter())
            outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
            times.append(time.perf_counter())
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise InputError(f"{self.name}: ONNX Runtime: {first_line(error)}") from error
        return Ran(outputs, Lap(*(float(part) for part in np.diff(times))))

    def _bind(self, images: NDArray[Any]) -> Any:
        if self._images is None or tuple(self._images.shape()) != images.shape:
            self._images = ort.OrtValue.ortvalue_from_shape_and_type(
                list(images.shape), images.dtype.type, self._device, 0
            )
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(self._input, self._images)
        for name in self._outputs:  # they come back in the order in which they are bound
            binding.bind_output(name, self._device, 0)
        return binding


def _session(loading: Loading, provider: str, options: Mapping[str, str]) -> Any:
    settings = ort.SessionOptions()
    settings.log_severity_level = LOG_NOTHING
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if provider != CPU_PROVIDER:
        _load_libraries(provider)
    on_gpu, model = provider != CPU_PROVIDER, str(loading.model)
    try:
        with plain_model(model, on_gpu=on_gpu) as source:
            return ort.InferenceSession(
                source, settings, providers=[(provider, dict(options))], enable_fallback=0
            )
    except Exception as error:  # ONNX Runtime's exceptions share no other base
        raise InputError(
            f"runner {loading.runner}: {loading.model}: ONNX Runtime: {first_line(error)}"
        ) from error


def _load_libraries(provider: str) -> None:
    """Load CUDA, and TensorRT, from their wheels."""
    load_libraries()
    if provider == TENSORRT and find_spec("tensorrt") is not None:
        import tensorrt  # noqa: F401


def _placement(session: Any, provider: str, name: str) -> dict[str, int]:
    """How many nodes each provider computes."""
    if not hasattr(session, "get_provider_graph_assignment_info"):
        raise InputError(f"onnxruntime {ort.__version__} does not say where nodes run; 1.24 does")
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
        if part.ep_name == provider:
            continue
        for node in part.get_nodes():
            if _PRODUCT.search(node.op_type):
                raise InputError(
                    f"{name}: {provider} does not take {node.op_type} {node.name!r}: "
                    f"ONNX Runtime would run it on {part.ep_name}"
                )
    return dict(counts)


def _input_name(loading: Loading) -> str:
    try:
        graph = onnx.load(loading.model, load_external_data=False).graph
    except Exception as error:  # protobuf's and the system's share no other base
        raise InputError(f"{loading.model}: {first_line(error)}") from error
    return str(graph.input[0].name)
