"""Bad input at the command line: exit code 2, one line, and nothing left behind."""

import errno
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.cli_runs import Cli
from support.command_line import assert_refused
from support.tiny_source import RECIPE, SPEC
from support.tiny_vit import Spec, TinyVit

from regcache.export.onnx_file import sidecar

# One worker compiles for all.
pytestmark = pytest.mark.xdist_group("cli")


def test_a_full_disk_while_inspecting_is_one_line(
    cli: Cli, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "scratch/observed.onnx")

    monkeypatch.setattr("regcache.compiler.cli.main.inspect_encoder", full)
    outcome = cli("inspect", encoder)
    assert_refused(outcome, "scratch/observed.onnx: No space left on device")


class TestBadInput:
    """Exit code 2, one line, no artifact left behind."""

    @pytest.fixture
    def refuse(self, cli: Cli, calibration: Path, tmp_path: Path) -> Callable[..., None]:
        def compile_and_check(source: object, *parts: str, images: Path = calibration) -> None:
            before = sorted(tmp_path.rglob("*"))
            outcome = cli("compile", source, "--images", images, "-o", tmp_path / "artifact")
            assert_refused(outcome, *parts)
            assert sorted(tmp_path.rglob("*")) == before

        return compile_and_check

    def test_truncated(self, refuse: Callable[..., None], encoder: Path) -> None:
        encoder.write_bytes(encoder.read_bytes()[:3000])
        refuse(encoder, "tiny.onnx", "truncated")

    def test_nan_weights(self, refuse: Callable[..., None], encoder: Path) -> None:
        model = onnx.load(encoder)
        for weight in model.graph.initializer:
            if weight.name == "1.fc2":
                array = numpy_helper.to_array(weight).copy()
                array[0, 0] = np.nan
                weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        onnx.save(model, encoder)
        refuse(encoder, "tiny.onnx", "'1.fc2' holds NaN")

    def test_external_data_outside(self, refuse: Callable[..., None], tmp_path: Path) -> None:
        path = tmp_path / "big.onnx"
        onnx.save(
            TinyVit(SPEC).model(), path, save_as_external_data=True, location="d", size_threshold=0
        )
        path.write_bytes(path.read_bytes().replace(b"location\x12\x01d", b"location\x12\x01/"))
        refuse(path, "big.onnx", "outside")

    def test_no_transformer(self, refuse: Callable[..., None], tmp_path: Path) -> None:
        path = tmp_path / "cnn.onnx"
        onnx.save(TinyVit(Spec(depth=0, grid=4)).model(), path)
        sidecar(path).write_text(RECIPE.to_json())
        refuse(path, "cnn.onnx", "no transformer block")

    @pytest.mark.torch
    def test_missing_and_unknown_sources(self, refuse: Callable[..., None]) -> None:
        refuse("nowhere.onnx", "nowhere.onnx", "no such file")
        refuse("what", "'what' is no source")
        refuse("sample:other", "sample:other")

    def test_broken_sidecar(self, refuse: Callable[..., None], encoder: Path) -> None:
        sidecar(encoder).write_text("{}")
        refuse(encoder, "tiny.preprocess.json", "not a preprocessing recipe")

    def test_empty_folder(self, refuse: Callable[..., None], encoder: Path, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        refuse(encoder, str(empty), "no image", images=empty)
        refuse(encoder, "gone", images=tmp_path / "gone")

    def test_only_broken_images(
        self, refuse: Callable[..., None], encoder: Path, tmp_path: Path
    ) -> None:
        folder = tmp_path / "broken"
        folder.mkdir()
        (folder / "a.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing more")
        refuse(encoder, "a.jpg", images=folder)

    def test_an_enormous_png(
        self, refuse: Callable[..., None], encoder: Path, calibration: Path
    ) -> None:
        import struct
        import zlib

        def chunk(kind: bytes, body: bytes) -> bytes:
            checksum = struct.pack(">I", zlib.crc32(kind + body))
            return struct.pack(">I", len(body)) + kind + body + checksum

        header = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
        data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
        (calibration / "sky.png").write_bytes(b"\x89PNG\r\n\x1a\n" + data)
        refuse(encoder, "sky.png", "30000 x 30000 pixels")

    def test_output_in_the_way(self, cli: Cli, encoder: Path, calibration: Path) -> None:
        outcome = cli("compile", encoder, "--images", calibration, "-o", calibration)
        assert_refused(outcome, str(calibration), "holds no regcache artifact")
        assert len(list(calibration.iterdir())) == 12

    def test_a_resolution_for_a_fixed_graph(
        self, cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
    ) -> None:
        command = ("compile", encoder, "--images", calibration, "-o", tmp_path / "artifact")
        assert_refused(cli(*command, "--resolution", 32), "resolution")

    def test_a_read_only_place(self, cli: Cli, encoder: Path, calibration: Path) -> None:
        outcome = cli("compile", encoder, "--images", calibration, "-o", "/proc/artifact")
        assert_refused(outcome, "/proc")


@pytest.mark.slow
def test_a_broken_image_is_skipped_and_said(
    cli: Cli, encoder: Path, calibration: Path, tmp_path: Path
) -> None:
    whole = (calibration / "03.png").read_bytes()
    (calibration / "03.png").write_bytes(whole[: len(whole) // 2])
    artifact = tmp_path / "artifact"
    outcome = cli("compile", encoder, "--images", calibration, "-o", artifact)
    assert outcome.code == 0
    assert re.search(r"skipped .*03\.png: ", outcome.err)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert manifest["calibration"]["images"] == 11
    assert manifest["calibration"]["skipped"][0].startswith("03.png: ")
