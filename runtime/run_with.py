"""What runs an artifact: ONNX Runtime, or OpenVINO with its options; opens a model in either."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, Self

from numpy.typing import NDArray

from regcache.passes.errors import InputError
from regcache.runtime.device import CPU, Device
from regcache.runtime.openvino_options import OpenVinoOptions, check_openvino
from regcache.runtime.session import OrtSession


class RuntimeName(StrEnum):
    """A library that computes an encoder's outputs."""

    ONNXRUNTIME = "onnxruntime"
    OPENVINO = "openvino"


@dataclass(frozen=True)
class RunWith:
    """A runtime, and how it is used; `runtime` None stands for the one that a target names."""

    runtime: RuntimeName | None = None
    openvino: OpenVinoOptions = field(default_factory=OpenVinoOptions)

    def settle(self, own: RuntimeName, device: Device) -> RuntimeName:
        """The runtime to use: the one that was asked for, else `own`, the target's.

        Raises MissingExtraError where it is OpenVINO and that is not installed, and InputError for
        options or a device that the runtime does not have.
        """
        chosen = self.runtime or own
        if chosen is RuntimeName.OPENVINO:
            if device.on_gpu:
                other = f"--device cpu, or --runtime {RuntimeName.ONNXRUNTIME.value}"
                raise InputError(f"OpenVINO runs on the CPU, not on {device}: {other}")
            check_openvino("running in OpenVINO")
        elif self.openvino != OpenVinoOptions():
            raise InputError(
                "an inference precision, a hint and a model cache are OpenVINO's: "
                "--runtime openvino"
            )
        return chosen


class Session(Protocol):
    """An encoder loaded into a runtime; a context manager that frees it.

    `fixed_batch`: the model's batch size where the graph fixes it, else None.
    """

    name: str
    fixed_batch: int | None
    output_names: list[str]

    def run(self, images: NDArray[Any]) -> list[NDArray[Any]]:
        """Encode a batch; outputs in the order of `output_names`."""

    def run_each(self, batches: Iterable[NDArray[Any]]) -> Iterator[list[NDArray[Any]]]:
        """Encode batches, in order."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def open_session(
    model: Path,
    runtime: RuntimeName,
    *,
    threads: int | None,
    outputs: Sequence[str],
    integers: bool = True,
    deployed: bool = False,
    device: Device = CPU,
    openvino: OpenVinoOptions | None = None,
) -> Session:
    """Load an ONNX file; `integers`, `deployed` and `device` are ONNX Runtime's, see OrtSession.

    Raises InputError, naming the file and the reason, when it cannot be loaded.
    """
    if runtime is RuntimeName.OPENVINO:
        from regcache.runtime.openvino_session import OpenVinoSession

        return OpenVinoSession(model, threads=threads, openvino=openvino, outputs=outputs)
    return OrtSession(
        model,
        threads=threads,
        integers=integers,
        outputs=outputs,
        device=device,
        deployed=deployed,
    )
