"""Engines on the real TensorRT-RTX up to the GPU, and behind it on memory of the host."""

import ctypes
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from support.building import has_gpu, needs_tensorrt
from support.tiny_vit import Spec, TinyVit

from regcache.passes.errors import InputError, MissingExtraError
from regcache.runtime.runners import Loading, RunnerName
from regcache.runtime.tensorrt_rtx import build_engine
from regcache.runtime.trt_runner import TensorRtRunner, cuda_errors


def loading(path: Path, runner: RunnerName = RunnerName.TENSORRT_RTX) -> Loading:
    return Loading(runner, path, 1, (1, 4), (3, 8, 8))


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        TensorRtRunner(loading(path))
    where, _, reason = str(caught.value).partition(": ")
    assert where == str(path)
    assert "\n" not in reason
    return reason


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine")
    onnx.save(TinyVit(Spec()).model(), folder / "tiny.onnx")
    built = build_engine(folder / "tiny.onnx", compute_capabilities=["8.6"])
    path = folder / "tiny.engine"
    path.write_bytes(built.engine)
    return path


@needs_tensorrt
class TestRealEngines:
    def test_without_a_gpu_the_library_says_so(
        self, engine: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        if has_gpu():
            pytest.skip("NOT CHECKED: there is a GPU")
        reason = refusal(engine)
        assert reason.startswith("tensorrt_rtx cannot load it: cudaError ")
        assert "_src" not in reason
        assert capfd.readouterr() == ("", "")

    def test_what_is_no_engine(self, engine: Path, tmp_path: Path) -> None:
        cut = tmp_path / "cut.engine"
        cut.write_bytes(engine.read_bytes()[:200])
        assert "cannot load it: Serialization assertion" in refusal(cut)
        assert refusal(tmp_path / "none.engine") == "No such file or directory"

    def test_what_is_called_exists(self) -> None:
        import tensorrt_rtx as trt

        names = {
            trt.Runtime: ["deserialize_cuda_engine"],
            trt.ICudaEngine: [
                "create_execution_context",
                "get_tensor_dtype",
                "get_tensor_mode",
                "get_tensor_name",
                "get_tensor_shape",
                "num_io_tensors",
            ],
            trt.IExecutionContext: [
                "execute_async_v3",
                "get_tensor_shape",
                "set_input_shape",
                "set_tensor_address",
            ],
        }
        for kind, members in names.items():
            assert set(members) <= set(dir(kind))
        assert np.dtype(trt.nptype(trt.DataType.FLOAT)) == np.float32


def test_a_missing_library_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingExtraError, match=r"needs tensorrt: .*regcache\[trt\]"):
        TensorRtRunner(loading(tmp_path / "m.engine", RunnerName.TENSORRT))


def test_what_cuda_refuses_is_one_line() -> None:
    from polygraphy.exception import PolygraphyException

    with pytest.raises(InputError, match=r"^m\.engine: CUDA Error: 2$"), cuda_errors("m.engine"):
        raise PolygraphyException("CUDA Error: 2. To figure out what this means, read\nthis")


class HostMemory:
    """Polygraphy's CUDA wrapper, on memory of this process."""

    def __init__(self) -> None:
        self.blocks: dict[int, Any] = {}
        self.waits = 0

    def create_stream(self) -> int:
        return 7

    def destroy_stream(self, ptr: int) -> None:
        assert ptr == 7

    def stream_synchronize(self, ptr: int) -> None:
        assert ptr == 7
        self.waits += 1

    def malloc(self, size: int) -> int:
        block = ctypes.create_string_buffer(size)
        self.blocks[ctypes.addressof(block)] = block
        return ctypes.addressof(block)

    def free(self, ptr: int) -> None:
        if ptr:
            del self.blocks[ptr]

    def memcpy(self, dst: int, src: int, nbytes: int, kind: Any, stream_ptr: int) -> None:
        assert stream_ptr == 7
        ctypes.memmove(dst, src, nbytes)


class Engine:
    """Halves images [B, 3, 8, 8] into `half` (float32), and sums them into `sum` (float16)."""

    num_io_tensors = 3
    names = ("images", "half", "sum")

    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = (-1, 3, 8, 8)
        self.fails = False

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> str:
        return "in" if name == "images" else "out"

    def get_tensor_dtype(self, name: str) -> type[np.generic]:
        return np.float16 if name == "sum" else np.float32

    def create_execution_context(self) -> "Engine":
        return self

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape[:1] if name == "sum" else self.shape

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert name == "images"
        if shape[1:] != (3, 8, 8) or shape[0] > 4:
            return False
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        images, half, total = (self._array(name) for name in self.names)
        half[:] = images / 2
        total[:] = images.sum(axis=(1, 2, 3))
        return not self.fails

    def _array(self, name: str) -> Any:
        shape, dtype = self.get_tensor_shape(name), np.dtype(self.get_tensor_dtype(name))
        size = int(np.prod(shape)) * dtype.itemsize
        memory: Any = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype).reshape(shape)


class TestOnHostMemory:
    """The runner's own steps, with Polygraphy's real arrays, on a GPU that is none."""

    @pytest.fixture
    def memory(self, monkeypatch: pytest.MonkeyPatch) -> HostMemory:
        fake = HostMemory()
        monkeypatch.setattr("polygraphy.cuda.cuda.G_CUDA", fake)
        return fake

    @pytest.fixture
    def fake(self, monkeypatch: pytest.MonkeyPatch) -> Engine:
        class Runtime:
            def __init__(self, log: Any) -> None:
                self.log = log

            def deserialize_cuda_engine(self, content: bytes) -> Engine:
                assert content == b"engine"
                return halving

        class Logger:
            ERROR, INTERNAL_ERROR, WARNING = range(3)

        halving, module = Engine(), ModuleType("tensorrt")
        vars(module).update(
            ILogger=Logger, Runtime=Runtime, TensorIOMode=type("Mode", (), {"INPUT": "in"}),
            nptype=lambda dtype: dtype,
        )  # fmt: skip
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        return halving

    @pytest.fixture
    def runner(self, memory: HostMemory, fake: Engine, tmp_path: Path) -> Iterator[TensorRtRunner]:
        path = tmp_path / "m.engine"
        path.write_bytes(b"engine")
        with TensorRtRunner(loading(path, RunnerName.TENSORRT)) as runner:
            yield runner
        assert not memory.blocks

    def test_images_go_there_and_outputs_come_back(
        self, runner: TensorRtRunner, memory: HostMemory
    ) -> None:
        assert runner.fixed_batch is None
        for batch in (1, 4, 4, 2):
            images = np.random.default_rng(batch).random((batch, 3, 8, 8), np.float32)
            waits = memory.waits
            ran = runner.run(images)
            np.testing.assert_array_equal(ran.outputs[0], images / 2)
            np.testing.assert_allclose(ran.outputs[1], images.sum(axis=(1, 2, 3)), rtol=1e-2)
            assert ran.outputs[1].dtype == np.float16
            assert ran.lap is not None
            assert min(ran.lap.to_device, ran.lap.compute, ran.lap.to_host) > 0
            assert memory.waits == waits + 3  # each part is waited for, so that it counts apart

    def test_outputs_in_the_order_asked_for(self, runner: TensorRtRunner, tmp_path: Path) -> None:
        images = np.random.default_rng(0).random((2, 3, 8, 8), np.float32)
        plain, last = runner.run(images).outputs, runner._outputs[-1]
        turned = replace(loading(tmp_path / "m.engine", RunnerName.TENSORRT), outputs=(last,))
        with TensorRtRunner(turned) as other:
            found = other.run(images).outputs
        for one, truth in zip(found, reversed(plain), strict=True):
            np.testing.assert_array_equal(one, truth)

    def test_a_view_of_images_is_copied_whole(self, runner: TensorRtRunner) -> None:
        images = np.random.default_rng(0).random((4, 3, 8, 8), np.float32)[::2]
        np.testing.assert_array_equal(runner.run(images).outputs[0], images / 2)

    def test_other_shapes_are_refused(self, runner: TensorRtRunner) -> None:
        with pytest.raises(InputError, match=r"m\.engine: does not take \[5, 3, 8, 8\]"):
            runner.run(np.zeros((5, 3, 8, 8), np.float32))

    def test_another_dtype_is_refused(self, runner: TensorRtRunner) -> None:
        with pytest.raises(InputError, match=r"m\.engine: takes float32, not uint8"):
            runner.run(np.zeros((1, 3, 8, 8), np.uint8))

    def test_a_failed_run_is_said(self, runner: TensorRtRunner, fake: Engine) -> None:
        fake.fails = True
        with pytest.raises(InputError, match="no reason given"):
            runner.run(np.zeros((1, 3, 8, 8), np.float32))

    def test_two_inputs_are_refused(
        self, memory: HostMemory, fake: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(fake, "get_tensor_mode", lambda _name: "in")
        (tmp_path / "m.engine").write_bytes(b"engine")
        with pytest.raises(InputError, match="needs one image input, has images, half, sum"):
            TensorRtRunner(loading(tmp_path / "m.engine", RunnerName.TENSORRT))
        assert not memory.blocks
