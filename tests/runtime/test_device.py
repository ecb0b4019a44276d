"""Devices by name, what is said where CUDA is missing, and sessions that a GPU would get."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.pretended_cuda import PretendedCuda
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError
from regcache.runtime import device as device_module
from regcache.runtime.device import (
    CPU,
    CPU_PROVIDER,
    CUDA,
    Device,
    computing_on,
    device_name,
    find_device,
)
from regcache.runtime.session import OrtSession

GPU = Device(gpu=1)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(Spec(grid=4)).model(), path)
    return path


@pytest.mark.parametrize(
    ("text", "device"),
    [("cpu", CPU), ("cuda", Device(0)), ("cuda:0", Device(0)), ("cuda:12", Device(12))],
)
def test_names(text: str, device: Device) -> None:
    assert Device.parse(text) == device
    assert Device.parse(str(device)) == device
    assert device.on_gpu == (text != "cpu")
    assert device.arrays is None


@pytest.mark.parametrize(
    "text", ["", "gpu", "CPU", "cuda:", "cuda:-1", "cuda:1.0", "cuda:0 ", "cpu:0"]
)
def test_other_names_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^device '.*': must be cpu, cuda or cuda:N$"):
        find_device(text)


def test_the_cpu_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert find_device("cpu", algebra=True) is not None
    assert find_device("cpu", algebra=True) == CPU
    assert device_name(CPU) is None
    with computing_on(CPU):
        pass


def test_an_onnxruntime_without_cuda_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    for algebra in (False, True):
        with pytest.raises(InputError) as caught:
            find_device("cuda:1", algebra=algebra)
        assert str(caught.value).startswith(
            f"device cuda:1: onnxruntime {ort.__version__} here has no {CUDA}, only {CPU_PROVIDER}"
        )
        assert 'pip install "onnxruntime-gpu[cuda,cudnn]"' in str(caught.value)


def test_a_provider_that_does_not_load_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime goes on with the CPU here."""
    PretendedCuda(monkeypatch, loads=CPU_PROVIDER)
    with pytest.raises(
        InputError, match=rf"^device cuda:1: {CUDA} does not load and .*{CPU_PROVIDER}"
    ):
        find_device("cuda:1")


def test_what_onnxruntime_says_of_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedCuda(monkeypatch)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("/ort/cuda.cc:129 CUDA failure 101: invalid device ordinal\nMore of it")

    monkeypatch.setattr(ort, "InferenceSession", refuse)
    with pytest.raises(InputError, match=r"^device cuda:7: ONNX Runtime: .*ordinal$"):
        find_device("cuda:7")


@pytest.fixture
def torch_with_two(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """PyTorch that finds two GPUs, of which only the names are used."""
    cuda = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 2,
        get_device_name=lambda index: f"GPU number {index}",
    )
    fake = SimpleNamespace(cuda=cuda, __version__="2.99", __spec__=object())
    monkeypatch.setitem(sys.modules, "torch", fake)
    return fake


def test_arrays_go_where_pytorch_can_compute(
    monkeypatch: pytest.MonkeyPatch, torch_with_two: SimpleNamespace
) -> None:
    PretendedCuda(monkeypatch)
    found = find_device("cuda:1", algebra=True)
    assert found == Device(1, "cuda:1")
    assert device_name(found) == "GPU number 1"
    assert find_device("cuda:1") == Device(1)
    with pytest.raises(InputError, match=r"^device cuda:2: there are 2 GPUs, the last is cuda:1$"):
        find_device("cuda:2", algebra=True)
    torch_with_two.cuda.is_available = lambda: False
    with pytest.raises(InputError, match=r"^device cuda:0: PyTorch 2\.99 here finds no CUDA: "):
        find_device("cuda", algebra=True)


def test_without_pytorch_arrays_stay_with_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    PretendedCuda(monkeypatch)
    monkeypatch.setattr(device_module, "find_spec", lambda _: None)
    assert find_device("cuda", algebra=True) == Device(0)


def test_sessions_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """FP32 as written, kernels that repeat themselves, Q/DQ node by node."""
    images = TinyVit(Spec(grid=4)).images(3)
    truth = OrtSession(model, threads=1).run(images)
    seen = PretendedCuda(monkeypatch)
    with OrtSession(model, threads=1, device=GPU) as session:
        for found, wanted in zip(session.run(images), truth, strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert session.at_once(8) == 1
    (given,), (settings,) = seen.given, seen.settings
    assert given["providers"] == [(CUDA, GPU.providers[0][1])]
    assert given["providers"][0][1] == {
        "device_id": "1",
        "use_tf32": "0",
        "cudnn_conv_algo_search": "DEFAULT",
        "arena_extend_strategy": "kSameAsRequested",
    }
    assert given["enable_fallback"] == 0
    assert given["disabled_optimizers"] == ["ReluQuantRewrite"]
    assert settings.use_deterministic_compute
    assert settings.get_session_config_entry("session.disable_quant_qdq") == "1"
    assert capsys.readouterr().out == ""


def test_sessions_on_the_cpu_are_as_ever(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    seen = PretendedCuda(monkeypatch)
    with OrtSession(model, threads=1) as session:
        assert session.at_once(8) == 8
    assert seen.given[0]["providers"] == [(CPU_PROVIDER, {})]
    assert seen.given[0]["disabled_optimizers"] is None
    assert not seen.settings[0].use_deterministic_compute


@pytest.mark.torch
def test_products_are_exact_inside_the_block_alone() -> None:
    import torch

    torch.set_float32_matmul_precision("high")
    try:
        with computing_on(Device(arrays="cpu")):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
        refused = pytest.raises(InputError, match=r"^device cuda:1: 8 GB asked for$")
        with refused, computing_on(Device(1, "cuda:1")):
            raise torch.OutOfMemoryError("8 GB asked for\nand more")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_gpu_computes_what_the_cpu_does(model: Path) -> None:
    try:
        device = find_device("cuda")
    except InputError as error:
        pytest.skip(f"NOT CHECKED: {error}")
    images = TinyVit(Spec(grid=4)).images(5)
    truth = OrtSession(model, threads=1).run(images)
    with OrtSession(model, device=device) as session:
        first, again = session.run(images), session.run(images)
    for found, once_more, wanted in zip(first, again, truth, strict=True):
        np.testing.assert_array_equal(found, once_more)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
