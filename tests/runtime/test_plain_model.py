"""What was fused for ONNX Runtime on the CPU, apart where something else runs it."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.canonical import canonical_graph
from support.pretended_cuda import PretendedCuda
from support.quantized_graphs import quantized
from support.spellings import ops
from support.tiny_vit import Spec, TinyVit

from regcache.passes.base import run_all
from regcache.passes.fuse_attention import FuseAttention
from regcache.passes.fuse_biases import FuseBiases
from regcache.passes.onnx_file import import_graph, save_graph
from regcache.runtime.device import Device
from regcache.runtime.plain_model import plain_model
from regcache.runtime.session import OrtSession

VIT = TinyVit(Spec())


@pytest.fixture
def fused(tmp_path: Path) -> Path:
    """An encoder as `ort-cpu` has it."""
    graph = quantized(canonical_graph(VIT.model()))
    path = tmp_path / "model.onnx"
    save_graph(run_all([FuseAttention(), FuseBiases()], graph)[0], path)
    return path


def test_nothing_is_fused_and_the_numbers_are_the_same(fused: Path, tmp_path: Path) -> None:
    with plain_model(str(fused), on_gpu=True) as path:
        assert isinstance(path, str)
        assert Path(path).name == fused.name
        plain = import_graph(onnx.load(path))
        images = VIT.images(2)
        with OrtSession(Path(path), threads=1) as one, OrtSession(fused, threads=1) as other:
            for found, wanted in zip(one.run(images), other.run(images), strict=True):
                np.testing.assert_allclose(found, wanted, atol=0.02)
    assert not Path(path).exists()
    assert not any(node.domain for node in plain.nodes)
    assert ops(plain)["MatMul"] == ops(quantized(canonical_graph(VIT.model())))["MatMul"]


def test_other_files_are_themselves(tmp_path: Path) -> None:
    path = tmp_path / "plain.onnx"
    save_graph(canonical_graph(VIT.model()), path)
    for model in (str(path), path.read_bytes(), str(tmp_path / "missing.onnx")):
        with plain_model(model, on_gpu=True) as found:
            assert found == model


def test_a_gpu_is_given_the_plain_one(fused: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would send what it does not know back to the CPU, and compute in float where it does."""
    cuda = PretendedCuda(monkeypatch)
    with OrtSession(fused, threads=1) as on_cpu:
        wanted = on_cpu.run(VIT.images(2))
    with OrtSession(fused, threads=1, device=Device(0)) as session:
        found = session.run(VIT.images(2))
    assert cuda.ran(on_gpu=True) == {"model.onnx"}
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=0.02)
