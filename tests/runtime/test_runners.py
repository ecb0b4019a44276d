"""What is missing is said before anything is measured; the real libraries refuse in one line."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.open_runner import check_runner, open_runner, preload
from regcache.runtime.runners import Loading, RunnerName

GPU_RUNNERS = [name for name in RunnerName if name.on_gpu]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_the_cpu_is_always_there(tmp_path: Path) -> None:
    check_runner(RunnerName.ORT_CPU)
    preload(RunnerName.ORT_CPU)
    path = tmp_path / "tiny.onnx"
    onnx.save(TinyVit(Spec(grid=4)).model(), path)
    loading = Loading(RunnerName.ORT_CPU, path, 1, (2,), (3, 16, 16))
    images = loading.images(2)
    with open_runner(loading) as runner:
        ran = runner.run(images)
        assert (runner.name, runner.fixed_batch, runner.placement) == (str(path), None, None)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    for found, truth in zip(ran.outputs, session.run(None, {"pixel_values": images}), strict=True):
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-5)
    assert ran.lap is None
    with open_runner(replace(loading, outputs=("last_hidden_state",))) as runner:
        turned = runner.run(images).outputs
    for one, other in zip(turned, reversed(ran.outputs), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", GPU_RUNNERS)
def test_every_gpu_runner_is_refused_here(name: RunnerName) -> None:
    """By the real libraries, whichever of them are installed."""
    with pytest.raises((InputError, MissingExtraError)) as caught:
        check_runner(name)
    message = str(caught.value)
    assert message.startswith(f"runner {name}")
    assert "\n" not in message


@pytest.mark.parametrize(("name", "module", "extra"), [
    (RunnerName.TENSORRT, "tensorrt", "trt"),
    (RunnerName.TENSORRT_RTX, "tensorrt_rtx", "trt-rtx"),
    (RunnerName.TENSORRT_RTX, "polygraphy", "gpu"),
])  # fmt: skip
def test_a_missing_library_names_its_extra(
    monkeypatch: pytest.MonkeyPatch, name: RunnerName, module: str, extra: str
) -> None:
    real = importlib.util.find_spec

    def find(wanted: str) -> object:
        return None if wanted == module else real("numpy")

    monkeypatch.setattr("regcache.runtime.open_runner.find_spec", find)
    with pytest.raises(MissingExtraError) as caught:
        check_runner(name)
    assert str(caught.value) == f'runner {name} needs {module}: pip install "regcache[{extra}]"'


@pytest.mark.parametrize("name", [RunnerName.ORT_CUDA, RunnerName.ORT_TENSORRT])
def test_an_onnxruntime_without_the_provider_names_the_one_with_it(name: RunnerName) -> None:
    preload(name)
    if len(ort.get_available_providers()) > 2:
        pytest.skip("NOT CHECKED: this onnxruntime has GPU providers")
    with pytest.raises(InputError, match=r"has no \w+, only .*onnxruntime-gpu\[cuda,cudnn\]"):
        check_runner(name)


def test_images_are_the_same_every_time() -> None:
    loading = Loading(RunnerName.ORT_CPU, Path("m.onnx"), 1, (1, 4), (3, 8, 6))
    images = loading.images(4)
    assert images.shape == (4, 3, 8, 6)
    assert images.dtype == np.float32
    np.testing.assert_array_equal(images, loading.images(4))
    loading = Loading(RunnerName.ORT_CPU, Path("m.onnx"), 1, (1, 4), (8, 6, 3), "uint8")
    images = loading.images(4)
    assert images.shape == (4, 8, 6, 3)
    assert images.dtype == np.uint8
    assert np.ptp(images) > 200
