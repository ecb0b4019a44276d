"""`--device`: what it refuses, which sessions it moves, and that decisions stay the same."""

import json
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
from support.command_line import assert_refused, run_regcache
from support.pretended_cuda import PretendedCuda
from support.tiny_source import RECIPE, SPEC, photos
from support.tiny_vit import TinyVit

import regcache
from regcache.compiler.artifact.manifest import DeviceRecord, Manifest
from regcache.compiler.artifact.read_manifest import read_manifest
from regcache.compiler.job.options import CompileOptions
from regcache.compiler.pipeline import compile_encoder
from regcache.compiler.reporter import Reporter
from regcache.export.onnx_file import sidecar
from regcache.passes.errors import InputError
from regcache.runtime import device as device_module
from regcache.runtime.device import CPU_PROVIDER, Device
from regcache.runtime.session import u8s8_saturates

pytestmark = pytest.mark.xdist_group("device")  # one worker makes the artifacts for all

INT8: dict[str, Any] = {"target": "tensorrt", "registers": "off"}
KINDS: dict[str, dict[str, Any]] = {
    "int8": INT8,
    "fp8": INT8 | {"precision": "fp8"},
    "w4a16": {"precision": "w4a16", "registers": "off"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device")
    photos(folder / "images", 18, seed=1)
    onnx.save(TinyVit(SPEC).model(), folder / "tiny.onnx")
    sidecar(folder / "tiny.onnx").write_text(RECIPE.to_json())
    return folder


def options_of(folder: Path, **more: Any) -> CompileOptions:
    plain = {"source": str(folder / "tiny.onnx"), "images": str(folder / "images"), "threads": 1}
    return CompileOptions.model_validate(plain | {"accept_slower": True} | more)


def compiled(folder: Path, name: str, found: Device | None = None, **more: Any) -> Manifest:
    return compile_encoder(options_of(folder, **more), folder / name, Reporter(), found)


@pytest.fixture(scope="module")
def on_cpu(folder: Path) -> dict[str, Manifest]:
    """The artifacts cpu-KIND, by kind."""
    return {kind: compiled(folder, f"cpu-{kind}", **more) for kind, more in KINDS.items()}


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    """CUDA without PyTorch."""
    monkeypatch.setattr(device_module, "find_spec", lambda _: None)
    u8s8_saturates()  # it is measured once a process
    return PretendedCuda(monkeypatch)


COMMANDS = {
    "compile": ("compile", "none.onnx", "--images", "none", "-o", "none"),
    "dry run": ("compile", "none.onnx", "--images", "none", "-o", "none", "--dry-run"),
    "inspect": ("inspect", "none.onnx", "--images", "none"),
    "parity": ("parity", "none", "--images", "none"),
    "reproduce": ("reproduce", "--models", "none.onnx", "--imagenet", "none", "--images", "more"),
    "reproduce two": (
        *("reproduce", "--models", "none.onnx,more.onnx", "--imagenet", "none", "--images", "more"),
        *("--classnames", "none"),
    ),
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_without_cuda_nothing_is_read(
    monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    done = run_regcache(*command, "--device", "cuda:3")
    assert_refused(done, "device cuda:3: onnxruntime ", "has no CUDAExecutionProvider")
    assert done.err.count("\n") == 1
    assert_refused(run_regcache(*command, "--device", "gpu"), "device 'gpu': must be cpu, cuda or")
    assert not Path("none").exists()


def test_the_interface_refuses_it_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU_PROVIDER])
    missing = pytest.raises(InputError, match=r"^device cuda:0: .* has no CUDAExecutionProvider")
    with missing:
        regcache.compile("none.onnx", "none", "none", device="cuda")
    with missing:
        regcache.inspect("none.onnx", "none", device="cuda")
    with missing:
        regcache.parity("none", "none", device="cuda")
    with missing:
        regcache.load("none", device="cuda")
    with pytest.raises(InputError, match=r"^device 0: must be cpu"):
        regcache.load("none", device=0)  # type: ignore[arg-type]


def test_names_are_written_in_full(folder: Path) -> None:
    assert options_of(folder).device == "cpu"
    assert options_of(folder, device="cuda").device == "cuda:0"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tensorrt", "ort-cpu"])
def test_all_of_a_compilation_moves_but_what_is_the_cpus(
    folder: Path, cuda: PretendedCuda, target: str
) -> None:
    """With registers searched for; what the pretended GPU computes gives the same bytes."""
    compiled(folder, f"plain-{target}", target=target)
    cuda.clear()
    manifest = compiled(folder, f"gpu-{target}", target=target, device="cuda")
    assert manifest.options.device == "cuda:0"
    assert manifest.device == DeviceRecord(gpu=None, algebra="numpy")
    here, there = cuda.ran(on_gpu=False), cuda.ran(on_gpu=True)
    assert {"float.onnx", ""} <= there
    own = {"model.onnx"} if target == "ort-cpu" else set()
    assert ("model.onnx" in there) == (target == "tensorrt")
    # Adopting compares a file with its original, the speed check with float; in memory are blocks
    # that make keys and values of a few registers.
    assert here == {"tiny.onnx", "float.onnx", ""} | own
    assert cuda.models.count("") > 20  # calibration and the search
    plain, moved = (folder / f"{one}-{target}" / "model.onnx" for one in ("plain", "gpu"))
    assert plain.read_bytes() == moved.read_bytes()


@pytest.mark.slow
def test_what_comes_after_moves_too(
    folder: Path, on_cpu: dict[str, Manifest], cuda: PretendedCuda
) -> None:
    """The graph in memory is the one that asks whether CUDA computes, or canonical float."""
    images = folder / "images"
    regcache.inspect(folder / "tiny.onnx", images, device="cuda")
    assert cuda.ran(on_gpu=True) == {""}
    for kind, moves in (("int8", True), ("w4a16", False)):
        cuda.clear()
        plain = regcache.parity(folder / f"cpu-{kind}", images, per_layer=True)
        assert not cuda.ran(on_gpu=True)
        cuda.clear()
        moved = regcache.parity(folder / f"cpu-{kind}", images, per_layer=True, device="cuda")
        assert moved.cosine_mean == pytest.approx(plain.cosine_mean, abs=1e-6)
        assert cuda.ran(on_gpu=True) == {"float.onnx", ""} | ({"model.onnx"} if moves else set())
        assert cuda.ran(on_gpu=False) == (set() if moves else {"model.onnx"})
        cuda.clear()
        with regcache.load(folder / f"cpu-{kind}", device="cuda") as encoder:
            assert encoder.embed(images / "00.png").shape == (1, SPEC.width)
        assert cuda.ran(on_gpu=True) == {"model.onnx", ""}


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_pytorch_decides_as_numpy_does(
    folder: Path, on_cpu: dict[str, Manifest], kind: str
) -> None:
    """On its CPU: scales to the bit, nearly all integers, and what follows from them."""
    found = compiled(folder, f"torch-{kind}", Device(arrays="cpu"), **KINDS[kind])
    wanted = on_cpu[kind]
    assert found.device == DeviceRecord(gpu=None, algebra="torch")
    assert wanted.device == DeviceRecord()
    assert found.quantization.sites == wanted.quantization.sites
    assert found.quantization.left_float == wanted.quantization.left_float
    here, there = (onnx.load(folder / f"{one}-{kind}" / "model.onnx") for one in ("cpu", "torch"))
    assert [node.op_type for node in here.graph.node] == [node.op_type for node in there.graph.node]
    integers = [
        onnx.numpy_helper.to_array(one) == onnx.numpy_helper.to_array(other)
        for one, other in zip(here.graph.initializer, there.graph.initializer, strict=True)
        if one.data_type in (onnx.TensorProto.INT8, onnx.TensorProto.UINT8) and one.dims
    ]
    assert all(same.mean() > 0.99 for same in integers)
    parities = [one.parity.result.cosine_mean for one in (found, wanted)]
    assert parities[0] == pytest.approx(parities[1], abs=1e-4)


@pytest.mark.slow
def test_a_manifest_from_before_says_the_cpu(on_cpu: dict[str, Manifest], folder: Path) -> None:
    manifest = read_manifest(folder / "cpu-int8")
    content = json.loads(manifest.model_dump_json())
    assert content.pop("device") == {"gpu": None, "algebra": "numpy"}
    assert content["options"].pop("device") == "cpu"
    assert Manifest.model_validate(content) == manifest
