"""The GPU through NVML: what it says, which one is chosen, and that there is none."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime import gpu
from regcache.runtime.gpu import Gpu, find_gpu, used_memory


def test_none_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the real NVML, or because it is hidden from it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    with pytest.raises(InputError, match=r"^no GPU: ") as caught:
        find_gpu()
    assert "\n" not in str(caught.value)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(MissingExtraError, match=r"needs nvidia-ml-py: pip install .*\[gpu\]"):
        find_gpu()


class FakeNvml:
    """NVML of a machine with two GPUs, under the names that the real one has."""

    def __init__(self) -> None:
        import pynvml

        self.NVMLError: type[Exception] = pynvml.NVMLError
        self.not_found = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        self.open = 0

    def nvmlInit(self) -> None:  # noqa: N802
        self.open += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.open -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        if index > 1:
            raise self.not_found
        return f"GPU {index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        return uuid

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return handle

    def nvmlDeviceGetCudaComputeCapability(self, _handle: str) -> tuple[int, int]:  # noqa: N802
        return 8, 9

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, _handle: str) -> Any:  # noqa: N802
        return SimpleNamespace(total=24, used=5)


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> FakeNvml:
    import pynvml

    fake = FakeNvml()
    for name in vars(FakeNvml):
        assert name.startswith("_") or hasattr(pynvml, name)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


@pytest.mark.parametrize(
    ("visible", "name"),
    [(None, "GPU 0"), ("1,0", "GPU 1"), ("GPU-aa-bb", "GPU-aa-bb"), (" 0", "GPU 0")],
)
def test_the_gpu_that_cuda_would_use(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str | None, name: str
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert find_gpu() == Gpu(name, "8.9", "580.1", 24)
    assert used_memory() == 5
    assert nvml.open == 0


@pytest.mark.parametrize(("visible", "reason"), [("", "hides them all"), ("7", "no usable GPU: ")])
def test_a_gpu_that_is_not_there(
    nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch, visible: str, reason: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(InputError, match=reason), gpu.open_device():
        pass
    assert nvml.open == 0
