"""TensorRT's timing cache, with a stand-in for the library that needs a GPU."""

from pathlib import Path

import pytest

from regcache.compiler.artifact.engine_record import EngineKind
from regcache.compiler.engines import toolchain as build_toolchain
from regcache.compiler.engines.toolchain import BuildOptions, Toolchain, open_toolchain
from regcache.compiler.job.targets import Precision
from regcache.compiler.reporter import Reporter
from regcache.passes.errors import InputError
from regcache.runtime import tensorrt_engine
from regcache.runtime.engine_build import EngineBuild
from regcache.runtime.gpu import Gpu

OPTIONS = BuildOptions(engine=EngineKind.TENSORRT, max_batch=4)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with TensorRT and a GPU; returns the user's cache folder."""

    def build(
        model: Path, *, max_batch: int, opt_batch: int, known_timings: Path, new_timings: Path
    ) -> EngineBuild:
        known = known_timings.read_text() if known_timings.is_file() else ""
        if model.stem == "refused":
            new_timings.write_text("half")
            raise InputError(str(model))
        new_timings.write_text(f"{known}{model.stem} ")
        return EngineBuild(b"", "10.9", ("8.6",), (1, opt_batch, max_batch), (), (), 1.0, "G")

    monkeypatch.setattr(tensorrt_engine, "build_engine", build)
    monkeypatch.setattr(tensorrt_engine, "library_version", lambda: "10.9")
    monkeypatch.setattr(
        build_toolchain, "find_gpu", lambda: Gpu("NVIDIA RTX A4000", "8.6", "570", 1 << 34)
    )
    monkeypatch.setenv("REGCACHE_CACHE", str(tmp_path))
    return tmp_path


def open_tensorrt(precision: Precision = Precision.INT8) -> Toolchain:
    return open_toolchain(OPTIONS, precision, Reporter())


def test_timings_are_kept_by_version_and_gpu(machine: Path) -> None:
    toolchain = open_tensorrt()
    assert toolchain.description == "TensorRT 10.9 on NVIDIA RTX A4000"
    assert toolchain.facts == {
        "engine": "tensorrt",
        "version": "10.9",
        "gpu": "NVIDIA RTX A4000",
        "max_batch": 4,
        "opt_batch": 1,
    }
    assert toolchain.build(Path("one.onnx")).batch == (1, 1, 4)
    toolchain.build(Path("two.onnx"))
    with pytest.raises(InputError):
        toolchain.build(Path("refused.onnx"))
    (cache,) = (machine / "tensorrt-timings").iterdir()
    assert cache.name == "10.9-nvidia-rtx-a4000.cache"
    assert cache.read_text() == "one two "


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("precision", [Precision.FP8, Precision.MXFP8, Precision.NVFP4])
def test_a_gpu_without_narrow_floats_is_refused(precision: Precision) -> None:
    why = rf"A4000: compute capability 8\.6 has no {precision.value.upper()}$"
    with pytest.raises(InputError, match=why):
        open_tensorrt(precision)
